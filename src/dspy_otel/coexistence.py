"""Other instrumentations of DSPy in the same process: warnings about doubled spans and lost wrappers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

from dspy_otel.content.introspection import bases_of, instance_dict, items, library
from dspy_otel.core.internal_errors import warn_once
from dspy_otel.operations import native_tracing

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

_MOST_WRAPPERS: Final = 32


class OtherInstrumentations:
    """Watches for other instrumentations, which may be switched on before ours or at any time after it."""

    def __init__(self) -> None:
        self._space: Mapping[str, Any] | None = None
        self._entry: Any = None
        self._ours: Any = None

    def check(self) -> None:
        """Warn once about each one that is active, and once if one has removed our wrappers."""
        for name, doubles in active_instrumentations().items():
            warn_once(
                ("other instrumentation", name),
                "%s is active too: %s will show twice. Switch one of the two off (ours by "
                "dspy_otel.uninstrument(), or OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=dspy_otel with "
                "opentelemetry-instrument)",
                name,
                doubles,
            )
        self._check_entry()

    def entry_changed(self) -> bool:
        """Whether the entry point of modules is another than at the last check. Cheap: it is asked for each program."""
        return self._space is None or self._space.get("__call__") is not self._entry

    def _check_entry(self) -> None:
        """Warn once when the entry point of modules is a function that our wrapper replaced.

        OpenInference's ``uninstrument()`` does that: it puts back the function below all wrappers, ours included.
        """
        if self._space is None:
            owner = getattr(sys.modules.get("dspy.primitives.module"), "Module", None)
            self._space = None if owner is None else vars(owner)
        entry = None if self._space is None else self._space.get("__call__")
        if entry is self._entry:
            return
        self._entry = entry
        if self._ours is None:
            self._ours = entry  # The first check comes right after our patches.
        elif any(entry is each for each in _wrapped_by(self._ours)):  # not ==: a proxy is equal to what it wraps
            warn_once(
                ("other instrumentation", "removed"),
                "dspy.Module.__call__ is no longer ours, as after another instrumentation's uninstrument(): modules "
                "are not recorded. dspy_otel.uninstrument() and dspy_otel.instrument() bring them back",
            )


def _wrapped_by(function: Any) -> list[Any]:
    """The functions that a wrapper wraps, outermost first."""
    found: list[Any] = []
    while len(found) < _MOST_WRAPPERS and (function := getattr(function, "__wrapped__", None)) is not None:
        found.append(function)
    return found


def active_instrumentations() -> dict[str, str]:
    """Each other DSPy instrumentation that is switched on, with what it doubles. Imports nothing."""
    found = {
        package: doubles
        for module, name, package, doubles in _INSTRUMENTORS
        if _instrumented(sys.modules.get(module), name)
    }
    if _mlflow_autolog():
        found["mlflow.dspy.autolog"] = "programs, LM calls and evaluations in MLflow"
    if _native_tracing():
        found["DSPy's own OpenTelemetry tracing"] = "modules, LM calls and tools"
    return found


def _instrumented(module: Any, name: str) -> bool:
    """Whether the one instance of an OpenTelemetry instrumentor is switched on."""
    instance = getattr(getattr(module, name, None), "_instance", None)
    return bool(getattr(instance, "is_instrumented_by_opentelemetry", False))


def _mlflow_autolog() -> bool:
    if "mlflow.dspy.callback" not in sys.modules:
        return False
    return any(type(callback).__module__.startswith("mlflow.") for callback in _callbacks())


def _native_tracing() -> bool:
    """Whether DSPy records spans by a callback of its own, other than the one that gives way to ours.

    It is a callback of DSPy's that keeps something of OpenTelemetry's.
    """
    known = getattr(sys.modules.get(native_tracing.PLACE), native_tracing.CALLBACK, None)
    return any(
        library(type(callback)) == "dspy"
        and not (known is not None and known in bases_of(type(callback)))
        and any(library(type(kept)) == "opentelemetry" for kept in instance_dict(callback).values())
        for callback in _callbacks()
    )


def _callbacks() -> list[Any]:
    """The callbacks that DSPy calls for everything."""
    settings = getattr(sys.modules.get("dspy"), "settings", None)
    return list(items(getattr(settings, "callbacks", None)))
