"""The worker: brings MLflow up to the journal. One thread sends spans, links traces, writes scores and runs.

It takes segments from the journal in order. Each is *digested* first: its spans tell the history of optimizations, from
which follows what their runs should have, and which traces and scores belong to them. Then runs are written, for links
and scores name them, and then the segment is delivered and leaves the journal. Everything may be written twice without
harm, so that a failure at any point means: again.

The same worker reads the journal of a process that has ended (:mod:`.replay`): there is no second way to recover.
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
from dspy_otel.mlflow.backends.base import LINKS_AT_ONCE, CreatedRun, first_line
from dspy_otel.mlflow.journal import Journal, JournalError, Segment
from dspy_otel.mlflow.pending import Outside, Pending, PendingRuns
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
PATIENT_ATTEMPTS: Final = 3
"""Failures of one item after which its parts, or others, have to show whether it is the item that fails."""
EXIT_ATTEMPTS: Final = 3
"""When the program ends and MLflow is away: what is left is in the journal."""
REPORTED_FROM: Final = 3
"""Failures in a row from which on it is said that a server cannot be reached."""
_ITEMS_AT_ONCE: Final = 100
_METRICS_AT_ONCE: Final = 800  # with parameters and tags at most 1,000 items in one call
_LONGEST_WAIT: Final = 1.0
_STRUCTURE: Final = frozenset({Kind.COMPILE, Kind.TRIAL, Kind.EVALUATION})


class Worker:
    """Brings MLflow up to a journal. All of it runs in one thread but :meth:`begin`, :meth:`wake` and the attributes.

    Args:
        journal: what to deliver.
        connect: opens MLflow.
        runs: also write runs, links and scores.
        pending: what MLflow lacks of runs.
        counted: is given spans that are done with: how many, and why they were lost, if they were.

    Attributes:
        account: what became of everything.
        backend: once it is open.
        away: when to try again, after something that concerns everything.
        dead: trying again in this process cannot help.
        abandoned: nobody waits any more: nothing may be changed.
    """

    def __init__(
        self,
        journal: Journal,
        connect: Callable[[], Backend],
        *,
        runs: bool = True,
        pending: PendingRuns | None = None,
        counted: Callable[[int, str | None], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.journal = journal
        self._connect = connect
        self._wants_runs = runs
        self.pending = pending or PendingRuns(versions())
        self._counted = counted
        self._clock = clock
        self.account = Account()
        self.backend: Backend | None = None
        self.away = Backoff(clock)
        self._spans = Backoff(clock)
        self._items: dict[tuple[str, str], _ItemBackoff] = {}
        """Of what failed of runs and scores, by kind and name."""
        self._successes: Counter[str] = Counter()
        self._written_before = 0
        self.dead = False
        self.abandoned = False
        self._starts: deque[tuple[ReadableSpan, Outside | None, int]] = deque()
        self._started: set[tuple[int, int]] = set()
        self._open: Counter[str] = Counter()
        self._groups: set[str] = set()
        """Optimizations and evaluations whose start is in the journal."""
        self._ids: dict[str, CreatedRun] = {}
        self._counted_runs: set[int] = set()
        self._reported: set[str] = set()
        self._helpers = _Helpers()
        self.busy = threading.Lock()
        """Held while a round is under way."""

    # --- from other threads -----------------------------------------------------------------------------------------
    def begin(self, span: ReadableSpan, outside: Outside | None, after: int) -> None:
        """A span of an optimization, trial or evaluation has started, after the segment of that number."""
        self._starts.append((span, outside, after))

    # --- one round --------------------------------------------------------------------------------------------------
    @property
    def done(self) -> bool:
        """Whether MLflow has everything that it will take."""
        return not (self._starts or self.journal.segments or self.lacking)

    @property
    def failures(self) -> int:
        """How often one thing has failed, in a row: the most of all."""
        segments = [segment.failures for segment in self.journal.segments]
        return max([*segments, *(item.failures for item in list(self._items.values()))], default=0)

    @property
    def lacking(self) -> list[Pending]:
        """Runs that MLflow does not have as they should be."""
        return [run for run in list(self.pending.runs.values()) if run.dirty]

    def wait_seconds(self) -> float:
        """How long there is nothing to do unless something comes in."""
        if self.done or self.dead:
            return 3600.0
        now = self._clock()
        if not self.away.ready:
            return min(max(self.away.due - now, 0.0), _LONGEST_WAIT)
        dues = [segment.due for segment in self.journal.segments] + [item.due for item in self._items.values()]
        return min([max(due - now, 0.0) for due in dues] + [_LONGEST_WAIT]) if dues else 0.05

    def round(self) -> None:
        """Digest what is new, and write what can be written."""
        with self.busy, suppress_instrumentation():
            self._digest_all()
            if self.dead or self.abandoned or not self.away.ready or self.done:
                return
            try:
                if self.backend is None:
                    self.backend = self._connect()
                if self._wants_runs:
                    self._write_runs(self.backend)
                    self._finish_groups()
                self._deliver_all(self.backend)
            except ExportError as error:
                self._failed(error)
            except Exception as error:
                self._failed(ExportError(type(error).__name__, f"MLflow: {clean(first_line(error))}.", away=True))
            else:
                if self.away.succeeded() or self._reported:
                    self._recovered()
            self._settle()

    def now(self) -> None:
        """Somebody waits: what has failed is tried at once."""
        self.away.now()
        for segment in self.journal.segments:
            segment.due = 0.0
        for item in self._items.values():
            item.now()

    def leave(self, on_disk: Callable[[str], bool]) -> None:
        """The process ends: say what becomes of what MLflow has not got.

        Args:
            on_disk: whether the journal has what a run follows from, by its key.
        """
        account = self.account
        for segment in list(self.journal.segments):
            kept = segment.path is not None
            if not segment.delivered:
                account.leave(SPANS, segment.count, kept)
                account.leave(TRACES, segment.roots, kept)
            account.leave(SCORES, len(segment.scores), kept)
        for run in self.lacking:
            if run.over:
                run.name_others({})  # its table of trials is an artifact, too
        self._count_runs()
        for run in self.lacking:
            kept = on_disk(run.key) and run.group not in self.journal.evicted
            account.written[RUNS] -= run.run_id is not None  # it lacks something
            account.leave(RUNS, 1, kept)
            account.leave(ARTIFACTS, len(run.artifacts), kept)

    def stop(self, when: int) -> None:
        """The program has ended: what still runs is killed (nanoseconds since 1970)."""
        with self.busy:
            self._digest_all()
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
    def _digest_all(self) -> None:
        segments = [segment for segment in list(self.journal.segments) if not segment.digested]
        for segment in segments:
            self.journal.take(segment)
        # Whatever ends in these has started by now.
        while self._starts:
            span, outside, after = self._starts[0]
            self._digest_up_to(segments, after)
            self._starts.popleft()
            self._start(span, outside)
        self._digest_up_to(segments, sys.maxsize)
        with contextlib.suppress(Exception):
            self.pending.refresh()
        self._count_runs()

    def _digest_up_to(self, segments: list[Segment], number: int) -> None:
        while segments and segments[0].number <= number:
            with contextlib.suppress(Exception):
                self.pending.refresh()  # a trial's dataset is that of its compile, which may have come with its end
            self.digest(segments.pop(0))

    def _start(self, span: ReadableSpan, outside: Outside | None) -> None:
        try:
            if kind_of(span) not in _STRUCTURE or span.context is None:
                return
            ids = (span.context.trace_id, span.context.span_id)
            if ids not in self._started:
                self._started.add(ids)
                self._open[group_of(span)] += 1
                self._groups.add(group_of(span))
            self.pending.start(span, outside, group_of(span))
        except Exception:
            _logger.debug("the start of %r is not followed", span.name, exc_info=True)

    def digest(self, segment: Segment) -> None:
        """Find out what belongs to a segment's spans."""
        segment.digested = True
        if not self._wants_runs:
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
        """A span of ours has ended."""
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
        """Find out which run the trace of an ended span belongs to, and what its score is."""
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
            if segment.digested and segment.due <= self._clock():
                self._deliver(backend, segment)

    def _deliver(self, backend: Backend, segment: Segment) -> None:
        try:
            if not segment.delivered:
                self._send(backend, segment)
            self._link(backend, segment)
            self._assess(backend, segment)
        except ExportError as error:
            if error.away:
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
            self._lose(segment.count, segment.roots, "unreadable")
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
            if error.away or (error.verdict is Verdict.LATER and not self._is_the_item(segment)):
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
        self._counted(count, None)

    def _is_the_item(self, segment: Segment) -> bool:
        """Whether it is time to find out if the segment is what fails."""
        return segment.failures >= PATIENT_ATTEMPTS

    def _together(self, segment: Segment) -> tuple[dict[str, list[str]], list[tuple[Score, str | None]]] | None:
        """Links and scores of a segment; None when a run of theirs is not there yet."""
        links: dict[str, list[str]] = {}
        for key, trace_id in segment.links:
            run = self._ids.get(key)
            if run is not None:
                links.setdefault(run.run_id, []).append(trace_id)
            elif key in self.pending.runs:
                return None
        return links, [(score, self._run_id(score.key)) for score in segment.scores]

    def _bisect(self, backend: Backend, segment: Segment, body: bytes, error: ExportError) -> None:
        """Something in a segment is refused: deliver the rest, and set aside what is left.

        Raises:
            ExportError: nothing got through, so that it may not be about the segment.
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
                    if again.away:
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
        self._sent(segment, count, roots)  # once all of it is known: whoever is interrupted begins again
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
                self._lose(1, roots, error.cause)
                then = "It is lost"
            self._counted(0 if not where else 1, error.cause)
            self._report(f"refused {error.cause}", f"Span {name!r} could not be written: {error} {then}.")
            gone = [score for score in segment.scores if _is_of(score, span[2])]
            segment.scores = [score for score in segment.scores if score not in gone]
            (self.account.refused if where else self.account.dropped)[SCORES] += len(gone)

    def _lose(self, count: int, roots: int, why: str) -> None:
        self.account.dropped[SPANS] += count
        self.account.dropped[TRACES] += roots
        self._counted(count, why)

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
                continue  # it is not there yet
            for start in range(0, len(trace_ids) if run is not None else 0, LINKS_AT_ONCE):
                some = trace_ids[start : start + LINKS_AT_ONCE]
                self._tolerating(LINKS, key, lambda run=run, some=some: backend.link(run.run_id, some), len(some))  # type: ignore[misc]
            segment.links = [one for one in segment.links if one[0] != key]

    def _assess(self, backend: Backend, segment: Segment) -> None:
        there = [score for score in segment.scores if score.key in self._ids or score.key not in self.pending.runs]
        if not there:
            return

        def assess(score: Score) -> bool:
            return self._tolerating(SCORES, score.id, lambda: backend.assess(score, self._run_id(score.key)))

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
        for run in there:  # one after the other: two calls that bring the same new dataset at once fail
            if run.datasets:
                self._each(run, lambda run=run: self._add_datasets(backend, run))  # type: ignore[misc]
        # A compile that is over comes last: its tables name the runs of its trials.
        last = [run for run in there if run.kind == COMPILE and run.over]
        first = [run for run in there if run not in last]

        def write(run: Pending) -> bool:
            return self._each(run, lambda: self._write(backend, run))

        for result in self._helpers.run(write, first, HELPERS if backend.parallel else 0):
            if isinstance(result, Exception):
                raise result
        for run in last:
            if not any(key in self.pending.runs and key not in self._ids for key in run.others):
                write(run)

    def _each(self, run: Pending, call: Callable[[], object]) -> bool:
        """Do something for one run; what fails holds up no other run, unless nothing would get through."""
        try:
            call()
        except ExportError as error:
            if error.away:
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
        parent = run.outside if run.parent is None else run.parent.run_id
        if parent is None and run.above is not None:
            parent = self._run_id(run.above)
        tags = dict(run.tags)
        if parent is not None:
            tags[TAG_PARENT] = parent
        tags.setdefault(TAG_NAME, run.name)
        some = _some(tags, _ITEMS_AT_ONCE)
        known, run.tried = run.tried, True
        created = backend.create_run(run.key, some, run.started, run.experiment, known=known)
        run.run_id, run.artifact_uri = created
        self._ids[run.key] = created
        for name in some:
            if run.tags.get(name) == some[name]:
                del run.tags[name]
        self.account.written[RUNS] += 1
        if known:  # it may have been made with other values
            run.tags.update(some)

    def _add_datasets(self, backend: Backend, run: Pending) -> None:
        assert run.run_id is not None
        run_id, datasets = run.run_id, list(run.datasets)
        with contextlib.suppress(ExportError):  # another program may have brought the same one at the same time
            backend.add_datasets(run_id, datasets)
            del run.datasets[: len(datasets)]
            return
        self._tolerating("datasets", run.key, lambda: backend.add_datasets(run_id, datasets))
        del run.datasets[: len(datasets)]

    def _write(self, backend: Backend, run: Pending) -> None:
        assert run.run_id is not None
        run_id, created = run.run_id, CreatedRun(run.run_id, run.artifact_uri)
        if run.over:
            run.name_others({key: one.run_id for key, one in self._ids.items()})
            self._count_runs()
        run.metrics.sort(key=lambda metric: "score" not in metric.key)  # MLflow's table shows columns as they came
        while run.tags or run.params or run.metrics:
            metrics = run.metrics[:_METRICS_AT_ONCE]
            params, tags = _some(run.params, _ITEMS_AT_ONCE), _some(run.tags, _ITEMS_AT_ONCE)
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
                put = self._tolerating(
                    ARTIFACTS,
                    f"{run.key}/{path}",
                    lambda p=path, t=text: backend.put_artifact(created, p, t),  # type: ignore[misc]
                )
            except ExportError as error:
                if error.away:
                    raise
                failure = error
                continue
            if put or path in run.artifacts:
                del run.artifacts[path]
        if failure is not None:
            raise failure
        if run.ended is not None:
            status, when = run.ended
            self._tolerating("ends of runs", run.key, lambda: backend.end_run(run_id, status, when))
            run.ended = None

    def _log(self, backend: Backend, run: Pending, metrics: Any, params: Any, tags: Any) -> None:
        """Write values; when some of them are refused, the others are written one by one."""
        run_id = str(run.run_id)
        try:
            backend.log(run_id, metrics, params, tags)
        except ExportError as error:
            if error.away or error.verdict is Verdict.LATER:
                raise
        else:
            return
        for metric in metrics:
            self._tolerating("metrics", run.key, lambda m=metric: backend.log(run_id, [m], {}, {}))  # type: ignore[misc]
        for name, value in params.items():
            self._tolerating("parameters", run.key, lambda n=name, v=value: backend.log(run_id, [], {n: v}, {}))  # type: ignore[misc]
        for name, value in tags.items():
            self._tolerating("tags", run.key, lambda n=name, v=value: backend.log(run_id, [], {}, {n: v}))  # type: ignore[misc]

    # --- failures ---------------------------------------------------------------------------------------------------
    def _item(self, kind: str, name: str) -> _ItemBackoff:
        found = self._items.get((kind, name))
        if found is None:
            found = self._items[kind, name] = _ItemBackoff(self._clock)
        return found

    def _may_try(self, kind: str, name: str) -> bool:
        found = self._items.get((kind, name))
        return found is None or found.ready

    def _tolerating(self, kind: str, name: str, call: Callable[[], object], count: int = 1) -> bool:
        """Write one item; False when MLflow will never take it. It is counted either way.

        Raises:
            ExportError: it has to be tried again.
        """
        if self.abandoned:
            raise ExportError("ended", "The program has ended.", away=True)
        try:
            call()
        except ExportError as error:
            if error.away:
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

    def _failed(self, error: ExportError) -> None:
        written = sum(self.account.written.values())
        if written > self._written_before:  # something got through since: this is not one long outage
            self.away.failures = 0
        self._written_before = written
        self.away.failed(error)
        if error.cause == "unreachable" and self.away.failures < REPORTED_FROM:
            return  # a server that is busy for a moment is no news
        if error.permanent:
            self.dead = True
            self._report(error.cause, f"Nothing can be written to MLflow: {error}")
        else:
            self._report(error.cause, f"{error} Spans, runs and scores wait until it works.")

    def _recovered(self) -> None:
        if any(not cause.startswith(("refused", "journal", "spool")) for cause in self._reported) and not (
            self._items or any(segment.failures for segment in self.journal.segments)
        ):
            self._reported = {cause for cause in self._reported if cause.startswith(("refused", "journal", "spool"))}
            say(_logger.warning, "MLflow works again.")

    def _report(self, cause: str, message: str) -> None:
        if cause not in self._reported and not self.abandoned:
            self._reported.add(cause)
            say(_logger.error, "%s", message)

    report = _report
    """One line for each cause."""

    # --- what is needed no more -------------------------------------------------------------------------------------
    def _needed(self, group: str) -> bool:
        return self._open[group] > 0 or any(run.group == group for run in self.lacking)

    def _finish_groups(self) -> None:
        """Note in the journal which optimizations and evaluations are over, and in MLflow as they should be."""
        lacking = {run.group for run in self.lacking}
        for group in [one for one in self._groups if one not in lacking and self._open[one] <= 0]:
            self._groups.discard(group)
            self.journal.finish(group)

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
            self.journal.forget_starts()


class _ItemBackoff(Backoff):
    """When to try an item again, and how often it failed while others of its kind got through."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._others = -1
        self._alone = 0

    def is_refused(self, others: int) -> bool:
        """Whether it is the item that fails; asked after each failure.

        A success counts for one failure only: those of before an outage say nothing about MLflow during it.

        Args:
            others: how many of its kind have got through so far.
        """
        self._alone += others > self._others >= 0
        self._others = others
        return self._alone >= PATIENT_ATTEMPTS


class _Helpers:
    """A few threads that call one function for each of a list of items."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[Any], Any], Any, SimpleQueue[tuple[int, Any]], int] | None]
        self._tasks = SimpleQueue()
        self._threads = 0

    def run(self, function: Callable[[_Item], bool], items: Sequence[_Item], threads: int) -> list[bool | Exception]:
        """What ``function`` returned or raised for each item, in order; with no threads, one after the other."""
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


def group_of(span: ReadableSpan) -> str:
    """The optimization or evaluation that a span belongs to, the outermost; empty for none."""
    at = span.attributes or {}
    group = at.get(semconv.OPTIMIZER_ROOT_RUN_ID) or at.get(semconv.OPTIMIZER_RUN_ID)
    if group is None and semconv.EVALUATION_ID in at:
        group = f"evaluation/{at[semconv.EVALUATION_ID]!s}"
    return "" if group is None or not belongs(span) else str(group)


def say(log: Callable[..., object], message: str, *arguments: object) -> None:
    """Log ``message % arguments``; a handler of the user's that raises must not stop the thread that does it.

    Args:
        log: a method of a logger.
        message: a %-format.
        arguments: for the format.
    """
    with contextlib.suppress(Exception):
        log(message, *arguments)


def start_thread(function: Callable[[], None], name: str) -> threading.Thread | None:
    """A running daemon thread; None when the interpreter is going down and starts no more."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def versions() -> dict[str, str]:
    """What every run carries of the software that made it."""
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
        return ExportError(type(error).__name__, f"MLflow: {clean(first_line(error))}.", away=True)


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
    """Whether a score is that of an example's span: then it is made again from what was set aside."""
    if score.trace_id != trace_id_of(int.from_bytes(span.trace_id, "big")):
        return False
    return not span.parent_span_id if score.span_id is None else span.span_id.hex() == score.span_id


def _some(values: Mapping[str, str], most: int) -> dict[str, str]:
    return dict(islice(values.items(), most))
