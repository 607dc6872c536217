"""OpenTelemetry tracing that DSPy may have of its own (stanfordnlp/dspy#10042): no call shows as two spans.

As proposed, it is a callback, ``dspy.utils.otel.OtelCallback``, that a program switches on. DSPy calls its callbacks
inside our wrappers. So for a call that has a span of ours, its handlers are passed over: ours says all that its span
would say, and belongs to evaluations and optimizations. Everything else stays with it, below our spans: adapters,
unless ``adapter_spans`` is on, and whatever we do not record. A callback that has another tracer provider than we have
is left alone: its spans go elsewhere. The callback, and where it is registered, are never changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from opentelemetry import trace

from dspy_otel.content.introspection import field
from dspy_otel.core.call_context import current_call_context
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.patching import Patches, argument, resolve

PLACE: Final = "dspy.utils.otel"
"""Module of the callback."""
CALLBACK: Final = "OtelCallback"
"""Its name."""

# The kinds of our operations, and DSPy's names of those handlers.
_HANDLERS: Final = {
    "module": "module",
    "lm": "lm",
    "tool": "tool",
    "evaluate": "evaluate",
    "adapter.format": "adapter_format",
    "adapter.parse": "adapter_parse",
}


class NativeTracing:
    """Passes over the handlers of DSPy's own tracing for calls that have a span of ours.

    Args:
        telemetry: shared state.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self._passed_over: set[Any] = set()

    def patch(self, patches: Patches) -> None:
        """Put the hooks in force, if this DSPy has such a callback."""
        callback = resolve(PLACE, CALLBACK)
        for kind, name in _HANDLERS.items():
            patches.wrap(callback, f"on_{name}_start", functools.partial(self.starting, kind))
            patches.wrap(callback, f"on_{name}_end", self.ending)

    def starting(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """In place of the handler for the start of a call of this kind."""

        def on_start(callback: Any, *args: Any, **kwargs: Any) -> Any:
            if self._has_span(kind, callback, args, kwargs):
                return None
            return original(callback, *args, **kwargs)

        return on_start

    def ending(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """In place of the handler for the end of a call."""

        def on_end(callback: Any, *args: Any, **kwargs: Any) -> Any:
            if self._was_passed_over(callback, args, kwargs):
                return None
            return original(callback, *args, **kwargs)

        return on_end

    @guard("DSPy's own tracing")
    def _has_span(self, kind: str, callback: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        call = current_call_context()
        if call is None or call.kind != kind or call.owner is not argument(args, kwargs, 1, "instance"):
            return False
        if not self.telemetry.active or not self._goes_where_ours_go(callback):
            return False
        self._passed_over.add((id(callback), argument(args, kwargs, 0, "call_id")))
        return True

    @guard("DSPy's own tracing")
    def _was_passed_over(self, callback: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        key = id(callback), argument(args, kwargs, 0, "call_id")
        if key not in self._passed_over:
            return False
        self._passed_over.discard(key)
        return True

    def _goes_where_ours_go(self, callback: Any) -> bool:
        """Whether its spans reach the same processors; also where that cannot be known."""
        tracer = field(callback, "_tracer")
        theirs = getattr(getattr(tracer, "_tracer", tracer), "span_processor", None)  # behind OpenTelemetry's proxy
        ours = getattr(self.telemetry.tracer_provider or trace.get_tracer_provider(), "_active_span_processor", None)
        return theirs is None or ours is None or theirs is ours
