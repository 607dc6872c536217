"""OTLP requests to finished spans, and back: in protobuf, and in the JSON of a Collector's file exporter."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from google.protobuf import json_format
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

_REMOTE = 0x200
"""Flag of a span whose parent is in another process."""


def encode(spans: Sequence[ReadableSpan]) -> bytes:
    """Spans as an OTLP request, in protobuf."""
    return encode_spans(spans).SerializeToString()  # type: ignore[no-any-return]


def decode(body: bytes) -> list[ReadableSpan]:
    """The spans of an OTLP request in protobuf.

    Raises:
        ValueError: it is none.
    """
    try:
        return list(_spans(ExportTraceServiceRequest.FromString(body)))
    except Exception as error:
        raise ValueError(f"no OTLP request ({type(error).__name__})") from error


def decode_lines(lines: Iterable[str]) -> Iterator[list[ReadableSpan]]:
    """The spans of each line of OTLP JSON; empty lines are left out.

    Raises:
        ValueError: a line is no OTLP request.
    """
    for place, line in enumerate(lines, 1):
        if line.strip():
            try:
                loaded = json.loads(line)
                if not isinstance(loaded, dict):
                    raise TypeError("no object")
                message = ExportTraceServiceRequest()
                json_format.ParseDict(_with_base64(loaded), message, ignore_unknown_fields=True)
                yield list(_spans(message))
            except Exception as error:
                raise ValueError(f"line {place} is no OTLP JSON ({type(error).__name__})") from error


def _with_base64(value: Any) -> Any:
    """OTLP writes ids in hexadecimal, where protobuf's own JSON has base64."""
    if isinstance(value, list):
        return [_with_base64(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: base64.b64encode(bytes.fromhex(item)).decode()
        if key in ("traceId", "spanId", "parentSpanId") and isinstance(item, str)
        else _with_base64(item)
        for key, item in value.items()
    }


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
