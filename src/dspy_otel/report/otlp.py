"""Finished spans from a file of OTLP JSON, as the Collector's file exporter writes it: one export request a line."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags


def read_spans(lines: Iterable[str]) -> Iterator[ReadableSpan]:
    """The spans of a file.

    Raises:
        ValueError: a line is no JSON, or no export request.
    """
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            for of_resource in json.loads(line).get("resourceSpans", ()):
                resource = Resource(_attributes(of_resource.get("resource", {})))
                for of_scope in of_resource.get("scopeSpans", ()):
                    for span in of_scope.get("spans", ()):
                        yield _span(span, resource)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {place} is no OTLP JSON ({type(error).__name__}: {error})") from error


def _span(span: Mapping[str, Any], resource: Resource) -> ReadableSpan:
    trace_id, parent = int(span["traceId"], 16), span.get("parentSpanId")
    status = span.get("status", {})
    return ReadableSpan(
        name=span["name"],
        context=_context(trace_id, span["spanId"]),
        parent=_context(trace_id, parent) if parent else None,
        resource=resource,
        attributes=_attributes(span),
        status=Status(
            StatusCode.ERROR if status.get("code") in (2, "STATUS_CODE_ERROR") else StatusCode.UNSET,
            status.get("message") if status.get("code") in (2, "STATUS_CODE_ERROR") else None,
        ),
        start_time=int(span["startTimeUnixNano"]),
        end_time=int(span["endTimeUnixNano"]),
    )


def _context(trace_id: int, span_id: str) -> SpanContext:
    return SpanContext(trace_id, int(span_id, 16), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _attributes(holder: Mapping[str, Any]) -> dict[str, Any]:
    return {one["key"]: _value(one.get("value", {})) for one in holder.get("attributes", ())}


def _value(value: Mapping[str, Any]) -> Any:
    """A value by its kind: 64-bit integers are text in OTLP's JSON, and so are infinity and NaN."""
    for kind, found in value.items():
        if kind == "intValue":
            return int(found)
        if kind == "doubleValue":
            return float(found)
        if kind == "arrayValue":
            return tuple(_value(one) for one in found.get("values", ()))
        if kind == "bytesValue":
            return base64.b64decode(found)
        return found
    return None
