"""Traces that are dropped, or perhaps dropped later: their spans cost little, or are made when the trace is kept.

Others inside (another instrumentation, another process) see the parent of a trace that is not sampled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    get_current_span,
    set_span_in_context,
)

from dspy_otel.core.attributes import EMPTY, restore_dropped
from dspy_otel.core.call_context import without_call_context
from dspy_otel.core.id_generator import SystemIds
from dspy_otel.core.internal_errors import guard

_IDS: Final = SystemIds()
_ONCE_REAL: Final = guard("deferred span")
_NOT_SAMPLED: Final = TraceFlags(TraceFlags.DEFAULT)


def _unsampled(trace_id: int | None = None) -> SpanContext:
    return SpanContext(trace_id or _IDS.generate_trace_id(), _IDS.generate_span_id(), False, _NOT_SAMPLED)


class DroppedTrace:
    """Takes the place of a tracer for a trace that is dropped: one span that records nothing.

    Attributes:
        dropped: the span.
    """

    def __init__(self) -> None:
        self.dropped: Span = NonRecordingSpan(_unsampled())

    def begin_span(self, *_: Any) -> Span:
        """The span."""
        return self.dropped


class DeferredTrace:
    """Takes the place of a tracer for a trace that may be kept: its spans are made then, with their own times.

    Args:
        tracer: makes them.
    """

    def __init__(self, tracer: Tracer) -> None:
        self.dropped: None = None
        self.tracer = tracer
        self.trace_id = _IDS.generate_trace_id()
        self.spans: list[DeferredSpan] = []
        self.decided = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.spans)

    def begin_span(
        self,
        name: str,
        context: Context,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Any] = EMPTY,
        links: Sequence[Link] = (),
    ) -> Span:
        """A span that waits; once the trace is decided, a real one or one that records nothing."""
        parent = get_current_span(context)
        span = DeferredSpan(self, name, without_call_context(context), kind, dict(attributes), list(links))
        with self._lock:
            if not self.decided:
                self.spans.append(span)
                return span
        if isinstance(parent, DeferredSpan) and parent.real is None:
            return NonRecordingSpan(_unsampled(self.trace_id))
        span.release()
        return span

    def keep(self) -> SpanContext | None:
        """Make the spans. Gives the first one's context, or ``None`` if it is decided already."""
        spans = self._decide()
        for span in spans:
            span.release()
        return spans[0].get_span_context() if spans else None

    def drop(self) -> None:
        """Forget the spans."""
        self._decide()

    def _decide(self) -> list[DeferredSpan]:
        with self._lock:
            spans, self.spans, self.decided = self.spans, [], True
        return spans


class DeferredSpan(Span):
    """A span that becomes real later, if at all."""

    def __init__(
        self,
        deferred: DeferredTrace,
        name: str,
        context: Context,
        kind: SpanKind,
        attributes: dict[str, Any],
        links: list[Link],
    ) -> None:
        self._trace = deferred
        self._name = name
        self._around = context
        self._kind = kind
        self._attributes = attributes
        self._links = links
        self._context = _unsampled(deferred.trace_id)
        self._events: list[tuple[str, Any, int]] = []
        self._once_real: list[Callable[[Span], None]] = []
        self._status: Status | StatusCode | None = None
        self._description: str | None = None
        self._started = time.time_ns()
        self._ended: int | None = None
        self.real: Span | None = None

    def release(self) -> None:
        """Make the real span, as far as this one has come. Its parent has been made before."""
        parent = get_current_span(self._around)
        around = self._around
        if isinstance(parent, DeferredSpan):
            if parent.real is None:
                return
            around = set_span_in_context(parent.real, around)
        real = self._trace.tracer.start_span(
            self._name, around, self._kind, self._attributes, self._links, self._started, False, False
        )
        restore_dropped(real, self._attributes)
        for name, attributes, when in self._events:
            real.add_event(name, attributes, when)
        if self._status is not None:
            real.set_status(self._status, self._description)
        self.real = real
        for action in self._once_real:
            with _ONCE_REAL:
                action(real)
        if self._ended is not None:
            real.end(self._ended)

    def once_real(self, action: Callable[[Span], None]) -> None:
        """Have something done with the real span before it ends: when there is one, if at all."""
        if self.real is not None:
            action(self.real)
        else:
            self._once_real.append(action)

    # --- the interface of a span ------------------------------------------------------------------------------------
    def get_span_context(self) -> SpanContext:
        """Of the real span; before there is one, of a trace that is not sampled."""
        return self._context if self.real is None else self.real.get_span_context()

    def is_recording(self) -> bool:
        """Whether it has not ended, and what is set on it may still be kept."""
        if self.real is not None:
            return self.real.is_recording()
        return self._ended is None and not self._trace.decided

    def set_attribute(self, key: str, value: Any) -> None:
        """Set one attribute."""
        self.set_attributes({key: value})

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes."""
        if self.real is not None:
            self.real.set_attributes(attributes)
        else:
            for key, value in attributes.items():  # What is set a second time becomes the newest, as in the SDK.
                self._attributes.pop(key, None)
                self._attributes[key] = value

    @property
    def dropped_attributes(self) -> int:
        """How many the SDK has dropped. That is unknown before there is a real span: one, to be sure."""
        return 1 if self.real is None else getattr(self.real, "dropped_attributes", 0)

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Add an event."""
        if self.real is not None:
            self.real.add_event(name, attributes, timestamp)
        else:
            self._events.append((name, attributes, timestamp or time.time_ns()))

    def add_link(self, context: SpanContext, attributes: Any = None) -> None:
        """Add a link."""
        if self.real is not None:
            self.real.add_link(context, attributes)
        else:
            self._links.append(Link(context, attributes))

    def update_name(self, name: str) -> None:
        """Change the name."""
        if self.real is not None:
            self.real.update_name(name)
        else:
            self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Set the status."""
        if self.real is not None:
            self.real.set_status(status, description)
        else:
            self._status, self._description = status, description

    def record_exception(
        self,
        exception: BaseException,
        attributes: Any = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Passed on to the real span. We record exceptions as events of our own; before there is one, so does this."""
        if self.real is not None:
            self.real.record_exception(exception, attributes, timestamp, escaped)
        else:
            self.add_event("exception", {"exception.type": type(exception).__name__, **(attributes or {})}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        """End it."""
        if self.real is not None:
            self.real.end(end_time)
        elif self._ended is None:
            self._ended = end_time or time.time_ns()
            if self.real is not None and self.real.is_recording():  # made meanwhile, by another thread
                self.real.end(self._ended)
