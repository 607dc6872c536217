"""One optimization as one HTML page: self-contained, without JavaScript, made from its record alone.

* :mod:`.page` - the record of an optimization to HTML; :mod:`.programs` - what changed in the program;
* :mod:`.verdict` - whether the winner is better; :mod:`.examples` - the result of each example;
* :mod:`.charts`, :mod:`.heat_map`, :mod:`.lineage` and :mod:`.words` - charts, examples by candidate, the graph of
  candidates, differences of texts;
* :mod:`.markup`, :mod:`.parts` and :mod:`.numbers` - elements, with everything escaped; tables; numbers as texts.

Nothing here reads or writes anything, and nothing imports DSPy or MLflow.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from dspy_otel.report.page import render
from dspy_otel.report.parts import Source

__all__ = ["Source", "render"]


class _Callable(ModuleType):
    """``dspy_otel.report(program)`` calls this package: the function and the package have the same name."""

    def __call__(self, program: Any) -> Any:
        """The report of the optimization that made ``program``; see :func:`dspy_otel.inline_report.report`."""
        from dspy_otel.inline_report import report

        return report(program)


sys.modules[__name__].__class__ = _Callable
