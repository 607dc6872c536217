"""Other instrumentations of DSPy in the same process: named, with what doubles."""

from __future__ import annotations

import sys
from typing import Any

from .telemetry.guard import warn_once


def warn_about_neighbours() -> None:
    """Warn once about each other DSPy instrumentation that is active. Imports nothing that is not imported yet."""
    for name, doubles in active_neighbours().items():
        warn_once(
            ("neighbour", name),
            "%s is active too: %s will show twice. Switch one of the two off "
            "(ours: OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=dspy_otel)",
            name,
            doubles,
        )


def active_neighbours() -> dict[str, str]:
    """Each other DSPy instrumentation that is switched on, with what it doubles."""
    found: dict[str, str] = {}
    if _instrumented("openinference.instrumentation.dspy", "DSPyInstrumentor"):
        found["openinference-instrumentation-dspy"] = "modules, LM calls, tools and retrieval"
    for module in ("opentelemetry.instrumentation.genai.dspy", "opentelemetry.instrumentation.genai_dspy"):
        if _instrumented(module, "DSPyInstrumentor"):
            found["opentelemetry-instrumentation-genai-dspy"] = "LM calls, tools, agents and retrieval"
    if _mlflow_autolog():
        found["mlflow.dspy.autolog"] = "programs, LM calls and evaluations in MLflow"
    return found


def _instrumented(module: str, name: str) -> bool:
    instrumentor: Any = getattr(sys.modules.get(module), name, None)
    return bool(getattr(instrumentor, "_is_instrumented_by_opentelemetry", False)) or bool(
        getattr(getattr(instrumentor, "_instance", None), "_is_instrumented_by_opentelemetry", False)
    )


def _mlflow_autolog() -> bool:
    if "mlflow.dspy.callback" not in sys.modules:
        return False
    settings = getattr(sys.modules.get("dspy"), "settings", None)
    callbacks = getattr(settings, "callbacks", None) or []
    return any(type(callback).__module__.startswith("mlflow.") for callback in callbacks)
