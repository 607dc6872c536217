"""Programs of spans at random: what the instrumentation emits, with ids and times that do not depend on the run."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import Status, StatusCode

from dspy_otel import semconv
from dspy_otel.mlflow import MLflowSpanExporter
from dspy_otel.mlflow.account import Account
from dspy_otel.mlflow.exporter import track_runs
from tests.mlflow.fake_server import Fault, Faults
from tests.support.waiting import wait_for

ROWS = json.dumps([{"q": "1", "n": 2}, {"q": "3", "n": 4}])
STATE = json.dumps({"qa": {"signature": {"instructions": "Answer."}, "demos": []}})


# --- what a program does --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Call:
    """A plain call, with calls in it; ``foreign`` spans are of another instrumentation."""

    children: int = 0
    foreign: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Scores of its examples; None for one that fails."""

    scores: tuple[float | None, ...] = ()
    fails: bool = False


@dataclass(frozen=True)
class Trial:
    scores: tuple[float | None, ...] = ()
    score: float | None = None
    fails: bool = False


@dataclass(frozen=True)
class Optimization:
    """``content``: programs, datasets' rows and examples' inputs are recorded."""

    trials: tuple[Trial, ...] = ()
    content: bool = True
    fails: bool = False
    inside: Optimization | None = None


Story = Call | Evaluation | Optimization
_scores = st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), max_size=4).map(tuple)
_trials = st.lists(
    st.builds(Trial, _scores, st.sampled_from([None, 50.0, 75.0]), st.booleans()),
    max_size=3,
).map(tuple)
_inner = st.builds(Optimization, _trials, st.booleans(), st.booleans())
stories: st.SearchStrategy[Story] = st.one_of(
    st.builds(Call, st.integers(0, 3), st.booleans()),
    st.builds(Evaluation, _scores, st.booleans()),
    st.builds(Optimization, _trials, st.booleans(), st.booleans(), st.none() | _inner),
)


# --- what happens around it -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Event:
    """Something that happens while the program runs.

    Attributes:
        at: when, in percent of its steps.
        kind: ``round`` (the queue is written down, and the worker does a round), ``record`` (only the first),
            ``outage``, ``mended``, ``poison`` (a span name gets a status), ``fault`` (of an endpoint's next request),
            ``disk`` (an errno for whatever is written), ``fork``.
    """

    at: int
    kind: str
    endpoint: str = ""
    fault: Fault | None = None
    number: int = 0


@dataclass(frozen=True)
class Plan:
    """A program and what happens to it.

    Attributes:
        stories: what it does.
        schedule: which of them goes on, in turn: they are interleaved.
        events: what happens around it.
        cut: share of its steps after which the process ends; 100 for all of them.
        end: ``shutdown``, or ``kill``: nothing is shut down once the queue is written down.
        spool: whether there is a disk.
        limit: most bytes on disk; 0 for the usual.
        memory: likewise, in memory.
        threads: whether the processor has threads of its own; else all of it runs in the test's.
    """

    stories: tuple[Story, ...] = ()
    schedule: tuple[int, ...] = (0,)
    events: tuple[Event, ...] = ()
    cut: int = 100
    end: str = "shutdown"
    spool: bool = True
    limit: int = 0
    memory: int = 0
    threads: bool = False

    def steps(self) -> int:
        return len(list(interleaved([list(_dry(story)) for story in self.stories], self.schedule)))


def _dry(story: Story) -> Iterator[None]:
    return Emitter(TracerProvider(shutdown_on_exit=False)).steps(story, "0")


def interleaved(stories: Sequence[Any], schedule: Sequence[int]) -> Iterator[Any]:
    active = [iter(story) for story in stories]
    turn = 0
    while active:
        place = schedule[turn % len(schedule)] % len(active)
        turn += 1
        try:
            yield next(active[place])
        except StopIteration:
            del active[place]


class Counting(IdGenerator):
    """Ids in order."""

    def __init__(self, first: int = 1) -> None:
        self.next = first

    def generate_span_id(self) -> int:
        self.next += 1
        return self.next

    def generate_trace_id(self) -> int:
        self.next += 1
        return (7 << 96) + self.next


class Emitter:
    """Emits spans; each step is the start or the end of one."""

    def __init__(self, provider: TracerProvider) -> None:
        self._ours = provider.get_tracer(semconv.SCOPE_NAME)
        self._foreign = provider.get_tracer("somebody.else")
        # Later than now: the exporter takes spans that ended before it was attached from the batch processor too.
        self._now = 1_900_000_000_000_000_000
        self.produced: list[ReadableSpan] = []

    def _tick(self) -> int:
        self._now += 7_000_000
        return self._now

    def start(self, name: str, parent: Any = None, foreign: bool = False, **at: Any) -> Any:
        context = trace.set_span_in_context(parent if parent is not None else trace.INVALID_SPAN)
        tracer = self._foreign if foreign else self._ours
        attributes = {key.replace("__", "."): value for key, value in at.items() if value is not None}
        return tracer.start_span(name, context, attributes=attributes, start_time=self._tick())

    def end(self, span: Any) -> None:
        span.end(self._tick())
        self.produced.append(span)

    def steps(self, story: Story, name: str) -> Iterator[None]:
        if isinstance(story, Call):
            yield from self._call(story, None)
        elif isinstance(story, Evaluation):
            yield from self._evaluation(story, f"e{name}", None, {}, True)
        else:
            yield from self._optimization(story, f"o{name}", None, f"o{name}")

    def _call(self, story: Call, parent: Any) -> Iterator[None]:
        span = self.start("call" if story.foreign else "Predict qa", parent, story.foreign)
        yield
        for _ in range(story.children):
            child = self.start("chat m", span, story.foreign, gen_ai__operation__name="chat")
            yield
            self.end(child)
            yield
        self.end(span)
        yield

    def _evaluation(self, story: Any, name: str, parent: Any, stamps: dict[str, Any], content: bool) -> Iterator[None]:
        stamps = {**stamps, semconv.EVALUATION_ID: name}
        span = self.start("evaluate QA", parent, **stamps, **{semconv.EVALUATION_METRIC_NAME: "exact"})
        yield
        for index, score in enumerate(story.scores):
            example = self.start("example QA", None, **stamps, **{semconv.EXAMPLE_INDEX: index})
            yield
            child = self.start("chat m", example, **stamps, gen_ai__operation__name="chat")
            yield
            self.end(child)
            yield
            if content:
                example.set_attribute(semconv.MODULE_INPUTS, json.dumps({"q": str(index)}))
                expected = {"a": "yes", "also": [1, {"b": None}], "not": None}
                example.set_attribute(semconv.EXAMPLE_EXPECTED, json.dumps(expected if index % 2 else {"a": "yes"}))
                if score is not None:
                    example.set_attribute(semconv.MODULE_OUTPUTS, json.dumps({"a": "yes"}))
            if score is None:
                example.set_attribute(semconv.ERROR_TYPE, "ValueError")
                example.set_status(Status(StatusCode.ERROR, "no"))
            else:
                example.set_attribute(semconv.EXAMPLE_SCORE, score)
            self.end(example)
            yield
        span.set_attribute(semconv.EVALUATION_SCORE, 50.0)
        self._end_maybe_failed(span, story.fails)
        yield

    def _end_maybe_failed(self, span: Any, fails: bool) -> None:
        if fails:
            span.set_attribute(semconv.ERROR_TYPE, "RuntimeError")
            span.set_status(Status(StatusCode.ERROR, "it broke"))
        self.end(span)

    def _optimization(self, story: Optimization, name: str, parent: Any, root: str) -> Iterator[None]:
        stamps = {semconv.OPTIMIZER_RUN_ID: name, semconv.OPTIMIZER_ROOT_RUN_ID: root}
        above = None if name == root else name.rpartition("i")[0]
        at = {semconv.OPTIMIZER_NAME: "Best", semconv.PROGRAM_NAME: "QA", semconv.OPTIMIZER_PARENT_RUN_ID: above}
        span = self.start("compile Best", parent, **stamps, **at)
        yield
        # Parameters and datasets come after the start, as in a program.
        span.set_attributes({f"{semconv.OPTIMIZER_PARAMS_PREFIX}seed": 3, semconv.DATASET_VAL_SIZE: 4})
        span.set_attribute(semconv.DATASET_VAL_DIGEST, f"digest of {root}")
        if story.content:
            span.set_attributes({semconv.DATASET_VAL_ROWS: ROWS, semconv.INITIAL_PROGRAM_ID: "c0"})
            span.set_attribute(semconv.INITIAL_PROGRAM_STATE, STATE)
        yield
        for number, trial in enumerate(story.trials, 1):
            yield from self._trial(trial, number, name, span, stamps, story.content)
        if story.inside is not None:
            yield from self._optimization(story.inside, f"{name}i", span, root)
        scores = [trial.score for trial in story.trials if trial.score is not None]
        if scores:
            span.set_attribute(semconv.OPTIMIZER_BEST_SCORE, max(scores))
            span.set_attribute(semconv.OPTIMIZER_WINNER_TRIAL, 1)
        span.set_attribute(semconv.OPTIMIZER_TRIALS_DONE, len(story.trials))
        if not story.fails:
            span.set_attribute(semconv.PROGRAM_ID, "c1")
            if story.content:
                span.set_attribute(semconv.PROGRAM_STATE, STATE)
        span.set_attribute(semconv.OPTIMIZER_OUTCOME, "failed" if story.fails else "finished")
        self._end_maybe_failed(span, story.fails)
        yield

    def _trial(
        self, story: Trial, number: int, name: str, parent: Any, stamps: dict[str, Any], content: bool
    ) -> Iterator[None]:
        stamps = {**stamps, semconv.TRIAL_NUMBER: number}
        span = self.start("trial", parent, **stamps, **{semconv.TRIAL_KIND: "full", semconv.CANDIDATE_ID: f"c{number}"})
        yield
        if story.scores:
            yield from self._evaluation(story, f"{name}e{number}", span, stamps, content)
        if story.score is not None:
            span.set_attribute(semconv.TRIAL_SCORE, story.score)
            span.set_attribute(semconv.TRIAL_IS_BEST, number == 1)
        span.set_attribute(semconv.TRIAL_SIZE, 4)
        if content:
            span.set_attribute(semconv.PROGRAM_STATE, STATE)
        self._end_maybe_failed(span, story.fails)
        yield


# --- a process ------------------------------------------------------------------------------------------------------


@dataclass
class Process:
    """A program that ran, or was ended.

    Attributes:
        exporter: what it wrote with.
        produced: spans that ended.
        forked, exit_codes: children, and how they ended.
        account: what became of all of it, when it was shut down.
    """

    exporter: Any
    produced: list[ReadableSpan] = field(default_factory=list)
    forked: int = 0
    exit_codes: list[int] = field(default_factory=list)
    account: Account | None = None


@dataclass
class Disk:
    """What writing to the journal fails with; 0 for nothing."""

    errno: int = 0


def run(
    plan: Plan,
    uri: str,
    faults: Faults | None,
    disk: Disk,
    timeout: float = 60.0,
    experiment: str | None = None,
    first: int = 1,
) -> Process:
    """Run a program to its end. Without ``faults`` nothing goes wrong, but it forks and ends as it does with them."""
    exporter = MLflowSpanExporter(uri, timeout=timeout, experiment=experiment)
    process = Process(exporter)
    ids = Counting(first)
    provider = TracerProvider(shutdown_on_exit=False, id_generator=ids)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    track_runs(provider)
    processor = exporter.processor
    processor._no_threads = not plan.threads
    emitter = Emitter(provider)
    process.produced = emitter.produced
    all_steps = list(plan.stories)
    last = plan.steps() * plan.cut // 100
    waiting = sorted(plan.events, key=lambda event: event.at)
    running = interleaved([emitter.steps(story, str(place)) for place, story in enumerate(all_steps)], plan.schedule)
    for step in range(last + 1):
        while waiting and waiting[0].at * last <= step * 100:
            happen(waiting.pop(0), process, provider, ids, faults, disk)
        if step < last:
            next(running)
    if plan.end == "kill":
        processor.record()
        abandon(processor)
    else:
        provider.shutdown()
        process.account = copy.deepcopy(processor.worker.account)
        recoveries = [thread for thread in threading.enumerate() if thread.name == "dspy-otel-mlflow-recovery"]
        for thread in (*processor._threads, *recoveries):  # the process would be gone by now
            thread.join()
    return process


def happen(
    event: Event, process: Process, provider: TracerProvider, ids: Counting, faults: Faults | None, disk: Disk
) -> None:
    processor = process.exporter.processor
    if event.kind == "fork":
        fork(process, provider, ids)
    elif event.kind == "record":
        processor.record()
    elif event.kind == "round":
        processor.record()
        processor.worker.retry_now()
        processor.worker.round()
    elif faults is None:
        return
    elif event.kind == "outage":
        faults.outage = event.fault
    elif event.kind == "mended":
        faults.outage = None
    elif event.kind == "poison":
        faults.poison[event.endpoint] = event.number
    elif event.kind == "replaced":
        assert faults.forget is not None
        faults.forget()
    elif event.kind == "fault":
        assert event.fault is not None
        faults.add(event.endpoint, event.fault)
    else:
        disk.errno = event.number


def fork(process: Process, provider: TracerProvider, ids: Counting) -> None:
    """A child process makes a call of its own, and ends."""
    process.forked += 1
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ids.next += 1_000_000 * process.forked
            emitter = Emitter(provider)
            for _ in emitter.steps(Call(1), ""):
                pass
            provider.shutdown()
            code = 0
        finally:
            os._exit(code)
    process.exit_codes.append(wait(child))


def wait(child: int) -> int:
    try:
        _, status = wait_for(
            lambda: (found := os.waitpid(child, os.WNOHANG))[0] and found, "a forked child", pause=0.01
        )
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return os.waitstatus_to_exitcode(status)


def abandon(processor: Any) -> None:
    """As if the process had been killed: nothing is closed or written any more, and its lock is free."""
    processor._over.set()
    processor.worker.abandoned = True
    processor._new.set()
    processor._wake.set()
    recoveries = [thread for thread in threading.enumerate() if thread.name == "dspy-otel-mlflow-recovery"]
    for thread in (*processor._threads, *recoveries):
        thread.join()
    processor.worker.close()
    if processor.journal.place is not None:
        processor.journal.place.release()
