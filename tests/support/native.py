"""A stand-in for the OpenTelemetry tracing that DSPy may have one day, written after what stanfordnlp/dspy#10042 says.

A callback whose handlers open a span, make it current, and close it: ``dspy.utils.otel.OtelCallback``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dspy.utils.callback import BaseCallback
from opentelemetry import context, trace

PLACE = "dspy.utils.otel"


def made(module: str = PLACE) -> type[Any]:
    """The class of the callback, as if it were defined in this module."""

    class OtelCallback(BaseCallback):
        def __init__(self, tracer_provider: Any = None) -> None:
            provider = tracer_provider if tracer_provider is not None else trace.get_tracer_provider()
            self._tracer = provider.get_tracer("dspy")
            self._open: dict[str, Any] = {}

        def start(self, call_id: str, name: str) -> None:
            span = self._tracer.start_span(name)
            self._open[call_id] = span, context.attach(trace.set_span_in_context(span))

        def end(self, call_id: str) -> None:
            span, token = self._open.pop(call_id)
            context.detach(token)
            span.end()

    def starting(kind: str) -> Any:
        def on_start(self: Any, call_id: str, instance: Any, inputs: Any) -> None:
            self.start(call_id, f"{kind} {type(instance).__name__}")

        return on_start

    def on_end(self: Any, call_id: str, outputs: Any, exception: Any = None) -> None:
        self.end(call_id)

    for kind in ("module", "lm", "tool", "evaluate", "adapter_format", "adapter_parse"):
        setattr(OtelCallback, f"on_{kind}_start", starting(kind))
        setattr(OtelCallback, f"on_{kind}_end", on_end)
    OtelCallback.__module__ = module
    return OtelCallback


@contextmanager
def native_tracing() -> Iterator[type[Any]]:
    """DSPy has it, until the end of the block."""
    module = types.ModuleType(PLACE)
    kind = made()
    module.OtelCallback = kind  # type: ignore[attr-defined]
    sys.modules[PLACE] = module
    try:
        yield kind
    finally:
        del sys.modules[PLACE]
