"""GEPA without DSPy, under ``opentelemetry-instrument``.

That loads no instrumentor of a package whose extra ``instruments`` (DSPy) is not installed. Entry points of the group
``opentelemetry_post_instrument`` have no such condition: ours is in force where DSPy is missing and GEPA is there.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Final

NAME: Final = "gepa_otel"
_DISABLED: Final = "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS"


def has_gepa_alone() -> bool:
    """Whether GEPA is installed, and DSPy is not."""
    return _installed("gepa") and not _installed("dspy")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # A stand-in without a specification is in its place.
        return False


def instrument() -> None:
    """Switch instrumentation on in a program that has GEPA alone; entry point ``gepa_otel``."""
    disabled = {name.strip() for name in os.environ.get(_DISABLED, "").split(",")}
    if has_gepa_alone() and not disabled & {"*", NAME}:
        from dspy_otel.instrumentor import DSPyInstrumentor

        DSPyInstrumentor().instrument()
