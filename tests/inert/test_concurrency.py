"""Threads, tasks, cancellation, forks, and switching on and off under way: every span counted, with its own parent."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import re
import sys
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import Span, TracerProvider

import dspy_otel
from dspy_otel.content import redaction
from dspy_otel.core import internal_errors, operation
from dspy_otel.core.call_context import CallContext, Program
from dspy_otel.core.deferred_spans import DeferredSpan, DeferredTrace
from dspy_otel.core.operation import Call
from dspy_otel.core.usage import Totals
from dspy_otel.operations.embedding import ASKING
from dspy_otel.operations.evaluation import ExampleRun
from tests.inert.programs import Oracle, until
from tests.support.nightly import at_night
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.waiting import run, wait_for
from tests.switching.process import ROOT, environment


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


class Counting(Oracle):
    """Bills each call as many tokens as its question's number says."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        answer = super().forward(prompt, messages, **kwargs)
        number = int(re.findall(r"number(\d+)", str(messages))[-1])
        answer.usage = {"prompt_tokens": number + 1, "completion_tokens": 2 * number + 1}
        return answer


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


def assert_own_tokens(telemetry: Any) -> None:
    """Each program's totals are those of its own two calls."""
    for root in telemetry.named("invoke_workflow"):
        number = int(re.findall(r"number(\d+)", root.attributes["input.value"])[0])
        assert root.attributes["dspy.usage.lm_calls"] == 2
        assert root.attributes["dspy.usage.input_tokens"] == 2 * (number + 1)
        assert root.attributes["dspy.usage.output_tokens"] == 2 * (2 * number + 1)


def test_many_threads_on_one_program(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    program, lm = Chain(), Counting()
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
    assert_own_tokens(telemetry)
    assert threading.active_count() <= before


async def test_many_tasks_on_one_program(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    program, calls = Chain(), 1000
    surrounding = otel_context.get_current()
    with dspy.context(lm=Counting(), disable_history=True, trace=None):
        await asyncio.gather(*(program.acall(question=f"number{number}") for number in range(calls)))
    assert otel_context.get_current() is surrounding
    assert Counter(span.name for span in telemetry.spans) == Counter({n: c * calls for n, c in PER_CALL.items()})
    assert_own_parents(telemetry.spans)
    assert_own_tokens(telemetry)


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

    def some_calls(number: int) -> None:
        enough = len(done) + number
        wait_for(lambda: errors or len(done) >= enough, "calls under way", pause=0.002)

    try:
        for _ in range(12):
            telemetry.instrument(capture_content="span_only")
            some_calls(10)
            dspy_otel.uninstrument()
            some_calls(2)
    finally:
        stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
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
    gc.disable()
    try:
        generator = Yields()(question="q")
        next(generator)
        kept = weakref.ref(generator)
        del generator
        assert kept() is None  # else DSPy's settings are those of its block until the collector runs
    finally:
        gc.enable()
    assert otel_context.get_current() is surrounding
    assert len(telemetry.named("invoke_workflow Yields")) == 1
    assert len(telemetry.named("invoke_workflow Chain")) == 1


# --- nothing is left ----------------------------------------------------------------------------------------------

OURS = (Call, CallContext, Totals, Program, DeferredTrace, DeferredSpan, operation._Pending, ExampleRun)


def left_over() -> Counter[str]:
    """Objects of ours, and live spans of the SDK, that anything still refers to."""
    gc.collect()
    kinds = {id(kind) for kind in (*OURS, Span)}  # by identity: another test's class may not want to be compared
    return Counter(type(thing).__name__ for thing in gc.get_objects() if id(type(thing)) in kinds)


async def test_nothing_is_left_after_a_storm() -> None:
    """Threads, tasks, cancellations, failures, abandoned calls and streams, retrievals: counted before and after."""
    provider = TracerProvider(shutdown_on_exit=False)
    dspy_otel.instrument(tracer_provider=provider, capture_content="span_and_event", optimization_traces="none")
    chance, one_at_a_time = random.Random(2), threading.Lock()
    program, lm = Chain(), Counting()
    retriever = dspy.Embeddings(["one", "two"], dspy.Embedder(lambda texts: [[1.0, 2.0] for _ in texts]), k=1)

    class Slow(Counting):
        async def aforward(self, *args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(chance.random() / 100)
            return await super().aforward(*args, **kwargs)

    class Stream(dspy.Module):
        def forward(self, question: str) -> Any:
            def produce() -> Any:
                yield program(question=question)
                yield program(question=question)

            return produce()

        async def aforward(self, question: str) -> Any:
            async def produce() -> Any:
                yield await program.acall(question=question)
                yield await program.acall(question=question)

            return produce()

    async def storm(size: int) -> None:
        surrounding = otel_context.get_current()
        with dspy.context(lm=Slow(), disable_history=True, trace=None, max_errors=1000):
            tasks = [asyncio.create_task(program.acall(question=f"number{each}")) for each in range(size)]
            await asyncio.sleep(0.005)
            for task in tasks[::3]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            async for _ in await Stream().acall(question="number1"):
                break
        settings = {"lm": lm, "disable_history": True, "trace": None, "max_errors": 1000}

        def work(each: int) -> None:
            with dspy.context(**settings):
                next(Stream()(question=f"number{each}"))
                retriever("q")
                program.acall(question="number1").close()
                rows = [dspy.Example(question=f"number{each}").with_inputs("question")] * 2
                metric = (lambda *_: 1 / 0) if each % 2 else (lambda *_: 1.0)
                with one_at_a_time:  # DSPy clears tqdm's own list of bars, which is not for several threads
                    dspy.Evaluate(devset=rows, metric=metric, num_threads=2, display_progress=False)(program)

        with ThreadPoolExecutor(16) as pool:
            await asyncio.gather(*(asyncio.get_running_loop().run_in_executor(pool, work, each) for each in range(32)))
        assert otel_context.get_current() is surrounding

    logging.getLogger("dspy").setLevel(logging.CRITICAL)
    try:
        await storm(50)  # what is made once and kept
        before = left_over()
        await storm(300)
        assert until(lambda: not left_over() - before), left_over() - before
    finally:
        logging.getLogger("dspy").setLevel(logging.NOTSET)
    assert ASKING._waiting == {}
    assert len(redaction._known) <= 256
    assert len(internal_errors._seen) <= 256


# --- processes ----------------------------------------------------------------------------------------------------

WORKER = Path(__file__).with_name("processes.py")


@pytest.mark.integration
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("method", ["fork", *at_night("spawn", "forkserver")])
def test_exporters_are_alive_in_child_processes(method: str, tmp_path: Path) -> None:
    """A program starts processes in its middle: their spans arrive, below its own, and so do their runs in MLflow."""
    pytest.importorskip("mlflow")
    with OtlpReceiver() as receiver:
        settings = environment(
            PYTHONPATH=os.pathsep.join((str(ROOT / "src"), str(ROOT))),
            OTEL_TRACES_EXPORTER="otlp,mlflow",
            OTEL_METRICS_EXPORTER="otlp",
            OTEL_LOGS_EXPORTER="otlp",
            OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http,
            OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT="span_and_event",
            MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db",
        )
        done = run([sys.executable, str(WORKER), method], cwd=tmp_path, env=settings)
        assert done.returncode == 0, done.stderr[-4000:]
        found = receiver.spans()
        metrics = receiver.metric_names()
    told = json.loads(done.stdout.splitlines()[-1])
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    (parent,) = [span for span in found if span.name == "invoke_workflow Starts"]
    below = [span for span in found if span.trace == parent.trace]
    children = {f"child {number}" for number in range(2)}
    of_children = [span for span in below if any(child in str(span.attributes) for child in children)]
    by_id = {span.id: span for span in below}
    assert len(by_id) == len(below), "an id was given twice"
    assert all(span.parent in by_id for span in below if span is not parent)
    for child in children:
        own = [span for span in of_children if child in str(span.attributes.get("input.value"))]
        assert Counter(span.name.split(" ")[0] for span in own) >= Counter({"Chain": 1, "Predict": 2}) or Counter(
            span.name.split(" ")[0] for span in own
        ) >= Counter({"invoke_workflow": 1, "Predict": 2}), [span.name for span in own]
    assert "gen_ai.client.operation.duration" in metrics
    # MLflow: one run for the parent's evaluation and one for each child's, each with its own traces.
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs(["0"])
    assert {each.info.status for each in runs} == {"FINISHED"}
    assert len(runs) == 3, [each.info.run_name for each in runs]
    for each in runs:
        assert len(client.search_traces(locations=["0"], run_id=each.info.run_id)) >= 2
    assert told["statuses"] == [0, 0]


SHUTDOWN = """
import atexit, sys, threading, time
import dspy, dspy_otel
from tests.inert.test_concurrency import Chain, Counting

dspy_otel.configure()
program = Chain()
settings = dict(lm=Counting(), disable_history=True, trace=None)

def ask(number):
    with dspy.context(**settings):
        return program(question=f"number{number}").answer

def forever():
    while True:
        ask(1)

class Late:
    def __del__(self):
        print("late", ask(2), flush=True)

atexit.register(lambda: print("exit", ask(3), flush=True))
late = Late()
sys.modules["kept until the end"] = late
for _ in range(4):
    threading.Thread(target=forever, daemon=True).start()
pending = program.acall(question="number4")
time.sleep(0.3)
print("end", flush=True)
"""


@pytest.mark.integration
def test_the_interpreter_ends_while_programs_run(tmp_path: Path) -> None:
    bare = run_at_shutdown(SHUTDOWN.replace("dspy_otel.configure()", ""), tmp_path)
    with OtlpReceiver() as receiver:
        watched = run_at_shutdown(
            SHUTDOWN, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http, OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf"
        )
        assert receiver.spans("invoke_workflow")
    gone = run_at_shutdown(SHUTDOWN, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    for done in (watched, gone):
        assert done.returncode == bare.returncode
        assert [line.split()[0] for line in done.stdout.splitlines()] == [
            line.split()[0] for line in bare.stdout.splitlines()
        ]
        assert "/src/dspy_otel/" not in done.stderr, done.stderr[-4000:]


def run_at_shutdown(code: str, folder: Path, **settings: str) -> Any:
    return run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(PYTHONPATH=os.pathsep.join((str(ROOT / "src"), str(ROOT))), **settings),
    )
