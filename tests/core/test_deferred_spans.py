"""Spans that wait for a verdict."""

from __future__ import annotations

from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Status, StatusCode, set_span_in_context

from dspy_otel.core.deferred_spans import DeferredTrace, DroppedTrace


def sdk() -> tuple[Any, InMemorySpanExporter]:
    spans = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider.get_tracer("test"), spans


def test_what_is_kept_is_as_it_was() -> None:
    tracer, spans = sdk()
    hold = DeferredTrace(tracer)
    outer = hold.begin_span("outer", Context(), attributes={"a": 1})
    inner = hold.begin_span("inner", set_span_in_context(outer))
    inner.add_event("happened", {"b": 2})
    inner.set_status(Status(StatusCode.ERROR, "why"))
    inner.end()
    assert outer.is_recording()
    assert not inner.is_recording()
    outer.set_attributes({"c": 3})
    outer.set_attribute("d", 4)
    outer.update_name("renamed")
    outer.add_link(tracer.start_span("other").get_span_context())
    outer.end()
    assert not spans.get_finished_spans()
    kept = hold.keep()
    first, second = spans.get_finished_spans()
    assert (first.name, second.name) == ("renamed", "inner")
    assert kept == first.context == outer.get_span_context()
    assert second.parent == first.context
    assert dict(first.attributes) == {"a": 1, "c": 3, "d": 4}
    assert len(first.links) == 1
    assert first.start_time <= second.start_time <= second.events[0].timestamp <= second.end_time <= first.end_time
    assert (second.status.status_code, second.status.description) == (StatusCode.ERROR, "why")
    assert hold.keep() is None  # once


def test_what_is_dropped_is_gone_and_so_is_what_comes_later() -> None:
    tracer, spans = sdk()
    hold = DeferredTrace(tracer)
    outer = hold.begin_span("outer", Context())
    hold.drop()
    late = hold.begin_span("late", set_span_in_context(outer))
    assert not outer.is_recording()
    assert not late.is_recording()
    for span in (late, outer):
        span.set_attribute("a", 1)
        span.end()
    assert not spans.get_finished_spans()
    assert len(hold) == 0


def test_what_is_still_open_when_it_is_kept_goes_on() -> None:
    tracer, spans = sdk()
    hold = DeferredTrace(tracer)
    outer = hold.begin_span("outer", Context())
    open_ = hold.begin_span("open", set_span_in_context(outer))
    outer.end()
    hold.keep()
    late = hold.begin_span("late", set_span_in_context(open_))
    for span in (late, open_):
        assert span.is_recording()
        span.set_attribute("a", 1)
        span.add_event("now")
        span.record_exception(ValueError("x"))
        span.end()
    found = {span.name: span for span in spans.get_finished_spans()}
    assert set(found) == {"outer", "open", "late"}
    assert found["late"].parent == found["open"].context
    assert found["open"].parent == found["outer"].context
    assert [event.name for event in found["late"].events] == ["now", "exception"]


def test_others_inside_see_a_trace_that_is_not_sampled() -> None:
    tracer, spans = sdk()
    for around in (DeferredTrace(tracer), DroppedTrace()):
        parent = around.begin_span("ours", Context())
        assert parent.get_span_context().is_valid
        theirs = tracer.start_span("theirs", set_span_in_context(parent))
        assert not theirs.is_recording()
        assert theirs.get_span_context().trace_id == parent.get_span_context().trace_id
        theirs.end()
    assert not spans.get_finished_spans()


def test_a_name_is_all_that_is_said_of_an_exception_before_it_is_kept() -> None:
    tracer, spans = sdk()
    hold = DeferredTrace(tracer)
    span = hold.begin_span("one", Context())
    span.record_exception(ValueError("secret"))
    span.end()
    hold.keep()
    (event,) = spans.get_finished_spans()[0].events
    assert dict(event.attributes) == {"exception.type": "ValueError"}
