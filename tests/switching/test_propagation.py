"""``inject()``, ``attach()`` and ``bind()``: into threads, tasks and processes of the user's own."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context

import dspy_otel
from dspy_otel.core.call_context import CallContext, current_call_context, with_call_context
from dspy_otel.propagation import MAX_INHERITED, MAX_VALUE
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.spans import Recorder
from tests.switching.process import script


class Inner(dspy.Module):
    def forward(self, number: int = 0) -> int:
        return number + 1


def in_scope(role: str | None = "judge", **inherited: Any) -> Any:
    context = CallContext("evaluate", None, None)
    context.inherited = {f"dspy.{key.replace('_', '.')}": value for key, value in inherited.items()}
    context.role = role
    return with_call_context(otel_context.get_current(), context)


# --- threads and tasks ----------------------------------------------------------------------------------------------
class OwnThreads(dspy.Module):
    """A user's program that uses a thread pool of its own."""

    def __init__(self, carried: str) -> None:
        super().__init__()
        self.inner = Inner()
        self.carried = carried

    def forward(self) -> list[int]:
        with ThreadPoolExecutor(3) as pool:
            if self.carried == "bind":
                return list(pool.map(dspy_otel.bind(self.call), range(4)))
            carrier = dspy_otel.inject()
            return list(pool.map(lambda number: self.attached(carrier, number), range(4)))

    def call(self, number: int) -> int:
        return self.inner(number=number)

    def attached(self, carrier: dict[str, str], number: int) -> int:
        with dspy_otel.attach(carrier):
            return self.inner(number=number)


@pytest.mark.parametrize("carried", ["bind", "inject"])
def test_a_thread_pool_of_the_users_own(telemetry: Recorder, carried: str):
    telemetry.instrument()
    token = otel_context.attach(in_scope(evaluation_id="e1", trial_number=7))
    try:
        assert OwnThreads(carried)() == [1, 2, 3, 4]
    finally:
        otel_context.detach(token)
    program = telemetry.only("invoke_workflow OwnThreads")
    inner = [span for span in telemetry.spans if span is not program]
    assert len(inner) == 4
    for span in inner:
        assert span.parent.span_id == program.context.span_id
        assert span.context.trace_id == program.context.trace_id
        assert span.attributes["dspy.evaluation.id"] == "e1"
        assert span.attributes["dspy.trial.number"] == 7


def test_nothing_stays_attached_in_the_workers(telemetry: Recorder):
    telemetry.instrument()
    with ThreadPoolExecutor(1) as pool:
        with telemetry.tracer.start_as_current_span("request"):
            bound = dspy_otel.bind(lambda: current_call_context())
        pool.submit(bound).result()
        assert pool.submit(trace.get_current_span).result() is trace.INVALID_SPAN
        with pytest.raises(ZeroDivisionError):
            pool.submit(dspy_otel.bind(lambda: 1 / 0)).result()
        assert pool.submit(otel_context.get_current).result() == {}


async def test_tasks_and_coroutines(telemetry: Recorder):
    class Gathers(dspy.Module):
        async def aforward(self) -> list[int]:
            return await asyncio.gather(*(inner.acall(number=number) for number in range(3)))

    class Async(Inner):
        async def aforward(self, number: int = 0) -> int:
            await asyncio.sleep(0)
            return number

    inner = Async()
    telemetry.instrument()
    with telemetry.tracer.start_as_current_span("request") as request:
        assert await Gathers().acall() == [0, 1, 2]
        bound = dspy_otel.bind(inner.acall)
        carrier = dspy_otel.inject()
    assert asyncio.iscoroutinefunction(bound)
    assert await bound(number=5) == 5
    with dspy_otel.attach(carrier):
        assert await asyncio.create_task(inner.acall(number=6)) == 6
    # Into a loop of another thread.
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        assert asyncio.run_coroutine_threadsafe(bound(number=7), loop).result() == 7
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert {span.context.trace_id for span in telemetry.spans} == {request.get_span_context().trace_id}
    assert len(telemetry.named("invoke_workflow Async")) == 3


def test_bind_keeps_what_it_binds():
    def named(a: int, *, b: int = 2) -> int:
        """Adds."""
        return a + b

    assert dspy_otel.bind(named).__name__ == "named"
    assert dspy_otel.bind(named).__doc__ == "Adds."
    assert dspy_otel.bind(named)(1, b=3) == 4
    assert dspy_otel.bind(partial(named, 1))(b=4) == 5
    assert dspy_otel.bind(Inner())(number=1) == 2


def test_role_reaches_lm_calls(telemetry: Recorder):
    telemetry.instrument()
    token = otel_context.attach(in_scope(role="judge", evaluation_id="e1"))
    carrier = dspy_otel.inject()
    otel_context.detach(token)
    with dspy.context(lm=DummyLM([{"answer": "blue"}])), dspy_otel.attach(carrier):
        dspy.Predict("question -> answer")(question="?")
    assert telemetry.only("chat ").attributes["dspy.lm.role"] == "judge"
    assert telemetry.only("chat ").attributes["dspy.evaluation.id"] == "e1"


# --- what a carrier may hold ----------------------------------------------------------------------------------------
def test_a_carrier_is_plain_strings(telemetry: Recorder):
    telemetry.instrument()
    headers = {"x": "1"}
    with telemetry.tracer.start_as_current_span("request") as span:
        token = otel_context.attach(in_scope(evaluation_id="e1"))
        carrier = dspy_otel.inject(headers)
        otel_context.detach(token)
    assert json.loads(json.dumps(carrier)) == pickle.loads(pickle.dumps(carrier)) == carrier
    assert headers == {"x": "1", **carrier}
    assert dspy_otel.inject() == {}
    assert f"{span.get_span_context().trace_id:032x}" not in carrier.get("baggage", "")


def test_what_is_not_ours_stays_home(telemetry: Recorder):
    """Who the user is and in which session is not for everybody the carrier is sent to."""
    context = CallContext("module", None, None)
    context.inherited = {"session.id": "s", "dspy.evaluation.id": "e"}
    token = otel_context.attach(with_call_context(otel_context.get_current(), context))
    carrier = dspy_otel.inject()
    otel_context.detach(token)
    assert carrier == {"baggage": "dspy.evaluation.id=e"}


def test_stamps_are_bounded_both_ways(telemetry: Recorder):
    telemetry.instrument()
    token = otel_context.attach(in_scope(**{f"s{index}": "x" * 10_000 for index in range(100)}))
    carrier = dspy_otel.inject()
    otel_context.detach(token)
    assert len(carrier["baggage"]) < MAX_INHERITED * (MAX_VALUE + 30)
    entries = {f"dspy.s{index}": "y" * 3000 for index in range(2)}
    many = {f"dspy.t{index}": "z" for index in range(100)}
    for sent in (entries, many):
        with dspy_otel.attach({"baggage": ",".join(f"{key}={value}" for key, value in sent.items())}):
            context = current_call_context()
            assert 0 < len(context.inherited) <= MAX_INHERITED
            assert all(len(value) <= MAX_VALUE for value in context.inherited.values())


def test_an_unknown_role_is_no_role(telemetry: Recorder):
    with dspy_otel.attach({"baggage": "dspy.lm.role=admin,dspy.trial.number=x7"}):
        assert current_call_context().role is None
        assert current_call_context().inherited == {"dspy.trial.number": "x7"}


def test_the_users_baggage_is_carried_and_left_alone(telemetry: Recorder):
    token = otel_context.attach(baggage.set_baggage("tenant", "blue"))
    carrier = dspy_otel.inject()
    otel_context.detach(token)
    with dspy_otel.attach(carrier):
        assert baggage.get_all() == {"tenant": "blue"}
        assert current_call_context().inherited == {}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
headers = st.sampled_from(["traceparent", "tracestate", "baggage", "TRACEPARENT", ""])
values = st.sampled_from(
    ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "dspy.lm.role=judge", "=,;=", "a=b;c", "%ff", "00-"]
)
carriers = anything | st.dictionaries(headers | st.text() | st.integers(), values | anything)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(carrier=carriers)
def test_any_carrier_is_harmless(caplog: pytest.LogCaptureFixture, carrier: Any):
    caplog.set_level(logging.CRITICAL)
    before = otel_context.get_current()
    with dspy_otel.attach(carrier):
        assert isinstance(dspy_otel.inject(), dict)
    assert otel_context.get_current() == before


def test_an_error_inside_the_block_is_the_users(telemetry: Recorder):
    with pytest.raises(KeyError, match="mine"):
        with dspy_otel.attach({}):
            raise KeyError("mine")


@pytest.mark.injects_faults
def test_a_carrier_that_refuses_does_no_harm(caplog: pytest.LogCaptureFixture, telemetry: Recorder):
    class Closed(dict):  # type: ignore[type-arg]
        def update(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("closed")

    token = otel_context.attach(baggage.set_baggage("tenant", "blue"))
    assert dspy_otel.inject(Closed()) == {"baggage": "tenant=blue"}
    otel_context.detach(token)
    assert len(caplog.records) == 1


# --- processes ------------------------------------------------------------------------------------------------------
_PROCESSES = """
import multiprocessing, sys
import dspy, dspy_otel
from opentelemetry import context as otel_context, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from tests.switching.app import App, EchoLM
from tests.switching.test_propagation import in_scope

def provider():
    made = TracerProvider()
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made

def work(carrier, own):
    tracers = trace.get_tracer_provider()
    if own:
        dspy_otel.uninstrument()  # nothing to undo in a spawned process
        tracers = provider()
        dspy_otel.instrument(tracer_provider=tracers)
    with dspy.context(lm=EchoLM(model="test/echo")), dspy_otel.attach(carrier):
        answer = App()(question="?").answer
    tracers.force_flush()
    return answer

if __name__ == "__main__":
    method, own = sys.argv[1], sys.argv[2] == "own"
    trace.set_tracer_provider(provider())
    dspy_otel.instrument()
    # DSPy and the exporter have run in this process before it forks.
    with dspy.context(lm=EchoLM(model="test/echo")):
        App()(question="?")
    trace.get_tracer_provider().force_flush()
    with trace.get_tracer("mine").start_as_current_span("request"):
        token = otel_context.attach(in_scope(role="teacher", optimizer_run_id="run7", trial_number=3))
        with multiprocessing.get_context(method).Pool(2) as pool:
            jobs = [pool.apply_async(work, (dspy_otel.inject(), own)) for _ in range(2)]
            print([job.get(60) for job in jobs])
        otel_context.detach(token)
"""


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        yield running


@pytest.mark.integration
@pytest.mark.parametrize(("method", "own"), [("spawn", "own"), ("fork", "own"), ("fork", "inherited")])
def test_processes_of_the_users_own(tmp_path: Path, receiver: OtlpReceiver, method: str, own: str):
    program = tmp_path / "parallel_app.py"
    program.write_text(_PROCESSES)
    done = script(program, method, own, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http)
    assert done.output == "['blue', 'blue']\n"
    (request,) = receiver.spans("request")
    inside = [span for span in receiver.spans() if span.trace == request.trace and span.scope == "dspy_otel"]
    assert sorted(span.name for span in inside) == sorted(["Predict reply", "chat echo", "invoke_workflow App"] * 2)
    programs = [span for span in inside if span.name.startswith("invoke_workflow")]
    assert {span.parent for span in programs} == {request.id}
    for span in inside:
        assert span.attributes["dspy.optimizer.run.id"] == "run7"
        assert span.attributes["dspy.trial.number"] == 3
    assert {span.attributes["dspy.lm.role"] for span in inside if span.name == "chat echo"} == {"teacher"}


_PARENT_AND_CHILD = """
import os, subprocess, sys
import dspy_otel
from opentelemetry import context as otel_context, trace
from tests.switching.app import main
from tests.switching.test_propagation import in_scope

dspy_otel.configure()
if sys.argv[1:] == ["child"]:
    sys.argv.pop()
    main()
else:
    with trace.get_tracer("mine").start_as_current_span("request"):
        otel_context.attach(in_scope(role="teacher", optimizer_run_id="run7"))
        carrier = {key.upper(): value for key, value in dspy_otel.inject().items()}
        subprocess.run([sys.executable, __file__, "child"], env={**os.environ, **carrier}, check=True)
"""


@pytest.mark.integration
def test_a_subprocess_takes_its_parent_from_the_environment(tmp_path: Path, receiver: OtlpReceiver):
    program = tmp_path / "parent_and_child.py"
    program.write_text(_PARENT_AND_CHILD)
    done = script(program, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http)
    assert done.output == "answer: blue\n"
    (request,) = receiver.spans("request")
    (program,) = receiver.spans("invoke_workflow")
    assert (program.trace, program.parent) == (request.trace, request.id)
    (call,) = receiver.spans("chat")
    assert call.attributes["dspy.lm.role"] == "teacher"
    assert call.attributes["dspy.optimizer.run.id"] == "run7"
