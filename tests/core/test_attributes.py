"""Half a character and NUL, whoever gave them, cost nothing but themselves: everything exported can be encoded."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from opentelemetry import baggage, context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

HALF = "caf\udce9 \0"


class Program(dspy.Module):
    def forward(self, question: str) -> Any:
        return dspy.Prediction(answer=f"answer {HALF}")


class Metric:
    __name__ = f"metric {HALF}"

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> float:
        return 1.0


def test_half_a_character_in_names_and_values_is_replaced_on_the_way_into_a_span(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")

    def look_up(query: str) -> str:
        raise LookupError(f"nothing for {query} {HALF}")

    token = context.attach(baggage.set_baggage("session.id", f"session {HALF}"))
    try:
        Program()(question=HALF)
    finally:
        context.detach(token)
    rows = [dspy.Example(question=HALF, answer="a").with_inputs("question")]
    dspy.Evaluate(devset=rows, metric=Metric(), num_threads=1, display_progress=False)(Program())
    with pytest.raises(LookupError):
        dspy.Tool(look_up, name="tool")(query=HALF)
    spans = telemetry.spans
    assert len(spans) >= 4
    encoded = encode_spans(spans).SerializeToString().decode("utf-8", "replace")  # else the batch is lost
    for text in ("session", "metric", "answer"):
        assert f"{text} caf\ufffd" in encoded
    values = [value for span in spans for value in (span.name, *span.attributes.values())]
    assert not [value for value in values if isinstance(value, str) and "\0" in value]
