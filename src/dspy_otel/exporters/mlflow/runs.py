"""Runs in MLflow while they happen: a span processor that hands compiles, trials and evaluations to one worker.

The program's threads only put spans on a queue. The worker keeps a :class:`~dspy_otel.exporters.mlflow.tree.Tree` of
what should be in MLflow and brings MLflow up to it, some times a second at most; what fails is tried again with the
next round, so that a server may be away for a while. Traces are linked to their runs, and scores put on traces, when
the exporter has delivered the trace.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from itertools import islice
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar

from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from dspy_otel import semconv as sc
from dspy_otel.exporters.mlflow.base import ExportError, first_line
from dspy_otel.exporters.mlflow.delivery import Delivery, start_thread
from dspy_otel.exporters.mlflow.exporter import MLflowSpanExporter
from dspy_otel.exporters.mlflow.tree import (
    COMPILE,
    EVALUATION,
    TAG_NAME,
    TAG_PARENT,
    TRIAL,
    Dataset,
    Metric,
    Models,
    Run,
    Score,
    StoredRun,
    Tree,
    is_example,
    kind_of,
    score_of_span,
)
from dspy_otel.report.collect import is_phase, trace_id_of
from dspy_otel.version import __version__

_logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")

_LINGER: Final = 0.5
"""Seconds between something new and writing it: what comes in between travels in the same calls."""
_BACKOFF: Final = (1.0, 2.0, 5.0, 10.0)
"""Seconds to wait after the first, second, ... failure in a row; the last holds on."""
MAX_EVENTS: Final = 50_000
"""Most spans waiting for the worker. Above it, examples are left out of evaluation tables; runs and trials never."""
MAX_SCORES: Final = 200_000
"""Most scores and links waiting while MLflow does not answer."""
EXIT_SECONDS: Final = 180.0
"""Most time that the end of the program waits for what is left. A server that does not answer ends it at once."""
_WORTH_A_LINE: Final = 500
"""From so many spans and scores on, the end of the program says that it takes a while."""
_TRIES_AT_EXIT: Final = 2
_MOST_TRIES: Final = 12
"""For what MLflow refuses though it can be reached: about a minute and a half. The rest has to go on."""
_AWAY: Final = frozenset({"unreachable", "credentials"})
_HELPERS: Final = 8
"""Threads that put scores on traces: MLflow takes them one by one only, 80 ms each over one connection and 20 over
eight (measured with MLflow 3.17.2 on two cores)."""
_SCORES_AT_ONCE: Final = 64
_LINKS_AT_ONCE: Final = 100  # MLflow's MAX_TRACE_LINKS_PER_REQUEST
_TAGS_AT_ONCE: Final = 100
_METRICS_AT_ONCE: Final = 800  # with parameters and tags at most 1,000 items in one call


class RunStore(Protocol):
    """Where runs are kept; methods raise any error, and :meth:`explain` says what it means."""

    parallel: bool

    def create(self, run: Run, tags: Mapping[str, str]) -> tuple[str, str]:
        """Create a run; returns its id and the address of its artifacts."""

    def log(self, run: Run, metrics: Sequence[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Write metrics, parameters and tags."""

    def datasets(self, run: Run, datasets: Sequence[Dataset]) -> None:
        """Add dataset inputs."""

    def artifact(self, run: Run, path: str, text: str) -> None:
        """Store a text artifact."""

    def end(self, run: Run, status: str, when: int) -> None:
        """Set a run's status and end."""

    def link(self, run_id: str, trace_ids: Sequence[str]) -> None:
        """Put traces on a run."""

    def assess(self, score: Score, run_id: str | None) -> bool:
        """Put a score on a trace; False when the trace does not exist."""

    def find_runs(self, run_id: str | None, condition: str, experiment_id: str | None = None) -> list[StoredRun]:
        """The run with an id, or those of an experiment (by default its own) that match a search condition."""

    def read_artifact(self, run_id: str, artifact_uri: str, path: str) -> str | None:
        """A text artifact, or None when the run has none under that path."""

    def explain(self, error: Exception) -> ExportError:
        """An error as one of ours; permanent when the same call would fail again."""

    def close(self) -> None:
        """Release connections."""

    def after_fork(self) -> None:
        """In a forked child: give up connections that the parent process still uses."""


class RunTracker(SpanProcessor):
    """Compile, trial and evaluate spans as MLflow runs. No method raises or waits for MLflow, except at the end.

    Args:
        exporter: says where to write, and writes spans.

    Attributes:
        since: all spans that end after this time (nanoseconds since 1970) come here.
    """

    def __init__(self, exporter: MLflowSpanExporter) -> None:
        self._exporter = exporter
        self.since = 1 << 63
        self._begin()
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())

    def _begin(self) -> None:
        self._events: deque[tuple[str, Any, Any]] = deque()
        self._delivery = Delivery(self._exporter.write, self.sent)
        self._models = Models()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None
        self._deadline = float("inf")
        self._left_out = 0
        self._worker: _Worker | None = None

    # --- in the program's threads -----------------------------------------------------------------------------------
    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Note the start of a compile, trial or evaluation."""
        try:
            kind = kind_of(span.name, span.attributes or {}) if _ours(span) else None
            if kind is not None:
                self._put("start", span, None if kind == TRIAL else self._users_run())
        except Exception:
            _logger.debug("start of %r is not followed", span.name, exc_info=True)

    def on_end(self, span: ReadableSpan) -> None:
        """Take the span along, and note the end of a compile, trial, evaluation, example or LM call."""
        try:
            if not _ours(span):
                self._take_along(span)
                return
            at = span.attributes or {}
            if sc.GEN_AI_OPERATION_NAME in at:
                if sc.OPTIMIZER_RUN_ID in at or sc.EVALUATION_ID in at:
                    with self._lock:
                        self._models.add(at)
            elif is_example(span.name):
                if len(self._events) < MAX_EVENTS:
                    self._put("end", span, {})
                else:
                    self._left_out += 1
            elif kind_of(span.name, at) is not None or is_phase(span.name, at):
                self._put("end", span, self._models_of(span))
            self._take_along(span)  # last: a delivered trace is linked to a run that is known
        except Exception:
            _logger.debug("end of %r is not followed", span.name, exc_info=True)

    def _models_of(self, span: ReadableSpan) -> dict[str, str]:
        """The models of an optimization or evaluation that is over."""
        at = span.attributes or {}
        place = {COMPILE: at.get(sc.OPTIMIZER_RUN_ID), EVALUATION: at.get(sc.EVALUATION_ID)}
        of = place.get(str(kind_of(span.name, at)))
        with self._lock:
            found = self._models.of(of)
            self._models.forget(of)
        return found

    def _take_along(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self._delivery.put(span)

    def sent(self, spans: Sequence[ReadableSpan]) -> None:
        """These spans are delivered: their traces can be linked and scored now."""
        try:
            for span in spans:
                if _ours(span) and (span.parent is None or is_example(span.name)):
                    at = span.attributes or {}
                    if sc.OPTIMIZER_RUN_ID in at or sc.EVALUATION_ID in at:
                        self._put("sent", span, None)
        except Exception:
            _logger.debug("delivered spans are not followed", exc_info=True)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Wait until everything so far is in MLflow; False when it is not within the time."""
        until = time.monotonic() + timeout_millis / 1000
        if not self._delivery.flush(timeout_millis / 1000):
            return False
        if self._thread is None:
            return True
        self._wake.set()
        return self._idle.wait(max(0.0, until - time.monotonic()))

    def shutdown(self) -> None:
        """Write what is left, for at most three minutes, and say so when something could not be written."""
        if self._stop.is_set():
            return
        self._deadline = time.monotonic() + EXIT_SECONDS
        waiting = self._delivery.waiting + len(self._events) + (0 if self._worker is None else self._worker.waiting)
        if waiting > _WORTH_A_LINE:
            _logger.warning("MLflow: writing the last %d spans and scores; at most %.0f s.", waiting, EXIT_SECONDS)
        self._delivery.stop(self._deadline)
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(max(1.0, self._deadline + 1 - time.monotonic()))
        elif self._events:
            self._run()
        self._exporter.close()
        worker = self._worker
        left = [f"{self._delivery.lost} spans"] if self._delivery.lost else []
        if worker is not None:
            left += worker.left()
        if self._left_out:
            left.append(f"{self._left_out} rows of evaluation tables")
        if left:
            done = "" if worker is None else f"{worker.done()}; "
            _logger.warning("MLflow: %snot written: %s.", done, ", ".join(left))

    def _put(self, what: str, span: ReadableSpan, more: Any) -> None:
        if self._stop.is_set():
            return
        self._idle.clear()
        self._events.append((what, span, more))
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = start_thread(self._run, "dspy-otel-mlflow")
        self._wake.set()

    def _users_run(self) -> str | None:
        """Id of the run that the user has started around this, if it is in the same place as ours."""
        fluent = sys.modules.get("mlflow.tracking.fluent")
        if fluent is None:
            return None
        run = fluent.active_run()
        if run is None or not self._exporter.is_here(sys.modules["mlflow"].get_tracking_uri()):
            return None
        return str(run.info.run_id)

    def _after_fork(self) -> None:
        worker = self._worker
        self._begin()  # what waits is the parent process's to write
        if worker is not None:
            worker.after_fork()

    # --- in the worker ----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        worker = self._worker = _Worker(self._exporter.open_runs, self._stop)
        with suppress_instrumentation():  # what we send is not to be watched, and sent in turn
            while self._round(worker):
                pass
            worker.close()

    def _round(self, worker: _Worker) -> bool:
        """Take what came and write it; False when that was the last time."""
        if not worker.pending:
            self._wake.wait()
        self._stop.wait(_LINGER if worker.failures == 0 else worker.pause)
        self._wake.clear()
        stopping = self._stop.is_set()
        self._take(worker)
        if stopping:
            worker.stop()
        worker.work(self._deadline)
        if not worker.pending and not self._events:
            self._idle.set()
            if self._events:  # something came in between
                self._idle.clear()
        if stopping:
            if not worker.pending or worker.failures > _TRIES_AT_EXIT or time.monotonic() > self._deadline:
                return False
            time.sleep(min(worker.failures, 1))  # a server may just be restarting
        return True

    def _take(self, worker: _Worker) -> None:
        for _ in range(len(self._events)):  # what comes in between waits: runs are written in the meantime
            what, span, more = self._events.popleft()
            if worker.dead:
                continue
            try:
                if what == "start":
                    worker.tree.start(span, more)
                elif what == "sent":
                    worker.deliver(span)
                else:
                    worker.tree.end(span, more)
            except Exception:
                _logger.debug("%s of %r is not followed", what, span.name, exc_info=True)
        with contextlib.suppress(Exception):
            worker.tree.refresh()


class _Worker:
    """Brings MLflow up to the tree. Used by one thread."""

    def __init__(self, connect: Callable[[threading.Event], RunStore], stop: threading.Event) -> None:
        self.tree = Tree(versions())
        self._connect = connect
        self._stop = stop
        self._store: RunStore | None = None
        self.dead = False
        """Trying again cannot help."""
        self._links: dict[str, list[str]] = {}
        self._scores: deque[Score] = deque()
        self._ids: dict[str, str] = {}
        self._reported: set[str] = set()
        self._helpers = _Helpers()
        self.failures = 0
        self._counts = {"runs": 0, "traces": 0, "scores": 0}
        self._lost = {"runs": 0, "traces": 0, "scores": 0}

    @property
    def pending(self) -> bool:
        """Whether MLflow lacks something."""
        return not self.dead and bool(self._links or self._scores or any(run.dirty for run in self.tree.runs.values()))

    @property
    def waiting(self) -> int:
        """Scores that are not yet written."""
        return len(self._scores)

    @property
    def pause(self) -> float:
        """Seconds to wait after the last failures."""
        return _BACKOFF[min(self.failures, len(_BACKOFF)) - 1]

    def deliver(self, span: ReadableSpan) -> None:
        """Note a delivered root span or example: its trace belongs on a run, and may have a score."""
        key = self.tree.key_of(span)
        if key is None:
            return
        if span.parent is None:
            self._links.setdefault(key, []).append(trace_id_of(span))
        score = score_of_span(span, key, self.tree.metric_of(span.attributes or {}))
        if score is not None:
            if len(self._scores) >= MAX_SCORES:
                self._lost["scores"] += 1
            else:
                self._scores.append(score)

    def work(self, deadline: float) -> None:
        """One round. Runs first, then traces on them, then a share of the scores."""
        if self.dead:
            return
        try:
            if self._store is None:
                self._store = self._connect(self._stop)
            self._write_all([run for run in self.tree.runs.values() if run.dirty])
            self._link()
            while self._scores and time.monotonic() < deadline:
                self._assess(list(_take(self._scores, _SCORES_AT_ONCE)))
                if not self._stop.is_set() and any(run.dirty for run in self.tree.runs.values()):
                    break
        except Exception as error:
            self._failed(error)
        else:
            if self.failures:
                _logger.warning("MLflow takes runs again.")
            self.failures = 0
            self._reported.clear()

    def stop(self) -> None:
        """The program ends: what still runs is killed."""
        try:
            self.tree.stop(time.time_ns() // 1_000_000)
        except Exception:
            _logger.debug("open runs are not ended", exc_info=True)

    def close(self) -> None:
        """Release connections and helper threads."""
        self._helpers.close()
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.close()

    def after_fork(self) -> None:
        """Give up connections that the parent process still uses."""
        if self._store is not None:
            self._store.after_fork()

    def done(self) -> str:
        """What was written."""
        return ", ".join(f"{count} {name}" for name, count in self._counts.items()) + " written"

    def left(self) -> list[str]:
        """What was not written; empty when everything was."""
        counts = {
            "runs": self._lost["runs"] + sum(run.dirty for run in self.tree.runs.values()),
            "links of traces": self._lost["traces"] + sum(map(len, self._links.values())),
            "scores": self._lost["scores"] + len(self._scores),
        }
        return [f"{count} {name}" for name, count in counts.items() if count]

    # --- runs -------------------------------------------------------------------------------------------------------
    def _write_all(self, runs: list[Run]) -> None:
        store = self._existing
        for run in runs:
            if run.run_id is None:
                self._create(store, run)
            if run.datasets:
                self._write_datasets(store, run)
        # A compile that is over comes last: its tables name the runs of its trials.
        last = [run for run in runs if run.kind == COMPILE and run.over]
        first = [run for run in runs if run not in last]
        results = self._helpers.run(self._write, first, _HELPERS if store.parallel else 0)
        for result in results:
            if isinstance(result, Exception):
                raise result
        for run in last:
            self._write(run)
        for run in runs:
            self.tree.settle(run)

    def _write(self, run: Run) -> bool:
        store = self._existing
        while run.later and run.over:
            run.later.pop(0)()
        run.metrics.sort(key=lambda metric: "score" not in metric.key)  # MLflow's table shows columns as they came
        while run.tags or run.params or run.metrics:
            metrics = run.metrics[:_METRICS_AT_ONCE]
            params, tags = _some(run.params, _TAGS_AT_ONCE), _some(run.tags, _TAGS_AT_ONCE)
            self._tolerating(store, f"values of {run.name}", store.log, run, metrics, params, tags)
            del run.metrics[: len(metrics)]
            for name in params:
                del run.params[name]
            for name, value in tags.items():
                if run.tags.get(name) == value:
                    del run.tags[name]
        for path, text in list(run.artifacts.items()):
            self._tolerating(store, path, store.artifact, run, path, text)
            del run.artifacts[path]
        if run.ended is not None:
            self._tolerating(store, f"end of {run.name}", store.end, run, *run.ended)
            run.ended = None
        return True

    def _write_datasets(self, store: RunStore, run: Run) -> None:
        """One run after the other: MLflow fails when two calls bring it the same new dataset at the same time.

        Two programs may do that too: then the second attempt finds the dataset there.
        """
        what = f"datasets of {run.name}"
        with contextlib.suppress(Exception):
            store.datasets(run, run.datasets)
            run.datasets.clear()
            return
        self._tolerating(store, what, store.datasets, run, run.datasets)
        run.datasets.clear()

    def _create(self, store: RunStore, run: Run) -> None:
        if run.parent is not None and run.parent.run_id is None:
            self._create(store, run.parent)
        parent = run.outside if run.parent is None else run.parent.run_id
        tags = dict(run.tags)
        if parent is not None:
            tags[TAG_PARENT] = parent
        tags.setdefault(TAG_NAME, run.name)
        run.run_id, run.artifact_uri = store.create(run, _some(tags, _TAGS_AT_ONCE))
        for name in list(tags)[:_TAGS_AT_ONCE]:
            run.tags.pop(name, None)
        self._ids[run.key] = run.run_id
        self._counts["runs"] += 1

    # --- traces -----------------------------------------------------------------------------------------------------
    def _link(self) -> None:
        for key in list(self._links):
            run_id = self._ids.get(key)
            while self._links[key]:
                some = self._links[key][:_LINKS_AT_ONCE]
                if run_id is not None:
                    if self._tolerating(self._existing, "links of traces", self._existing.link, run_id, some):
                        self._counts["traces"] += len(some)
                    else:
                        self._lost["traces"] += len(some)
                del self._links[key][: len(some)]
            del self._links[key]

    def _assess(self, scores: list[Score]) -> None:
        store = self._existing

        def assess(score: Score) -> bool:
            return store.assess(score, self._ids.get(score.key))

        results = self._helpers.run(assess, scores, _HELPERS if store.parallel else 0)
        failure = None
        for score, result in zip(scores, results, strict=True):
            if result is True:
                self._counts["scores"] += 1
            elif result is False:
                self._lost["scores"] += 1
            elif self._is_lasting(error := store.explain(result)):
                self._lost["scores"] += 1
                self._report(error)
            else:
                self._scores.append(score)
                failure = error
        if failure is not None:
            raise failure

    # --- failures ---------------------------------------------------------------------------------------------------
    @property
    def _existing(self) -> RunStore:
        assert self._store is not None
        return self._store

    def _tolerating(self, store: RunStore, what: str, function: Callable[..., Any], *arguments: Any) -> bool:
        """Call ``function``; what MLflow will never take is given up, so that the rest goes on."""
        try:
            function(*arguments)
        except Exception as error:
            explained = store.explain(error)
            if not self._is_lasting(explained):
                raise explained from error
            self._report(ExportError(explained.cause, f"{what}: {explained}"))
            return False
        return True

    def _is_lasting(self, error: ExportError) -> bool:
        return error.permanent or (self.failures >= _MOST_TRIES and error.cause not in _AWAY)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        explained = error if isinstance(error, ExportError) else None
        if explained is None and self._store is not None:
            explained = self._store.explain(error)
        if explained is None:
            explained = ExportError(type(error).__name__, first_line(error))
        if self._store is None and explained.permanent:
            self.dead = True  # the exporter says why: it cannot write either
            self.tree = Tree({})
        elif explained.cause not in self._reported:
            self._reported.add(explained.cause)
            _logger.warning("%s Runs and scores wait until it works.", explained)

    def _report(self, error: ExportError) -> None:
        if error.cause not in self._reported:
            self._reported.add(error.cause)
            _logger.warning("%s This is left out.", error)


class _Helpers:
    """A few threads that call one function for each of a list of items."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[Any], Any], Any, SimpleQueue[tuple[int, Any]], int] | None]
        self._tasks = SimpleQueue()
        self._threads = 0

    def run(self, function: Callable[[_Item], bool], items: Sequence[_Item], threads: int) -> list[bool | Exception]:
        """What ``function`` returned or raised for each item, in order; with no threads, one after the other."""
        self._start(min(threads, len(items)))
        if not self._threads or not threads:
            return [_attempt(function, item) for item in items]
        done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        for place, item in enumerate(items):
            self._tasks.put((function, item, done, place))
        found: list[Any] = [None] * len(items)
        for _ in items:
            place, result = done.get()
            found[place] = result
        return found

    def close(self) -> None:
        """End the threads."""
        for _ in range(self._threads):
            self._tasks.put(None)

    def _start(self, wanted: int) -> None:
        while self._threads < wanted:
            if start_thread(self._help, "dspy-otel-mlflow-scores") is None:
                return
            self._threads += 1

    def _help(self) -> None:
        with suppress_instrumentation():
            while (task := self._tasks.get()) is not None:
                function, item, done, place = task
                done.put((place, _attempt(function, item)))


def _attempt(function: Callable[[_Item], bool], item: _Item) -> bool | Exception:
    try:
        return function(item)
    except Exception as error:
        return error


def _take(items: deque[_Item], most: int) -> Iterable[_Item]:
    while items and most > 0:
        most -= 1
        yield items.popleft()


def _some(values: Mapping[str, str], most: int) -> dict[str, str]:
    return dict(islice(values.items(), most))


def _ours(span: ReadableSpan) -> bool:
    scope = span.instrumentation_scope
    return scope is not None and scope.name == sc.SCOPE_NAME


def versions() -> dict[str, str]:
    """What every run says of the software that made it."""
    found = {"dspy_otel.version": __version__, "mlflow.source.type": "LOCAL"}
    for package in ("dspy", "opentelemetry-sdk"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[f"{package}.version"] = metadata.version(package)
    if sys.argv and sys.argv[0]:
        found["mlflow.source.name"] = os.path.basename(sys.argv[0]) or sys.argv[0]
    return found


def track_runs(provider: Any) -> None:
    """Add a :class:`RunTracker` to a tracer provider for each exporter it feeds that has none yet.

    Args:
        provider: a tracer provider; one that is not the SDK's is left alone.
    """
    add = getattr(provider, "add_span_processor", None)
    if add is None:
        return
    for exporter in exporters_of(provider):
        if exporter.wants_runs and exporter.tracker is None:
            exporter.tracker = tracker = RunTracker(exporter)
            add(tracker)
            tracker.since = time.time_ns()


def exporters_of(provider: Any) -> list[MLflowSpanExporter]:
    """Our exporters that a provider feeds, in a batch or simple processor of the SDK."""
    found: list[MLflowSpanExporter] = []
    waiting = [getattr(provider, "_active_span_processor", None)]
    while waiting:
        processor = waiting.pop()
        waiting += getattr(processor, "_span_processors", ())
        exporter = getattr(processor, "span_exporter", None)
        if isinstance(exporter, MLflowSpanExporter):
            found.append(exporter)
    return found
