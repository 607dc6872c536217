"""One correct tree through threads, tasks and whatever runs them."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

import dspy_otel
from tests.operations.common import dummy


class Fan(dspy.Module):
    """Asks its predictor for several questions at once."""

    def __init__(self, threads):
        super().__init__()
        self.ask = dspy.Predict("question -> answer")
        self.threads = threads

    def forward(self, questions):
        run = dspy.Parallel(num_threads=self.threads, disable_progress_bar=True)
        return run([(self.ask, {"question": question}) for question in questions])


def plain(text):
    """Without what tells how many threads there were."""
    return "\n".join(line for line in text.splitlines() if "num_threads" not in line)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_parallel_inside_a_module_under_an_application(telemetry, snapshot, threads):
    telemetry.instrument()
    with dspy.context(lm=dummy(*[{"answer": "a"}] * 4)), telemetry.tracer.start_as_current_span("application"):
        Fan(threads)(questions=["1", "2", "3", "4"])
    snapshot(plain(telemetry.tree(sort=True)), "parallel")  # The same with any number of threads.


@pytest.mark.parametrize("threads", [1, 3])
def test_batch(telemetry, snapshot, threads):
    telemetry.instrument()
    rows = [dspy.Example(question=str(number)).with_inputs("question") for number in range(3)]
    with dspy.context(lm=dummy(*[{"answer": "a"}] * 3)):
        dspy.Predict("question -> answer").batch(rows, num_threads=threads, disable_progress_bar=True)
    snapshot(plain(telemetry.tree(sort=True, attributes=False)), "batch")


def test_nested_parallel(telemetry):
    telemetry.instrument()
    outer = dspy.Parallel(num_threads=2, disable_progress_bar=True)
    with dspy.context(lm=dummy(*[{"answer": "a"}] * 4)), telemetry.tracer.start_as_current_span("application"):
        outer([(Fan(2), {"questions": ["1", "2"]}), (Fan(2), {"questions": ["3", "4"]})])
    (parallel,) = telemetry.children(telemetry.only("application"))
    fans = telemetry.children(parallel)
    assert [span.name for span in fans] == ["invoke_workflow Fan"] * 2
    for fan in fans:
        (inner,) = telemetry.children(fan)
        assert [span.name for span in telemetry.children(inner)] == ["Predict ask"] * 2
        assert fan.attributes["dspy.usage.lm_calls"] == 2
    assert len({span.context.trace_id for span in telemetry.spans}) == 1


def test_parallel_failures(telemetry):
    class Fails(dspy.Module):
        def forward(self, question):
            raise LookupError("canary")

    telemetry.instrument()
    run = dspy.Parallel(num_threads=2, disable_progress_bar=True, return_failed_examples=True)
    run([(Fails(), {"question": "1"}), (Fails(), {"question": "2"})])
    assert telemetry.only("parallel").attributes["dspy.parallel.failures"] == 2
    assert [span.attributes["error.type"] for span in telemetry.named("invoke_workflow")] == ["LookupError"] * 2
    assert "canary" not in telemetry.everything()


async def test_gather(telemetry):
    telemetry.instrument()
    predict = dspy.Predict("question -> answer")

    async def request(number):
        with telemetry.tracer.start_as_current_span(f"request {number}"):
            await asyncio.gather(predict.acall(question="1"), predict.acall(question="2"))

    with dspy.context(lm=dummy(*[{"answer": "a"}] * 6)):
        await asyncio.gather(*(request(number) for number in range(3)))
    for number in range(3):
        children = telemetry.children(telemetry.only(f"request {number}"))
        assert [span.name for span in children] == ["invoke_workflow Predict"] * 2
        assert all(len(telemetry.children(child)) == 1 for child in children)


async def test_asyncify(telemetry, snapshot):
    telemetry.instrument()
    with dspy.context(lm=dummy({"answer": "a"})), telemetry.tracer.start_as_current_span("application"):
        await dspy.asyncify(dspy.Predict("question -> answer"))(question="x")
    snapshot(telemetry.tree(attributes=False))


def test_worker_threads_keep_no_context(telemetry):
    """What a worker thread does later is not inside a call that has ended."""
    from opentelemetry.trace import get_current_span

    telemetry.instrument()
    seen = []

    class Look(dspy.Module):
        def forward(self, question):
            seen.append(get_current_span().get_span_context().is_valid)

    before = get_current_span()
    run = dspy.Parallel(num_threads=2, disable_progress_bar=True)
    run([(Look(), {"question": "1"})] * 4)
    assert seen == [True] * 4
    assert get_current_span() is before


@pytest.mark.skipif(not hasattr(dspy, "RLM"), reason="DSPy 3.1.3 is the first with RLM")
def test_lm_calls_of_rlms_batches_belong_to_it(telemetry, server):
    telemetry.instrument()
    dspy.configure(lm=server.lm())
    with telemetry.tracer.start_as_current_span("application"):
        tools = dspy.RLM("context, query -> answer")._make_llm_tools()
        assert len(tools["llm_query_batched"](["one", "two", "three"])) == 3
    application = telemetry.only("application")
    assert [span.name for span in telemetry.children(application)] == ["chat gpt-4o-mini"] * 3
    dspy_otel.uninstrument()
    assert vars(sys.modules["dspy.predict.rlm"])["ThreadPoolExecutor"] is ThreadPoolExecutor
