"""OpenTelemetry instrumentation for DSPy.

Three ways to switch it on:

* ``opentelemetry-instrument python app.py`` - by environment variables alone;
* ``DSPyInstrumentor().instrument()`` - inside an observability stack that already runs;
* ``dspy_otel.configure(...)`` - one line, for those with nothing set up yet.
"""

from __future__ import annotations

from typing import Any

from .config import Config
from .instrumentor import DSPyInstrumentor
from .operations.program import program_digest as program_id
from .optimizers import Optimization, optimization
from .propagation import attach, bind, inject
from .providers import configure
from .version import __version__


def instrument(**options: Any) -> DSPyInstrumentor:
    """Switch instrumentation on: short for ``DSPyInstrumentor().instrument(**options)``.

    Args:
        **options: providers and settings, as :meth:`DSPyInstrumentor.instrument` takes them.

    Returns:
        The instrumentor, for ``uninstrument()``.
    """
    instrumentor = DSPyInstrumentor()
    instrumentor.instrument(**options)
    return instrumentor


def uninstrument() -> None:
    """Switch instrumentation off and put every attribute of DSPy back."""
    DSPyInstrumentor().uninstrument()


__all__ = [
    "Config",
    "DSPyInstrumentor",
    "Optimization",
    "__version__",
    "attach",
    "bind",
    "configure",
    "inject",
    "instrument",
    "optimization",
    "program_id",
    "uninstrument",
]
