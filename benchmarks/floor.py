"""The floor: what the same telemetry costs when it is written by hand with the OpenTelemetry SDK.

One run under dspy-otel is recorded: every span with the attributes it had at its start and those added later, its
events, and every measurement. The floor then opens the same spans around the bare program, sets the same attributes
and records the same measurements. It knows all values beforehand, so it is lower than what real code could reach;
only content is serialized again for each call, once per distinct content, and durations are measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind, Status, StatusCode
from programs import Opener

SERIALIZED_FROM = 64
"""Shortest JSON text, in characters, that counts as content serialized for the call."""


class Recorder(SpanProcessor):
    """Records spans and measurements of one run as plain JSON, outermost span first.

    Give ``tracer_provider`` and ``meter_provider`` to the instrumentation to record; call ``clear`` after warming up.
    """

    def __init__(self) -> None:
        self.spans: dict[int, dict[str, Any]] = {}
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(self)
        self.meter_provider = _RecordingMeterProvider(self)

    def clear(self) -> None:
        """Forget what was recorded."""
        self.spans.clear()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Note the attributes given at the start."""
        assert span.context is not None
        self.spans[span.context.span_id] = {
            "name": span.name,
            "kind": span.kind.name,
            "parent": span.parent.span_id if span.parent else None,
            "start": dict(span.attributes or {}),
            "measurements": [],
        }

    def on_end(self, span: ReadableSpan) -> None:
        """Note what was added later."""
        assert span.context is not None
        record = self.spans[span.context.span_id]
        final = dict(span.attributes or {})
        begun = record["start"]
        record["start"] = {key: value for key, value in begun.items() if final.get(key) == value}
        record["end"] = {key: value for key, value in final.items() if key not in record["start"]}
        record["name"] = span.name
        record["events"] = [(event.name, dict(event.attributes or {})) for event in span.events]
        record["status"] = span.status.status_code.name

    def measure(self, instrument: dict[str, Any], value: float, attributes: Any, context: Context | None) -> None:
        """Note one measurement with the span it was made in (the outermost one if in none of ours)."""
        active = trace.get_current_span(context).get_span_context().span_id
        span = self.spans.get(active) or next(iter(self.spans.values()))
        span["measurements"].append({**instrument, "value": value, "attributes": dict(attributes or {})})

    def chain(self) -> list[dict[str, Any]]:
        """Recorded spans, outermost first; ValueError when they are not a chain of only children."""
        parent = None
        for span_id, span in self.spans.items():
            if span["parent"] != parent:
                names = ", ".join(recorded["name"] for recorded in self.spans.values())
                raise ValueError(f"the recorded spans are not one chain: {names}")
            parent = span_id
        return list(self.spans.values())


class _RecordingMeterProvider(metrics.MeterProvider):
    """Meter provider that hands every measurement to a Recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def get_meter(self, name: str, *args: Any, **kwargs: Any) -> metrics.Meter:
        return _RecordingMeter(name, self.recorder)


class _RecordingMeter(metrics.NoOpMeter):
    """Meter whose counters and histograms record."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        super().__init__(name)
        self.recorder = recorder

    def create_histogram(self, name: str, unit: str = "", description: str = "", **advisory: Any) -> Any:
        buckets = advisory.get("explicit_bucket_boundaries_advisory")
        return _RecordingInstrument(self.recorder, type="histogram", name=name, unit=unit, buckets=buckets)

    def create_counter(self, name: str, unit: str = "", description: str = "") -> Any:
        return _RecordingInstrument(self.recorder, type="counter", name=name, unit=unit, buckets=None)


class _RecordingInstrument:
    """Counter or histogram that records."""

    def __init__(self, recorder: Recorder, **description: Any) -> None:
        self.recorder, self.description = recorder, description

    def record(self, amount: float, attributes: Any = None, context: Context | None = None) -> None:
        self.recorder.measure(self.description, amount, attributes, context)

    add = record


def openers(chain: list[dict[str, Any]], tracer: trace.Tracer, meter: metrics.Meter) -> list[Opener]:
    """Write the recorded spans by hand: one opener for each, outermost first."""
    texts: dict[str, str] = {}  # contents already serialized in this call
    seen: set[str] = set()
    starts = [_attributes(span["start"], texts, seen) for span in chain]
    ends = [_attributes(span["end"], texts, seen) for span in reversed(chain)][::-1]
    return [_opener(span, start, end, tracer, meter) for span, start, end in zip(chain, starts, ends, strict=True)]


def opener(span: dict[str, Any], tracer: trace.Tracer, meter: metrics.Meter) -> Opener:
    """Write one recorded span by hand."""
    texts: dict[str, str] = {}
    seen: set[str] = set()
    start, end = (_attributes(span[part], texts, seen) for part in ("start", "end"))
    return _opener(span, start, end, tracer, meter)


def _attributes(recorded: dict[str, Any], texts: dict[str, str], seen: set[str]) -> Callable[[], dict[str, Any]]:
    """Give a function that makes the attributes, serializing each distinct content where it is first needed."""
    fixed = {key: tuple(value) if isinstance(value, list) else value for key, value in recorded.items()}
    serialize: list[tuple[str, str, Any, tuple[str, str]]] = []
    reuse: list[tuple[str, str]] = []
    for key, value in recorded.items():
        content, separators = _content(value)
        if content is None:
            continue
        if value in seen:
            reuse.append((key, value))
        else:
            seen.add(value)
            serialize.append((key, value, content, separators))

    def make() -> dict[str, Any]:
        made = dict(fixed)
        for key, text, content, separators in serialize:
            made[key] = texts[text] = json.dumps(content, ensure_ascii=False, separators=separators)
        for key, text in reuse:
            made[key] = texts[text]
        return made

    return make if serialize or reuse else fixed.copy


def _content(value: Any) -> tuple[Any, tuple[str, str]]:
    """Object behind a long JSON text, and the separators it was written with; None for anything else."""
    spaced, compact = (", ", ": "), (",", ":")
    if isinstance(value, str) and len(value) >= SERIALIZED_FROM and value[0] in "[{":
        try:
            content = json.loads(value)
        except ValueError:
            return None, spaced
        return content, compact if json.dumps(content, ensure_ascii=False, separators=compact) == value else spaced
    return None, spaced


def _opener(
    span: dict[str, Any],
    start: Callable[[], dict[str, Any]],
    end: Callable[[], dict[str, Any]],
    tracer: trace.Tracer,
    meter: metrics.Meter,
) -> Opener:
    """One hand-written span around a call."""
    name, kind = span["name"], SpanKind[span["kind"]]
    events = span["events"]
    ok = Status(StatusCode[span["status"]]) if span["status"] != "UNSET" else None
    durations, values = [], []
    for made in span["measurements"]:
        measure = _instrument(made, meter)
        if made["unit"] == "s":
            durations.append((measure, made["attributes"]))
        else:
            values.append((measure, made["value"], made["attributes"]))

    def opener(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        with tracer.start_as_current_span(name, kind=kind, attributes=start()) as current:
            result = call(*args, **kwargs)
            if current.is_recording():
                current.set_attributes(end())
                for event, attributes in events:
                    current.add_event(event, attributes)
                if ok is not None:
                    current.set_status(ok)
            elapsed = time.perf_counter() - began
            for measure, attributes in durations:
                measure(elapsed, attributes)
            for measure, value, attributes in values:
                measure(value, attributes)
            return result

    return opener


def _instrument(made: dict[str, Any], meter: metrics.Meter) -> Callable[..., None]:
    if made["type"] == "counter":
        return meter.create_counter(made["name"], made["unit"]).add
    return meter.create_histogram(
        made["name"], made["unit"], explicit_bucket_boundaries_advisory=made["buckets"]
    ).record
