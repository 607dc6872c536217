"""GEPA without DSPy, under ``opentelemetry-instrument``.

That loads no instrumentor of a package whose extra ``instruments`` (DSPy) is not installed. Entry points of the group
``opentelemetry_post_instrument`` have no such condition: ours is in force where DSPy is missing and GEPA is there.
"""

from __future__ import annotations

import os
from typing import Final

from dspy_otel.packages import has_gepa_alone

NAME: Final = "gepa_otel"
_DISABLED: Final = "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS"


def instrument() -> None:
    """Switch instrumentation on in a program that has GEPA alone; entry point ``gepa_otel``."""
    disabled = {name.strip() for name in os.environ.get(_DISABLED, "").split(",")}
    if has_gepa_alone() and not disabled & {"*", NAME}:
        from dspy_otel.instrumentor import DSPyInstrumentor

        DSPyInstrumentor().instrument()
