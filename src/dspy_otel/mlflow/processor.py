"""The span processor: it puts spans into the journal, and runs the worker that delivers them.

The program's threads only put a span on a queue. One thread writes the queue to the journal, four times a second; a
second one is the worker, which sends. They are two because a disk must not wait for a network: a killed process loses
the spans that are not in the journal.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from opentelemetry import metrics
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from dspy_otel import semconv
from dspy_otel.core.metrics import WithoutExemplars
from dspy_otel.mlflow.account import SPANS, TRACES
from dspy_otel.mlflow.backends import open_backend
from dspy_otel.mlflow.journal import ENV_SPOOL, Journal, spool_directory, spool_limit
from dspy_otel.mlflow.pending import UserRun
from dspy_otel.mlflow.replay import recover
from dspy_otel.mlflow.retry import LOCKED, clean
from dspy_otel.mlflow.runs import count_assessments, key_of_start
from dspy_otel.mlflow.source import source_tags
from dspy_otel.mlflow.target import Target
from dspy_otel.mlflow.termination import after_shutdown, before_termination, before_worker_ends
from dspy_otel.mlflow.threads import Throttle, log_safely, start_thread
from dspy_otel.mlflow.translate import started_copy, translate
from dspy_otel.mlflow.versions import enabled
from dspy_otel.mlflow.worker import EXIT_ATTEMPTS, Worker, group_of
from dspy_otel.record.otlp import decode, encode
from dspy_otel.record.spans import RUN_KINDS, is_ours, kind_of
from dspy_otel.version import __version__

_logger = logging.getLogger(__name__)

WRITE_INTERVAL: Final = 0.25
"""Seconds between two times that the queue is written to the journal."""
ENV_EXIT_SECONDS: Final = "OTEL_DSPY_EXIT_SECONDS"
EXIT_SECONDS: Final = 180.0
"""Most time that the end of the program waits for the delivery."""
HANGS_AFTER: Final = 20.0
"""Seconds in which MLflow takes nothing, after which :meth:`MLflowProcessor.shutdown` stops waiting."""
_CACHED_SPANS: Final = 20_000
"""Most spans that stay in memory beside the journal; others are read back from disk."""
_LAST_SECONDS: Final = 0.5
"""Seconds that the worker has to finish its last request, so that the account is exact."""
_LONGEST_RECORD_SECONDS: Final = 60.0
_LAST_RECORD_SECONDS: Final = 2.0
"""Seconds that the journal's thread has for what is still on the queue."""
_LONGEST_CLOSE_SECONDS: Final = 10.0
"""Most seconds that the end waits for the disk."""
_BATCH_SPANS: Final = 512
_REPORTED_FROM: Final = 500
_NEVER: Final = 1 << 63
_RUN_NAMES: Final = frozenset({semconv.SPAN_COMPILE, semconv.SPAN_TRIAL, semconv.SPAN_EVALUATE})


class MLflowProcessor(SpanProcessor):
    """Spans to MLflow. No method raises or waits for MLflow, except at the end.

    Args:
        target: where to write.
        runs: also record optimizations and evaluations as MLflow runs.

    Attributes:
        since: spans that end after this time (nanoseconds since 1970) come by :meth:`on_end`, and are ignored by
            :meth:`export`. If the clock goes back, a span that ended earlier may come by both.
    """

    def __init__(self, target: Target, *, runs: bool = True) -> None:
        self._target = target
        self._runs = runs
        self.since = _NEVER
        self._reset()
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())
        if self.journal.directory is None:
            log_safely(
                _logger.warning,
                "%s=off: spans wait in memory, and what is not sent when the program ends, or is killed, is lost.",
                ENV_SPOOL,
            )
        before_termination(self)
        before_worker_ends(self)
        at_exit = weakref.WeakMethod(self._record_at_exit)
        atexit.register(lambda: (method := at_exit()) and method())

    def _reset(self) -> None:
        self._queue: deque[tuple[ReadableSpan, UserRun | None, bool]] = deque()
        self._checked_experiment: str | None = None
        """MLflow's own active experiment when it was last compared with ours."""
        self._live: dict[int, tuple[ReadableSpan, UserRun | None, int]] = {}
        self._seen: weakref.WeakSet[ReadableSpan] = weakref.WeakSet()
        """Spans that ended before :attr:`since` and are on the queue."""
        self._on_disk: set[str] = set()
        """Keys of runs whose start or end is in the journal."""
        self._lock = threading.Lock()
        self._recording = threading.Lock()
        self._ending = threading.Lock()
        self._new = threading.Event()
        self._urgent = threading.Event()
        self._waiting: deque[threading.Event] = deque()
        """Of callers that wait until the queue is in the journal."""
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._stop = threading.Event()
        self._deadline = math.inf
        self._over = threading.Event()
        self._closing = threading.Lock()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._no_threads = False
        count_spans = _counter_of_spans()
        directory = spool_directory()
        self.journal = Journal(directory, spool_limit(_logger.warning), self._about, self._report)
        self._throttle = Throttle()
        self.worker = Worker(
            self.journal, self._connect, runs=self._runs, count_spans=count_spans, throttle=self._throttle
        )
        self._count_spans = count_spans
        self._recovered = directory is None

    def _about(self) -> dict[str, Any]:
        return {**self._target.about(), "runs": self._runs, "source": source_tags(), "parts": sorted(enabled())}

    def _connect(self) -> Any:
        if self._target.is_default:
            path = self._target.uri.partition(":///")[2]
            log_safely(
                _logger.warning,
                "MLFLOW_TRACKING_URI is not set: traces go to %s. To look at them: mlflow ui --backend-store-uri %s",
                path,
                self._target.uri,
            )
        return open_backend(self._target)

    def _report(self, cause: str, message: str) -> None:
        self.worker.report(cause, message)

    @property
    def over(self) -> bool:
        """Whether it has been shut down."""
        return self._over.is_set()

    # --- in the program's threads -----------------------------------------------------------------------------------
    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Put the start of an optimization, trial or evaluation on the queue."""
        if span.parent is None:
            with contextlib.suppress(Exception):  # it looks at what MLflow keeps to itself
                self._look_at_experiment()
        try:
            if self._runs and span.name.split(" ", 1)[0] in _RUN_NAMES and is_ours(span):
                self._put(span, None if span.name == semconv.SPAN_TRIAL else self._active_run(), False)
        except Exception:
            _logger.debug("the start of %r is not followed", span.name, exc_info=True)

    def on_end(self, span: ReadableSpan) -> None:
        """Put a span on the queue."""
        sampled = span.context is not None and span.context.trace_flags.sampled
        if sampled and ((span.end_time or 0) >= self.since or self._is_new(span)):
            self._put(span, None, True)

    def export(self, spans: Sequence[ReadableSpan]) -> None:
        """Put those finished spans on the queue that did not come by :meth:`on_end`."""
        for span in spans:
            if (span.end_time or 0) < self.since and self._is_new(span):
                self._put(span, None, True)

    def _is_new(self, span: ReadableSpan) -> bool:
        if self.since == _NEVER:
            return True
        with self._lock:
            new = span not in self._seen
            self._seen.add(span)
        return new

    def _put(self, span: ReadableSpan, user_run: UserRun | None, ended: bool) -> None:
        if self._over.is_set():
            return
        self._queue.append((span, user_run, ended))
        if not self._threads and not self._no_threads:
            self._start_threads()
        if not self._new.is_set():
            self._new.set()

    def _start_threads(self) -> None:
        with self._lock:
            if not self._threads and not self._no_threads:
                for function, name in ((self._write_journal, "journal"), (self._deliver, "worker")):
                    thread = start_thread(function, f"dspy-otel-mlflow-{name}")
                    if thread is None:
                        self._no_threads = True
                        return
                    self._threads.append(thread)

    def _active_run(self) -> UserRun | None:
        """The user's active MLflow run, if it is in the same store as ours."""
        fluent = sys.modules.get("mlflow.tracking.fluent")
        if fluent is None:
            return None
        run = fluent.active_run()
        if run is None or not self._target.is_at(sys.modules["mlflow"].get_tracking_uri()):
            return None
        return UserRun(str(run.info.run_id), str(run.info.experiment_id))

    def _look_at_experiment(self) -> None:
        """Warn once when ``mlflow.set_experiment()`` has chosen another experiment than ours, which is in use."""
        fluent = sys.modules.get("mlflow.tracking.fluent")
        active = None if fluent is None else fluent._active_experiment_id
        if active == self._checked_experiment or not self._target.is_at(sys.modules["mlflow"].get_tracking_uri()):
            return
        ours = None if self.worker.backend is None else self.worker.backend.experiment_in_use
        if ours is None:  # nothing has been written yet: looked at again at the next start
            return
        self._checked_experiment = active
        if ours != str(active):
            log_safely(
                _logger.warning,
                "mlflow.set_experiment() has chosen experiment %s; traces go on to experiment %s. To change that too, "
                "call dspy_otel.configure(experiment=...) with its name.",
                active,
                ours,
            )

    # --- the queue to the journal -----------------------------------------------------------------------------------
    def _write_journal(self) -> None:
        while not self._over.is_set():
            self._new.wait()
            self._urgent.wait(WRITE_INTERVAL)
            self._new.clear()
            self._urgent.clear()
            waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
            try:
                self._record()
            except Exception as error:  # the thread must not end: the queue would grow
                self._report("journal thread", f"Spans could not be written to the journal: {type(error).__name__}.")
            for recorded in waiting:
                recorded.set()

    def record(self, seconds: float = _LONGEST_RECORD_SECONDS) -> None:
        """Write the queue to the journal.

        Its thread does so, if there is one: Ctrl-C interrupts the main thread, which would lose what it was writing.

        Args:
            seconds: most time to wait.
        """
        if not self._threads or not self._threads[0].is_alive():
            self._record()
            return
        recorded = threading.Event()
        self._waiting.append(recorded)
        self._new.set()
        self._urgent.set()
        recorded.wait(seconds)

    def _record(self) -> None:
        with self._recording:
            ended: list[ReadableSpan] = []
            for _ in range(len(self._queue)):
                span, user_run, is_end = self._queue.popleft()
                if is_end:
                    ended.append(span)
                    if span.context is not None:
                        self._live.pop(span.context.span_id, None)
                    if len(ended) >= _BATCH_SPANS:
                        self._append(ended)
                        ended = []
                else:
                    if span.name.startswith(semconv.SPAN_COMPILE):
                        self._append(ended)
                        ended = []
                    self._record_start(span, user_run)
            self._append(ended)
            self._record_changes()
        self._idle.clear()
        self._wake.set()

    def _record_at_exit(self) -> None:
        """A second Ctrl-C may interrupt the provider before it shuts this processor down: the journal has the queue."""
        if self._over.is_set():
            return
        try:
            self.record(_LAST_RECORD_SECONDS)
        except KeyboardInterrupt:
            self.record(_LAST_RECORD_SECONDS)
            raise

    def _record_start(self, span: ReadableSpan, user_run: UserRun | None) -> None:
        if span.context is None:
            return
        last = self.journal.segments[-1] if self.journal.segments else None
        if last is not None and span.name.startswith(semconv.SPAN_COMPILE):
            self.journal.close_segment(last)
        self.worker.add_start(span, user_run, -1 if last is None or not last.closed else last.number)
        self._live[span.context.span_id] = (span, user_run, -1)

    def _record_changes(self) -> None:
        """Write the starts of running spans to the journal, again when a span has more attributes."""
        changed: list[tuple[ReadableSpan, UserRun | None, int]] = []
        for span, user_run, count in list(self._live.values()):
            now = len(span.attributes or ())
            if span.end_time is None and kind_of(span) in RUN_KINDS and now != count:
                changed.append((span, user_run, now))
        if not changed:
            return
        written = False
        with contextlib.suppress(Exception):
            written = self.journal.append_starts(
                encode([started_copy(span, user_run) for span, user_run, _ in changed])
            )
        for span, user_run, now in changed:
            if written and span.context is not None and span.context.span_id in self._live:
                self._live[span.context.span_id] = (span, user_run, now)
        self._add_on_disk([span for span, _, _ in changed], written)

    def _add_on_disk(self, spans: Iterable[ReadableSpan], written: bool = True) -> None:
        """Remember which runs the journal has in full."""
        for span in spans:
            with contextlib.suppress(Exception):
                if is_ours(span) and (key := key_of_start(span)) is not None:
                    (self._on_disk.add if written else self._on_disk.discard)(key)

    def _append(self, spans: list[ReadableSpan]) -> None:
        if not spans:
            return
        account = self.worker.account
        account.produced[SPANS] += len(spans)
        account.produced[TRACES] += sum(span.parent is None for span in spans)
        try:
            if not self._append_some(spans):
                # The limit is reached: what runs are made of has a reserve on disk, the rest waits in memory. Examples
                # come before the evaluation that they are of, as they have ended.
                needed = [span for span in spans if is_ours(span) and kind_of(span) in RUN_KINDS]
                for some in ([span for span in spans if span not in needed], needed):
                    if some and not self._append_some(some, needed=some is needed, although_full=True):
                        self._drop(some, "spool_full" if self.journal.directory is not None else "queue_full")
        except Exception as error:
            _logger.debug("spans cannot be encoded", exc_info=True)
            if len(spans) == 1:
                self._report("encode", f"Span {clean(spans[0].name, 60)!r} cannot be encoded: {type(error).__name__}.")
                self._drop(spans, "encode")
                return
            account.produced[SPANS] -= len(spans)
            account.produced[TRACES] -= sum(span.parent is None for span in spans)
            for span in spans:
                self._append([span])

    def _append_some(self, spans: list[ReadableSpan], needed: bool = False, although_full: bool = False) -> bool:
        body = encode(translate(spans))
        groups = {group for span in spans if is_ours(span) and (group := group_of(span))} if self._runs else set()
        roots = sum(span.parent is None for span in spans)
        segment = self.journal.append(body, spans, groups, roots, needed=needed, although_full=although_full)
        if segment is None:
            return False
        if groups:
            self._add_on_disk(spans, segment.path is not None)
        cached = 0
        for each in reversed(list(self.journal.segments)):
            cached += each.count
            if cached > _CACHED_SPANS and each.path is not None and each.closed:
                each.spans = None
        return True

    def _drop(self, spans: list[ReadableSpan], why: str) -> None:
        if not spans:
            return
        if why in ("queue_full", "spool_full"):
            self._report(
                why,
                "Too many spans wait for MLflow: traces of examples and calls are dropped, those of optimizations, "
                "trials and evaluations are kept.",
            )
        account = self.worker.account
        if self._runs:
            counts = count_assessments(spans)
            account.produced.update(counts)
            account.dropped.update(counts)
        account.dropped[SPANS] += len(spans)
        account.dropped[TRACES] += sum(span.parent is None for span in spans)
        self._count_spans(len(spans), why)

    # --- the journal to MLflow --------------------------------------------------------------------------------------
    def _deliver(self) -> None:
        while not self._over.is_set():
            try:
                self.worker.round()
            except Exception as error:  # likewise
                self._report("worker thread", f"A step of the delivery failed: {type(error).__name__}.")
                self._stop.wait(1.0)
            if self.worker.done and not self._queue:
                self._throttle.restart()
                self._idle.set()
                if self._stop.is_set():
                    return
            if self._should_stop():
                return
            if not self._recovered and self.worker.account.written[SPANS]:
                self._recovered = True
                start_thread(self._recover, "dspy-otel-mlflow-recovery")
            self._wake.wait(min(self.worker.wait_seconds(), 0.2) if self._stop.is_set() else self.worker.wait_seconds())
            self._wake.clear()

    def _should_stop(self) -> bool:
        """When the program ends: whether MLflow cannot be reached, so that the rest stays in the journal."""
        backoff = self.worker.backoff
        if not self._stop.is_set() or backoff.error is None or backoff.error.cause == "slow":
            return self._stop.is_set() and (self.worker.failed or self.worker.only_versions_fail)
        asked_for = backoff.error.retry_after or 0.0
        if asked_for > HANGS_AFTER or backoff.due > self._deadline:
            return True
        return self.worker.failed or backoff.failures >= EXIT_ATTEMPTS

    def _recover(self) -> None:
        """Deliver the journals that earlier processes left for the same target."""
        with suppress_instrumentation(), contextlib.suppress(Exception):
            recover(self.journal.directory, self._target, self._over.is_set)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Wait until everything so far is in MLflow; False when it is not within the time."""
        if self._over.is_set():
            return True
        until = time.monotonic() + timeout_millis / 1000
        self.record(max(0.0, timeout_millis / 1000))
        if self._no_threads or not self._threads:
            if not self.worker.done:
                self._deliver_here(until)
            return self.worker.done
        caller = object()
        self._throttle.hurry(caller)
        self.worker.retry_now()
        self._idle.clear()
        self._wake.set()
        try:
            while (left := until - time.monotonic()) > 0 and not self._over.is_set():
                if self._idle.wait(left) and self.worker.done and not self._queue:
                    return True
                self._idle.clear()  # what came in since the worker looked
                self._wake.set()
            return self.worker.done
        finally:
            self._throttle.relax(caller)

    def _deliver_here(self, until: float) -> None:
        """Deliver in this thread: no other can be started any more."""
        while not self.worker.done and time.monotonic() < until and not self._should_stop():
            self.worker.round()
            if not self.worker.done:
                time.sleep(min(self.worker.wait_seconds(), 0.2))

    # --- the end ----------------------------------------------------------------------------------------------------
    def shutdown(self, seconds: float | None = None) -> None:
        """Deliver what is pending, and log the account. The rest stays in the journal. A second call does nothing.

        Args:
            seconds: most time for the delivery; ``OTEL_DSPY_EXIT_SECONDS`` (three minutes) if that is less.
        """
        if not self._ending.acquire(blocking=False):
            if seconds is not None and not self._over.is_set():  # SIGTERM while the program already waits for its end
                if self._threads:
                    self._join(self._threads[-1], time.monotonic() + seconds)
                self._close()
            return
        interrupted: BaseException | None = None
        try:
            self._finish(min(exit_seconds(), math.inf if seconds is None else seconds))
        except KeyboardInterrupt as error:  # a second Ctrl-C: the user does not wait
            interrupted = error
        with contextlib.suppress(Exception):
            self._close()
        after_shutdown(self)
        if interrupted is not None and threading.main_thread().is_alive():
            raise interrupted

    def _finish(self, seconds: float) -> None:
        self._deadline = deadline = time.monotonic() + seconds
        self._throttle.hurry(self)
        self.record(min(seconds / 2, _LONGEST_RECORD_SECONDS))
        worker = self.worker
        if worker.done and not self._live and not self.journal.place:
            self._stop.set()
            return
        waiting = sum(segment.count for segment in self.journal.segments)
        if waiting > _REPORTED_FROM:
            log_safely(
                _logger.warning, "MLflow: writing the last %d spans and scores; at most %.0f s.", waiting, seconds
            )
        if worker.backend is not None:
            worker.backend.set_deadline(deadline)

        def stop() -> None:
            worker.stop(time.time_ns())
            if worker.backoff.error is None or worker.backoff.error.cause != LOCKED:  # which was waited for just now
                worker.retry_now()
                worker.backoff.restart()
            self._stop.set()
            self._wake.set()

        if self._no_threads or not self._threads:
            stop()
            self._deliver_here(deadline)
            return
        # The worker may be in the middle of a request.
        if start_thread(stop, "dspy-otel-mlflow-end") is None:
            stop()
        self._join(self._threads[-1], deadline)

    def _join(self, thread: threading.Thread, deadline: float) -> None:
        """Wait for the worker while MLflow takes something. A server that has answered before is slow, not down."""
        progress, since = -1, time.monotonic()
        while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            thread.join(min(left, 0.2))
            worker, backend = self.worker, self.worker.backend
            if worker.progress != progress:
                progress, since = worker.progress, time.monotonic()
            hangs = self._target.is_server and not (backend is not None and backend.answered)
            locked = worker.backoff.error is not None and worker.backoff.error.cause == LOCKED
            if (hangs or locked or worker.failures) and time.monotonic() - since > HANGS_AFTER:
                return

    def _close(self) -> None:
        """Close the journal and log the account, once. A disk that hangs delays the end by seconds only."""
        if self._closing.acquire(blocking=False):
            thread = start_thread(self._close_now, "dspy-otel-mlflow-close")
            if thread is None:
                self._close_now()
        if not self._closed.wait(_LONGEST_CLOSE_SECONDS):
            log_safely(_logger.error, "MLflow: the disk does not answer; what is not yet in the journal is lost.")

    def _close_now(self) -> None:
        with contextlib.suppress(Exception):
            self._close_journal()
        self._closed.set()

    def _close_journal(self) -> None:
        worker, journal = self.worker, self.journal
        self.record(_LAST_RECORD_SECONDS)
        self._over.set()
        self._new.set()
        self._urgent.set()
        self._wake.set()
        for recorded in list(self._waiting):
            recorded.set()
        self._idle.set()
        worker.abandoned = True  # if it still waits for an answer
        idle = worker.busy.acquire(timeout=_LAST_SECONDS)
        for segment in journal.save():
            self._add_on_disk(decode(segment.body()))
        place = None if journal.place is None else journal.place.path
        worker.account_for_rest(lambda key: place is not None and key in self._on_disk)
        account = worker.account
        lost = sum(segment.count for segment in journal.segments if not segment.path and not segment.delivered)
        if lost:
            self._count_spans(lost, "not_sent")
        journal.close(worker.done)
        if idle:
            worker.close()
            worker.busy.release()
        if account.incomplete or any(account.written.values()):
            log = _logger.warning if account.incomplete else _logger.info
            log_safely(log, "%s.", account.line(place, bool(journal.refused)))

    def _after_fork(self) -> None:
        backend, journal = self.worker.backend, self.journal
        self._reset()  # the parent process delivers what is pending
        journal.after_fork()
        if backend is not None:
            with contextlib.suppress(Exception):
                backend.after_fork()
            self.worker.backend = backend


def exit_seconds() -> float:
    """Most time that the end of the program waits for the delivery, from the environment."""
    named = os.environ.get(ENV_EXIT_SECONDS, "").strip()
    try:
        seconds = float(named or EXIT_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        log_safely(_logger.warning, "dspy-otel: %s: use a number of seconds; using %g", ENV_EXIT_SECONDS, EXIT_SECONDS)
        return EXIT_SECONDS
    return seconds


def _counter_of_spans() -> Callable[[int, str | None], None]:
    """A function that counts spans that were sent, or lost for a reason."""
    counter = WithoutExemplars(
        metrics.get_meter(semconv.SCOPE_NAME, __version__).create_counter(
            semconv.METRIC_SPANS_EXPORTED, "{span}", "Spans that were sent to MLflow, or lost (with error.type)"
        )
    )
    labels = {
        semconv.OTEL_COMPONENT_TYPE: "dspy_mlflow_exporter",
        semconv.OTEL_COMPONENT_NAME: "dspy_mlflow_exporter/0",
    }

    def count(spans: int, why: str | None) -> None:
        with contextlib.suppress(Exception):
            counter.add(spans, labels if why is None else {**labels, semconv.ERROR_TYPE: why})

    return count
