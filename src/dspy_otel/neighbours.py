"""Other instrumentations of DSPy in the same process: named, with what doubles."""

from __future__ import annotations

import sys
from typing import Any, Final

from .telemetry.guard import warn_once

# Instrumentors of others: module, class; the package's name, and what it records that we record too.
_INSTRUMENTORS: Final = (
    (
        "openinference.instrumentation.dspy",
        "DSPyInstrumentor",
        "openinference-instrumentation-dspy",
        "modules, LM calls, tools and retrieval",
    ),
    (
        "opentelemetry.instrumentation.genai.dspy",
        "DSPyInstrumentor",
        "opentelemetry-instrumentation-genai-dspy",
        "LM calls, tools, agents and retrieval, and their metrics,",
    ),
)


class Neighbours:
    """Watches for other instrumentations. They may be switched on before ours, or at any time after it."""

    def __init__(self) -> None:
        self._modules = 0

    def look(self) -> None:
        """Warn once about each one that is active. Cheap enough for each outermost call.

        Nothing can be switched on that is not imported, and a program soon stops importing: only when the number of
        modules has changed since the last look is there anything to do.
        """
        modules = len(sys.modules)
        if modules == self._modules:
            return
        self._modules = modules
        for name, doubles in active_neighbours().items():
            warn_once(
                ("neighbour", name),
                "%s is active too: %s will show twice. Switch one of the two off (ours by "
                "dspy_otel.uninstrument(), or OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=dspy_otel with "
                "opentelemetry-instrument)",
                name,
                doubles,
            )


def active_neighbours() -> dict[str, str]:
    """Each other DSPy instrumentation that is switched on, with what it doubles. Imports nothing."""
    found = {
        package: doubles
        for module, name, package, doubles in _INSTRUMENTORS
        if _instrumented(sys.modules.get(module), name)
    }
    if _mlflow_autolog():
        found["mlflow.dspy.autolog"] = "programs, LM calls and evaluations in MLflow"
    return found


def _instrumented(module: Any, name: str) -> bool:
    """Whether the one instance of an OpenTelemetry instrumentor is switched on."""
    instance = getattr(getattr(module, name, None), "_instance", None)
    return bool(getattr(instance, "is_instrumented_by_opentelemetry", False))


def _mlflow_autolog() -> bool:
    if "mlflow.dspy.callback" not in sys.modules:
        return False
    settings = getattr(sys.modules.get("dspy"), "settings", None)
    callbacks = getattr(settings, "callbacks", None) or []
    return any(type(callback).__module__.startswith("mlflow.") for callback in callbacks)
