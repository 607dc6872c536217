"""Span and trace ids, and waits between retries, that leave the ``random`` module alone.

The SDK's default generator of ids, and the OTLP exporters when a backend is gone, draw from the module's shared state.
A program that calls ``random.seed()`` would get other numbers when it is watched, and the same ids in each of its runs.
"""

from __future__ import annotations

import os
import random
import struct
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from opentelemetry.trace import Tracer

_given: Final[ContextVar[tuple[int, int] | None]] = ContextVar("dspy_otel.given_ids", default=None)


@contextmanager
def given_ids(trace_id: int, span_id: int) -> Iterator[None]:
    """Give a span started inside these ids: to end a span that another process began and could not end."""
    token = _given.set((trace_id, span_id))
    try:
        yield
    finally:
        _given.reset(token)


_numbers: Final[deque[int]] = deque()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_numbers.clear)


def _number() -> int:
    """64 random bits, read for 64 ids at once: a system call lets the other threads of a program go first."""
    try:
        return _numbers.popleft()
    except IndexError:
        first, *others = struct.unpack("=64Q", os.urandom(512))
        _numbers.extend(others)
        return int(first)


class SystemIds:
    """Ids from the operating system's randomness; the interface of the SDK's ``IdGenerator``. Fork-safe."""

    def generate_span_id(self) -> int:
        """A new span id: 64 bits, never 0."""
        given = _given.get()
        if given is not None:
            return given[1]
        try:  # once for each span, without a call
            return _numbers.popleft() or 1
        except IndexError:
            return _number() or 1

    def generate_trace_id(self) -> int:
        """A new trace id: 128 bits, never 0."""
        given = _given.get()
        return given[0] if given is not None else _number() << 64 | _number() or 1

    def is_trace_id_random(self) -> bool:
        """Whether the ids are evenly distributed, as samplers and W3C's ``random`` flag require."""
        return True


def with_system_ids(tracer: Tracer) -> Tracer:
    """``tracer``, with :class:`SystemIds` if it would use the SDK's default generator. A user's own is kept.

    The tracer is ours alone: providers keep one for each instrumentation scope.
    """
    kind = type(getattr(tracer, "id_generator", None))
    if kind.__name__ == "RandomIdGenerator" and kind.__module__.startswith("opentelemetry.sdk."):
        tracer.id_generator = SystemIds()  # type: ignore[attr-defined]
    return tracer


# The modules in which OTLP exporters draw how long to wait before a retry.
_RETRYING: Final = (
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    *(f"opentelemetry.exporter.otlp.proto.http.{signal}_exporter" for signal in ("trace", "metric", "_log")),
    "opentelemetry.exporter.otlp.common.http",  # from 1.45
)


def give_exporters_a_generator() -> None:
    """Give the modules of the OTLP exporters that are imported a random generator of their own, not the shared one.

    While a backend is away, the exporters of every SDK from 1.38 on draw ``random.uniform()`` before each retry: in the
    program's thread with a ``SimpleSpanProcessor``, and in the worker's with a batch, at a moment that depends on the
    backend. A seeded program would go on with other numbers. The exporters take no generator as an argument.

    It stays after ``uninstrument()``: an exporter may still be retrying then.
    """
    for name in _RETRYING:
        module = sys.modules.get(name)
        if getattr(module, "random", None) is random:
            module.random = random.Random()  # type: ignore[union-attr]
