"""One optimization as one HTML page: self-contained, without JavaScript, made from its record alone.

* :mod:`.page` - the record of an optimization to HTML; :mod:`.charts`, :mod:`.lineage` and :mod:`.words` - its charts,
  its graph of candidates and its differences of texts; :mod:`.markup` - elements, with everything escaped;
* :mod:`.examples` - the result of each example.

Nothing here reads or writes anything, and nothing imports DSPy or MLflow.
"""

from __future__ import annotations

from dspy_otel.report.page import Source, render

__all__ = ["Source", "render"]
