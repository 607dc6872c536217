"""Carry the context into threads and processes, and read the context that other processes hand on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

from opentelemetry import baggage, propagate, trace
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from dspy_otel import semconv
from dspy_otel.core.attributes import Attributes, AttributeValue, repair
from dspy_otel.core.call_context import CallContext, current_call_context, with_call_context
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import detach
from dspy_otel.operations.parallel import bind

_INHERITED_PREFIX: Final = "dspy."
MAX_INHERITED: Final = 16
MAX_VALUE: Final = 256
"""Most characters of an inherited attribute. Those are ids and numbers; a longer text under such a name is cut."""

_ROLES: Final = frozenset(
    {semconv.ROLE_TASK, semconv.ROLE_JUDGE, semconv.ROLE_PROPOSER, semconv.ROLE_REFLECTION, semconv.ROLE_TEACHER}
)
_CARRIER: Final = ("traceparent", "tracestate", "baggage")


def inject(carrier: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """The current context as a dictionary of strings, for another process (or any place that takes strings).

    It has what OpenTelemetry's propagators write (``traceparent``, ``baggage``; ``OTEL_PROPAGATORS`` chooses them) and,
    as baggage, what DSPy operations inside must know: evaluation, optimizer run, trial and candidate ids, and the role
    of LM calls. Upper-case its names, and it is the environment that a subprocess takes its parent from.

    Args:
        carrier: filled too, if given: headers of a message, for example.

    Returns:
        A new dictionary, picklable and JSON-serializable; empty if there is nothing to carry.
    """
    written: dict[str, str] = {}
    with guard("inject()"):
        propagate.inject(written, write_call_context(current_call_context(), otel_context.get_current()))
        if carrier is not None:
            carrier.update(written)
    return written


@contextmanager
def attach(carrier: Mapping[str, str]) -> Iterator[Context]:
    """Work in the context that :func:`inject` wrote, until the ``with`` block ends.

    Args:
        carrier: what ``inject()`` gave. Without a valid ``traceparent`` the block starts traces of its own; other
            entries, of any type, are ignored.
    """
    context = otel_context.get_current()
    with guard("attach()"):
        context = read_context(carrier, context)
    token = otel_context.attach(context)
    try:
        yield context
    finally:
        detach(token)


def parent_of_process() -> Context | None:
    """The parent that the environment names (``TRACEPARENT``, ``TRACESTATE``, ``BAGGAGE``), if it names one.

    OpenTelemetry's "environment variables as context propagation carriers"; read once, when instrumentation starts.
    """
    carrier = {name: os.environ[name.upper()] for name in _CARRIER if os.environ.get(name.upper())}
    if "traceparent" not in carrier:
        return None
    context = read_context(carrier, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def write_call_context(call_context: CallContext | None, context: Context) -> Context:
    """``context`` with what a call hands on as baggage: the attributes that all spans inside carry, and the role."""
    if call_context is None:
        return context
    entries = {key: value for key, value in call_context.inherited.items() if key.startswith(_INHERITED_PREFIX)}
    for key, value in list(entries.items())[:MAX_INHERITED]:
        context = baggage.set_baggage(key, str(value)[:MAX_VALUE], context)
    if call_context.role is not None:
        context = baggage.set_baggage(semconv.LM_ROLE, call_context.role, context)
    return context


def read_context(carrier: Any, context: Context) -> Context:
    """``context`` with the parent span, the baggage and a call context that ``carrier`` has.

    Args:
        carrier: a mapping of strings, as OpenTelemetry's propagators write it. Anything else in it is ignored.
        context: what to start from; stays as it is when the carrier has nothing usable.
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
        elif key.startswith(_INHERITED_PREFIX) and len(inherited) < MAX_INHERITED:
            inherited[key] = _typed(key, text)
    repair(inherited)
    call_context = CallContext("remote", None, None)
    call_context.inherited, call_context.role = inherited, role
    return with_call_context(found, call_context)


def _typed(key: str, text: str) -> AttributeValue:
    """A value of baggage, which is text only, as an attribute: counters become numbers."""
    if key.endswith((".number", ".index", ".size")) and text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    return text


__all__ = ["attach", "bind", "inject"]
