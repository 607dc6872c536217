"""Streamed answers: time to first chunk, chunks, usage, and consumers who go away."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import re

import dspy
import pytest

from tests.operations.common import NATIVE, only_native
from tests.operations.test_lm import ENGINES, on
from tests.support.waiting import wait_for

DURATION = "gen_ai.client.operation.duration"


def streaming(asynchronous=True, is_async_program=False):
    predict = dspy.Predict("question -> answer")
    return dspy.streamify(
        predict,
        is_async_program=is_async_program,
        stream_listeners=[dspy.streaming.StreamListener(signature_field_name="answer")],
        async_streaming=asynchronous,
    )


def chunks_name_the_model():
    """Whether this LiteLLM keeps the model that a server names in the chunks of a stream."""
    from litellm.litellm_core_utils.streaming_chunk_builder_utils import ChunkProcessor

    return hasattr(ChunkProcessor, "_get_provider_response_model")


@pytest.fixture
def words(server):
    server.answers["answer"] = "one two three four five six seven eight nine ten"
    return server


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("asynchronous", [True, False])
async def test_streamify(telemetry, words, snapshot, engine, asynchronous):
    telemetry.instrument()
    with telemetry.tracer.start_as_current_span("application"), dspy.context(lm=on(words, engine)):
        if asynchronous:
            got = [chunk async for chunk in streaming()(question="x")]
        else:
            got = await asyncio.to_thread(lambda: list(streaming(False)(question="x")))
    assert isinstance(got[-1], dspy.Prediction)
    tree, attributes = telemetry.tree(), telemetry.only("chat").attributes
    if engine == "litellm" and not chunks_name_the_model():
        assert "gen_ai.response.model" not in attributes
        model = '      . gen_ai.response.model: "gpt-4o-mini-2024-07-18"\n'
        tree = re.sub(r"(?m)^(?=      \. gen_ai\.response\.time)", model, tree)
    snapshot(tree, f"streamify_{engine}")
    (point,) = telemetry.metric("gen_ai.client.operation.time_to_first_chunk")
    assert point.count == 1
    assert point.sum == pytest.approx(attributes["gen_ai.response.time_to_first_chunk"])


async def consume(lm, **settings):
    with dspy.context(lm=lm, **settings):
        async for _ in streaming()(question="x"):
            pass


@pytest.mark.parametrize("engine", ENGINES)
async def test_what_a_server_counts_in_a_stream_is_its_usage(telemetry, words, engine):
    telemetry.instrument()
    words.details = False
    await consume(on(words, engine), track_usage=True)
    attributes = telemetry.only("chat").attributes
    assert attributes["gen_ai.usage.input_tokens"] == 100
    assert attributes["gen_ai.usage.output_tokens"] == 20
    assert attributes["dspy.lm.cost"] == pytest.approx(2.7e-05)
    # LiteLLM says 0 where the server says nothing.
    assert "gen_ai.usage.reasoning.output_tokens" not in attributes


@pytest.mark.parametrize("asked", [False, pytest.param(True, marks=only_native)])
async def test_what_litellm_counts_itself_is_no_usage_and_has_no_price(telemetry, words, asked):
    """It counts where the server does not: where nobody asks it to, or where it does not know how."""
    telemetry.instrument()
    words.usage = not asked
    lm = on(words, "litellm", cache=True)
    for _ in range(2):
        await consume(lm, track_usage=asked)
    assert len(words.requests) == 1
    first, hit = (span.attributes for span in telemetry.named("chat"))
    assert hit["dspy.lm.cache_hit"] is True
    for attributes in (first, hit):
        assert not [key for key in attributes if key.startswith(("gen_ai.usage.", "dspy.lm.cost"))]
    totals, _ = (span.attributes for span in telemetry.named("invoke_workflow"))
    used = {name: value for name, value in totals.items() if name.startswith("dspy.usage.")}
    assert used == {"dspy.usage.lm_calls": 1, "dspy.usage.cache_hits": 0, "dspy.usage.unpriced_calls": 1}
    assert telemetry.metric("gen_ai.client.token.usage") == []
    assert telemetry.metric("dspy.lm.cost") == []


@only_native
async def test_usage_that_the_lm_itself_asks_for_is_usage(telemetry, words):
    telemetry.instrument()
    lm = on(words, "litellm", stream_options={"include_usage": True})
    await consume(lm)
    attributes = telemetry.only("chat").attributes
    assert attributes["gen_ai.usage.input_tokens"] == 100
    assert attributes["gen_ai.usage.reasoning.output_tokens"] == 5


@pytest.mark.parametrize("engine", ENGINES)
async def test_one_server_makes_one_series(telemetry, words, engine):
    """Streamed or not, an answer has the id and the model that the server gives it."""
    telemetry.instrument()
    lm = on(words, engine)
    with dspy.context(lm=lm):
        dspy.Predict("question -> answer")(question="x")
    await consume(lm)
    ids = [span.attributes["gen_ai.response.id"] for span in telemetry.named("chat")]
    assert ids == ["chatcmpl-1", "chatcmpl-2"]
    models = {point.attributes.get("gen_ai.response.model") for point in telemetry.metric(DURATION)}
    unknown = engine == "litellm" and not chunks_name_the_model()
    assert models == {"gpt-4o-mini-2024-07-18"} | ({None} if unknown else set())


@pytest.mark.parametrize("is_async_program", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_consumer_stops_early(telemetry, words, caplog, engine, is_async_program):
    telemetry.instrument()
    words.delay = 0.02

    async def consumer():
        with telemetry.tracer.start_as_current_span("application"), dspy.context(lm=on(words, engine)):
            async for _ in streaming(True, is_async_program)(question="x"):
                break
            telemetry.tracer.start_span("after").end()

    async def application():
        await asyncio.create_task(consumer())
        # The loop closes the abandoned stream, from a task of its own. The program may run on a thread and notice when
        # it wants to send its next chunk: to a loop that is gone, AnyIO would wait for ever.
        ended = functools.partial(telemetry.named, "invoke_workflow")
        await asyncio.to_thread(wait_for, ended, "the end of the abandoned stream's program")

    asyncio.run(application())
    # All closed, below their true parents, and the application's own context is what it was.
    root = telemetry.only("application")
    workflow, chat = telemetry.only("invoke_workflow"), telemetry.only("chat")
    assert workflow.parent.span_id == root.context.span_id
    assert chat.parent.span_id == workflow.context.span_id
    assert telemetry.only("after").parent.span_id == root.context.span_id
    assert chat.attributes["dspy.lm.chunks"] >= 1
    assert not [record.message for record in caplog.records if "detach" in record.message.lower()]
    if NATIVE:
        # Cancelled, or told by the closed stream: whichever comes first.
        assert chat.status.status_code.name == "ERROR"


def test_abandoned_call_is_closed_quietly(telemetry, caplog):
    """A coroutine that is thrown away ends in whatever context is current then: nothing to undo there."""

    class Forever:
        def __await__(self):
            while True:
                yield

    async def wait():
        await Forever()

    telemetry.instrument()
    coroutine = dspy.Tool(wait).acall()
    with telemetry.tracer.start_as_current_span("first"):
        contextvars.copy_context().run(coroutine.send, None)
    with telemetry.tracer.start_as_current_span("second"):
        coroutine.close()
        telemetry.tracer.start_span("after").end()
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert telemetry.only("execute_tool").parent.span_id == telemetry.only("first").context.span_id
    assert telemetry.only("after").parent.span_id == telemetry.only("second").context.span_id


async def test_two_streams_at_once_keep_apart(telemetry, words):
    telemetry.instrument()

    async def consume(number):
        with telemetry.tracer.start_as_current_span(f"request {number}"):
            async for _ in streaming()(question=f"tokens={number}"):
                pass

    with dspy.context(lm=words.lm()):
        await asyncio.gather(consume(1), consume(2), consume(3))
    for number in (1, 2, 3):
        (workflow,) = telemetry.children(telemetry.only(f"request {number}"))
        (chat,) = [span for span in telemetry.named("chat") if span.context.trace_id == workflow.context.trace_id]
        if NATIVE:
            assert chat.attributes["gen_ai.usage.input_tokens"] == number
