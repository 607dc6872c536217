"""One optimization as one HTML page: self-contained, without JavaScript, made from its spans alone.

* :mod:`.model` - what the page tells: plain data, no OpenTelemetry, no MLflow, no HTML;
* :mod:`.collect` - spans of an optimization to that data, while it runs;
* :mod:`.page` - that data to HTML; :mod:`.charts`, :mod:`.lineage` and :mod:`.words` - its charts, its graph of
  candidates and its differences of texts; :mod:`.markup` - elements, with everything escaped.

Nothing here reads or writes anything, and nothing imports DSPy or MLflow.
"""

from __future__ import annotations

from dspy_otel.report.collect import Collector, reports
from dspy_otel.report.model import Report
from dspy_otel.report.page import render

__all__ = ["Collector", "Report", "render", "reports"]
