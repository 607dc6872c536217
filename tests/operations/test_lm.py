"""LM calls: what each one says of itself, on every engine, is that very call's own truth."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import dspy
import pytest

import dspy_otel
from dspy_otel import semconv
from dspy_otel.operations.lm import LMDescription
from dspy_otel.operations.lm_request import is_loopback
from dspy_otel.operations.lm_response import LMResponse, id_of_litellm, response_of_call_result, without_provider
from tests.operations.common import NATIVE, VERSION, dummy, only_native
from tests.support.chat import chat
from tests.support.openai_server import Reply

ENGINES = ["lm15", "litellm"] if NATIVE else ["litellm"]


def on(server, engine, **options):
    """An LM of the server on one engine. DSPy 3.3 knows only LiteLLM and no such option."""
    return server.lm(**({"engine": "litellm"} if engine == "litellm" and NATIVE else {}), **options)


def direct_call(engine):
    """The snapshot of a call: the same on both engines, but DSPy 3.5 has no price for what LiteLLM's answers."""
    return "lm_direct_call" if engine == "lm15" or VERSION < (3, 5) else "lm_direct_call_litellm"


@pytest.mark.parametrize("engine", ENGINES)
def test_direct_call(telemetry, server, snapshot, engine):
    telemetry.instrument(capture_content="span_only")
    lm = on(server, engine, temperature=0.3, max_tokens=50, top_p=0.9, seed=7, stop=["END"])
    assert lm("Hi", presence_penalty=0.1) == ["Hello from the server."]
    snapshot(telemetry.tree(), direct_call(engine))
    assert telemetry.spans[0].attributes["dspy.lm.engine"] == engine


@pytest.mark.parametrize("engine", ENGINES)
async def test_direct_call_async(telemetry, server, snapshot, engine):
    telemetry.instrument(capture_content="span_only")
    lm = on(server, engine, temperature=0.3, max_tokens=50, top_p=0.9, seed=7, stop=["END"])
    assert await lm.acall("Hi", presence_penalty=0.1) == ["Hello from the server."]
    snapshot(telemetry.tree(), direct_call(engine))


@pytest.mark.parametrize("engine", ENGINES)
def test_messages_tools_and_several_candidates(telemetry, server, snapshot, engine):
    telemetry.instrument(capture_content="span_only")
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Weather here?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400}},
            ],
        },
    ]
    server.replies += [Reply(tool_calls=[("weather", {"place": "Bern"})])] * (2 if engine == "lm15" else 1)
    outputs = chat(on(server, engine), messages, n=2, tools=[tool])
    assert len(outputs) == 2
    snapshot(telemetry.tree(), f"lm_tools_{engine}")


@pytest.mark.parametrize("engine", ENGINES)
def test_reasoning_and_tool_results_are_parts_of_messages(telemetry, server, engine):
    telemetry.instrument(capture_content="span_only")
    server.replies.append(Reply("sunny", reasoning="let me see"))
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Bern"}'}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    chat(on(server, engine), messages)
    attributes = telemetry.spans[0].attributes
    assert json.loads(attributes["gen_ai.input.messages"])[1:] == [
        {
            "role": "assistant",
            "parts": [{"type": "tool_call", "id": "call_1", "name": "weather", "arguments": {"place": "Bern"}}],
        },
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "call_1", "response": "sunny"}]},
    ]
    (message,) = json.loads(attributes["gen_ai.output.messages"])
    assert message["parts"][-1] == {"type": "text", "content": "sunny"}
    assert message["parts"][0] == {"type": "reasoning", "content": "let me see"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_priced_model_on_loopback_says_so(telemetry, server, engine):
    """DSPy prices by name: nobody bills a local server that has the name of a model with a price."""
    telemetry.instrument()
    on(server, engine)("Hi")
    on(server, engine, model="openai/nobody-sells-this")("Hi")
    priced, unpriced = (span.attributes for span in telemetry.spans)
    assert priced["dspy.lm.cost"] > 0
    assert priced["dspy.lm.cost.loopback"] is True
    assert not [key for key in unpriced if key.startswith("dspy.lm.cost")]


def test_what_is_loopback():
    assert all(map(is_loopback, ["localhost", "api.localhost", "127.0.0.1", "127.9.9.9", "::1"]))
    assert not any(
        map(is_loopback, ["api.openai.com", "localhost.example.com", "10.0.0.1", "::2", "", "127.0.0.1.nip.io"])
    )


def test_an_unpriced_cache_hit_has_no_cost(telemetry, server):
    telemetry.instrument()
    lm = on(server, ENGINES[0], model="openai/nobody-sells-this", cache=True)
    lm("Hi")
    lm("Hi")
    first, hit = (span.attributes for span in telemetry.spans)
    assert hit["dspy.lm.cache_hit"] is True
    assert not [key for key in (*first, *hit) if key.startswith("dspy.lm.cost")]


@pytest.mark.parametrize("model", ["lm_studio/gemma", "llamafile/gemma"])
def test_litellms_providers_are_no_part_of_the_servers_name(telemetry, server, model):
    telemetry.instrument()
    on(server, "litellm", model=model)("Hi")
    attributes = telemetry.spans[0].attributes
    assert attributes["gen_ai.request.model"] == "gemma"
    assert attributes["gen_ai.response.model"] == "gemma-2024-07-18"


@pytest.mark.parametrize(
    ("named", "requested", "model"),
    [
        ("ollama_chat/llama3", "ollama_chat/llama3", "llama3"),
        ("lm_studio//models/a.gguf", "lm_studio/a", "/models/a.gguf"),
        ("hosted_vllm/openai/gpt-oss", "hosted_vllm/openai/gpt-oss", "openai/gpt-oss"),
        ("openai/gpt-4o", "openrouter/openai/gpt-4o", "openai/gpt-4o"),
        ("openai/gpt-oss", "openai/openai/gpt-oss", "openai/gpt-oss"),
        ("openai/openai/gpt-oss", "openai/openai/gpt-oss", "openai/gpt-oss"),
        ("gpt-4o", "gpt-4o", "gpt-4o"),
        ("gpt-4o", "openai/gpt-4o", "gpt-4o"),
        (None, "openai/gpt-4o", None),
        ("gpt-4o", None, "gpt-4o"),
    ],
)
def test_a_name_without_its_provider(named, requested, model):
    assert without_provider(named, requested) == model


def test_an_id_that_litellm_makes_up_is_left_out():
    from litellm import ModelResponse

    assert ModelResponse().id
    assert id_of_litellm(ModelResponse()) is None
    assert id_of_litellm(ModelResponse(id="chatcmpl-9X3")) == "chatcmpl-9X3"


@only_native
@pytest.mark.parametrize(
    ("body", "response_id", "model"),
    [
        # Chat and Responses: the body has all. A stream's first event may lack the model.
        ({"id": "i", "model": "served"}, None, ("served", "i")),
        ({"id": "i", "model": "served"}, "i", ("served", "i")),
        ({"id": "i"}, "i", (None, "i")),
        ({}, None, (None, None)),
        ({"modelVersion": "served"}, None, ("served", None)),  # Gemini
        ({"type": "message_delta"}, "i", ("echo", "i")),  # Anthropic's stream: its first event had both.
        (None, None, ("echo", None)),  # a custom engine
    ],
)
def test_the_model_is_the_servers_word(body, response_id, model):
    response = SimpleNamespace(provider_data=body, id=response_id, model="echo", finish_reason="stop")
    result = SimpleNamespace(responses=(response,), outputs=[], usage={}, cost=None, cache_hit=False, raw=response)
    answer = response_of_call_result(result, "openai/echo")
    assert (answer.model, answer.response_id) == model


@pytest.mark.parametrize("engine", ENGINES)
def test_cache_hit_bills_nothing(telemetry, server, engine):
    telemetry.instrument()
    lm = on(server, engine, cache=True)
    lm("Hi")
    lm("Hi")
    first, second = (span.attributes for span in telemetry.spans)
    assert len(server.requests) == 1
    assert first["dspy.lm.cache_hit"] is False
    assert first["dspy.lm.cost"] == pytest.approx(2.4e-05)
    assert "dspy.lm.cost.saved" not in first
    assert second["dspy.lm.cache_hit"] is True
    assert second["dspy.lm.cost"] == 0.0
    assert second["dspy.lm.cost.saved"] == pytest.approx(2.4e-05)
    assert not [key for key in second if key.startswith("gen_ai.usage.")]
    assert second["gen_ai.response.model"] == "gpt-4o-mini-2024-07-18"


@only_native
def test_cache_hit_of_the_other_engine(telemetry, server):
    """DSPy shares its cache between engines."""
    telemetry.instrument()
    server.lm(cache=True)("Hi")
    server.lm(cache=True, engine="litellm")("Hi")
    assert [span.attributes["dspy.lm.cache_hit"] for span in telemetry.spans] == [False, True]
    assert "gen_ai.usage.input_tokens" not in telemetry.spans[1].attributes


@pytest.mark.parametrize("engine", ENGINES)
def test_totals_of_a_program_leave_cached_calls_out(telemetry, server, engine):
    telemetry.instrument()
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=on(server, engine, cache=True)):
        program(question="x")
        program(question="x")
    first, second = (span.attributes for span in telemetry.named("invoke_workflow"))
    assert first["dspy.usage.input_tokens"] == 100
    assert first["dspy.usage.output_tokens"] == 20
    assert first["dspy.usage.cost"] == pytest.approx(2.4e-05)
    assert "dspy.usage.input_tokens" not in second
    assert second["dspy.usage.cost"] == 0.0
    assert second["dspy.usage.cache_hits"] == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("settings", [{"disable_history": True}, {"max_history_size": 0}, {"max_history_size": 2}])
def test_history_settings_change_nothing(telemetry, server, engine, settings):
    telemetry.instrument()
    lm = on(server, engine)
    with dspy.context(**settings):
        for tokens in (11, 12, 13, 14):
            lm(f"tokens={tokens}")
    assert [span.attributes["gen_ai.usage.input_tokens"] for span in telemetry.spans] == [11, 12, 13, 14]


def check_own_tokens(spans, numbers):
    """Each span's counters belong to the prompt of that span."""
    found = {}
    for span in spans:
        prompt = span.attributes["gen_ai.input.messages"]
        number = int(prompt.split("tokens=")[1].split('"')[0])
        found[number] = (span.attributes["gen_ai.usage.input_tokens"], span.attributes["gen_ai.usage.output_tokens"])
    assert found == {number: (number, number + 1) for number in numbers}


@pytest.mark.parametrize("engine", ENGINES)
def test_24_threads_on_one_lm(telemetry, server, engine):
    telemetry.instrument(capture_content="span_only")
    lm = on(server, engine)
    numbers = range(1000, 1096)
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda number: lm(f"tokens={number}"), numbers))
    check_own_tokens(telemetry.spans, numbers)


@pytest.mark.parametrize("engine", ENGINES)
async def test_24_tasks_on_one_lm(telemetry, server, engine):
    telemetry.instrument(capture_content="span_only")
    lm = on(server, engine)
    numbers = range(1000, 1048)
    with telemetry.tracer.start_as_current_span("application"):
        await asyncio.gather(*(lm.acall(f"tokens={number}") for number in numbers))
    check_own_tokens(telemetry.named("chat"), numbers)
    assert len(telemetry.children(telemetry.only("application"))) == 48


@pytest.mark.parametrize("engine", ENGINES)
def test_rollout_id_and_reasoning_level(telemetry, server, engine):
    telemetry.instrument()
    on(server, engine, cache=True)("Hi", rollout_id=3, temperature=0.5)
    assert telemetry.spans[0].attributes["dspy.lm.rollout_id"] == "3"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_error(telemetry, server, snapshot, engine, asynchronous):
    telemetry.instrument()
    server.replies.append(Reply("no such canary", status=400, headers={"x-request-id": "req-77"}))
    lm = on(server, engine, num_retries=0)
    with pytest.raises(Exception, match="canary"):
        await lm.acall("Hi") if asynchronous else lm("Hi")
    span = telemetry.spans[0]
    if VERSION >= (3, 3):  # before, LiteLLM's own exceptions come through
        assert span.attributes["http.response.status_code"] == 400
    assert "canary" not in telemetry.everything()
    if engine == "lm15":
        assert span.attributes["dspy.lm.request.id"] == "req-77"
        snapshot(telemetry.tree(), "lm_error")


@only_native
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_retries_are_events_and_counted(telemetry, server, snapshot, asynchronous):
    telemetry.instrument()
    server.replies += [Reply("busy", status=500, headers={"retry-after": "0"})] * 2
    lm = server.lm(num_retries=3)
    await lm.acall("Hi") if asynchronous else lm("Hi")
    snapshot(telemetry.tree(), "lm_retries")
    (point,) = telemetry.metric("dspy.lm.retries")
    assert point.value == 2
    assert point.attributes["error.type"].startswith("dspy.utils.exceptions.LM")


def test_text_completion(telemetry, server, snapshot):
    telemetry.instrument(capture_content="span_only")
    server.lm("text-completion-openai/gpt-3.5-turbo-instruct", model_type="text")("Hi")
    snapshot(telemetry.tree())


def test_responses(telemetry, server, snapshot):
    if not NATIVE:
        pytest.importorskip("mcp", reason="LiteLLM needs the mcp package for the Responses API")
    telemetry.instrument(capture_content="span_only")
    server.lm(model_type="responses")("Hi")
    snapshot(telemetry.tree())


@only_native
def test_explicit_request(telemetry, server, snapshot):
    from dspy.lm15 import Config, Message, Request, TextPart

    telemetry.instrument(capture_content="span_only")
    request = Request(
        model="openai/gpt-4o-mini",
        system="Be brief.",
        messages=(Message(role="user", parts=(TextPart(text="Hi"),)),),
        config=Config(temperature=0.25, max_tokens=33),
    )
    response = server.lm()(request=request)
    assert response is not None
    snapshot(telemetry.tree())


class Echo(dspy.BaseLM):
    """A user's own LM: the OpenAI shape, without any HTTP."""

    def forward(self, prompt=None, messages=None, **kwargs):
        from types import SimpleNamespace as Bag

        message = Bag(content=f"echo {prompt}", tool_calls=None, reasoning_content=None)
        return Bag(
            id="echo-1",
            model="echo-large",
            choices=[Bag(message=message, finish_reason="stop", index=0)],
            usage={"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        )

    async def aforward(self, prompt=None, messages=None, **kwargs):
        return self.forward(prompt, messages, **kwargs)


async def test_custom_base_lm(telemetry, snapshot):
    telemetry.instrument(capture_content="span_only")
    lm = Echo(model="acme/echo")
    assert lm("Hi") == ["echo Hi"]
    sync = telemetry.tree()
    telemetry.clear()
    assert await lm.acall("Hi") == ["echo Hi"]
    assert telemetry.tree() == sync
    snapshot(sync)


@only_native
def test_custom_engine_object(telemetry, server, snapshot):
    from dspy.lm15 import Message, Response, TextPart, Usage

    class Engine:
        def complete(self, request):
            return Response(
                id="own-1",
                model="own-model",
                message=Message(role="assistant", parts=(TextPart(text="from my engine"),)),
                finish_reason="stop",
                usage=Usage(input_tokens=5, output_tokens=6, total_tokens=11),
            )

        def stream(self, request):
            raise NotImplementedError

    telemetry.instrument(capture_content="span_only")
    lm = dspy.LM("acme/own-model", engine=Engine(), cache=False)
    assert lm("Hi") == ["from my engine"]
    snapshot(telemetry.tree())
    assert telemetry.spans[0].attributes["dspy.lm.engine"] == "Engine"


def test_unknown_usage_and_price_are_absent(telemetry, server):
    telemetry.instrument()
    server.usage = False
    server.lm("openai/no-such-model")("Hi")
    attributes = telemetry.spans[0].attributes
    assert not [key for key in attributes if key.startswith("gen_ai.usage.") or key.startswith("dspy.lm.cost")]
    assert not telemetry.metric("gen_ai.client.token.usage")
    assert not telemetry.metric("dspy.lm.cost")


def test_after_uninstrument_nothing_is_recorded(telemetry, server):
    telemetry.instrument()
    dspy_otel.uninstrument()
    server.lm()("Hi")
    assert telemetry.spans == []


only_typed = pytest.mark.skipif(not hasattr(dspy, "LMRequest"), reason="DSPy 3.3 alone has experimental typed requests")


@only_typed
@pytest.mark.parametrize("way", ["request", "experimental", "messages"])
def test_typed_requests_of_dspy_33(telemetry, server, way):
    telemetry.instrument(capture_content="span_only")
    lm = server.lm()
    if way == "request":
        lm(request=dspy.LMRequest.from_call(prompt="tokens=21", model=lm.model, temperature=0.25))
    elif way == "experimental":
        with dspy.context(experimental=True):
            lm("tokens=21", temperature=0.25)
    else:
        with dspy.context(experimental=True):
            lm(dspy.System("Be brief."), dspy.User("tokens=21"), temperature=0.25)
    attributes = telemetry.only("chat").attributes
    assert "tokens=21" in attributes["gen_ai.input.messages"]
    assert "Hello" in attributes["gen_ai.output.messages"]
    assert attributes["gen_ai.usage.input_tokens"] == 21
    assert attributes["gen_ai.request.temperature"] == 0.25
    assert attributes["gen_ai.response.id"].startswith("chatcmpl")
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 40
    assert attributes["dspy.lm.cost"] > 0
    if way == "messages":
        assert [message["role"] for message in json.loads(attributes["gen_ai.input.messages"])] == ["system", "user"]


@only_typed
def test_typed_lm_of_dspy_33(telemetry):
    class Typed(dspy.BaseLM):
        forward_contract = "typed_lm"

        def forward(self, request):
            return dspy.LMResponse.from_text(
                "fine", model="typed-1", usage={"prompt_tokens": 3, "completion_tokens": 4}
            )

    telemetry.instrument(capture_content="span_only")
    assert Typed(model="acme/typed")("Hi") == ["fine"]
    attributes = telemetry.only("chat").attributes
    assert attributes["gen_ai.usage.input_tokens"] == 3
    assert attributes["gen_ai.response.model"] == "typed-1"
    assert "fine" in attributes["gen_ai.output.messages"]


@pytest.mark.parametrize(("content", "shown"), [("no_content", None), ("span_only", ("CANARY", "[masked]"))])
def test_stop_sequences_are_content(telemetry, content, shown):
    telemetry.instrument(capture_content=content)
    dummy({"answer": "b"})("hi", stop=["CANARY", "sk-" + "a" * 30])
    assert telemetry.only("chat").attributes.get("gen_ai.request.stop_sequences") == shown


def test_what_answers_share_is_made_once_unless_it_is_long():
    description = LMDescription("chat m", "m", {}, {}, None)
    usual = LMResponse([], {}, None, False, "m-1", "id", ["stop"])
    first = description.answered("litellm", None, usual)
    assert first == {
        semconv.LM_CACHE_HIT: False,
        semconv.GEN_AI_RESPONSE_MODEL: "m-1",
        semconv.GEN_AI_RESPONSE_FINISH_REASONS: ("stop",),
        semconv.LM_ENGINE: "litellm",
    }
    assert description.answered("litellm", None, usual._replace(response_id="other")) is first
    assert description.answered("lm15", "openai", usual)[semconv.GEN_AI_PROVIDER_NAME] == "openai"
    long = usual._replace(finish_reasons=["stop"] * 1000)
    assert len(description.answered("litellm", None, long)[semconv.GEN_AI_RESPONSE_FINISH_REASONS]) == 1000
    assert description.answered("litellm", None, long) is not description.answered("litellm", None, long)
    for number in range(100):
        description.answered("litellm", None, usual._replace(model=f"m-{number}"))
    assert len(description._answered) <= 32
