"""`BaseLM.generate`, which adapters call from DSPy 3.5 on. Until that can be installed, these run on the shim of it."""

from __future__ import annotations

import json
import warnings
from types import FunctionType
from typing import Any

import dspy
import pytest

import dspy_otel
from tests.operations.test_lm import on
from tests.support.older import DSPY
from tests.support.openai_server import OpenAIServer, Reply
from tests.support.spans import Recorder

pytestmark = pytest.mark.skipif(DSPY < (3, 5), reason="before DSPy 3.5 there is no generate")

ENGINES = ["lm15", "litellm"]


def request_of(lm: Any, text: str = "Hi", **config: Any) -> Any:
    from dspy.lm15 import Config, Message, Request

    return Request(
        model=lm.model, system="Be brief.", messages=(Message.user(text),), config=Config(max_tokens=33, **config)
    )


class Engine:
    """Answers each request with a number, and bills 10 + 1 tokens."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def complete(self, request: Any) -> Any:
        from dspy.lm15 import Message, Response, Usage

        self.requests.append(request)
        said = f"[[ ## answer ## ]]\n{len(self.requests)}\n\n[[ ## completed ## ]]"
        usage = Usage(input_tokens=10, output_tokens=1, reasoning_tokens=1)
        return Response(id="own", model="own", message=Message.assistant(said), finish_reason="stop", usage=usage)


class AsyncEngine(Engine):
    async def complete(self, request: Any) -> Any:
        return super().complete(request)


def own(kind: type = dspy.LM, **options: Any) -> Any:
    return kind("acme/own", engine=Engine(), async_engine=AsyncEngine(), **{"cache": False, **options})


async def ask(lm: Any, asynchronous: bool, **options: Any) -> Any:
    return await lm.agenerate(request_of(lm), **options) if asynchronous else lm.generate(request_of(lm), **options)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
async def test_one_call_is_one_span(telemetry: Recorder, server: OpenAIServer, engine: str, asynchronous: bool) -> None:
    telemetry.instrument(capture_content="span_only")
    lm = on(server, engine, rollout_id=7, temperature=0.5)
    server.replies += [Reply("one", reasoning="let me see"), Reply("two")]
    first, second = await ask(lm, asynchronous, n=2)
    assert (first.text, second.text) == ("one", "two")
    assert len(server.requests) == 2
    attributes = telemetry.only("chat gpt-4o-mini").attributes
    assert len(telemetry.spans) == 1
    assert attributes["dspy.lm.engine"] == engine
    assert attributes["gen_ai.request.max_tokens"] == 33
    assert attributes["gen_ai.request.choice.count"] == 2
    assert attributes["dspy.lm.rollout_id"] == "7"
    assert attributes["gen_ai.response.model"] == "gpt-4o-mini-2024-07-18"
    assert attributes["gen_ai.response.finish_reasons"] == ("stop", "stop")
    assert attributes["gen_ai.usage.input_tokens"] == 200
    assert attributes["gen_ai.usage.output_tokens"] == 40
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 80
    assert ("dspy.lm.cost" in attributes) is (engine == "lm15")
    assert json.loads(attributes["gen_ai.system_instructions"]) == [{"type": "text", "content": "Be brief."}]
    assert json.loads(attributes["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "Hi"}]}
    ]
    said = [message["parts"] for message in json.loads(attributes["gen_ai.output.messages"])]
    assert said[0] == [{"type": "reasoning", "content": "let me see"}, {"type": "text", "content": "one"}]
    assert said[1] == [{"type": "text", "content": "two"}]
    (point,) = telemetry.metric("gen_ai.client.operation.duration")
    assert point.count == 1
    assert sum(point.sum for point in telemetry.metric("gen_ai.client.token.usage")) == 240


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_cache_retries_and_errors(telemetry: Recorder, server: OpenAIServer, asynchronous: bool) -> None:
    telemetry.instrument()
    lm = server.lm(cache=True, num_retries=1)
    server.replies.append(Reply("busy", status=500, headers={"retry-after": "0"}))
    for _ in range(2):
        await ask(lm, asynchronous)
    server.replies.append(Reply("no such canary", status=400, headers={"x-request-id": "req-77"}))
    with pytest.raises(Exception, match="canary"):
        await ask(lm, asynchronous, n=2)
    asked, hit, failed = (span.attributes for span in telemetry.spans)
    assert asked["dspy.lm.retries"] == 1
    assert [event.name for event in telemetry.spans[0].events] == ["dspy.lm.retry"]
    assert (asked["dspy.lm.cache_hit"], hit["dspy.lm.cache_hit"]) == (False, True)
    assert hit["dspy.lm.cost.saved"] == asked["dspy.lm.cost"]
    assert not [key for key in hit if key.startswith("gen_ai.usage.")]
    assert failed["http.response.status_code"] == 400
    assert failed["dspy.lm.request.id"] == "req-77"


def test_settings_that_a_request_carries(telemetry: Recorder) -> None:
    from dspy.lm15 import Reasoning

    telemetry.instrument(capture_content="span_only")
    lm = own()
    config = {"presence_penalty": 0.5, "reasoning": Reasoning(effort="high"), "stop": ("END",)}
    lm.generate(request_of(lm, response_format={"type": "json_object"}, **config))
    attributes = telemetry.only("chat").attributes
    assert attributes["gen_ai.request.presence_penalty"] == 0.5
    assert attributes["gen_ai.request.reasoning.level"] == "high"
    assert attributes["gen_ai.request.stop_sequences"] == ("END",)
    assert attributes["gen_ai.output.type"] == "json"


# --- counted once ----------------------------------------------------------------------------------------------------


class GenerateByCall(dspy.BaseLM):
    """Each answer is a call of its own."""

    def generate(self, request: Any, *, n: int = 1, **options: Any) -> Any:
        return [self(request, **options) for _ in range(n)]

    async def agenerate(self, request: Any, *, n: int = 1, **options: Any) -> Any:
        return [await self.acall(request, **options) for _ in range(n)]


class CallByGenerate(dspy.BaseLM):
    """A call is what generates one answer."""

    def __call__(self, request: Any, **options: Any) -> Any:
        return self.generate(request, **options)[0]

    async def acall(self, request: Any, **options: Any) -> Any:
        return (await self.agenerate(request, **options))[0]


class Both(GenerateByCall):
    """Overrides all of them, and goes through the other from each."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return super().__call__(*args, **options)

    async def acall(self, *args: Any, **options: Any) -> Any:
        return await super().acall(*args, **options)


class AsynchronousByOther(dspy.BaseLM):
    """Its coroutines run the other method."""

    async def agenerate(self, request: Any, **options: Any) -> Any:
        return self.generate(request, **options)


class Twice(dspy.BaseLM):
    def generate(self, *args: Any, **options: Any) -> Any:
        super().generate(*args, **options)
        return super().generate(*args, **options)

    async def agenerate(self, *args: Any, **options: Any) -> Any:
        await super().agenerate(*args, **options)
        return await super().agenerate(*args, **options)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("kind", "requests"),
    [(dspy.BaseLM, 2), (GenerateByCall, 2), (CallByGenerate, 2), (Both, 2), (AsynchronousByOther, 2), (Twice, 4)],
)
async def test_each_call_is_counted_once(telemetry: Recorder, kind: type, requests: int, asynchronous: bool) -> None:
    telemetry.instrument()
    lm = own(kind)
    with dspy.context(lm=lm):
        program = dspy.Predict("question -> answer", n=2)
        answers = (await program.acall(question="x") if asynchronous else program(question="x")).completions
    assert len(answers) == 2
    assert len(telemetry.named("chat")) == 1
    totals = telemetry.only("invoke_workflow").attributes
    assert totals["dspy.usage.lm_calls"] == 1
    assert totals["dspy.usage.input_tokens"] == 10 * requests
    assert telemetry.only("chat").attributes["gen_ai.usage.output_tokens"] == requests
    assert sum(point.sum for point in telemetry.metric("gen_ai.client.token.usage")) == 11 * requests


@pytest.mark.parametrize("kind", [dspy.BaseLM, GenerateByCall, CallByGenerate, Both])
async def test_a_call_with_a_request_is_counted_once(telemetry: Recorder, kind: type) -> None:
    telemetry.instrument()
    lm = own(kind)
    lm(request_of(lm))
    await lm.acall(request_of(lm))
    assert [span.name for span in telemetry.spans] == ["chat own"] * 2
    assert [span.attributes["gen_ai.usage.input_tokens"] for span in telemetry.spans] == [10, 10]


def test_classes_made_later_and_switching_off(telemetry: Recorder) -> None:
    before = vars(dspy.BaseLM)["generate"]
    telemetry.instrument()
    late = own(type("Late", (GenerateByCall,), {}))
    late.generate(request_of(late))
    assert len(telemetry.spans) == 1
    dspy_otel.uninstrument()
    late.generate(request_of(late))
    assert len(telemetry.spans) == 1
    assert vars(dspy.BaseLM)["generate"] is before


def test_an_lm_for_sandboxes_hands_on(telemetry: Recorder) -> None:
    from dspy.primitives.facade import SandboxLM

    telemetry.instrument()
    lm = SandboxLM(own())
    with dspy.context(lm=lm):
        assert dspy.Predict("question -> answer")(question="x").answer == "1"
    assert len(telemetry.named("chat")) == 1


# --- adapters --------------------------------------------------------------------------------------------------------


class French(dspy.ChatAdapter):
    def format(self, signature: Any, demos: Any, inputs: Any) -> Any:
        prompt = super().format(signature, demos, inputs)
        return dspy.adapters.Prompt(messages=prompt.messages, system=prompt.system + "\nAnswer in French.")


def test_a_prompt_is_shown_by_adapter_spans(telemetry: Recorder) -> None:
    telemetry.instrument(capture_content="span_only", adapter_spans=True)
    lm = own()
    with dspy.context(lm=lm, adapter=French()):
        assert dspy.Predict("question -> answer")(question="x").answer == "1"
    names = [span.name for span in telemetry.spans]
    assert names == ["invoke_workflow Predict", "French.format", "chat own", "French.parse"]
    shown = json.loads(telemetry.only("French.format").attributes["output.value"])
    assert shown["system"].endswith("Answer in French.")
    assert [(message["role"], message["parts"][0]["text"][:18]) for message in shown["messages"]] == [
        ("user", "[[ ## question ## ]]"[:18])
    ]
    (said,) = json.loads(telemetry.only("chat").attributes["gen_ai.system_instructions"])
    assert said["content"] == shown["system"]
    assert lm.engine.requests[0].system == shown["system"]


def test_a_prompt_stays_out_without_content(telemetry: Recorder) -> None:
    telemetry.instrument(adapter_spans=True)
    with dspy.context(lm=own(), adapter=French()):
        dspy.Predict("question -> answer")(question="x")
    assert "Answer in French" not in telemetry.everything()


# --- what is gone ----------------------------------------------------------------------------------------------------


def test_what_is_gone_is_missed_by_nobody(telemetry: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    for owner, name in (
        *((dspy.BaseLM, "forward"), (dspy.LM, "forward"), (dspy, "CodeAct"), (dspy, "ProgramOfThought")),
        (dspy.clients.engines, "LegacyEngine"),
    ):
        assert not hasattr(owner, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        telemetry.instrument(adapter_spans=True)
        with dspy.context(lm=own()):
            dspy.Predict("question -> answer")(question="x")
    assert [record for record in caplog.records if record.name.startswith("dspy_otel")] == []


async def test_what_is_removed_is_refused_as_it_is_without_us(telemetry: Recorder) -> None:
    elsewhere = FunctionType((lambda self, **_: None).__code__, {"__name__": "elsewhere"})
    telemetry.instrument()
    with pytest.raises(TypeError, match=r"was removed in DSPy 3\.5"):
        own()(messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(TypeError, match="Request"):
        own().generate("Hi")
    with pytest.raises(dspy.LMUnsupportedFeatureError, match="async_engine"):
        await dspy.BaseLM("acme/own", engine=Engine()).acall("Hi")
    with pytest.raises(dspy.LMUnsupportedFeatureError, match="engine"):
        type("Old", (dspy.BaseLM,), {"forward": elsewhere})("acme/own")("Hi")
    assert [span.status.status_code.name for span in telemetry.spans] == ["ERROR"] * 4
