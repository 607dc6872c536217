"""One optimization as one HTML page: self-contained, without JavaScript, made from its record alone.

* :mod:`.page` - the record of an optimization to HTML; :mod:`.programs` - what changed in the program;
* :mod:`.verdict` - whether the winner is better; :mod:`.examples` - the result of each example;
* :mod:`.charts`, :mod:`.heat_map`, :mod:`.lineage` and :mod:`.words` - charts, examples by candidate, the graph of
  candidates, differences of texts;
* :mod:`.markup`, :mod:`.parts` and :mod:`.numbers` - elements, with everything escaped; tables; numbers as texts.

Nothing here reads or writes anything, and nothing imports DSPy or MLflow.
"""

from __future__ import annotations

from dspy_otel.reports.page import render
from dspy_otel.reports.parts import Source

__all__ = ["Source", "render"]
