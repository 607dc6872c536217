"""A context from elsewhere: another process's, or the one that the environment names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from opentelemetry import baggage, propagate
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from dspy_otel import semconv
from dspy_otel.core.attributes import Attributes, AttributeValue
from dspy_otel.core.call_context import CallContext
from dspy_otel.core.context import CALL_CONTEXT_KEY

INHERITED_PREFIX: Final = "dspy."
MAX_INHERITED: Final = 16
MAX_VALUE: Final = 256
"""Characters. Stamps are ids and numbers; whatever else comes under their names is cut."""

_ROLES: Final = frozenset(
    {semconv.ROLE_TASK, semconv.ROLE_JUDGE, semconv.ROLE_PROPOSER, semconv.ROLE_REFLECTION, semconv.ROLE_TEACHER}
)


def write_call_context(call_context: CallContext | None, context: Context) -> Context:
    """``context`` with what ``scope`` passes on as baggage: the stamps of DSPy operations, and the role."""
    if call_context is None:
        return context
    entries = {key: value for key, value in call_context.inherited.items() if key.startswith(INHERITED_PREFIX)}
    for key, value in list(entries.items())[:MAX_INHERITED]:
        context = baggage.set_baggage(key, str(value)[:MAX_VALUE], context)
    if call_context.role is not None:
        context = baggage.set_baggage(semconv.LM_ROLE, call_context.role, context)
    return context


def read_context(carrier: Any, context: Context) -> Context:
    """``context`` with the parent span, baggage and scope that ``carrier`` holds.

    Args:
        carrier: a mapping of strings, as OpenTelemetry's propagators write it. Anything else in it is ignored.
        context: what to start from; stays as it is when the carrier holds nothing usable.
    """
    if not isinstance(carrier, Mapping):
        return context
    usable = {key: value for key, value in carrier.items() if isinstance(key, str) and isinstance(value, str)}
    found = propagate.extract(usable, context)
    inherited: Attributes = {}
    role = None
    for key, value in baggage.get_all(found).items():
        text = str(value)[:MAX_VALUE]
        if key == semconv.LM_ROLE:
            role = text if text in _ROLES else None
        elif key.startswith(INHERITED_PREFIX) and len(inherited) < MAX_INHERITED:
            inherited[key] = _typed(key, text)
    call_context = CallContext("remote", None, None)
    call_context.inherited, call_context.role = inherited, role
    return otel_context.set_value(CALL_CONTEXT_KEY, call_context, found)


def _typed(key: str, text: str) -> AttributeValue:
    """Baggage holds text only; counters are numbers again."""
    if key.endswith((".number", ".index", ".size")) and text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    return text
