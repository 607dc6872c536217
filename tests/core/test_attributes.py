"""Half a character and NUL, whoever gave them, cost nothing but themselves: everything exported can be encoded."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

HALF = "caf\udce9 \0"


def test_half_a_character_in_names_and_values_is_replaced_on_the_way_into_a_span(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")

    def look_up(query: str) -> str:
        raise LookupError(f"nothing for {query} {HALF}")

    class Named:
        __name__ = f"metric {HALF}"

        def __call__(self, example: Any, prediction: Any, trace: Any = None) -> float:
            return 1.0

    program = type("Program", (dspy.Module,), {"forward": lambda self, question: self.inner(question=question)})()
    program.inner = dspy.Predict("question -> answer")
    tool = dspy.Tool(look_up)  # pydantic refuses half a character in its name
    with dspy.context(lm=DummyLM([{"answer": f"Bern {HALF}"}] * 2)):
        program(question=HALF)
        rows = [dspy.Example(question=HALF, answer="a").with_inputs("question")]
        dspy.Evaluate(devset=rows, metric=Named(), num_threads=1, display_progress=False)(program)
        with pytest.raises(LookupError):
            tool(query="q")
    spans = telemetry.spans
    assert len(spans) > 6
    text = encode_spans(spans).SerializeToString().decode("utf-8", "replace")  # the SDK would lose the whole batch
    assert "\0" not in "".join(span.name for span in spans)
    assert "caf\ufffd \ufffd" in text
