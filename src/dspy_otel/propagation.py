"""Carry the context into threads and processes of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from opentelemetry import context as otel_context
from opentelemetry import propagate
from opentelemetry.context import Context

from dspy_otel.core.call_context import current_call_context
from dspy_otel.core.internal_errors import failed
from dspy_otel.core.operation import detach
from dspy_otel.core.remote import read_context, write_call_context
from dspy_otel.operations.parallel import bind


def inject(carrier: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """The current context as a dictionary of strings, for another process (or any place that takes strings).

    Holds what OpenTelemetry's propagators write (``traceparent``, ``baggage``; ``OTEL_PROPAGATORS`` chooses them), and,
    as baggage, what DSPy operations inside must know: evaluation, optimizer run, trial and candidate ids, and the role
    of LM calls. Upper-case its names, and it is the environment that a subprocess takes its parent from.

    Args:
        carrier: filled too, if given (headers of a message, say).

    Returns:
        A new dictionary, picklable and JSON-serializable; empty if there is nothing to carry.
    """
    written: dict[str, str] = {}
    try:
        propagate.inject(written, write_call_context(current_call_context(), otel_context.get_current()))
        if carrier is not None:
            carrier.update(written)
    except Exception as error:
        failed("inject()", error)
    return written


@contextmanager
def attach(carrier: Mapping[str, str]) -> Iterator[Context]:
    """Work in the context that :func:`inject` wrote, until the ``with`` block ends.

    Args:
        carrier: what ``inject()`` gave. Without a valid ``traceparent`` the block starts traces of its own; anything
            else in it, of whatever type, does no harm.
    """
    context = otel_context.get_current()
    try:
        context = read_context(carrier, context)
    except Exception as error:
        failed("attach()", error)
    token = otel_context.attach(context)
    try:
        yield context
    finally:
        detach(token)


__all__ = ["attach", "bind", "inject"]
