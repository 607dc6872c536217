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
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from importlib import metadata
from typing import Any, Final

from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel import semconv
from dspy_otel.mlflow.account import ARTIFACTS, LINKS, RUNS, SPANS, TRACES, Account
from dspy_otel.mlflow.backends import Backend, Batch
from dspy_otel.mlflow.backends.base import MAX_LINKS, CreatedRun, unexpected
from dspy_otel.mlflow.items import ATTEMPTS_BEFORE_SPLIT, Items
from dspy_otel.mlflow.journal import Journal, JournalError, Segment
from dspy_otel.mlflow.pending import PendingRuns, UserRun
from dspy_otel.mlflow.retry import Backoff, ExportError, Verdict, clean
from dspy_otel.mlflow.run_writer import RunWriter
from dspy_otel.mlflow.runs import (
    Assessment,
    assessments_of,
    evaluation_key,
    key_of,
    kind_of_assessment,
    trace_id_of,
)
from dspy_otel.mlflow.source import source_tags
from dspy_otel.mlflow.splitting import SentSpan, body_of, count_roots, deliver_in_halves
from dspy_otel.mlflow.threads import HELPERS, Helpers, Throttle, log_safely
from dspy_otel.mlflow.translate import restore
from dspy_otel.mlflow.versions import enabled
from dspy_otel.record.otlp import decode
from dspy_otel.record.spans import RUN_KINDS, Kind, belongs, is_ours, kind_of
from dspy_otel.version import __version__

_logger = logging.getLogger(__name__)

EXIT_ATTEMPTS: Final = 3
"""Failures in a row after which the end of the program leaves the rest to the journal."""
REPORTED_FAILURES: Final = 3
"""Failures in a row after which an unreachable server is logged."""
_SHORTEST_WAIT: Final = 0.05
_LONGEST_WAIT: Final = 1.0


class Worker:
    """Delivers a journal to MLflow. One thread at a time may use it; any thread may call :meth:`add_start`.

    Args:
        journal: what to deliver.
        connect: opens the backend.
        runs: also write runs, links and scores.
        pending: runs that MLflow does not have in full.
        count_spans: called with a number of spans, and the reason if they were lost.
        throttle: rests between segments; None for no rests.
        unkept: what becomes of a refused span that the journal cannot set aside, for people.

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
        throttle: Throttle | None = None,
        unkept: str = "It is lost",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.journal = journal
        self._connect = connect
        self._runs = runs
        self.pending = pending or PendingRuns({**versions(), **source_tags()}, parts=enabled())
        self._count_spans = count_spans
        self._throttle = throttle
        self._unkept = unkept
        self._clock = clock
        self.account = Account()
        self.backend: Backend | None = None
        self.backoff = Backoff(clock)
        self._items = Items(self.account, self.report, lambda: self.abandoned, clock)
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
        self._helpers = Helpers()
        self._run_writer = RunWriter(
            self.pending,
            self._ids,
            self._items,
            self.account,
            self.report,
            self._count_runs,
            journal.send_again,
        )
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
        return not (self._starts or self.journal.segments or self.pending.lacking)

    @property
    def failures(self) -> int:
        """The most failures in a row of one item."""
        segments = [segment.failures for segment in self.journal.segments]
        return max([*segments, *(item.failures for item in self._items.failing)], default=0)

    @property
    def progress(self) -> int:
        """A number that grows with everything that MLflow takes."""
        return sum(list(self._items.successes.values())) + self.account.written[RUNS]

    @property
    def only_versions_fail(self) -> bool:
        """Whether nothing is pending but models, prompts and datasets that have failed several times."""
        if self._starts or self.journal.segments or self.failures < EXIT_ATTEMPTS:
            return False
        return all(run.version is not None and run.ended is None for run in self.pending.lacking)

    def wait_seconds(self) -> float:
        """Seconds until there is something to do, unless spans come in."""
        if self.done or self.failed:
            return 3600.0
        now = self._clock()
        if not self.backoff.ready:
            return min(max(self.backoff.due - now, 0.0), _LONGEST_WAIT)
        # A delivered segment that has not failed waits for a run, which is among the items if that failed.
        dues = [one.due for one in self.journal.segments if not one.delivered or one.failures]
        dues += [item.due for item in self._items.failing]
        return min(max(min(dues, default=0.0) - now, _SHORTEST_WAIT), _LONGEST_WAIT)

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
                    self._run_writer.write(self.backend)
                    self._finish_groups()
                self._deliver_all(self.backend)
                if self._runs and not any(segment.applied for segment in self.journal.segments):
                    self._run_writer.write_versions(self.backend)  # all traces are there, and on their runs
                    self._finish_groups()
            except ExportError as error:
                self._record_failure(error)
            except Exception as error:
                self._record_failure(unexpected(error))
            else:
                if self.backoff.succeeded() or self._reported:
                    self._recovered()
            self._settle()

    def retry_now(self) -> None:
        """Retry at once what has failed: a caller waits for the result."""
        self.backoff.retry_now()
        for segment in self.journal.segments:
            segment.due = 0.0
        for item in self._items.failing:
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
            for kind, count in Counter(map(kind_of_assessment, segment.scores)).items():
                account.add_undelivered(kind, count, kept)
        for run in self.pending.lacking:
            if run.over:
                run.resolve_references({})  # its table of trials is an artifact too
        self._count_runs()
        for run in self.pending.lacking:
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
        now = self._clock()
        segments = [one for one in list(self.journal.segments) if not one.applied and one.due <= now]
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
            if kind_of(span) not in RUN_KINDS or span.context is None:
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
        if not self._runs:
            segment.applied = True
            return
        try:
            spans = segment.spans if segment.spans is not None else [restore(one) for one in decode(segment.body())]
        except (JournalError, ValueError) as error:
            message = f"A segment of the journal cannot be read: {error}."
            self.report("journal", message)
            if isinstance(error, JournalError) and error.passing:
                self._retry_later(segment, ExportError("journal", message))
            else:
                segment.applied = True
            return
        segment.applied = True
        for span in spans:
            if is_ours(span):
                self.end(span, segment)
        segment.spans = None

    def end(self, span: ReadableSpan, segment: Segment) -> None:
        """Apply the end of a span of ours."""
        try:
            kind = kind_of(span)
            if kind in RUN_KINDS and span.context is not None:
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
            key, assessments = key_of(trace), assessments_of(trace)
            if key is not None and trace.root:
                segment.links.append((key, trace_id_of(trace.trace_id)))
            segment.scores += assessments
            self.account.produced.update(map(kind_of_assessment, assessments))

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
                with self._throttle.work() if self._throttle else contextlib.nullcontext():
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
            self._retry_later(segment, error)
            if error.verdict is Verdict.LOST:
                self.journal.send_again(segment.groups)
            self.report(error.cause, f"{error} What waits for it is tried again.")
        if segment.delivered and not segment.links and not segment.scores:
            self.journal.delivered(segment, any(map(self._needed, segment.groups)))

    def _send(self, backend: Backend, segment: Segment) -> None:
        try:
            body = segment.body()
        except JournalError as error:
            message = f"A segment of the journal cannot be read: {error}."
            if error.passing:
                raise ExportError("journal", message) from error
            self.report("journal", message)
            self.journal.set_aside_whole(segment)
            self._drop(segment.count, segment.roots, "unreadable")
            segment.delivered = True
            return
        together = self._together(segment)
        if together is not None and backend.deliver(Batch(body, *together)):
            self.account.written.update(map(kind_of_assessment, segment.scores))
            self._items.successes.update(map(kind_of_assessment, segment.scores))
            segment.links, segment.scores = [], []
            self._sent(segment, segment.count, segment.roots)
            return
        try:
            backend.send(body)
        except ExportError as error:
            if error.unavailable or (error.verdict is Verdict.LATER and segment.failures < ATTEMPTS_BEFORE_SPLIT):
                raise
            self._split(backend, segment, body, error)
        else:
            self._sent(segment, segment.count, segment.roots)

    def _sent(self, segment: Segment, count: int, roots: int) -> None:
        segment.delivered, segment.failures = True, 0
        self._items.successes[SPANS] += count > 0
        self.account.written[SPANS] += count
        self.account.written[TRACES] += roots
        self._count_spans(count, None)

    def _together(self, segment: Segment) -> tuple[dict[str, list[str]], list[tuple[Assessment, str | None]]] | None:
        """Links and scores of a segment; None when one of their runs does not exist yet."""
        links: dict[str, list[str]] = {}
        for key, trace_id in dict.fromkeys(segment.links):  # a file of the Collector's may have a span twice
            run = self._ids.get(key)
            if run is not None:
                links.setdefault(run.run_id, []).append(trace_id)
            elif key in self.pending.runs:
                return None
        return links, [(score, self._run_id(score.key)) for score in segment.scores]

    def _split(self, backend: Backend, segment: Segment, body: bytes, error: ExportError) -> None:
        """Deliver a segment in halves, and set the spans aside that are refused."""

        def count() -> None:
            self._items.successes[SPANS] += 1

        split = deliver_in_halves(backend.send, body, error, self._items.successes[SPANS] > segment.baseline, count)
        self._sent(segment, split.delivered, split.roots)  # at the end, so that an interrupted delivery starts over
        self._set_aside(split.refused, segment)

    def _set_aside(self, alone: list[tuple[SentSpan, ExportError]], segment: Segment) -> None:
        for span, error in alone:
            body, roots = body_of([span]), count_roots([span])
            where = self.journal.set_aside(body, 1) or self.journal.set_aside_whole(segment)
            name = clean(span[2].name, 60)
            if where:
                self.account.refused[SPANS] += 1
                self.account.refused[TRACES] += roots
                then = "It is set aside in the spool"
            else:
                self._drop(1, roots, error.cause)
                then = self._unkept
            self._count_spans(0 if not where else 1, error.cause)
            self.report(f"refused {error.cause}", f"Span {name!r} could not be written: {error} {then}.")
            scores = [score for score in segment.scores if _is_of(score, span[2])]
            segment.scores = [score for score in segment.scores if score not in scores]
            (self.account.refused if where else self.account.dropped).update(map(kind_of_assessment, scores))

    def _drop(self, count: int, roots: int, why: str) -> None:
        self.account.dropped[SPANS] += count
        self.account.dropped[TRACES] += roots
        self._count_spans(count, why)

    def _retry_later(self, segment: Segment, error: ExportError) -> None:
        """Count a failure of a segment, and set when it is tried again."""
        if not segment.failures:
            segment.baseline = self._items.successes[SPANS]
        segment.failures += 1
        backoff = Backoff(self._clock)
        backoff.failures = segment.failures - 1
        backoff.failed(error)
        segment.due = backoff.due

    # --- links and scores -------------------------------------------------------------------------------------------
    def _link(self, backend: Backend, segment: Segment) -> None:
        by_run: dict[str, list[str]] = {}
        for key, trace_id in dict.fromkeys(segment.links):
            by_run.setdefault(key, []).append(trace_id)
        for key, trace_ids in by_run.items():
            run = self._ids.get(key)
            if run is None and key in self.pending.runs:
                continue  # it does not exist yet
            for start in range(0, len(trace_ids) if run is not None else 0, MAX_LINKS):
                some = trace_ids[start : start + MAX_LINKS]
                self._items.write(LINKS, key, lambda run=run, some=some: backend.link(run.run_id, some), len(some))  # type: ignore[misc]
            segment.links = [one for one in segment.links if one[0] != key]

    def _assess(self, backend: Backend, segment: Segment) -> None:
        there = [score for score in segment.scores if score.key in self._ids or score.key not in self.pending.runs]
        if not there:
            return

        def assess(score: Assessment) -> bool:
            kind = kind_of_assessment(score)
            return self._items.write(kind, score.id, lambda: backend.assess(score, self._run_id(score.key)))

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

    # --- failures ---------------------------------------------------------------------------------------------------
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
            self.report(error.cause, f"Nothing can be written to MLflow: {error}")
        else:
            self.report(error.cause, f"{error} Spans, runs and scores wait until it works.")

    def _recovered(self) -> None:
        if any(not cause.startswith(("refused", "journal", "spool")) for cause in self._reported) and not (
            self._items.failing or any(segment.failures for segment in self.journal.segments)
        ):
            self._reported = {cause for cause in self._reported if cause.startswith(("refused", "journal", "spool"))}
            log_safely(_logger.warning, "MLflow works again.")

    def report(self, cause: str, message: str) -> None:
        """Log one line for each cause."""
        if cause not in self._reported and not self.abandoned:
            self._reported.add(cause)
            log_safely(_logger.error, "%s", message)

    # --- clean-up -------------------------------------------------------------------------------------------------
    def _needed(self, group: str) -> bool:
        return self._open[group] > 0 or any(run.group == group for run in self.pending.lacking)

    def _finish_groups(self) -> None:
        """Mark in the journal the optimizations and evaluations that have ended and are in MLflow in full."""
        lacking = {run.group for run in self.pending.lacking}
        for group in [one for one in self._groups if one not in lacking and self._open[one] <= 0]:
            self._groups.discard(group)
            self.journal.mark_finished(group)

    def _settle(self) -> None:
        for run in list(self.pending.runs.values()):
            if run.over and not run.dirty:
                self._counted_runs.discard(id(run))
            self.pending.settle(run)
        if self.journal.kept:
            lacking = {run.group for run in self.pending.lacking}
            self.journal.release(lambda group: self._open[group] > 0 or group in lacking)
        if not any(count > 0 for count in self._open.values()) and self.done:
            self._open.clear()
            self._started.clear()
            self.journal.remove_starts()


def group_of(span: ReadableSpan) -> str:
    """The optimization or evaluation that a span belongs to, the outermost; empty for none."""
    at = span.attributes or {}
    group = at.get(semconv.OPTIMIZER_ROOT_RUN_ID) or at.get(semconv.OPTIMIZER_RUN_ID)
    if group is None and semconv.EVALUATION_ID in at:
        group = evaluation_key(str(at[semconv.EVALUATION_ID]))
    return "" if group is None or not belongs(span) else str(group)


def versions() -> dict[str, str]:
    """Tags of every run: the versions of the software that made it."""
    found = {"dspy_otel.version": __version__}
    for package in ("dspy", "opentelemetry-sdk"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[f"{package}.version"] = metadata.version(package)
    return found


def _is_of(score: Assessment, span: Any) -> bool:
    """Whether a score is that of an example's span."""
    if score.trace_id != trace_id_of(int.from_bytes(span.trace_id, "big")):
        return False
    return not span.parent_span_id if score.span_id is None else span.span_id.hex() == score.span_id
