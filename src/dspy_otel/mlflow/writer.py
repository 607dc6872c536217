"""Brings MLflow up to a tree of runs: in few calls, again when one fails, and never the same thing twice."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from itertools import islice
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar

from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel.mlflow.base import ExportError, first_line, say
from dspy_otel.mlflow.delivery import start_thread
from dspy_otel.mlflow.pace import Pace
from dspy_otel.mlflow.pending import Pending, PendingRuns
from dspy_otel.mlflow.runs import (
    COMPILE,
    TAG_NAME,
    TAG_PARENT,
    Dataset,
    Metric,
    Score,
    StoredRun,
    key_of,
    score_of,
    trace_id_of,
)
from dspy_otel.mlflow.state import Left, dump, load
from dspy_otel.record.history import History
from dspy_otel.version import __version__

_logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")

_BACKOFF: Final = (1.0, 2.0, 5.0, 10.0)
"""Seconds to wait after the first, second, ... failure in a row; the last holds on."""
MAX_SCORES: Final = 200_000
"""Most scores waiting while MLflow does not answer."""
_A_WHILE: Final = 1.0
"""Seconds of putting scores on traces after which news of runs come first again."""
_LONGEST_REST: Final = 2.0
"""Seconds for which a busy program may keep the runs from being looked after."""
_HELPERS: Final = 8
"""Threads that put scores on traces: MLflow takes them one by one only, 80 ms each over one connection and 20 over
eight (measured with MLflow 3.17.2 on two cores)."""
_SCORES_AT_ONCE: Final = 64
_SCORES_AT_ONCE_HERE: Final = 8
"""Where this process does the work itself."""
_LINKS_AT_ONCE: Final = 100  # MLflow's MAX_TRACE_LINKS_PER_REQUEST
_TAGS_AT_ONCE: Final = 100
_METRICS_AT_ONCE: Final = 800  # with parameters and tags at most 1,000 items in one call


class RunStore(Protocol):
    """Where runs are kept; methods raise any error, and :meth:`explain` says what it means."""

    parallel: bool

    def create(self, run: Pending, tags: Mapping[str, str]) -> tuple[str, str]:
        """Create a run; returns its id and the address of its artifacts."""

    def find(self, key: str) -> tuple[str, str] | None:
        """Id of a run and the address of its artifacts, by its key."""

    def log(self, run: Pending, metrics: Sequence[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Write metrics, parameters and tags."""

    def datasets(self, run: Pending, datasets: Sequence[Dataset]) -> None:
        """Add dataset inputs."""

    def artifact(self, run: Pending, path: str, text: str) -> None:
        """Store a text artifact."""

    def end(self, run: Pending, status: str, when: int) -> None:
        """Set a run's status and end."""

    def link(self, run_id: str, trace_ids: Sequence[str]) -> None:
        """Put traces on a run."""

    def assess(self, score: Score, run_id: str | None) -> bool:
        """Put a score on a trace; False when the trace does not exist."""

    def find_runs(self, run_id: str | None, condition: str, experiment_id: str | None = None) -> list[StoredRun]:
        """The run with an id, or those of an experiment (by default its own) that match a search condition."""

    def read_artifact(self, run_id: str, artifact_uri: str, path: str) -> str | None:
        """A text artifact, or None when the run has none under that path."""

    def alive(self) -> bool:
        """Whether it answers at all."""

    def explain(self, error: Exception) -> ExportError:
        """An error as one of ours; permanent when the same call would fail again."""

    def close(self) -> None:
        """Release connections."""

    def after_fork(self) -> None:
        """In a forked child: give up connections that the parent process still uses."""


class RunWriter:
    """Brings MLflow up to a tree of runs. Used by one thread.

    Args:
        connect: opens the store.
        stop: set when the program ends.
        pace: keeps out of a busy program's way.
        history: reads the spans.

    Attributes:
        tree: what should be in MLflow.
        counts: what has been written.
        calls: of the store so far, failed or not.
        error: why the last round failed, if it did.
    """

    def __init__(
        self,
        connect: Callable[[threading.Event], RunStore],
        stop: threading.Event,
        pace: Pace,
        history: History | None = None,
    ) -> None:
        self.tree = PendingRuns(versions(), history)
        self._connect = connect
        self._stop = stop
        self._pace = pace
        self._store: RunStore | None = None
        self.dead = False
        """Trying again cannot help."""
        self.abandoned = False
        """Nobody waits for it any more: it must not change anything."""
        self._links: dict[str, list[str]] = {}
        self._scores: deque[Score] = deque()
        self._ids: dict[str, str] = {}
        self._reported: set[str] = set()
        self._helpers = _Helpers(pace)
        self.failures = 0
        self.error: ExportError | None = None
        self.calls = 0
        self.counts = {"runs": 0, "traces on runs": 0, "scores": 0}
        self._lost = {"runs": 0, "links of traces": 0, "scores": 0}

    @property
    def pending(self) -> bool:
        """Whether MLflow lacks something that can be written."""
        return not self.dead and self._lacks

    @property
    def _lacks(self) -> bool:
        return bool(self._links or self._scores or any(run.dirty for run in self.tree.runs.values()))

    @property
    def waiting(self) -> int:
        """Scores that are not yet written."""
        return len(self._scores)

    @property
    def pause(self) -> float:
        """Seconds to wait after the last failures."""
        return _BACKOFF[min(self.failures, len(_BACKOFF)) - 1]

    def find(self, key: str) -> str | None:
        """The id of a run that is in MLflow, by its key.

        Raises:
            ExportError: MLflow cannot be asked.
        """
        if key not in self._ids:
            if self._store is None:
                self._store = self._connect(self._stop)
            found = self._store.find(key)
            if found is None:
                return None
            self._ids[key] = found[0]
        return self._ids[key]

    def state(self) -> dict[str, Any]:
        """What MLflow lacks."""
        return dump(self.tree, Left(self._links, list(self._scores), self._ids))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what another process has left.

        Raises:
            ValueError: it cannot be read.
        """
        left = load(state, self.tree)
        self._links, self._ids = left.links, left.ids
        self._scores.extend(left.scores)

    def deliver(self, span: ReadableSpan) -> None:
        """Note a delivered root span or example: its trace belongs on a run, and may have a score."""
        trace = self.tree.history.trace(span)
        key = None if trace is None else key_of(trace)
        if trace is None or key is None:
            return
        if trace.root:
            self._links.setdefault(key, []).append(trace_id_of(trace.trace_id))
        score = score_of(trace)
        if score is not None:
            if len(self._scores) >= MAX_SCORES:
                self._lost["scores"] += 1
            else:
                self._scores.append(score)

    def work(self, deadline: float, news: Callable[[], bool]) -> None:
        """One round. Runs first, then traces on them, then a share of the scores.

        Args:
            deadline: of the monotonic clock.
            news: whether something has come in that may concern runs.
        """
        if self.dead:
            return
        try:
            if self._store is None:
                self._store = self._connect(self._stop)
            # What MLflow fails at does not hold up the rest; the first failure is told when all have had their turn.
            with _FirstError() as error:
                error.of(self._write_all, [run for run in self.tree.runs.values() if run.dirty])
                error.of(self._link)
                error.of(self._assess_all, deadline, news)
        except Exception as error:
            self._failed(error)
        else:
            if self.failures:
                say(_logger.warning, "MLflow takes runs again.")
            self.failures, self.error = 0, None
            self._reported.clear()

    def stop(self) -> None:
        """The program ends: what still runs is killed."""
        try:
            self.tree.stop(time.time_ns())
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

    def done(self) -> list[str]:
        """What was written."""
        return [f"{count} {name}" for name, count in self.counts.items() if count]

    def lost(self) -> list[str]:
        """What MLflow did not take."""
        return [f"{count} {name}" for name, count in self._lost.items() if count]

    def left(self) -> list[str]:
        """What is not written; empty when everything is."""
        counts = {
            "runs": sum(run.dirty for run in self.tree.runs.values()),
            "links of traces": sum(map(len, self._links.values())),
            "scores": len(self._scores),
        }
        return [f"{count} {name}" for name, count in counts.items() if count]

    # --- runs -------------------------------------------------------------------------------------------------------
    def _write_all(self, runs: list[Pending]) -> None:
        store = self._existing
        with _FirstError() as error:
            for run in runs:
                if run.run_id is None:
                    error.of(self._create, store, run)
                if run.run_id is not None and run.datasets:
                    error.of(self._write_datasets, store, run)
            runs = [run for run in runs if run.run_id is not None]
            # A compile that is over comes last: its tables name the runs of its trials.
            last = [run for run in runs if run.kind == COMPILE and run.over]
            first = [run for run in runs if run not in last]
            for result in self._helpers.run(self._write, first, _HELPERS if store.parallel else 0):
                if isinstance(result, Exception):
                    error.note(result)
            for run in last:
                error.of(self._write, run)
            for run in runs:
                self.tree.settle(run)

    def _write(self, run: Pending) -> bool:
        store = self._existing
        if run.over:
            run.name_others(self._ids)
        run.metrics.sort(key=lambda metric: "score" not in metric.key)  # MLflow's table shows columns as they came
        with _FirstError() as error:
            error.of(self._write_values, store, run)
            for path, text in list(run.artifacts.items()):
                error.of(self._write_artifact, store, run, path, text)
            if run.ended is not None:
                self._tolerating(store, f"end of {run.name}", store.end, run, *run.ended)
                run.ended = None
        return True

    def _write_artifact(self, store: RunStore, run: Pending, path: str, text: str) -> None:
        self._tolerating(store, path, store.artifact, run, path, text)
        del run.artifacts[path]

    def _write_values(self, store: RunStore, run: Pending) -> None:
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

    def _write_datasets(self, store: RunStore, run: Pending) -> None:
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

    def _create(self, store: RunStore, run: Pending) -> None:
        if run.parent is not None and run.parent.run_id is None:
            self._create(store, run.parent)
        parent = run.outside if run.parent is None else run.parent.run_id
        tags = dict(run.tags)
        if parent is not None:
            tags[TAG_PARENT] = parent
        tags.setdefault(TAG_NAME, run.name)
        self.calls += 1
        run.run_id, run.artifact_uri = store.create(run, _some(tags, _TAGS_AT_ONCE))
        for name in list(tags)[:_TAGS_AT_ONCE]:
            run.tags.pop(name, None)
        self._ids[run.key] = run.run_id
        self.counts["runs"] += 1

    # --- traces -----------------------------------------------------------------------------------------------------
    def _link(self) -> None:
        for key in list(self._links):
            run_id = self._ids.get(key)
            if run_id is None and key in self.tree.runs:
                continue  # its run is still to be made
            while self._links[key]:
                some = self._links[key][:_LINKS_AT_ONCE]
                if run_id is not None:
                    if self._tolerating(self._existing, "links of traces", self._existing.link, run_id, some):
                        self.counts["traces on runs"] += len(some)
                    else:
                        self._lost["links of traces"] += len(some)
                del self._links[key][: len(some)]
            del self._links[key]

    def _assess_all(self, deadline: float, news: Callable[[], bool]) -> None:
        began = time.monotonic()
        while self._scores and time.monotonic() < deadline:
            self._assess(list(_take(self._scores, self._at_once)))
            filled = len(self._scores) / MAX_SCORES
            self._pace.rest(self._helpers.spent(), filled, _LONGEST_REST)
            if news() and time.monotonic() - began > _A_WHILE:
                break

    def _assess(self, scores: list[Score]) -> None:
        store = self._existing

        def assess(score: Score) -> bool:
            self.calls += 1
            return store.assess(score, self._ids.get(score.key))

        results = self._helpers.run(assess, scores, _HELPERS if store.parallel else 0)
        failure = None
        for score, result in zip(scores, results, strict=True):
            if result is True:
                self.counts["scores"] += 1
            elif result is False:
                self._lost["scores"] += 1
            elif (error := store.explain(result)).permanent:
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

    @property
    def _at_once(self) -> int:
        return _SCORES_AT_ONCE if self._existing.parallel else _SCORES_AT_ONCE_HERE

    def _tolerating(self, store: RunStore, what: str, function: Callable[..., Any], *arguments: Any) -> bool:
        """Call ``function``; what MLflow will never take is given up, so that the rest goes on."""
        if self.abandoned:
            raise ExportError("unreachable", "The program has ended.")
        self.calls += 1
        try:
            function(*arguments)
        except Exception as error:
            explained = store.explain(error)
            if not explained.permanent:
                raise explained from error
            self._report(ExportError(explained.cause, f"{what}: {explained}"))
            return False
        return True

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self.calls += 1
        explained = error if isinstance(error, ExportError) else None
        if explained is None and self._store is not None:
            explained = self._store.explain(error)
        if explained is None:
            explained = ExportError(type(error).__name__, first_line(error))
        self.error = explained
        if self._store is None and explained.permanent:
            self.dead = True  # the exporter says why: it cannot write either
        elif explained.cause not in self._reported:
            self._reported.add(explained.cause)
            say(_logger.warning, "%s Runs and scores wait until it works.", explained)

    def _report(self, error: ExportError) -> None:
        if error.cause not in self._reported:
            self._reported.add(error.cause)
            say(_logger.warning, "%s This is left out.", error)


class _FirstError:
    """Several things that are each to be tried, whatever becomes of the others; raises the first error at the end."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> _FirstError:
        return self

    def __exit__(self, kind: object, error: BaseException | None, frames: object) -> None:
        if error is None and self.error is not None:
            raise self.error

    def of(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call ``function``; an error of it is noted."""
        try:
            function(*arguments)
        except Exception as error:
            self.note(error)

    def note(self, error: Exception) -> None:
        """Note an error, if it is the first."""
        if self.error is None:
            self.error = error


class _Helpers:
    """A few threads that call one function for each of a list of items."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._lock = threading.Lock()
        self._spent = 0.0
        self._tasks: SimpleQueue[tuple[Callable[[Any], Any], Any, SimpleQueue[tuple[int, Any]], int] | None]
        self._tasks = SimpleQueue()
        self._threads = 0

    def run(self, function: Callable[[_Item], bool], items: Sequence[_Item], threads: int) -> list[bool | Exception]:
        """What ``function`` returned or raised for each item, in order; with no threads, one after the other."""
        self._start(min(threads, len(items)))
        if not self._threads or not threads:
            began = time.thread_time()
            found_here = [_attempt(function, item) for item in items]
            self._spent += time.thread_time() - began
            return found_here
        done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        for place, item in enumerate(items):
            self._tasks.put((function, item, done, place))
        found: list[Any] = [None] * len(items)
        for _ in items:
            place, result = done.get()
            found[place] = result
        return found

    def spent(self) -> float:
        """Seconds of the processor that were used since this was last asked."""
        with self._lock:
            spent, self._spent = self._spent, 0.0
        return spent

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
                began = time.thread_time()
                with self._pace.working():
                    result = _attempt(function, item)
                with self._lock:
                    self._spent += time.thread_time() - began
                done.put((place, result))


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


def versions() -> dict[str, str]:
    """What every run says of the software that made it."""
    found = {"dspy_otel.version": __version__, "mlflow.source.type": "LOCAL"}
    for package in ("dspy", "opentelemetry-sdk"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[f"{package}.version"] = metadata.version(package)
    if sys.argv and sys.argv[0]:
        found["mlflow.source.name"] = os.path.basename(sys.argv[0]) or sys.argv[0]
    return found
