"""Threads, tasks, cancellation, forks, and switching on and off under way: every span counted, with its own parent."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace

import dspy_otel

from .programs import Oracle


class Chain(dspy.Module):
    """Asks twice; what it asks says which call it is."""

    def __init__(self) -> None:
        super().__init__()
        self.one = dspy.Predict("question -> answer")
        self.two = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        self.one(question=question)
        return self.two(question=question)

    async def aforward(self, question: str) -> Any:
        await self.one.acall(question=question)
        return await self.two.acall(question=question)


PER_CALL = Counter({"invoke_workflow Chain": 1, "Predict one": 1, "Predict two": 1, "chat oracle": 2})


def assert_own_parents(spans: Any) -> None:
    """Each span hangs below one that was asked the same question."""
    by_id = {span.context.span_id: span for span in spans}
    for span in spans:
        if span.parent is None:
            assert span.name.startswith("invoke_workflow"), span.name
            continue
        parent = by_id[span.parent.span_id]
        assert parent.context.trace_id == span.context.trace_id
        if "input.value" in span.attributes:
            assert span.attributes["input.value"] == parent.attributes["input.value"]
        else:
            question = parent.attributes["input.value"].split('"')[3]
            assert f"{question} " in span.attributes["gen_ai.input.messages"].replace("\\n", " ")


def test_many_threads_on_one_program(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    program, lm = Chain(), Oracle()
    settings = {"lm": lm, "disable_history": True, "trace": None}
    calls, before = 256, threading.active_count()

    def work(number: int) -> bool:
        surrounding = otel_context.get_current()
        with dspy.context(**settings):
            program(question=f"number{number}")
        return otel_context.get_current() is surrounding

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(work, range(calls)))
    assert Counter(span.name for span in telemetry.spans) == Counter({n: c * calls for n, c in PER_CALL.items()})
    assert_own_parents(telemetry.spans)
    roots = telemetry.named("invoke_workflow")
    assert {span.attributes["dspy.usage.lm_calls"] for span in roots} == {2}
    assert {span.attributes["dspy.usage.input_tokens"] for span in roots} == {6}
    assert threading.active_count() <= before


async def test_many_tasks_on_one_program(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    program, calls = Chain(), 500
    surrounding = otel_context.get_current()
    with dspy.context(lm=Oracle(), disable_history=True, trace=None):
        await asyncio.gather(*(program.acall(question=f"number{number}") for number in range(calls)))
    assert otel_context.get_current() is surrounding
    assert Counter(span.name for span in telemetry.spans) == Counter({n: c * calls for n, c in PER_CALL.items()})
    assert_own_parents(telemetry.spans)
    assert {span.attributes["dspy.usage.lm_calls"] for span in telemetry.named("invoke_workflow")} == {2}


async def test_tasks_cancelled_at_random_points(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    chance = random.Random(1)

    class Slow(Oracle):
        async def aforward(self, *args: Any, **kwargs: Any) -> Any:
            for _ in range(40):
                await asyncio.sleep(0)
            return await super().aforward(*args, **kwargs)

    program = Chain()
    surrounding = otel_context.get_current()
    with dspy.context(lm=Slow(), disable_history=True, trace=None):
        tasks = [asyncio.create_task(program.acall(question=f"number{number}")) for number in range(200)]
        for task in tasks:
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            if chance.random() < 0.7:
                task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    cancelled = sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert 20 < cancelled < 200
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert otel_context.get_current() is surrounding
    roots = telemetry.named("invoke_workflow")
    failed = [span for span in roots if span.status.status_code is trace.StatusCode.ERROR]
    # A task that is cancelled before its first step never calls the program.
    assert len(roots) - len(failed) == len(outcomes) - cancelled
    assert {span.attributes["error.type"] for span in failed} == {"asyncio.exceptions.CancelledError"}
    assert_own_parents(telemetry.spans)


def test_switching_on_and_off_under_way(telemetry: Any) -> None:
    program, lm = Chain(), Oracle()
    stop = threading.Event()
    errors: list[BaseException] = []
    done: list[int] = []

    def work(number: int) -> None:
        surrounding = otel_context.get_current()
        with dspy.context(lm=lm, disable_history=True, trace=None):
            while not stop.is_set():
                try:
                    program(question=f"number{number}")
                    assert otel_context.get_current() is surrounding
                    done.append(number)
                except BaseException as error:
                    errors.append(error)
                    return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(12):
        telemetry.instrument(capture_content="span_only")
        stop.wait(0.05)
        dspy_otel.uninstrument()
        stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(done) > 50
    spans = telemetry.spans
    assert spans
    known = {span.context.span_id for span in spans}
    assert all(span.parent is None or span.parent.span_id in known for span in spans), "a span was never ended"
    telemetry.clear()
    with dspy.context(lm=lm, disable_history=True, trace=None):
        program(question="after")
    assert telemetry.spans == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_fork_in_the_middle_of_a_call(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    results: list[int] = []

    class Forks(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = Chain()

        def forward(self, question: str) -> Any:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    span = trace.get_current_span().get_span_context()
                    telemetry.clear()
                    self.chain(question="in the child")
                    spans = telemetry.spans
                    below = telemetry.named("Chain")
                    same = all(each.context.trace_id == span.trace_id for each in spans)
                    code = 0 if same and len(spans) == 5 and below[0].parent.span_id == span.span_id else 2
                finally:
                    os._exit(code)
            results.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            return self.chain(question=question)

    with dspy.context(lm=Oracle(), disable_history=True, trace=None):
        Forks()(question="q")
    assert results == [0]
    assert len(telemetry.spans) == 6


def test_abandoned_generators(telemetry: Any) -> None:
    telemetry.instrument()

    class Yields(dspy.Module):
        def forward(self, question: str) -> Any:
            def produce() -> Any:
                with dspy.context(lm=Oracle(), disable_history=True, trace=None):
                    for _ in range(3):
                        yield Chain()(question=question)

            return produce()

    surrounding = otel_context.get_current()
    generator = Yields()(question="q")
    next(generator)
    del generator
    assert otel_context.get_current() is surrounding
    assert len(telemetry.named("invoke_workflow Yields")) == 1
    assert len(telemetry.named("invoke_workflow Chain")) == 1
