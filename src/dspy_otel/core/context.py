"""OpenTelemetry contexts, read and made in one step: the API's helpers copy a context for each key, on every call.

The keys are OpenTelemetry's own and not public; what the public helpers do tells them.
"""

from __future__ import annotations

from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.trace import INVALID_SPAN, Span, set_span_in_context


def _keys_of_suppression() -> tuple[str, ...]:
    token = otel_context.attach(Context())  # what surrounds the import must not hide a key
    try:
        with suppress_instrumentation():
            return tuple(otel_context.get_current())
    finally:
        otel_context.detach(token)


CALL_CONTEXT_KEY: Final = otel_context.create_key("dspy_otel.scope")
_SPAN_KEY: Final = next(iter(set_span_in_context(INVALID_SPAN, Context())))
_SUPPRESSION_KEYS: Final = _keys_of_suppression()


def suppressed(context: Context) -> bool:
    """Whether ``context`` was made inside ``suppress_instrumentation()``."""
    return any(map(context.get, _SUPPRESSION_KEYS))


def inside(context: Context, span: Span, call_context: Any) -> Context:
    """``context`` with this span and this scope as the current ones."""
    return Context({**context, _SPAN_KEY: span, CALL_CONTEXT_KEY: call_context})


def without_call_context(context: Context) -> Context:
    """``context`` without our scope, for whoever keeps it longer than the call: a scope keeps the program alive."""
    return Context({key: value for key, value in context.items() if key != CALL_CONTEXT_KEY})
