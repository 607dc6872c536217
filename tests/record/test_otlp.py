"""One decoder for both forms of OTLP."""

from __future__ import annotations

import json

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel.record.otlp import decode, decode_lines, encode
from tests.reports.test_optimizations import otlp_json


def test_json_and_protobuf_give_the_same_spans() -> None:
    memory, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("t", "1")
    with tracer.start_as_current_span("parent"), tracer.start_as_current_span("child") as span:
        span.set_attributes(
            {"text": "é", "int": 2**53 + 1, "float": 0.5, "bool": True, "list": ["a"], "nan": float("inf")}
        )
    spans = memory.get_finished_spans()
    from_json = [one for found in decode_lines(otlp_json(spans).splitlines()) for one in found]
    assert [one.to_json() for one in from_json] == [one.to_json() for one in decode(encode(spans))]
    # As the Collector's file exporter has it with `format: proto`.
    framed = b"".join(len(body).to_bytes(4, "big") + body for body in map(encode, ([one] for one in spans)))
    assert [one.to_json() for one in decode(framed)] == [one.to_json() for one in decode(encode(spans))]
    with pytest.raises(ValueError, match=r"no OTLP request \(EOFError\)"):
        decode(framed[:-1])


def test_fields_of_a_newer_otlp_do_no_harm() -> None:
    line = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "s", "newField": 1}]}], "other": {}}]})
    assert [[span.name for span in spans] for spans in decode_lines(["", line])] == [["s"]]


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"resourceSpans": 1}'])
def test_what_is_no_otlp_is_named_by_its_line(text: str) -> None:
    with pytest.raises(ValueError, match="line 2 is no OTLP JSON"):
        list(decode_lines(["{}", text]))
