"""OpenTelemetry instrumentation for DSPy.

Three ways to switch it on:

* ``opentelemetry-instrument python app.py`` - by environment variables alone;
* ``DSPyInstrumentor().instrument()`` - inside an observability stack that already runs;
* ``dspy_otel.configure(...)`` - one line, for those with nothing set up yet.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from dspy_otel.version import __version__

if TYPE_CHECKING:
    from dspy_otel.budgets import BudgetAlert, BudgetExceeded, BudgetRefused, budget
    from dspy_otel.config import Config
    from dspy_otel.dataset import examples
    from dspy_otel.decide import compare, why
    from dspy_otel.inline_report import report
    from dspy_otel.instrumentor import DSPyInstrumentor
    from dspy_otel.live.process import watch
    from dspy_otel.operations.program import program_digest as program_id
    from dspy_otel.optimizers import optimization
    from dspy_otel.propagation import add_usage, attach, bind, delegate, inject
    from dspy_otel.record.model import Origin
    from dspy_otel.setup import configure, flush

# Loaded on first use: a program that leaves instrumentation off pays for none of it.
_PLACES: Final = {
    "BudgetAlert": ("budgets", "BudgetAlert"),
    "BudgetExceeded": ("budgets", "BudgetExceeded"),
    "BudgetRefused": ("budgets", "BudgetRefused"),
    "Config": ("config", "Config"),
    "DSPyInstrumentor": ("instrumentor", "DSPyInstrumentor"),
    "Origin": ("record.model", "Origin"),
    "add_usage": ("propagation", "add_usage"),
    "attach": ("propagation", "attach"),
    "bind": ("propagation", "bind"),
    "budget": ("budgets", "budget"),
    "compare": ("decide", "compare"),
    "configure": ("setup", "configure"),
    "delegate": ("propagation", "delegate"),
    "examples": ("dataset", "examples"),
    "flush": ("setup", "flush"),
    "inject": ("propagation", "inject"),
    "optimization": ("optimizers", "optimization"),
    "program_id": ("operations.program", "program_digest"),
    "report": ("inline_report", "report"),
    "watch": ("live.process", "watch"),
    "why": ("decide", "why"),
}


if not TYPE_CHECKING:  # A type checker would take any name for one of ours.

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _PLACES[name]
        value = globals()[name] = getattr(importlib.import_module(f".{module}", __name__), attribute)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_PLACES})


def instrument(**options: Any) -> DSPyInstrumentor:
    """Switch instrumentation on: short for ``DSPyInstrumentor().instrument(**options)``.

    Args:
        **options: providers and settings, as :meth:`DSPyInstrumentor.instrument` takes them.

    Returns:
        The instrumentor, for ``uninstrument()``.
    """
    from dspy_otel.instrumentor import DSPyInstrumentor

    instrumentor = DSPyInstrumentor()
    instrumentor.instrument(**options)
    return instrumentor


def uninstrument() -> None:
    """Switch instrumentation off and put every attribute of DSPy back."""
    from dspy_otel.instrumentor import DSPyInstrumentor

    DSPyInstrumentor().uninstrument()


__all__ = [
    "BudgetAlert",
    "BudgetExceeded",
    "BudgetRefused",
    "Config",
    "DSPyInstrumentor",
    "Origin",
    "__version__",
    "add_usage",
    "attach",
    "bind",
    "budget",
    "compare",
    "configure",
    "delegate",
    "examples",
    "flush",
    "inject",
    "instrument",
    "optimization",
    "program_id",
    "report",
    "uninstrument",
    "watch",
    "why",
]
