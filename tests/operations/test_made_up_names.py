"""Names that a server, a tool or an LM makes up: bounded, plain, without secrets, and few on metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM
from opentelemetry import baggage
from opentelemetry import context as otel_context

from dspy_otel.content import redaction
from dspy_otel.content.names import VOCABULARY, is_parameter, plain_name, plain_word, without_secrets
from dspy_otel.core.metrics import MOST_VALUES, MetricAttributes
from tests.support.older import DSPY
from tests.support.spans import Recorder

KEY = "sk-proj-" + "aB3dE6gH9jK2mN5pQ8sT" * 2


class Server(dspy.BaseLM):
    """Answers with whatever it is given in place of its names."""

    def __init__(self, **names: Any) -> None:
        super().__init__("vendor/model", cache=False)
        self.names = names

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        names = {name: value() if callable(value) else value for name, value in self.names.items()}
        choice = SimpleNamespace(message=SimpleNamespace(content="a"), finish_reason=names.get("reason", "stop"))
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return SimpleNamespace(
            choices=[choice], usage=usage, model=names.get("model", "model"), id=names.get("id", "resp-1")
        )


def test_what_a_server_makes_up_is_no_way_out_for_content(telemetry: Recorder) -> None:
    telemetry.instrument()
    said = f"my prompt, with\n{KEY}\x00 and \ud83d more" * 50
    Server(model=said, id=said, reason=said)("hi")
    span = telemetry.only("chat")
    for name in ("gen_ai.response.model", "gen_ai.response.id"):
        shown = str(span.attributes[name])
        assert len(shown) <= 300
        assert shown.isprintable()
        assert " " not in shown
    # lm15 has words of its own for reasons.
    assert span.attributes["gen_ai.response.finish_reasons"] == (("other",) if DSPY < (3, 5) else ("stop",))
    assert KEY not in telemetry.everything()


@pytest.mark.parametrize(
    "name",
    [
        *("gpt-4o-mini-2024-07-18", "meta-llama/Llama-3.1-8B-Instruct:free", "ft:gpt-4o:org::Ab12Cd", "qwen2.5:0.5b"),
        *("anthropic.claude-3-5-sonnet-20241022-v2:0", "accounts/x/models/y#z", "chatcmpl-AbC123def456GhI789jkl012"),
        *("resp_68af40a1f0c08190b7a1f4ab7a2d9f0c0f3a", "msg_01XFDUDYJgAACzvnptvVoYEL", "模型-7b"),
    ],
)
def test_names_of_real_servers_stay(name: str) -> None:
    assert plain_name(name) == name


@pytest.mark.parametrize(
    "word", ["stop", "length", "tool_calls", "content_filter", "end_turn", "max_tokens", "MAX_TOKENS", "xhigh", "none"]
)
def test_words_of_real_vocabularies_stay(word: str) -> None:
    assert word in VOCABULARY
    assert plain_word(word) == word


@pytest.mark.parametrize("word", ["two words", "", "1", KEY, "ä\n", "a" * 100, "x=1"])
def test_no_other_text_is_a_word(word: str) -> None:
    assert plain_word(word) == "other"


def test_another_model_in_each_answer_makes_a_bounded_number_of_series(telemetry: Recorder) -> None:
    telemetry.instrument()
    numbers = iter(range(10_000))
    lm = Server(model=lambda: f"model-{next(numbers)}")
    for _ in range(MOST_VALUES + 50):
        lm("hi")
    points = telemetry.metric("gen_ai.client.operation.duration")
    models = {point.attributes["gen_ai.response.model"]: point.count for point in points}
    assert len(models) == MOST_VALUES + 1
    assert models["other"] == 50
    assert len(telemetry.metric("gen_ai.client.token.usage")) == 2 * (MOST_VALUES + 1)
    assert len({span.attributes["gen_ai.response.model"] for span in telemetry.named("chat")}) == MOST_VALUES + 50


def test_labels_can_be_sent_by_every_exporter(telemetry: Recorder) -> None:
    telemetry.instrument()

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return 1.0

    metric.__name__ = "met\ud83dric\0"
    rows = [dspy.Example(question="q").with_inputs("question")]
    dspy.Evaluate(devset=rows, metric=metric, num_threads=1, display_progress=False)(lambda question: "a")
    dspy.Tool(lambda: 1, name="look\ud83d")()
    for name in ("dspy.evaluation.examples", "gen_ai.execute_tool.duration"):
        for point in telemetry.metric(name):
            for value in point.attributes.values():
                assert "\0" not in str(value)
                str(value).encode("utf-8")


def test_labels_that_are_good_are_not_copied() -> None:
    labels = {"gen_ai.response.model": "m", "dspy.program.name": "P", "server.port": 1}
    assert MetricAttributes().of(labels) is labels
    assert MetricAttributes().of(None) is None


def test_a_text_is_no_name_of_a_parameter(telemetry: Recorder) -> None:
    class Open(dspy.teleprompt.Teleprompter):
        def compile(self, student: Any, **settings: Any) -> Any:
            return student

    telemetry.instrument()
    Open().compile(dspy.Predict("q -> a"), **{"Ada is ill": 1, KEY: 2, "depth_2": 3, "a\n": 4})
    names = [name for name in telemetry.only("compile").attributes if name.startswith("dspy.optimizer.params.")]
    assert names == ["dspy.optimizer.params.depth_2"]


@pytest.mark.parametrize("name", ["sk_" + "live_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ", "a" * 100, "1a", "ä"])
def test_a_secret_is_no_name_of_a_parameter(name: str) -> None:
    assert not is_parameter(name)


def test_half_a_secret_is_none_either() -> None:
    for room in (10, 30, 250):
        assert "aB3dE6gH9jK2mN5pQ8sT" not in plain_name("x" * (256 - room) + " " + KEY)


def test_sessions_and_users_of_callers_are_bounded_and_masked_and_else_as_they_are(telemetry: Recorder) -> None:
    telemetry.instrument()
    token = otel_context.attach(baggage.set_baggage("session.id", f"my prompt\n{KEY}" * 40))
    token_of_user = otel_context.attach(baggage.set_baggage("user.id", "Ada L. <ada@example.com>"))
    try:
        with dspy.context(lm=DummyLM([{"answer": "a"}])):
            dspy.Predict("question -> answer")(question="q")
    finally:
        otel_context.detach(token_of_user)
        otel_context.detach(token)
    span = telemetry.only("invoke_workflow")
    assert len(str(span.attributes["session.id"])) <= 1024
    assert span.attributes["user.id"] == "Ada L. <ada@example.com>"
    assert KEY[:20] not in telemetry.everything()


def test_the_prompt_and_conversation_that_the_application_names(telemetry: Recorder) -> None:
    telemetry.instrument()
    long, broken = f"my prompt\n{KEY}" * 40, "v\ud800\0"
    named = baggage.set_baggage("gen_ai.conversation.id", "c1")
    prompt = baggage.set_baggage(
        "gen_ai.prompt.version", broken, baggage.set_baggage("gen_ai.prompt.name", long, named)
    )
    lm = DummyLM([{"answer": "a"}] * 2)
    for context in (prompt, named):
        token = otel_context.attach(context)
        try:
            with dspy.context(lm=lm):
                dspy.Predict("question -> answer")(question="q")
        finally:
            otel_context.detach(token)
    assert {span.attributes["gen_ai.conversation.id"] for span in telemetry.spans} == {"c1"}
    first, second = telemetry.named("chat")
    assert len(str(first.attributes["gen_ai.prompt.name"])) <= 1024
    assert first.attributes["gen_ai.prompt.version"] == "v" + "\N{REPLACEMENT CHARACTER}" * 2
    assert not [key for key in second.attributes if key.startswith("gen_ai.prompt.")]
    assert not [key for span in telemetry.named("invoke") for key in span.attributes if "prompt" in key]
    assert KEY[:20] not in telemetry.everything()


def test_efforts_and_rollouts_are_no_way_out_either(telemetry: Recorder) -> None:
    telemetry.instrument()
    Server()("hi", reasoning_effort=KEY, rollout_id=f"try {KEY}")
    span = telemetry.only("chat")
    assert span.attributes["gen_ai.request.reasoning.level"] == "other"
    assert KEY not in telemetry.everything()


def test_a_name_that_turns_out_to_be_a_secret_is_masked_from_then_on() -> None:
    text = "correcthorsebattery9"
    assert plain_name(text) == without_secrets(text) == text
    redaction.remember(text)
    assert plain_name(text) == without_secrets(text) == redaction.MASK


@pytest.mark.parametrize("hosted", [True, False])
def test_an_embedders_name_is_no_way_out_for_a_key(hosted: bool, telemetry: Recorder) -> None:
    telemetry.instrument()

    def embed(texts: list[str]) -> Any:
        raise ValueError

    embed.__qualname__ = f"embed-{KEY}"
    embedder = dspy.Embedder(f"openai/{KEY}" if hosted else embed, caching=False, api_base="http://127.0.0.1:9")
    with pytest.raises(Exception):  # LiteLLM's, or the function's
        embedder("text")
    assert redaction.MASK in telemetry.only("embeddings").name
    assert KEY not in telemetry.everything()
    labels = [dict(point.attributes) for point in telemetry.metric("gen_ai.client.operation.duration")]
    assert labels
    assert KEY not in str(labels)
