"""Splitting: a request is delivered in halves until each span that MLflow refuses is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from dspy_otel.mlflow.retry import ExportError, Verdict

SentSpan = tuple[Any, Any, Any]
"""A span in protobuf, after its resource and scope."""


@dataclass
class Split:
    """What became of the parts of a request.

    Attributes:
        delivered: number of spans.
        roots: number of traces that begin with those.
        refused: spans with the reasons.
    """

    delivered: int = 0
    roots: int = 0
    refused: list[tuple[SentSpan, ExportError]] = field(default_factory=list)


def deliver_in_halves(
    send: Callable[[bytes], None], body: bytes, error: ExportError, works: bool, count: Callable[[], None]
) -> Split:
    """Deliver a request that failed in ever smaller parts.

    Args:
        send: delivers a request.
        body: the request.
        error: its failure.
        works: whether other requests got through since it first failed.
        count: called for each part that gets through.

    Raises:
        ExportError: nothing got through, so the request may not be the cause.
    """
    evidence = works or error.verdict is not Verdict.LATER
    split = Split()
    waiting: list[tuple[list[SentSpan], ExportError]] = [(spans_of(body), error)]
    while waiting:
        spans, error = waiting.pop()
        if len(spans) == 1:
            split.refused.append((spans[0], error))
            continue
        half, failed = len(spans) // 2, []
        for part in (spans[:half], spans[half:]):
            try:
                send(body_of(part))
            except ExportError as again:
                if again.unavailable:
                    raise
                failed.append((part, again))
                evidence = evidence or again.verdict is not Verdict.LATER
            else:
                evidence = True
                count()
                split.delivered += len(part)
                split.roots += count_roots(part)
        if len(failed) == 2 and not evidence:
            raise failed[-1][1]
        waiting += failed
    if not evidence:
        raise error
    return split


def spans_of(body: bytes) -> list[SentSpan]:
    """The spans of a request, each with its resource and scope."""
    return [
        (of_resource, of_scope, span)
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def body_of(spans: Iterable[SentSpan]) -> bytes:
    """A request of some spans."""
    request = ExportTraceServiceRequest()
    for of_resource, of_scope, span in spans:
        resource = request.resource_spans.add(schema_url=of_resource.schema_url)
        resource.resource.CopyFrom(of_resource.resource)
        scope = resource.scope_spans.add(schema_url=of_scope.schema_url)
        scope.scope.CopyFrom(of_scope.scope)
        scope.spans.add().CopyFrom(span)
    return bytes(request.SerializeToString())


def count_roots(spans: Iterable[SentSpan]) -> int:
    """How many traces begin with some spans."""
    return sum(not span.parent_span_id for _, _, span in spans)
