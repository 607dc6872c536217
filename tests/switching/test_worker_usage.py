"""What LM calls in worker processes have used comes back: once, whatever fails, and to the right place."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import dspy
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from opentelemetry import context as otel_context
from opentelemetry.instrumentation.utils import suppress_instrumentation

import dspy_otel
from dspy_otel import BudgetExceeded, BudgetRefused, budget
from dspy_otel.core import worker_tasks
from dspy_otel.core.call_context import CallContext, current_call_context
from dspy_otel.core.usage import Sums, Totals
from dspy_otel.core.worker_tasks import Record, Task
from tests.support.spans import Recorder
from tests.switching.app import App, EchoLM

CALL = 18
"""Tokens of one call of the LM here."""


# --- what workers do ------------------------------------------------------------------------------------------------
def ask(times: int = 1) -> list[str]:
    with dspy.context(lm=EchoLM("test/echo", cache=False)):
        return [App()(question=f"{number}?").answer for number in range(times)]


def ask_and_fail(times: int) -> None:
    ask(times)
    raise KeyError("mine")


def ask_and_die(times: int) -> None:
    ask(times)
    os.kill(os.getpid(), signal.SIGKILL)


async def ask_async(times: int) -> list[str]:
    await asyncio.sleep(0)
    return ask(times)


def run(coroutine_function: Any, times: int) -> Any:
    return asyncio.run(coroutine_function(times))


def ask_uninstrumented(times: int) -> list[str]:
    dspy_otel.uninstrument()
    return ask(times)


def ask_elsewhere(times: int) -> list[str]:
    with ProcessPoolExecutor(1, mp_context=FORK) as pool:
        return pool.submit(dspy_otel.delegate(ask), times).result()


def as_bytes(work: Any, times: int) -> bytes:
    return pickle.dumps(work(times))


def read(sent: bytes) -> Any:
    return pickle.loads(sent)


def attached(carrier: dict[str, str], *times: int) -> list[str]:
    with dspy_otel.attach(carrier) as inside:
        usages = [inside.usage() for each in times if ask(each)]
    return [*usages, inside.usage()]


FORK = multiprocessing.get_context("fork")


@pytest.fixture
def pool(telemetry: Recorder) -> Iterator[ProcessPoolExecutor]:
    telemetry.instrument()
    with ProcessPoolExecutor(1, mp_context=FORK) as made:
        made.submit(os.getpid).result()
        yield made


class Sends(dspy.Module):
    """A program that has another process work."""

    def __init__(self, work: Any) -> None:
        super().__init__()
        self.work = work

    def forward(self, **inputs: Any) -> Any:
        return self.work(**inputs)


def spent(block: Any) -> tuple[int, int, int]:
    """LM calls, tokens and unanswered tasks."""
    now = block.spent
    return now.lm_calls, now.tokens, now.unanswered_tasks


# --- pools ----------------------------------------------------------------------------------------------------------
def test_a_task_belongs_to_the_place_it_was_sent_from(telemetry: Recorder, pool: ProcessPoolExecutor) -> None:
    program = Sends(lambda times: pool.submit(dspy_otel.delegate(ask), times).result())
    with budget(tokens=10**6) as outer, budget(lm_calls=100) as inner:
        assert program(times=3) == ["blue"] * 3
        assert spent(inner) == spent(outer) == (3, 3 * CALL, 0)
    shown = telemetry.only("invoke_workflow Sends").attributes
    usage = {key: value for key, value in shown.items() if key.startswith("dspy.usage.")}
    assert usage == {
        "dspy.usage.lm_calls": 3,
        "dspy.usage.cache_hits": 0,
        "dspy.usage.input_tokens": 33,
        "dspy.usage.output_tokens": 21,
        "dspy.usage.unpriced_calls": 3,
        "dspy.usage.worker_tasks": 1,
    }


def test_chunks_of_a_map_are_tasks(telemetry: Recorder, pool: ProcessPoolExecutor) -> None:
    def mapped(chunksize: int) -> str:
        list(pool.map(dspy_otel.delegate(ask), [1, 1, 1], chunksize=chunksize))
        return "done"

    with budget(tokens=10**6) as block:
        assert list(pool.map(dspy_otel.delegate(ask), [1, 2, 3], chunksize=2)) == [["blue"] * n for n in (1, 2, 3)]
        assert spent(block) == (6, 6 * CALL, 0)
        with FORK.Pool(1) as another:
            another.map(dspy_otel.delegate(ask), [1, 2, 3], chunksize=2)
        assert spent(block) == (12, 12 * CALL, 0)
        Sends(mapped)(chunksize=2)
        assert spent(block) == (15, 15 * CALL, 0)
    assert telemetry.only("invoke_workflow Sends").attributes["dspy.usage.worker_tasks"] == 2


def test_what_is_pickled_to_be_looked_at_is_no_task_of_its_own(pool: ProcessPoolExecutor) -> None:
    with budget(tokens=10**6) as block:
        task = dspy_otel.delegate(ask)
        pickle.dumps(task)
        pool.submit(task, 1).result()
        assert spent(block) == (1, CALL, 0)


def test_what_a_failed_task_has_used_counts(pool: ProcessPoolExecutor) -> None:
    with budget(tokens=10**6) as block:
        with pytest.raises(KeyError, match="mine") as caught:
            pool.submit(dspy_otel.delegate(ask_and_fail), 2).result()
        assert spent(block) == (2, 2 * CALL, 0)
        assert caught.value.args == ("mine",)
        # The failed task's usage has come along with the next one's again, and has been recognized.
        pool.submit(dspy_otel.delegate(ask), 1).result()
        assert spent(block) == (3, 3 * CALL, 0)


def swallow(work: Any, times: int) -> str:
    """What a framework does that repeats a task without asking its sender."""
    try:
        work(times)
    except KeyError:
        return "once more"
    return ""


def test_a_failure_that_never_arrives_comes_with_the_next_result(pool: ProcessPoolExecutor) -> None:
    with budget(tokens=10**6) as block:
        assert pool.submit(swallow, dspy_otel.delegate(ask_and_fail), 2).result() == "once more"
        assert spent(block) == (0, 0, 1)
        pool.submit(dspy_otel.delegate(ask), 1).result()
        assert spent(block) == (3, 3 * CALL, 0)


def test_a_lost_worker_is_said(telemetry: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    telemetry.instrument()

    def lose_one(times: int) -> Any:
        with ProcessPoolExecutor(1, mp_context=FORK) as pool:
            with pytest.raises(BrokenProcessPool):
                pool.submit(dspy_otel.delegate(ask_and_die), times).result()
        with ProcessPoolExecutor(1, mp_context=FORK) as pool:
            return pool.submit(dspy_otel.delegate(ask), times).result()

    with budget(tokens=10**6) as block:
        Sends(lose_one)(times=2)
    assert spent(block) == (2, 2 * CALL, 1)
    shown = telemetry.only("invoke_workflow Sends").attributes
    assert (shown["dspy.usage.worker_tasks"], shown["dspy.usage.unanswered_tasks"]) == (2, 1)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "dspy_otel"]
    assert "1 of 2 tasks that were sent to worker processes have handed no usage back" in said


def test_a_worker_without_instrumentation_is_said(pool: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    with budget(tokens=10**6) as block:
        for _ in range(2):
            assert pool.submit(dspy_otel.delegate(ask_uninstrumented), 1).result() == ["blue"]
        assert spent(block) == (0, 0, 0)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "dspy_otel"]
    assert "instrumentation is off there" in said


def test_a_task_that_sends_another_one(pool: ProcessPoolExecutor) -> None:
    with budget(tokens=10**6) as block:
        assert pool.submit(dspy_otel.delegate(ask_elsewhere), 2).result() == ["blue", "blue"]
        assert spent(block) == (2, 2 * CALL, 0)


def test_a_coroutine_function(pool: ProcessPoolExecutor) -> None:
    with budget(tokens=10**6) as block:
        assert asyncio.run(dspy_otel.delegate(ask_async)(1)) == ["blue"]  # here
        sent = pool.submit(run, dspy_otel.delegate(ask_async), 2)
        assert sent.result() == ["blue", "blue"]
        assert spent(block) == (3, 3 * CALL, 0)


def test_a_result_that_goes_by_way_of_another_worker(pool: ProcessPoolExecutor) -> None:
    """Another worker unpickles it. Its usage goes home with the next result of that worker; no result counts twice."""
    with ProcessPoolExecutor(1, mp_context=FORK) as other, budget(tokens=10**6) as block:
        sent = pool.submit(as_bytes, dspy_otel.delegate(ask), 2).result()
        assert other.submit(read, sent).result() == ["blue", "blue"]
        assert spent(block) == (0, 0, 1)
        other.submit(dspy_otel.delegate(ask), 1).result()
        assert spent(block) == (3, 3 * CALL, 0)
        assert pickle.loads(sent) == pickle.loads(sent) == ["blue", "blue"]
        assert spent(block) == (3, 3 * CALL, 0)


def test_a_task_that_runs_twice_has_used_twice(pool: ProcessPoolExecutor) -> None:
    with budget(tokens=10**6) as block:
        sent = pickle.dumps(dspy_otel.delegate(ask))
        for _ in range(2):
            pickle.loads(pool.submit(run_sent, sent, 2).result())
        assert spent(block) == (4, 4 * CALL, 0)


def run_sent(sent: bytes, times: int) -> bytes:
    return as_bytes(pickle.loads(sent), times)


# --- without pickle -------------------------------------------------------------------------------------------------
def test_usage_is_text_that_counts_once(pool: ProcessPoolExecutor) -> None:
    with budget(tokens=10**6) as block:
        carrier = json.loads(json.dumps(dspy_otel.inject(usage=True)))
        assert spent(block) == (0, 0, 1)
        usages = json.loads(json.dumps(pool.submit(attached, carrier, 2, 1).result()))
        for expected, usage in zip((2, 3, 3), usages, strict=True):
            for _ in range(2):
                dspy_otel.add_usage(usage)
                assert spent(block) == (expected, expected * CALL, 0)
    assert len(set(usages)) == 3


def test_nothing_is_asked_for_where_nothing_counts(pool: ProcessPoolExecutor) -> None:
    assert dspy_otel.inject(usage=True) == {}
    assert pool.submit(attached, {}, 1).result() == ["", ""]
    assert pool.submit(dspy_otel.delegate(ask), 1).result() == ["blue"]
    dspy_otel.add_usage("")
    with budget(tokens=10**6) as block:
        assert "dspy-task" not in dspy_otel.inject()
        with suppress_instrumentation():
            assert "dspy-task" not in dspy_otel.inject(usage=True)
            assert pool.submit(dspy_otel.delegate(ask), 1).result() == ["blue"]
        assert spent(block) == (0, 0, 0)


def test_in_the_process_that_has_sent_it(telemetry: Recorder) -> None:
    """A thread instead of a process, an eager Celery, a cluster of Dask in the same process."""
    telemetry.instrument()
    with budget(tokens=10**6) as block:
        dspy_otel.add_usage(attached(dspy_otel.inject(usage=True), 1)[0])
        assert spent(block) == (1, CALL, 0)
        assert dspy_otel.delegate(ask)(1) == ["blue"]
        assert spent(block) == (2, 2 * CALL, 0)
        assert pickle.loads(pickle.dumps(dspy_otel.delegate(ask)))(1) == ["blue"]
        assert spent(block) == (3, 3 * CALL, 0)
        with pytest.raises(KeyError, match="mine"):
            pickle.loads(pickle.dumps(dspy_otel.delegate(ask_and_fail)))(1)
        assert spent(block) == (4, 4 * CALL, 0)


def test_late_usage_counts_for_what_still_goes_on(telemetry: Recorder, pool: ProcessPoolExecutor) -> None:
    sent: list[bytes] = []

    def send() -> str:
        sent.append(pickle.dumps(dspy_otel.delegate(ask)))
        return "begun"

    with budget(tokens=10**6) as block:
        Sends(send)()
        pickle.loads(pool.submit(run_sent, sent[0], 2).result())
        assert spent(block) == (2, 2 * CALL, 0)
    assert telemetry.only("invoke_workflow Sends").attributes["dspy.usage.unanswered_tasks"] == 1


# --- budgets --------------------------------------------------------------------------------------------------------
def test_a_budget_holds_before_the_next_task(telemetry: Recorder, pool: ProcessPoolExecutor) -> None:
    alerts: list[Any] = []
    with budget(lm_calls=4, on_warning=alerts.append) as block:
        with pytest.raises(BudgetExceeded, match="4 LM calls is used up: 4 LM calls"):
            for _ in range(10):
                pool.submit(dspy_otel.delegate(ask), 2).result()
        assert spent(block) == (4, 4 * CALL, 0)
        with pytest.raises(BudgetExceeded):
            dspy_otel.inject(usage=True)
        with pytest.raises(BudgetExceeded):
            ask()
    assert [(each.percent, each.spent) for each in alerts] == [(50, 2), (100, 4)]


def test_a_budget_that_cannot_hold_is_refused_before_the_next_task(pool: ProcessPoolExecutor) -> None:
    with budget(cost=1.0):
        assert pool.submit(dspy_otel.delegate(ask), 1).result() == ["blue"]  # the LM has no price
        with pytest.raises(BudgetRefused, match="cannot be enforced"):
            dspy_otel.delegate(ask)


class Outer(dspy.BaseLM):
    """An LM that asks another one, in a worker, and reports as its own what that has used."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        super().__init__("test/outer", cache=False)
        self.pool = pool

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        self.pool.submit(dspy_otel.delegate(ask), 2).result()
        answer = EchoLM("test/echo").forward()
        answer.usage = {"prompt_tokens": 22, "completion_tokens": 14, "total_tokens": 36}
        return answer


def test_an_lm_that_asks_others_counts_once(pool: ProcessPoolExecutor) -> None:
    with budget(tokens=10**6) as block, dspy.context(lm=Outer(pool)):
        App()(question="?")
        assert spent(block) == (2, 2 * CALL, 0)


# --- records --------------------------------------------------------------------------------------------------------
def in_totals() -> tuple[Totals, CallContext]:
    context, totals = CallContext("test", None, None), Totals(by_role=True)
    context.totals = (totals,)
    return totals, context


@pytest.mark.parametrize(
    ("records", "tasks", "unanswered"),
    [
        ([("a", 0)], 1, 0),
        ([("a", 1)], 2, 1),  # the first attempt was lost
        ([("a", 2), ("a", 0)], 3, 1),  # what it had used has come later
        ([("a", 0), ("a", 1), ("a", 1)], 2, 0),
        ([("a", 0), ("b", 0), ("c", 1)], 4, 1),  # several that share a carrier
    ],
)
def test_attempts_of_a_framework_are_tasks(records: list[tuple[str, int]], tasks: int, unanswered: int) -> None:
    totals, context = in_totals()
    task = worker_tasks.send(context)
    for number, (run_, attempt) in enumerate(records):
        record = Record(task, f"record {number}", {"task": Sums(calls=1, input_tokens=5)}, run=run_, attempt=attempt)
        text = json.dumps([record.fields()])
        assert len(worker_tasks.receive(text)) == 1
        assert worker_tasks.receive(text) == []
    assert (totals.sent_tasks, totals.unanswered_tasks) == (tasks, unanswered)
    assert totals.by_role()["task"].input_tokens == 5 * len(records)


def test_celery_says_which_attempt_it_is() -> None:
    celery = pytest.importorskip("celery")
    seen: list[tuple[str, int]] = []

    def fails_twice() -> None:
        seen.append((worker_tasks.Collector("sender-1").run, worker_tasks.Collector("sender-1").attempt))
        if len(seen) < 3:
            raise ValueError("not yet")

    application = celery.Celery("retries", broker="memory://", set_as_current=False)
    retries = {"autoretry_for": (ValueError,), "default_retry_delay": 0, "retry_backoff": 0}
    application.task(fails_twice, **retries).apply().get()
    assert [attempt for _, attempt in seen] == [0, 1, 2]
    assert len({run_ for run_, _ in seen} - {""}) == 1
    assert worker_tasks.Collector("sender-1").run == ""


def test_no_more_is_kept_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_tasks, "MAX_UNANSWERED", 5)
    monkeypatch.setattr(worker_tasks, "MAX_ANSWERED", 2)
    monkeypatch.setattr(worker_tasks, "_unanswered", {})
    monkeypatch.setattr(worker_tasks, "_answered", {})
    totals, context = in_totals()
    sent = [worker_tasks.send(context) for _ in range(8)]
    assert list(worker_tasks._unanswered) == sent[3:]
    for number in "ab":
        for task in sent:
            worker_tasks.receive(json.dumps([Record(task, number, {None: Sums(calls=1)}).fields()]))
    assert (totals.calls, totals.unanswered_tasks) == (5 + 2, 3)
    assert list(worker_tasks._answered) == sent[6:]
    assert not worker_tasks._unanswered
    assert not worker_tasks._waiting
    task = Task(context)
    for number in range(worker_tasks.MAX_RECORDS + 10):
        task.add(Record(task.id, str(number), {}, run=str(number)))
    assert len(task._records) == len(task._runs) == worker_tasks.MAX_RECORDS
    for number in range(worker_tasks.MAX_WAITING + 10):
        for _ in range(2):
            worker_tasks.receive(json.dumps([Record("another-1", str(number), {}).fields()]))
    assert len(worker_tasks._waiting) == worker_tasks.MAX_WAITING
    assert len(worker_tasks._take_waiting("another-2")) == worker_tasks.MAX_WAITING


def test_a_task_keeps_no_program_alive(telemetry: Recorder) -> None:
    _, context = in_totals()
    id_ = worker_tasks.send(context)
    assert worker_tasks._unanswered[id_].context() is context
    del context
    assert worker_tasks._unanswered[id_].context() is None


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
names = st.sampled_from(["task", "id", "used", "tasks", "run", "attempt", "counted"])
numbers = st.lists(st.sampled_from([0, 1, -1, 2**60, 0.5, float("nan"), True, None]), min_size=8, max_size=8)
nearly = st.fixed_dictionaries(
    {
        "task": st.just("TASK"),
        "id": st.text() | anything,
        "used": st.dictionaries(st.sampled_from(["task", "", "admin"]), numbers) | anything,
        "tasks": st.lists(st.integers(), max_size=3) | anything,
        "run": st.just("") | anything,
        "attempt": st.integers() | anything,
        "counted": st.booleans(),
    }
)


@pytest.mark.injects_faults
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(sent=anything | st.lists(nearly | st.dictionaries(names, anything)))
@example([{"task": "TASK", "id": "a", "used": {}, "tasks": [0, 2], "run": "", "attempt": 0, "counted": True}])
def test_any_usage_is_harmless(caplog: pytest.LogCaptureFixture, sent: Any) -> None:
    caplog.set_level(logging.CRITICAL)
    totals, context = in_totals()
    task = worker_tasks.send(context)
    text = json.dumps(sent)
    for each in (text, text.replace("TASK", task), text[:-1], sent):
        dspy_otel.add_usage(each)
    assert all(type(value) is int and value >= 0 for value in (totals.calls, totals.input_tokens or 0))
    assert totals.cost >= 0
    assert totals.unanswered_tasks >= 0


class Strict(Exception):
    """Lets nobody set an attribute, also when it is unpickled."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__"):  # Python's own
            raise TypeError(name)


def fail_strictly(times: int) -> None:
    ask(times)
    raise Strict("mine")


def test_an_exception_that_takes_no_attribute_is_left_alone(pool: ProcessPoolExecutor) -> None:
    with budget(tokens=10**6) as block:
        with pytest.raises(Strict, match="mine"):
            pool.submit(dspy_otel.delegate(fail_strictly), 2).result()
        pool.submit(dspy_otel.delegate(ask), 1).result()  # comes along with it
        assert spent(block) == (3, 3 * CALL, 0)


def test_threads_may_bring_usage_back_together(telemetry: Recorder) -> None:
    telemetry.instrument()
    totals, context = in_totals()
    records = [
        json.dumps([Record(worker_tasks.send(context), "r", {"task": Sums(calls=1, output_tokens=3)}).fields()])
        for _ in range(200)
    ]
    token = otel_context.get_current()
    threads = [threading.Thread(target=lambda: [dspy_otel.add_usage(each) for each in records]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (totals.calls, totals.output_tokens, totals.unanswered_tasks) == (200, 600, 0)
    assert otel_context.get_current() is token
    assert current_call_context() is None
