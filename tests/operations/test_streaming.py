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

USAGE = re.compile(r"gen_ai\.usage\.|dspy\.lm\.cost|dspy\.usage\.(cost|input_tokens|output_tokens|unpriced_calls)")


def streaming(asynchronous=True, is_async_program=False):
    predict = dspy.Predict("question -> answer")
    return dspy.streamify(
        predict,
        is_async_program=is_async_program,
        stream_listeners=[dspy.streaming.StreamListener(signature_field_name="answer")],
        async_streaming=asynchronous,
    )


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
    if engine == "litellm":
        # Its streams report zeros as usage and cost, or since 1.107 a count of its own: absent, or real.
        tree = "\n".join(line for line in tree.splitlines() if not USAGE.search(line))
        assert attributes.get("gen_ai.usage.input_tokens", 1) > 0
        assert attributes.get("gen_ai.usage.output_tokens", 1) > 0
        assert attributes.get("dspy.lm.cost", 1) > 0
    snapshot(tree, f"streamify_{engine}")
    (point,) = telemetry.metric("gen_ai.client.operation.time_to_first_chunk")
    assert point.count == 1
    assert point.sum == pytest.approx(attributes["gen_ai.response.time_to_first_chunk"])


@only_native
async def test_litellm_streams_report_usage_when_tracked(telemetry, words):
    telemetry.instrument()
    with dspy.context(lm=on(words, "litellm"), track_usage=True):
        async for _ in streaming()(question="x"):
            pass
    assert telemetry.only("chat").attributes["gen_ai.usage.input_tokens"] == 100


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
