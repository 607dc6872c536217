"""Carry the context into threads and processes of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from opentelemetry import baggage, propagate
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from . import semconv as names
from .operations.parallel import bind
from .telemetry.attributes import AttributeValue
from .telemetry.scope import SCOPE_KEY, Scope, current_scope
from .telemetry.spans import detach

_BAGGAGE_PREFIX = "dspy."


def inject(carrier: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """The current context as a dictionary of strings, for another process (or any place that takes strings).

    Holds what OpenTelemetry's propagators write (``traceparent``, ``baggage``), and what DSPy operations inside
    must know: evaluation, optimizer run, trial and candidate ids, and the role of LM calls.

    Args:
        carrier: filled too, if given (headers of a message, say).

    Returns:
        A new dictionary, picklable and JSON-serializable.
    """
    context = otel_context.get_current()
    scope = current_scope(context)
    if scope is not None:
        for key, value in scope.stamps.items():
            context = baggage.set_baggage(key, str(value), context)
        if scope.role is not None:
            context = baggage.set_baggage(names.LM_ROLE, scope.role, context)
    written: dict[str, str] = {}
    propagate.inject(written, context)
    if carrier is not None:
        carrier.update(written)
    return written


@contextmanager
def attach(carrier: Mapping[str, str]) -> Iterator[Context]:
    """Work in the context that :func:`inject` wrote, until the ``with`` block ends.

    Args:
        carrier: what ``inject()`` gave. Without a valid ``traceparent`` the block starts traces of its own.
    """
    context = propagate.extract(dict(carrier), otel_context.get_current())
    stamps: dict[str, AttributeValue] = {}
    role = None
    for key, value in baggage.get_all(context).items():
        if key == names.LM_ROLE:
            role = str(value)
        elif key.startswith(_BAGGAGE_PREFIX):
            stamps[key] = str(value)
    context = otel_context.set_value(SCOPE_KEY, Scope("remote", None, None, stamps=stamps, role=role), context)
    token = otel_context.attach(context)
    try:
        yield context
    finally:
        detach(token)


__all__ = ["attach", "bind", "inject"]
