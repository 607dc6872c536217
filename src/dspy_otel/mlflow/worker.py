"""The worker delivers the journal to MLflow: one thread sends spans, links traces, and writes scores and runs.

It reads segments in order. First it applies a segment to the history of optimizations
(:mod:`dspy_otel.record.history`), which gives the contents of their runs, and the runs that traces and scores belong
to. Then it writes the runs, because links and scores need their ids. Then it delivers the segment, which leaves the
journal. Writing everything twice does no harm, so the worker retries after a failure at any point.

:mod:`.replay` uses the same worker for the journal of a process that has ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from itertools import islice
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel import semconv
from dspy_otel.mlflow.account import ARTIFACTS, LINKS, RUNS, SCORES, SPANS, TRACES, Account
from dspy_otel.mlflow.backends import Backend, Batch
from dspy_otel.mlflow.backends.base import MAX_LINKS, CreatedRun, first_line
from dspy_otel.mlflow.journal import Journal, JournalError, Segment
from dspy_otel.mlflow.pending import Pending, PendingRuns, UserRun
from dspy_otel.mlflow.retry import Backoff, ExportError, Verdict, clean
from dspy_otel.mlflow.runs import COMPILE, TAG_NAME, TAG_PARENT, Score, key_of, score_of, trace_id_of
from dspy_otel.mlflow.translate import restore
from dspy_otel.record.otlp import decode
from dspy_otel.record.spans import Kind, belongs, is_ours, kind_of
from dspy_otel.version import __version__

_logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")

HELPERS: Final = 8
"""Threads that put scores on traces of a server: it takes them one by one only, 80 ms each over one connection and 20
over eight (measured with MLflow 3.17.2 on two cores)."""
ATTEMPTS_BEFORE_SPLIT: Final = 3
"""Failures of one item before the worker finds out, by its parts or by others, whether the item is the cause."""
EXIT_ATTEMPTS: Final = 3
"""Failures in a row after which the end of the program leaves the rest to the journal."""
REPORTED_FAILURES: Final = 3
"""Failures in a row after which an unreachable server is logged."""
_MAX_ITEMS: Final = 100
_MAX_METRICS: Final = 800  # with parameters and tags at most 1,000 items in one call
_LONGEST_WAIT: Final = 1.0
_STRUCTURE: Final = frozenset({Kind.COMPILE, Kind.TRIAL, Kind.EVALUATION})


class Worker:
    """Delivers a journal to MLflow. One thread at a time may use it; any thread may call :meth:`add_start`.

    Args:
        journal: what to deliver.
        connect: opens the backend.
        runs: also write runs, links and scores.
        pending: runs that MLflow does not have in full.
        count_spans: called with a number of spans, and the reason if they were lost.

    Attributes:
        account: counts of what was written, kept, refused and dropped.
        backend: once it is open.
        backoff: when to try again after a failure of MLflow as a whole.
        failed: trying again in this process cannot help.
        abandoned: the process ends: it writes nothing any more.
    """

    def __init__(
        self,
        journal: Journal,
        connect: Callable[[], Backend],
        *,
        runs: bool = True,
        pending: PendingRuns | None = None,
        count_spans: Callable[[int, str | None], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.journal = journal
        self._connect = connect
        self._runs = runs
        self.pending = pending or PendingRuns(versions())
        self._count_spans = count_spans
        self._clock = clock
        self.account = Account()
        self.backend: Backend | None = None
        self.backoff = Backoff(clock)
        self._spans = Backoff(clock)
        self._items: dict[tuple[str, str], _ItemBackoff] = {}
        """Retries of runs, scores and other items, by kind and name."""
        self._successes: Counter[str] = Counter()
        self._written_before = 0
        self.failed = False
        self.abandoned = False
        self._starts: deque[tuple[ReadableSpan, UserRun | None, int]] = deque()
        self._started: set[tuple[int, int]] = set()
        self._open: Counter[str] = Counter()
        self._groups: set[str] = set()
        """Optimizations and evaluations whose start is in the journal."""
        self._ids: dict[str, CreatedRun] = {}
        self._counted_runs: set[int] = set()
        self._reported: set[str] = set()
        self._helpers = _Helpers()
        self.busy = threading.Lock()
        """Locked while :meth:`round` runs."""

    # --- from other threads -----------------------------------------------------------------------------------------
    def add_start(self, span: ReadableSpan, user_run: UserRun | None, after: int) -> None:
        """Add the start of an optimization, trial or evaluation, which follows the segment of that number."""
        self._starts.append((span, user_run, after))

    # --- one round --------------------------------------------------------------------------------------------------
    @property
    def done(self) -> bool:
        """Whether nothing is pending."""
        return not (self._starts or self.journal.segments or self.lacking)

    @property
    def failures(self) -> int:
        """The most failures in a row of one item."""
        segments = [segment.failures for segment in self.journal.segments]
        return max([*segments, *(item.failures for item in list(self._items.values()))], default=0)

    @property
    def lacking(self) -> list[Pending]:
        """Runs that MLflow does not have in full."""
        return [run for run in list(self.pending.runs.values()) if run.dirty]

    def wait_seconds(self) -> float:
        """Seconds until there is something to do, unless spans come in."""
        if self.done or self.failed:
            return 3600.0
        now = self._clock()
        if not self.backoff.ready:
            return min(max(self.backoff.due - now, 0.0), _LONGEST_WAIT)
        dues = [segment.due for segment in self.journal.segments] + [item.due for item in self._items.values()]
        return min([max(due - now, 0.0) for due in dues] + [_LONGEST_WAIT]) if dues else 0.05

    def round(self) -> None:
        """Apply new segments, and write what can be written."""
        with self.busy, suppress_instrumentation():
            self._apply_all()
            if self.failed or self.abandoned or not self.backoff.ready or self.done:
                return
            try:
                if self.backend is None:
                    self.backend = self._connect()
                if self._runs:
                    self._write_runs(self.backend)
                    self._finish_groups()
                self._deliver_all(self.backend)
            except ExportError as error:
                self._record_failure(error)
            except Exception as error:
                self._record_failure(
                    ExportError(type(error).__name__, f"MLflow: {clean(first_line(error))}.", unavailable=True)
                )
            else:
                if self.backoff.succeeded() or self._reported:
                    self._recovered()
            self._settle()

    def retry_now(self) -> None:
        """Retry at once what has failed: a caller waits for the result."""
        self.backoff.retry_now()
        for segment in self.journal.segments:
            segment.due = 0.0
        for item in self._items.values():
            item.retry_now()

    def account_for_rest(self, on_disk: Callable[[str], bool]) -> None:
        """Count what MLflow does not have as kept or dropped: the process ends.

        Args:
            on_disk: whether the journal has the spans of a run, by its key.
        """
        account = self.account
        for segment in list(self.journal.segments):
            kept = segment.path is not None
            if not segment.delivered:
                account.add_undelivered(SPANS, segment.count, kept)
                account.add_undelivered(TRACES, segment.roots, kept)
            account.add_undelivered(SCORES, len(segment.scores), kept)
        for run in self.lacking:
            if run.over:
                run.resolve_references({})  # its table of trials is an artifact too
        self._count_runs()
        for run in self.lacking:
            kept = on_disk(run.key) and run.group not in self.journal.evicted
            account.written[RUNS] -= run.run_id is not None  # it lacks something
            account.add_undelivered(RUNS, 1, kept)
            account.add_undelivered(ARTIFACTS, len(run.artifacts), kept)

    def stop(self, when: int) -> None:
        """End as killed what still runs: the program ended at ``when`` (nanoseconds since 1970)."""
        with self.busy:
            self._apply_all()
            with contextlib.suppress(Exception):
                self.pending.stop(when)
            self._open.clear()
            self._count_runs()

    def close(self) -> None:
        """Release connections and helper threads."""
        self._helpers.close()
        if self.backend is not None:
            with contextlib.suppress(Exception):
                self.backend.close()

    # --- spans to runs, links and scores ----------------------------------------------------------------------------
    def _apply_all(self) -> None:
        segments = [segment for segment in list(self.journal.segments) if not segment.applied]
        for segment in segments:
            self.journal.close_segment(segment)
        # The starts of all spans in these segments are here by now.
        while self._starts:
            span, user_run, after = self._starts[0]
            self._apply_up_to(segments, after)
            self._starts.popleft()
            self._start(span, user_run)
        self._apply_up_to(segments, sys.maxsize)
        with contextlib.suppress(Exception):
            self.pending.refresh()
        self._count_runs()

    def _apply_up_to(self, segments: list[Segment], number: int) -> None:
        while segments and segments[0].number <= number:
            with contextlib.suppress(Exception):
                self.pending.refresh()  # a trial needs the dataset of its compile, which may have come late
            self.apply(segments.pop(0))

    def _start(self, span: ReadableSpan, user_run: UserRun | None) -> None:
        try:
            if kind_of(span) not in _STRUCTURE or span.context is None:
                return
            ids = (span.context.trace_id, span.context.span_id)
            if ids not in self._started:
                self._started.add(ids)
                self._open[group_of(span)] += 1
                self._groups.add(group_of(span))
            self.pending.start(span, user_run, group_of(span))
        except Exception:
            _logger.debug("the start of %r is not followed", span.name, exc_info=True)

    def apply(self, segment: Segment) -> None:
        """Apply a segment's spans to the history, and collect its links and scores."""
        segment.applied = True
        if not self._runs:
            return
        try:
            spans = segment.spans if segment.spans is not None else [restore(one) for one in decode(segment.body())]
        except (JournalError, ValueError) as error:
            self._report("journal", f"A segment of the journal cannot be read: {error}.")
            return
        for span in spans:
            if is_ours(span):
                self.end(span, segment)
        segment.spans = None

    def end(self, span: ReadableSpan, segment: Segment) -> None:
        """Apply the end of a span of ours."""
        try:
            kind = kind_of(span)
            if kind in _STRUCTURE and span.context is not None:
                ids = (span.context.trace_id, span.context.span_id)
                if ids not in self._started:  # a sampler may have taken the attributes that its start had
                    self._start(span, None)
                self._started.discard(ids)
                self._open[group_of(span)] -= 1
            if kind is not Kind.OTHER:
                self.pending.end(span, group_of(span))
            self.place(span, segment)
        except Exception:
            _logger.debug("the end of %r is not followed", span.name, exc_info=True)

    def place(self, span: ReadableSpan, segment: Segment) -> None:
        """Collect the link of an ended span's trace to its run, and its score."""
        with contextlib.suppress(Exception):
            trace = self.pending.history.trace(span)
            if trace is None:
                return
            key, score = key_of(trace), score_of(trace)
            if key is not None and trace.root:
                segment.links.append((key, trace_id_of(trace.trace_id)))
            if score is not None:
                segment.scores.append(score)
                self.account.produced[SCORES] += 1

    def _count_runs(self) -> None:
        for run in self.pending.runs.values():
            if id(run) not in self._counted_runs:
                self._counted_runs.add(id(run))
                if run.run_id is None:
                    self.account.produced[RUNS] += 1
            self.account.produced[ARTIFACTS] += run.produced
            run.produced = 0

    # --- segments ---------------------------------------------------------------------------------------------------
    def _deliver_all(self, backend: Backend) -> None:
        for segment in list(self.journal.segments):
            if self.abandoned:
                return
            if segment.applied and segment.due <= self._clock():
                self._deliver(backend, segment)

    def _deliver(self, backend: Backend, segment: Segment) -> None:
        try:
            if not segment.delivered:
                self._send(backend, segment)
            self._link(backend, segment)
            self._assess(backend, segment)
        except ExportError as error:
            if error.unavailable:
                raise
            if not segment.failures:
                segment.baseline = self._successes[SPANS]
            segment.failures += 1
            self._pause(segment, error)
            self._report(error.cause, f"{error} What waits for it is tried again.")
        if segment.delivered and not segment.links and not segment.scores:
            self.journal.delivered(segment, any(map(self._needed, segment.groups)))

    def _send(self, backend: Backend, segment: Segment) -> None:
        try:
            body = segment.body()
        except JournalError as error:
            self._report("journal", f"A segment of the journal cannot be read: {error}.")
            self._drop(segment.count, segment.roots, "unreadable")
            segment.delivered = True
            return
        together = self._together(segment)
        if together is not None and backend.deliver(Batch(body, *together)):
            self.account.written[SCORES] += len(segment.scores)
            self._successes[SCORES] += len(segment.scores)
            segment.links, segment.scores = [], []
            self._sent(segment, segment.count, segment.roots)
            return
        try:
            backend.send(body)
        except ExportError as error:
            if error.unavailable or (error.verdict is Verdict.LATER and not self._is_the_item(segment)):
                raise
            self._bisect(backend, segment, body, error)
        else:
            self._sent(segment, segment.count, segment.roots)

    def _sent(self, segment: Segment, count: int, roots: int) -> None:
        segment.delivered, segment.failures = True, 0
        self._written(count, roots)

    def _written(self, count: int, roots: int) -> None:
        self._successes[SPANS] += 1
        self.account.written[SPANS] += count
        self.account.written[TRACES] += roots
        self._count_spans(count, None)

    def _is_the_item(self, segment: Segment) -> bool:
        """Whether it has failed often enough to find out if it is the cause."""
        return segment.failures >= ATTEMPTS_BEFORE_SPLIT

    def _together(self, segment: Segment) -> tuple[dict[str, list[str]], list[tuple[Score, str | None]]] | None:
        """Links and scores of a segment; None when one of their runs does not exist yet."""
        links: dict[str, list[str]] = {}
        for key, trace_id in segment.links:
            run = self._ids.get(key)
            if run is not None:
                links.setdefault(run.run_id, []).append(trace_id)
            elif key in self.pending.runs:
                return None
        return links, [(score, self._run_id(score.key)) for score in segment.scores]

    def _bisect(self, backend: Backend, segment: Segment, body: bytes, error: ExportError) -> None:
        """Deliver a segment in halves, and set the spans aside that are refused.

        Raises:
            ExportError: nothing got through, so the segment may not be the cause.
        """
        evidence = error.verdict is not Verdict.LATER or self._successes[SPANS] > segment.baseline
        count = roots = 0
        waiting: list[tuple[list[tuple[Any, Any, Any]], ExportError]] = [(_flat(body), error)]
        alone: list[tuple[tuple[Any, Any, Any], ExportError]] = []
        while waiting:
            spans, error = waiting.pop()
            if len(spans) == 1:
                alone.append((spans[0], error))
                continue
            half, failed = len(spans) // 2, []
            for part in (spans[:half], spans[half:]):
                try:
                    backend.send(_body_of(part))
                except ExportError as again:
                    if again.unavailable:
                        raise
                    failed.append((part, again))
                    evidence = evidence or again.verdict is not Verdict.LATER
                else:
                    evidence = True
                    self._successes[SPANS] += 1
                    count, roots = count + len(part), roots + _roots(part)
            if len(failed) == 2 and not evidence:
                raise failed[-1][1]
            waiting += failed
        if not evidence:
            raise error
        self._sent(segment, count, roots)  # at the end, so that an interrupted delivery starts over
        self._set_aside(alone, segment)

    def _set_aside(self, alone: list[tuple[tuple[Any, Any, Any], ExportError]], segment: Segment) -> None:
        for span, error in alone:
            body, roots = _body_of([span]), _roots([span])
            where = self.journal.set_aside(body, 1) or self.journal.set_aside_whole(segment)
            name = clean(span[2].name, 60)
            if where:
                self.account.refused[SPANS] += 1
                self.account.refused[TRACES] += roots
                then = "It is set aside in the spool"
            else:
                self._drop(1, roots, error.cause)
                then = "It is lost"
            self._count_spans(0 if not where else 1, error.cause)
            self._report(f"refused {error.cause}", f"Span {name!r} could not be written: {error} {then}.")
            scores = [score for score in segment.scores if _is_of(score, span[2])]
            segment.scores = [score for score in segment.scores if score not in scores]
            (self.account.refused if where else self.account.dropped)[SCORES] += len(scores)

    def _drop(self, count: int, roots: int, why: str) -> None:
        self.account.dropped[SPANS] += count
        self.account.dropped[TRACES] += roots
        self._count_spans(count, why)

    def _pause(self, segment: Segment, error: ExportError) -> None:
        backoff = Backoff(self._clock)
        backoff.failures = segment.failures - 1
        backoff.failed(error)
        segment.due = backoff.due

    # --- links and scores -------------------------------------------------------------------------------------------
    def _link(self, backend: Backend, segment: Segment) -> None:
        by_run: dict[str, list[str]] = {}
        for key, trace_id in segment.links:
            by_run.setdefault(key, []).append(trace_id)
        for key, trace_ids in by_run.items():
            run = self._ids.get(key)
            if run is None and key in self.pending.runs:
                continue  # it does not exist yet
            for start in range(0, len(trace_ids) if run is not None else 0, MAX_LINKS):
                some = trace_ids[start : start + MAX_LINKS]
                self._write_item(LINKS, key, lambda run=run, some=some: backend.link(run.run_id, some), len(some))  # type: ignore[misc]
            segment.links = [one for one in segment.links if one[0] != key]

    def _assess(self, backend: Backend, segment: Segment) -> None:
        there = [score for score in segment.scores if score.key in self._ids or score.key not in self.pending.runs]
        if not there:
            return

        def assess(score: Score) -> bool:
            return self._write_item(SCORES, score.id, lambda: backend.assess(score, self._run_id(score.key)))

        results = self._helpers.run(assess, there, HELPERS if backend.parallel else 0)
        failures = [result for result in results if isinstance(result, Exception)]
        done = {score.id for score, result in zip(there, results, strict=True) if not isinstance(result, Exception)}
        segment.scores = [score for score in segment.scores if score.id not in done]
        if failures:
            raise failures[-1]

    def _run_id(self, key: str) -> str | None:
        run = self._ids.get(key)
        return None if run is None else run.run_id

    # --- runs -------------------------------------------------------------------------------------------------------
    def find(self, key: str) -> str | None:
        """The id of a run that is in MLflow, by its key.

        Raises:
            ExportError: MLflow cannot be asked.
        """
        if key not in self._ids:
            if self.backend is None:
                self.backend = self._connect()
            found = self.backend.find_run(key)
            if found is None:
                return None
            self._ids[key] = found
        return self._ids[key].run_id

    def _write_runs(self, backend: Backend) -> None:
        runs = [run for run in self.lacking if self._may_try(RUNS, run.key)]
        for run in runs:
            self._each(run, lambda run=run: self._create(backend, run))  # type: ignore[misc]
        there = [run for run in runs if run.run_id is not None]
        for run in there:  # one after the other: two calls at once with the same new dataset fail
            if run.datasets:
                self._each(run, lambda run=run: self._add_datasets(backend, run))  # type: ignore[misc]
        # A compile that has ended comes last: its tables refer to the runs of its trials.
        last = [run for run in there if run.kind == COMPILE and run.over]
        first = [run for run in there if run not in last]

        def write(run: Pending) -> bool:
            return self._each(run, lambda: self._write(backend, run))

        for result in self._helpers.run(write, first, HELPERS if backend.parallel else 0):
            if isinstance(result, Exception):
                raise result
        for run in last:
            if not any(key in self.pending.runs and key not in self._ids for key in run.referenced):
                write(run)

    def _each(self, run: Pending, call: Callable[[], object]) -> bool:
        """Call a function for one run. Its failure stops the others only if MLflow as a whole fails."""
        try:
            call()
        except ExportError as error:
            if error.unavailable:
                raise
            self._item(RUNS, run.key).failed(error)
            self._report(error.cause, f"{run.name}: {error} It is tried again.")
            return False
        self._items.pop((RUNS, run.key), None)
        return True

    def _create(self, backend: Backend, run: Pending) -> None:
        if run.run_id is not None:
            return
        if run.parent is not None and run.parent.run_id is None:
            self._create(backend, run.parent)
        parent = run.user_run if run.parent is None else run.parent.run_id
        if parent is None and run.parent_key is not None:
            parent = self._run_id(run.parent_key)
        tags = dict(run.tags)
        if parent is not None:
            tags[TAG_PARENT] = parent
        tags.setdefault(TAG_NAME, run.name)
        some = _some(tags, _MAX_ITEMS)
        known, run.tried = run.tried, True
        created = backend.create_run(run.key, some, run.started, run.experiment, known=known)
        run.run_id, run.artifact_uri = created
        self._ids[run.key] = created
        for name in some:
            if run.tags.get(name) == some[name]:
                del run.tags[name]
        self.account.written[RUNS] += 1
        if known:  # it may have been created with other values
            run.tags.update(some)

    def _add_datasets(self, backend: Backend, run: Pending) -> None:
        assert run.run_id is not None
        run_id, datasets = run.run_id, list(run.datasets)
        with contextlib.suppress(ExportError):  # another program may have added the same one at the same time
            backend.add_datasets(run_id, datasets)
            del run.datasets[: len(datasets)]
            return
        self._write_item("datasets", run.key, lambda: backend.add_datasets(run_id, datasets))
        del run.datasets[: len(datasets)]

    def _write(self, backend: Backend, run: Pending) -> None:
        assert run.run_id is not None
        run_id, created = run.run_id, CreatedRun(run.run_id, run.artifact_uri)
        if run.over:
            run.resolve_references({key: one.run_id for key, one in self._ids.items()})
            self._count_runs()
        run.metrics.sort(
            key=lambda metric: "score" not in metric.key
        )  # MLflow's table shows columns in order of arrival
        while run.tags or run.params or run.metrics:
            metrics = run.metrics[:_MAX_METRICS]
            params, tags = _some(run.params, _MAX_ITEMS), _some(run.tags, _MAX_ITEMS)
            self._log(backend, run, metrics, params, tags)
            del run.metrics[: len(metrics)]
            for name in params:
                del run.params[name]
            for name, value in tags.items():
                if run.tags.get(name) == value:
                    del run.tags[name]
        failure = None
        for path, text in list(run.artifacts.items()):
            try:
                put = self._write_item(
                    ARTIFACTS,
                    f"{run.key}/{path}",
                    lambda p=path, t=text: backend.put_artifact(created, p, t),  # type: ignore[misc]
                )
            except ExportError as error:
                if error.unavailable:
                    raise
                failure = error
                continue
            if put or path in run.artifacts:
                del run.artifacts[path]
        if failure is not None:
            raise failure
        if run.ended is not None:
            status, when = run.ended
            self._write_item("ends of runs", run.key, lambda: backend.end_run(run_id, status, when))
            run.ended = None

    def _log(self, backend: Backend, run: Pending, metrics: Any, params: Any, tags: Any) -> None:
        """Write values; when some of them are refused, the others are written one by one."""
        run_id = str(run.run_id)
        try:
            backend.log(run_id, metrics, params, tags)
        except ExportError as error:
            if error.unavailable or error.verdict is Verdict.LATER:
                raise
        else:
            return
        for metric in metrics:
            self._write_item("metrics", run.key, lambda m=metric: backend.log(run_id, [m], {}, {}))  # type: ignore[misc]
        for name, value in params.items():
            self._write_item("parameters", run.key, lambda n=name, v=value: backend.log(run_id, [], {n: v}, {}))  # type: ignore[misc]
        for name, value in tags.items():
            self._write_item("tags", run.key, lambda n=name, v=value: backend.log(run_id, [], {}, {n: v}))  # type: ignore[misc]

    # --- failures ---------------------------------------------------------------------------------------------------
    def _item(self, kind: str, name: str) -> _ItemBackoff:
        found = self._items.get((kind, name))
        if found is None:
            found = self._items[kind, name] = _ItemBackoff(self._clock)
        return found

    def _may_try(self, kind: str, name: str) -> bool:
        found = self._items.get((kind, name))
        return found is None or found.ready

    def _write_item(self, kind: str, name: str, call: Callable[[], object], count: int = 1) -> bool:
        """Write and count one item; False when MLflow refuses it for good.

        Raises:
            ExportError: it has to be tried again.
        """
        if self.abandoned:
            raise ExportError("ended", "The program has ended.", unavailable=True)
        try:
            call()
        except ExportError as error:
            if error.unavailable:
                raise
            item = self._item(kind, name)
            item.failed(error)
            if error.verdict is Verdict.LATER and not item.is_refused(self._successes[kind]):
                raise
            self._items.pop((kind, name), None)
            self.account.refused[kind] += count
            self._report(f"refused {error.cause}", f"{kind}: {error} This is left out.")
            return False
        self._items.pop((kind, name), None)
        self._successes[kind] += count
        self.account.written[kind] += count
        return True

    def _record_failure(self, error: ExportError) -> None:
        written = sum(self.account.written.values())
        if written > self._written_before:  # something got through since: this is a new outage
            self.backoff.failures = 0
        self._written_before = written
        self.backoff.failed(error)
        if error.cause == "unreachable" and self.backoff.failures < REPORTED_FAILURES:
            return  # the server may only be busy for a moment
        if error.permanent:
            self.failed = True
            self._report(error.cause, f"Nothing can be written to MLflow: {error}")
        else:
            self._report(error.cause, f"{error} Spans, runs and scores wait until it works.")

    def _recovered(self) -> None:
        if any(not cause.startswith(("refused", "journal", "spool")) for cause in self._reported) and not (
            self._items or any(segment.failures for segment in self.journal.segments)
        ):
            self._reported = {cause for cause in self._reported if cause.startswith(("refused", "journal", "spool"))}
            log_safely(_logger.warning, "MLflow works again.")

    def _report(self, cause: str, message: str) -> None:
        if cause not in self._reported and not self.abandoned:
            self._reported.add(cause)
            log_safely(_logger.error, "%s", message)

    report = _report
    """One line for each cause."""

    # --- clean-up -------------------------------------------------------------------------------------------------
    def _needed(self, group: str) -> bool:
        return self._open[group] > 0 or any(run.group == group for run in self.lacking)

    def _finish_groups(self) -> None:
        """Mark in the journal the optimizations and evaluations that have ended and are in MLflow in full."""
        lacking = {run.group for run in self.lacking}
        for group in [one for one in self._groups if one not in lacking and self._open[one] <= 0]:
            self._groups.discard(group)
            self.journal.mark_finished(group)

    def _settle(self) -> None:
        for run in list(self.pending.runs.values()):
            if run.over and not run.dirty:
                self._counted_runs.discard(id(run))
            self.pending.settle(run)
        if self.journal.kept:
            lacking = {run.group for run in self.lacking}
            self.journal.release(lambda group: self._open[group] > 0 or group in lacking)
        if not any(count > 0 for count in self._open.values()) and self.done:
            self._open.clear()
            self._started.clear()
            self.journal.remove_starts()


class _ItemBackoff(Backoff):
    """Backoff of one item, which also counts its failures while others of its kind got through."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._successes_before = -1
        self._failed_alone = 0

    def is_refused(self, others: int) -> bool:
        """Whether the item itself is the cause; called after each failure.

        Each success counts once: successes before an outage prove nothing during the outage.

        Args:
            others: how many of its kind have got through so far.
        """
        self._failed_alone += others > self._successes_before >= 0
        self._successes_before = others
        return self._failed_alone >= ATTEMPTS_BEFORE_SPLIT


class _Helpers:
    """A pool of threads."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[Any], Any], Any, SimpleQueue[tuple[int, Any]], int] | None]
        self._tasks = SimpleQueue()
        self._threads = 0

    def run(self, function: Callable[[_Item], bool], items: Sequence[_Item], threads: int) -> list[bool | Exception]:
        """What ``function`` returns or raises for each item, in order; in this thread if ``threads`` is 0."""
        if len(items) > 1:
            self._start(min(threads, len(items)))
        if not self._threads or not threads or len(items) < 2:
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
        self._threads = 0

    def _start(self, threads: int) -> None:
        while self._threads < threads:
            if start_thread(self._help, "dspy-otel-mlflow-scores") is None:
                return
            self._threads += 1

    def _help(self) -> None:
        with suppress_instrumentation():
            while (task := self._tasks.get()) is not None:
                function, item, done, place = task
                done.put((place, _attempt(function, item)))


def group_of(span: ReadableSpan) -> str:
    """The optimization or evaluation that a span belongs to, the outermost; empty for none."""
    at = span.attributes or {}
    group = at.get(semconv.OPTIMIZER_ROOT_RUN_ID) or at.get(semconv.OPTIMIZER_RUN_ID)
    if group is None and semconv.EVALUATION_ID in at:
        group = f"evaluation/{at[semconv.EVALUATION_ID]!s}"
    return "" if group is None or not belongs(span) else str(group)


def log_safely(log: Callable[..., object], message: str, *arguments: object) -> None:
    """Log a message. An exception of a log handler of the user's is suppressed.

    Args:
        log: a method of a logger.
        message: a %-format.
        arguments: for the format.
    """
    with contextlib.suppress(Exception):
        log(message, *arguments)


def start_thread(function: Callable[[], None], name: str) -> threading.Thread | None:
    """Start a daemon thread; None when the interpreter shuts down and starts no threads."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def versions() -> dict[str, str]:
    """Tags of every run: the versions of the software that made it."""
    found = {"dspy_otel.version": __version__, "mlflow.source.type": "LOCAL"}
    for package in ("dspy", "opentelemetry-sdk"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[f"{package}.version"] = metadata.version(package)
    if sys.argv and sys.argv[0]:
        found["mlflow.source.name"] = os.path.basename(sys.argv[0]) or sys.argv[0]
    return found


def _attempt(function: Callable[[_Item], bool], item: _Item) -> bool | Exception:
    try:
        return function(item)
    except ExportError as error:
        return error
    except Exception as error:
        return ExportError(type(error).__name__, f"MLflow: {clean(first_line(error))}.", unavailable=True)


def _flat(body: bytes) -> list[tuple[Any, Any, Any]]:
    """The spans of a request, each with its resource and scope."""
    return [
        (of_resource, of_scope, span)
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def _body_of(spans: Iterable[tuple[Any, Any, Any]]) -> bytes:
    request = ExportTraceServiceRequest()
    for of_resource, of_scope, span in spans:
        resource = request.resource_spans.add(schema_url=of_resource.schema_url)
        resource.resource.CopyFrom(of_resource.resource)
        scope = resource.scope_spans.add(schema_url=of_scope.schema_url)
        scope.scope.CopyFrom(of_scope.scope)
        scope.spans.add().CopyFrom(span)
    return bytes(request.SerializeToString())


def _roots(spans: Iterable[tuple[Any, Any, Any]]) -> int:
    return sum(not span.parent_span_id for _, _, span in spans)


def _is_of(score: Score, span: Any) -> bool:
    """Whether a score is that of an example's span."""
    if score.trace_id != trace_id_of(int.from_bytes(span.trace_id, "big")):
        return False
    return not span.parent_span_id if score.span_id is None else span.span_id.hex() == score.span_id


def _some(values: Mapping[str, str], most: int) -> dict[str, str]:
    return dict(islice(values.items(), most))
