"""OTLP requests to finished spans, and back: in protobuf, and in the JSON of a Collector's file exporter."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from dspy_otel import semconv
from dspy_otel.record.answers import judgement_of
from dspy_otel.record.model import Judgement

_REMOTE = 0x200
"""Flag of a span whose parent is in another process."""


def encode(spans: Sequence[ReadableSpan]) -> bytes:
    """Spans as an OTLP request, in protobuf."""
    return encode_spans(spans).SerializeToString()  # type: ignore[no-any-return]


def decode(body: bytes) -> list[ReadableSpan]:
    """The spans of an OTLP request in protobuf, or of several as the Collector's file exporter writes them.

    Raises:
        ValueError: it is none.
    """
    try:
        # No request begins with a zero, and a length below 16 MB does.
        requests = _framed(body) if body[:1] == b"\0" else [body]
        return [span for one in requests for span in _spans(ExportTraceServiceRequest.FromString(one))]
    except Exception as error:
        raise ValueError(f"no OTLP request ({type(error).__name__})") from error


def _framed(body: bytes) -> Iterator[bytes]:
    """Messages, each behind its length in four bytes."""
    at = 0
    while at < len(body):
        size = int.from_bytes(body[at : at + 4], "big")
        if len(body) < at + 4 + size:
            raise EOFError
        yield body[at + 4 : at + 4 + size]
        at += 4 + size


def read_file(path: Path, judgements: list[Judgement] | None = None) -> Iterator[ReadableSpan]:
    """The spans of a file: in protobuf if its name ends in ``.pb``, else in JSON, line by line.

    Args:
        path: of the file.
        judgements: as for :func:`decode_lines`; of protobuf, spans alone are read.

    Raises:
        OSError: it cannot be read.
        ValueError: it has something else.
    """
    if path.suffix == ".pb":
        yield from decode(path.read_bytes())
        return
    with path.open(encoding="utf-8") as lines:
        for spans in decode_lines(lines, judgements):
            yield from spans


def decode_lines(lines: Iterable[str], judgements: list[Judgement] | None = None) -> Iterator[list[ReadableSpan]]:
    """The spans of each line of OTLP JSON; empty lines are left out.

    Args:
        lines: each a request of spans, of logs or of metrics.
        judgements: scores of answers that are in the logs are added to it.

    Raises:
        ValueError: a line is no OTLP request.
    """
    for place, line in enumerate(lines, 1):
        if line.strip():
            try:
                loaded = json.loads(line)
                if not isinstance(loaded, dict):
                    raise TypeError("no object")
                spans = list(_json_spans(loaded))
                if judgements is not None:
                    judgements += _json_judgements(loaded)
            except Exception as error:
                raise ValueError(f"line {place} is no OTLP JSON ({type(error).__name__})") from error
            yield spans


def _spans(request: Any) -> Iterator[ReadableSpan]:
    for of_resource in request.resource_spans:
        resource = Resource(_attributes(of_resource.resource.attributes), of_resource.schema_url or None)
        for of_scope in of_resource.scope_spans:
            scope = InstrumentationScope(
                of_scope.scope.name,
                of_scope.scope.version or None,
                of_scope.schema_url or None,
                _attributes(of_scope.scope.attributes),
            )
            for span in of_scope.spans:
                yield _span(span, resource, scope)


def _span(span: Any, resource: Resource, scope: InstrumentationScope) -> ReadableSpan:
    parent = None
    if span.parent_span_id:
        parent = _context(span.trace_id, span.parent_span_id, remote=bool(span.flags & _REMOTE))
    code = StatusCode(span.status.code)
    return ReadableSpan(
        name=span.name,
        context=_context(span.trace_id, span.span_id, state=span.trace_state),
        parent=parent,
        resource=resource,
        attributes=_attributes(span.attributes),
        events=[Event(event.name, _attributes(event.attributes), event.time_unix_nano) for event in span.events],
        links=[
            Link(_context(link.trace_id, link.span_id, remote=bool(link.flags & _REMOTE)), _attributes(link.attributes))
            for link in span.links
        ],
        kind=SpanKind(max(0, span.kind - 1)),
        instrumentation_scope=scope,
        status=Status(code, (span.status.message or None) if code is StatusCode.ERROR else None),
        start_time=span.start_time_unix_nano,
        end_time=span.end_time_unix_nano,
    )


def _context(trace_id: bytes, span_id: bytes, *, remote: bool = False, state: str = "") -> SpanContext:
    return SpanContext(
        int.from_bytes(trace_id, "big"),
        int.from_bytes(span_id, "big"),
        is_remote=remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=TraceState.from_header([state]) if state else None,
    )


def _attributes(pairs: Any) -> Mapping[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return tuple(_value(item) for item in value.array_value.values)
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return getattr(value, kind)


# --- JSON -----------------------------------------------------------------------------------------------------------
# Read as it stands: through protobuf's own reader of JSON, which is written in Python, a span takes ten times as long.


def _json_spans(request: Mapping[str, Any]) -> Iterator[ReadableSpan]:
    for of_resource in request.get("resourceSpans") or ():
        described = of_resource.get("resource", {})
        resource = Resource(_json_attributes(described), of_resource.get("schemaUrl") or None)
        for of_scope in of_resource.get("scopeSpans", ()):
            about = of_scope.get("scope", {})
            scope = InstrumentationScope(
                about.get("name", ""),
                about.get("version") or None,
                of_scope.get("schemaUrl") or None,
                _json_attributes(about),
            )
            for span in of_scope.get("spans", ()):
                yield _json_span(span, resource, scope)


def _json_judgements(request: Mapping[str, Any]) -> Iterator[Judgement]:
    """Scores as evaluators write them into logs."""
    for of_resource in request.get("resourceLogs") or ():
        for of_scope in of_resource.get("scopeLogs", ()):
            for entry in of_scope.get("logRecords", ()):
                if entry.get("eventName") == semconv.LOG_EVALUATION_RESULT and entry.get("traceId"):
                    trace_id, span_id = int(entry["traceId"], 16), int(entry.get("spanId") or "0", 16) or None
                    when = int(entry.get("timeUnixNano") or 0) / 1e9
                    yield from judgement_of(trace_id, span_id, _json_attributes(entry), when)


def read_span(span: Mapping[str, Any], scope: str) -> ReadableSpan:
    """A span alone, in the JSON that protobuf makes: fields by their names of protobuf, and ids in base64.

    Args:
        span: what was read from JSON.
        scope: name of its instrumentation scope.
    """
    named = _camel_case(span)
    for name in ("traceId", "spanId", "parentSpanId"):
        if named.get(name):
            named[name] = base64.b64decode(named[name]).hex()
    named.pop("links", None)
    return _json_span(named, Resource.get_empty(), InstrumentationScope(scope))


def _camel_case(value: Any) -> Any:
    """A message with fields named as OTLP's JSON has them. Keys of attributes are values here, and stay."""
    if isinstance(value, dict):
        return {_UNDERSCORE.sub(lambda found: found[1].upper(), name): _camel_case(one) for name, one in value.items()}
    return [_camel_case(item) for item in value] if isinstance(value, list) else value


_UNDERSCORE: Final = re.compile(r"_([a-z])")


def _json_span(span: Mapping[str, Any], resource: Resource, scope: InstrumentationScope) -> ReadableSpan:
    parent = None
    if span.get("parentSpanId"):
        parent = _json_context(span, "parentSpanId", remote=_is_remote(span))
    status = span.get("status", {})
    code = StatusCode(_number_of(status.get("code", 0), "STATUS_CODE_", _CODES))
    return ReadableSpan(
        name=span.get("name", ""),
        context=_json_context(span, "spanId", state=span.get("traceState", "")),
        parent=parent,
        resource=resource,
        attributes=_json_attributes(span),
        events=[
            Event(event.get("name", ""), _json_attributes(event), int(event.get("timeUnixNano", 0)))
            for event in span.get("events", ())
        ],
        links=[
            Link(_json_context(link, "spanId", remote=_is_remote(link)), _json_attributes(link))
            for link in span.get("links", ())
        ],
        kind=SpanKind(max(0, _number_of(span.get("kind", 0), "SPAN_KIND_", _KINDS) - 1)),
        instrumentation_scope=scope,
        status=Status(code, (status.get("message") or None) if code is StatusCode.ERROR else None),
        start_time=int(span.get("startTimeUnixNano", 0)),
        end_time=int(span.get("endTimeUnixNano", 0)),
    )


_CODES = ("UNSET", "OK", "ERROR")
_KINDS = ("UNSPECIFIED", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")


def _number_of(value: Any, prefix: str, names: Sequence[str]) -> int:
    """The number of an enumeration's value, which may stand there by its name."""
    return names.index(value.removeprefix(prefix)) if isinstance(value, str) else int(value)


def _is_remote(owner: Mapping[str, Any]) -> bool:
    return bool(int(owner.get("flags", 0)) & _REMOTE)


def _json_context(ids: Mapping[str, Any], name: str, *, remote: bool = False, state: str = "") -> SpanContext:
    return SpanContext(
        int(ids.get("traceId") or "0", 16),
        int(ids.get(name) or "0", 16),
        is_remote=remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=TraceState.from_header([state]) if state else None,
    )


def _json_attributes(owner: Mapping[str, Any]) -> Mapping[str, Any]:
    found = {}
    for pair in owner.get("attributes", ()):
        value = pair.get("value", _NOTHING)
        text = value.get("stringValue")  # most are texts
        found[pair["key"]] = _json_value(value) if text is None else text
    return found


_NOTHING: Mapping[str, Any] = {}


def _json_value(value: Mapping[str, Any]) -> Any:
    for kind, found in value.items():
        reader = _JSON_VALUES.get(kind)
        if reader is not None:
            return reader(found)
    return None


_JSON_VALUES: Mapping[str, Callable[[Any], Any]] = {
    "stringValue": str,
    "intValue": int,
    "doubleValue": float,
    "boolValue": bool,
    "bytesValue": base64.b64decode,
    "arrayValue": lambda found: tuple(_json_value(item) for item in found.get("values", ())),
    "kvlistValue": lambda found: {pair["key"]: _json_value(pair.get("value", {})) for pair in found.get("values", ())},
}
