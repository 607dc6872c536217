"""Half and control characters, whoever gave them, cost nothing but themselves: all can be encoded, and shown safely."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from opentelemetry import baggage, context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

from dspy_otel.core.attributes import repair, sendable, sendable_name

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


CONTROL = "".join(map(chr, (*range(32), *range(0x7F, 0xA0))))
KEPT = "\t\n\r"


def test_control_characters_are_replaced_but_tab_and_line_ends() -> None:
    for character in CONTROL:
        expected = character if character in KEPT else "\ufffd"
        for around in ("a", "ä", "模"):
            assert sendable(f"{around}{character}b") == f"{around}{expected}b"
            attributes: Any = {"one": f"{around}{character}b", "many": [f"{around}{character}"]}
            repair(attributes)
            assert attributes == {"one": f"{around}{expected}b", "many": [f"{around}{expected}"]}


@pytest.mark.parametrize("long", ["a" * 300, "ä " * 300, "模\n" * 300, "°" * 300, "caf\udce9" * 300])
def test_what_a_terminal_obeys_is_replaced_in_long_texts(long: str) -> None:
    for command in ("\0", "\x1b[31m", "\x85", "\x9b31m"):
        attributes: Any = {"text": f"{long}{command}{long}"}
        repair(attributes)
        assert attributes["text"] == f"{long}\ufffd{command[1:]}{long}".replace("\udce9", "\ufffd")


@pytest.mark.parametrize("text", ["", "a", "ä\u00a0«", "\u200b", "°" * 300, "a\tb\r\n" * 100, "\U0001f600 模" * 100])
def test_other_texts_stay_the_very_same(text: str) -> None:
    assert sendable(text) is text


def test_a_name_is_one_line() -> None:
    assert sendable_name("a\r\nb\tc\u2028d\x1b") == "a  b c d\ufffd"
    assert sendable_name("a" * 300 + "\n") == "a" * 300 + " "


class Commands(dspy.BaseLM):
    """Answers in commands to the terminal."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        choice = SimpleNamespace(message=SimpleNamespace(content=f"a{CONTROL}"), finish_reason=f"stop{CONTROL}")
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return SimpleNamespace(choices=[choice], usage=usage, model=f"m{CONTROL}", id=f"i{CONTROL}")


def test_no_name_is_a_command_to_a_terminal(telemetry: Any) -> None:
    telemetry.instrument()

    def look_up() -> str:
        raise type(f"Odd{CONTROL[1:]}", (Exception,), {"__module__": f"odd{CONTROL}"})

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return 1.0

    metric.__name__ = f"metric{CONTROL}"
    kind = type(f"Program{CONTROL[1:]}", (Program,), {})
    rows = [dspy.Example(question="q", answer="a").with_inputs("question")]
    dspy.Evaluate(devset=rows, metric=metric, num_threads=1, display_progress=False)(kind())
    Commands(f"vendor{CONTROL}/model{CONTROL}", cache=False)("hi")
    with pytest.raises(Exception):  # of a class made for this
        dspy.Tool(look_up, name=f"tool{CONTROL}")()
    spans = telemetry.spans
    assert {span.name.split(" ")[0] for span in spans} >= {"evaluate", "chat", "execute_tool"}
    assert all(span.name.isprintable() for span in spans)
    names = [value for span in spans for value in span.attributes.values() if isinstance(value, str)]
    points = [*telemetry.metric("gen_ai.client.operation.duration"), *telemetry.metric("dspy.evaluation.examples")]
    points += telemetry.metric("gen_ai.execute_tool.duration")
    labels = [str(value) for point in points for value in point.attributes.values()]
    assert [label for label in labels if "tool" in label or "model" in label or "metric" in label]
    assert all(label.isprintable() for label in labels)
    assert not [name for name in names if not set(CONTROL).difference(KEPT).isdisjoint(name)]


def test_a_saved_program_loads_with_its_control_characters(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    rows = [dspy.Example(question=CONTROL, answer=f"ä{CONTROL}").with_inputs("question")]
    program = dspy.LabeledFewShot(k=1).compile(dspy.Predict("question -> answer"), trainset=rows)
    attributes = telemetry.only("compile").attributes
    assert "dspy.program.state.complete" not in attributes
    loaded = dspy.Predict("question -> answer")
    loaded.load_state(json.loads(attributes["dspy.program.state"]))
    assert loaded.dump_state()["demos"] == program.dump_state()["demos"]


def test_parameters_of_an_optimizer_are_repaired_too(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return 1.0

    metric.__name__ = f"metric{CONTROL}"
    rows = [dspy.Example(question=f"q{CONTROL}", answer="a").with_inputs("question")]
    optimizer = dspy.BootstrapFewShot(metric=metric, max_rounds=1, teacher_settings={CONTROL: f"ä{CONTROL}{HALF}"})
    optimizer.compile(dspy.Predict("question -> answer"), trainset=rows)
    attributes = telemetry.only("compile BootstrapFewShot").attributes
    assert attributes["dspy.optimizer.params.metric"].startswith("metric\ufffd")
    assert "dspy.optimizer.params.teacher_settings" in attributes
    texts = [value for value in attributes.values() if isinstance(value, str)]
    assert not [text for text in texts if not set(CONTROL).difference(KEPT).isdisjoint(text)]
    encode_spans(telemetry.spans)
