"""LM calls against a real server (llama.cpp's, with a small model), each joined by its id to what the server answered.

The model is a toy: what it says does not matter, that each number of ours is the server's does. `make test-server`
installs server and model, and `make nightly` runs this; elsewhere it is skipped.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import dspy
import pytest
from opentelemetry.sdk.trace import ReadableSpan

from tests.operations.common import only_native
from tests.operations.test_lm import ENGINES
from tests.support.llama_server import CONTEXT, MODEL, LlamaServer, llama_server, missing
from tests.support.logging_proxy import Exchange, LoggingProxy, logging_proxy
from tests.support.spans import Recorder
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(missing() is not None, reason=f"{missing()} is not installed: `make test-server` does it"),
]
each_engine = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    with llama_server(tmp_path_factory.mktemp("llama")) as server:
        yield server


@pytest.fixture
def proxy(llama: LlamaServer) -> Iterator[LoggingProxy]:
    with logging_proxy(llama.url) as proxy:
        yield proxy


def on(url: str, engine: str, model: str = "openai/gpt-4o-mini", **options: Any) -> dspy.LM:
    """An LM on one engine, whose answers are short."""
    chosen = {"engine": engine} if len(ENGINES) > 1 and engine == "litellm" else {}
    defaults = {"cache": False, "max_tokens": 8, "num_retries": 0, "temperature": 0.7}
    return dspy.LM(model, api_base=url, api_key="none", **{**chosen, **defaults, **options})


async def streamed(lm: dspy.LM, **settings: Any) -> None:
    """Ask in a stream. Whether an adapter can read what the model says is chance."""
    predict = dspy.Predict("question -> answer")
    listener = dspy.streaming.StreamListener(signature_field_name="answer")
    with contextlib.suppress(Exception), dspy.context(lm=lm, **settings):
        async for _ in dspy.streamify(predict, stream_listeners=[listener])(question="Who are you?"):
            pass


def servers_id(span: ReadableSpan) -> str:
    """The id that the server gave: LiteLLM writes others around that of a Responses answer."""
    found = str((span.attributes or {})["gen_ai.response.id"])
    if not found.startswith("resp_bGl0ZWxsbT"):  # resp_ and "litellm:" in base64
        return found
    return base64.b64decode(found.removeprefix("resp_")).decode().rpartition("response_id:")[2]


def joined(telemetry: Recorder, proxy: LoggingProxy) -> list[tuple[Any, Exchange]]:
    """Attributes of each LM call that was answered by the server, in order, with that answer. All are equal."""
    answered = proxy.by_id()
    pairs: list[tuple[Any, Exchange]] = []
    for span in telemetry.spans:
        attributes = span.attributes or {}
        if "gen_ai.request.model" not in attributes or attributes.get("dspy.lm.cache_hit") is not False:
            continue
        exchange = answered.pop(servers_id(span))
        assert attributes["gen_ai.response.model"] == exchange.last("model") == MODEL
        tokens = attributes.get("gen_ai.usage.input_tokens"), attributes.get("gen_ai.usage.output_tokens")
        assert tokens == (exchange.tokens or (None, None))
        # LiteLLM has no price for text completions.
        assert ("dspy.lm.cost" in attributes) is (exchange.tokens is not None and exchange.path != "/v1/completions")
        assert attributes.get("dspy.lm.cost.loopback") is (True if "dspy.lm.cost" in attributes else None)
        assert attributes.get("gen_ai.request.stream", False) is exchange.streamed
        # The model does not reason, and the server does not say so.
        assert "gen_ai.usage.reasoning.output_tokens" not in attributes
        pairs.append((attributes, exchange))
    assert not answered, "answers of the server without a span"
    return pairs


def series(telemetry: Recorder) -> set[Any]:
    """The models that the metrics of answered calls name."""
    points = telemetry.metric("gen_ai.client.operation.duration")
    return {point.attributes.get("gen_ai.response.model") for point in points if "error.type" not in point.attributes}


@each_engine
@pytest.mark.parametrize("kind", ["chat", "responses", "text"])
def test_each_api(telemetry: Recorder, proxy: LoggingProxy, engine: str, kind: str) -> None:
    telemetry.instrument()
    on(proxy.url, engine, model_type=kind)("Who are you?")
    ((attributes, exchange),) = joined(telemetry, proxy)
    paths = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "text": "/v1/completions"}
    assert exchange.path == paths[kind]
    assert attributes["gen_ai.usage.input_tokens"] > 0


@each_engine
@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize("counted", [False, True])
async def test_streams(telemetry: Recorder, proxy: LoggingProxy, engine: str, kind: str, counted: bool) -> None:
    telemetry.instrument()
    lm = on(proxy.url, engine, model_type=kind)
    lm("Who are you?")
    await streamed(lm, track_usage=counted)
    first, second = joined(telemetry, proxy)[:2]
    assert first[1].streamed is False
    if (engine, kind) == ("litellm", "responses"):
        return  # It does not stream.
    assert second[1].streamed is True
    assert second[0]["dspy.lm.chunks"] > 1
    # lm15 always asks the server to count, LiteLLM if it is told to.
    assert (second[1].tokens is not None) is (counted or engine == "lm15")
    assert series(telemetry) == {MODEL}


@only_native
@each_engine
def test_prefixes(telemetry: Recorder, proxy: LoggingProxy, engine: str) -> None:
    telemetry.instrument()
    for model in ("lm_studio/gemma", "hosted_vllm/gemma", "llamafile/gemma"):
        on(proxy.url, engine, model)("Who are you?")
    assert series(telemetry) == {MODEL}


@each_engine
def test_several_candidates(telemetry: Recorder, proxy: LoggingProxy, engine: str) -> None:
    """lm15 asks once for each of them, LiteLLM once for all. Both are one call."""
    telemetry.instrument()
    assert len(on(proxy.url, engine, n=2, temperature=1.0)("Who are you?")) == 2
    (span,) = telemetry.named("chat")
    exchanges = proxy.by_id()
    assert servers_id(span) in exchanges
    counted = [each.tokens for each in exchanges.values() if each.tokens is not None]
    assert len(counted) == (2 if engine == "lm15" else 1)
    attributes = span.attributes or {}
    assert attributes["gen_ai.usage.input_tokens"] == sum(inputs for inputs, _ in counted)
    assert attributes["gen_ai.usage.output_tokens"] == sum(outputs for _, outputs in counted)
    assert len(attributes["gen_ai.response.finish_reasons"]) == 2


@each_engine
def test_the_cache(telemetry: Recorder, proxy: LoggingProxy, engine: str) -> None:
    telemetry.instrument()
    lm = on(proxy.url, engine, cache=True)
    lm("Who are you?")
    lm("Who are you?")
    ((first, exchange),) = joined(telemetry, proxy)
    hit = telemetry.named("chat")[1].attributes or {}
    assert hit["dspy.lm.cache_hit"] is True
    assert hit["gen_ai.response.id"] == exchange.last("id")
    assert hit["gen_ai.response.model"] == MODEL
    assert hit["dspy.lm.cost"] == 0
    assert hit["dspy.lm.cost.saved"] == first["dspy.lm.cost"]
    assert not [name for name in hit if name.startswith("gen_ai.usage.")]


@each_engine
def test_eight_threads(telemetry: Recorder, proxy: LoggingProxy, engine: str) -> None:
    telemetry.instrument()
    lm = on(proxy.url, engine, max_tokens=4)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: lm(f"Count to {number} {'and on ' * number}"), range(24)))
    pairs = joined(telemetry, proxy)
    assert len(pairs) == 24
    assert len({attributes["gen_ai.usage.input_tokens"] for attributes, _ in pairs}) > 8


@only_native
@each_engine
def test_an_agent_that_calls_tools(telemetry: Recorder, proxy: LoggingProxy, engine: str) -> None:
    telemetry.instrument(capture_content="span_only")
    asked: list[str] = []

    def weather(place: Literal["Bern", "Rome"]) -> str:
        """The weather of a place."""
        asked.append(place)
        return "rain"

    agent = dspy.ReActV2("question -> answer", tools=[weather], max_iters=2)
    lm = on(proxy.url, engine, max_tokens=80, tool_choice="required")
    adapter = dspy.ChatAdapter(use_native_function_calling=True)
    for _ in range(5):  # Whether the model calls the tool, in time and with what it needs, is chance: a high one.
        with contextlib.suppress(Exception), dspy.context(lm=lm, adapter=adapter):
            agent(question="How is the weather in Bern?")
        if asked:
            break
    assert asked
    assert len([span for span in telemetry.named("execute_tool weather") if span.status.is_unset]) == len(asked)
    pairs = joined(telemetry, proxy)
    for attributes, exchange in pairs:
        for call in exchange.last("choices")[0]["message"].get("tool_calls", ()):
            assert call["id"] in attributes["gen_ai.output.messages"]
    totals = [span.attributes or {} for span in telemetry.named("invoke_agent")]
    counted = [exchange.tokens for _, exchange in pairs if exchange.tokens is not None]
    assert sum(each["dspy.usage.lm_calls"] for each in totals) == len(pairs) == len(counted)
    assert sum(each["dspy.usage.input_tokens"] for each in totals) == sum(inputs for inputs, _ in counted)
    assert sum(each["dspy.usage.output_tokens"] for each in totals) == sum(outputs for _, outputs in counted)
    cost = sum(attributes["dspy.lm.cost"] for attributes, _ in pairs)
    assert sum(each["dspy.usage.cost"] for each in totals) == pytest.approx(cost)


@each_engine
def test_a_truncated_answer(telemetry: Recorder, proxy: LoggingProxy, engine: str) -> None:
    telemetry.instrument()
    on(proxy.url, engine, max_tokens=3)("Tell me a long story.")
    ((attributes, _),) = joined(telemetry, proxy)
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)


@each_engine
def test_a_prompt_that_is_too_long(telemetry: Recorder, proxy: LoggingProxy, engine: str) -> None:
    telemetry.instrument()
    with pytest.raises(Exception, match="context size"):
        on(proxy.url, engine)("word " * (CONTEXT + 500))
    (span,) = telemetry.named("chat")
    attributes = span.attributes or {}
    assert [each.status for each in proxy.exchanges] == [400]
    assert attributes.get("http.response.status_code", 400) == 400  # DSPy before 3.3 does not say.
    assert attributes["error.type"]
    assert not [name for name in attributes if name.startswith(("gen_ai.usage.", "gen_ai.response.", "dspy.lm.cost"))]


@each_engine
def test_a_server_that_is_killed_and_started_anew(
    telemetry: Recorder, llama: LlamaServer, proxy: LoggingProxy, engine: str
) -> None:
    telemetry.instrument()
    lm = on(proxy.url, engine, max_tokens=1000)

    def killed_while_it_answers() -> None:
        wait_for(lambda: proxy.exchanges, "the request")
        llama.kill()

    killer = threading.Thread(target=killed_while_it_answers)
    killer.start()
    with pytest.raises(Exception):
        lm("Tell me a long story.")
    killer.join()
    with pytest.raises(Exception):
        on(f"{llama.url}/v1", engine)("Is anybody there?")
    llama.start()
    on(proxy.url, engine)("Who are you?")
    dropped, refused, answered = (span.attributes or {} for span in telemetry.named("chat"))
    for attributes in (dropped, refused):
        assert attributes["error.type"]
        assert "http.response.status_code" not in attributes
        assert not [name for name in attributes if name.startswith(("gen_ai.usage.", "gen_ai.response."))]
    ((attributes, _),) = joined(telemetry, proxy)
    assert attributes == answered
