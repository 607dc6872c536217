"""Runs in MLflow while they happen: a span processor that hands compiles, trials and evaluations to one worker.

The program's threads only put spans on a queue. The worker keeps a :class:`~dspy_otel.mlflow.pending.PendingRuns` of
what should be in MLflow and brings MLflow up to it, some times a second at most; what fails is tried again with the
next round, so that a server may be away for a while. Traces are linked to their runs, and scores put on traces, when
the exporter has delivered the trace. What is left at the end of the program goes to the spool.
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
from collections.abc import Callable, Sequence
from typing import Any, Final

from opentelemetry import metrics
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from dspy_otel import semconv
from dspy_otel.core.metrics import WithoutExemplars
from dspy_otel.mlflow.base import first_line, say
from dspy_otel.mlflow.delivery import Delivery, join, start_thread
from dspy_otel.mlflow.exporter import MLflowSpanExporter
from dspy_otel.mlflow.pace import Pace
from dspy_otel.mlflow.spool import Spool, SpoolError
from dspy_otel.mlflow.writer import RunWriter
from dspy_otel.record.history import History
from dspy_otel.record.spans import Kind, belongs, is_ours, kind_of
from dspy_otel.version import __version__

_logger = logging.getLogger(__name__)

_LINGER: Final = 0.5
"""Seconds between something new and writing it: what comes in between travels in the same calls."""
MAX_EVENTS: Final = 50_000
"""Most spans waiting for the worker. Above it, examples are left out of evaluation tables; runs and trials never."""
ENV_EXIT_SECONDS: Final = "OTEL_DSPY_EXIT_SECONDS"
EXIT_SECONDS: Final = 180.0
"""Most time that the end of the program waits for what is left. A server that does not answer ends it at once."""
_REQUEST_AT_EXIT: Final = 15.0
"""Seconds for one request when the program ends: what takes longer goes to the spool."""
_HANGS_AFTER: Final = 20.0
"""Seconds without any answer until the end of the program gives a server up."""
_WORTH_A_LINE: Final = 500
"""From so many spans and scores on, the end of the program says that it takes a while."""
_TRIES_AT_EXIT: Final = 2
_WITH_RUN: Final = frozenset({Kind.COMPILE, Kind.TRIAL, Kind.EVALUATION})


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
        self._spool: Spool | None = None
        self._begin()
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())

    def _begin(self) -> None:
        self._events: deque[tuple[str, Any, Any]] = deque()
        self._urgent = threading.Event()
        self._pace = Pace(self._urgent)
        self._spool = self._exporter.open_spool()
        self._delivery = Delivery(
            self._exporter.write,
            self.sent,
            alive=self._exporter.alive,
            precious=_has_a_run,
            counted=_counter_of_spans(),
            spool=self._spool,
            pace=self._pace,
        )
        self._history = History()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None
        self._deadline = float("inf")
        self._left_out = 0
        self._worker: RunWriter | None = None

    # --- in the program's threads -----------------------------------------------------------------------------------
    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Note the start of a compile, trial or evaluation."""
        if not self._exporter.wants_runs:
            return
        try:
            kind = kind_of(span) if is_ours(span) else Kind.OTHER
            if kind in _WITH_RUN:
                self._put("start", span, None if kind is Kind.TRIAL else self._users_run())
        except Exception:
            _logger.debug("start of %r is not followed", span.name, exc_info=True)

    def on_end(self, span: ReadableSpan) -> None:
        """Take the span along, and note the end of a compile, trial, evaluation or example, and what was used."""
        try:
            if self._exporter.wants_runs and is_ours(span):
                self._note_end(span)
            if span.context is not None and span.context.trace_flags.sampled:
                self._delivery.put(span)  # last: a delivered trace is linked to a run that is known
        except Exception:
            _logger.debug("end of %r is not followed", span.name, exc_info=True)

    def _note_end(self, span: ReadableSpan) -> None:
        kind = kind_of(span)
        if kind in (Kind.LM_CALL, Kind.EMBEDDING):
            if belongs(span):
                self._history.end(span)
        elif kind is Kind.EXAMPLE and len(self._events) >= MAX_EVENTS:
            self._left_out += 1
        elif kind is not Kind.OTHER:
            self._put("end", span, None)

    def sent(self, spans: Sequence[ReadableSpan]) -> None:
        """These spans are delivered: their traces can be linked and scored now."""
        if not self._exporter.wants_runs:
            return
        try:
            for span in spans:
                if is_for_run(span):
                    self._put("sent", span, None)
        except Exception:
            _logger.debug("delivered spans are not followed", exc_info=True)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Wait until everything so far is in MLflow; False when it is not within the time."""
        until = time.monotonic() + timeout_millis / 1000
        self._urgent.set()
        try:
            if not self._delivery.flush(timeout_millis / 1000):
                return False
            if self._thread is None:
                return True
            self._wake.set()
            return self._idle.wait(max(0.0, until - time.monotonic()))
        finally:
            if not self._stop.is_set():
                self._urgent.clear()

    def shutdown(self) -> None:
        """Write what is left, for at most three minutes, put the rest into the spool, and say what became of it."""
        if self._stop.is_set():
            return
        interrupted: BaseException | None = None
        try:
            self._write_rest()
        except KeyboardInterrupt as error:  # who presses Ctrl-C again wants to go now
            interrupted = error
        self._stop.set()
        try:
            self._leave_rest()
        except Exception as error:
            say(_logger.warning, "MLflow: what was not written is lost (%s).", first_line(error))
        self._exporter.close()
        if interrupted is not None and threading.main_thread().is_alive():
            raise interrupted

    def _write_rest(self) -> None:
        seconds = exit_seconds()
        self._deadline = time.monotonic() + seconds
        self._exporter.patience.hurry(_REQUEST_AT_EXIT, self._deadline)
        self._urgent.set()
        waiting = self._delivery.waiting + len(self._events) + (0 if self._worker is None else self._worker.waiting)
        if waiting > _WORTH_A_LINE:
            say(_logger.warning, "MLflow: writing the last %d spans and scores; at most %.0f s.", waiting, seconds)
        # A store in this process works, however long it takes.
        hangs_after = _HANGS_AFTER if self._exporter.is_remote else seconds
        self._delivery.stop(self._deadline, hangs_after)
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            deadline = max(self._deadline, time.monotonic()) + 1
            join(self._thread, deadline, hangs_after, lambda: self._worker and self._worker.calls)
        elif self._events:
            self._run()

    def _leave_rest(self) -> None:
        self._delivery.leave()
        worker = self._worker
        if worker is None and self._events:
            worker = RunWriter(self._exporter.open_runs, self._stop, self._pace, self._history)
        written = [f"{self._delivery.done} spans"] if self._delivery.done else []
        left = [f"{self._delivery.kept} spans"] if self._delivery.kept else []
        lost = [f"{self._delivery.lost} spans"] if self._delivery.lost else []
        if worker is not None:
            worker.abandoned = True  # should it wait for an answer still
            self._take(worker)
            worker.stop()
            written += worker.done()
            lost += worker.lost()
            if unwritten := worker.left():
                (left if self._keep(worker) else lost).extend(unwritten)
        if self._left_out:
            lost.append(f"{self._left_out} rows of evaluation tables")
        place = None if self._spool is None or self._spool.place is None else self._spool.place.path
        if self._spool is not None:
            self._spool.close()
        said = f"MLflow: written: {', '.join(written) or 'nothing'}"
        if left:
            said += f"; not written: {', '.join(left)}, kept in {place}: deliver them with `dspy-otel replay`"
        if lost:
            said += f"; not written: {', '.join(lost)}, lost"
        if written or left or lost:
            _logger.log(logging.WARNING if left or lost else logging.INFO, "%s.", said)

    def _keep(self, worker: RunWriter) -> bool:
        """Put what MLflow lacks of runs into the spool."""
        if self._spool is None:
            return False
        try:
            self._spool.put_state(worker.state())
        except SpoolError as error:
            say(_logger.error, "Runs and scores cannot be kept: %s.", error)
            return False
        return True

    def _put(self, what: str, span: ReadableSpan, more: Any) -> None:
        if self._stop.is_set():
            return
        self._events.append((what, span, more))
        if self._idle.is_set():
            self._idle.clear()
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = start_thread(self._run, "dspy-otel-mlflow")
        if not self._wake.is_set():
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
        worker, spool = self._worker, self._spool
        if spool is not None:
            spool.after_fork()
        self._begin()  # what waits is the parent process's to write
        if worker is not None:
            worker.after_fork()

    # --- in the worker ----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        worker = self._worker = RunWriter(self._exporter.open_runs, self._stop, self._pace, self._history)
        with suppress_instrumentation():  # what we send is not to be watched, and sent in turn
            while self._round(worker):
                pass
            worker.close()

    def _round(self, worker: RunWriter) -> bool:
        """Take what came and write it; False when that was the last time."""
        if not worker.pending:
            self._wake.wait()
        if worker.failures or not worker.waiting:
            self._stop.wait(_LINGER if worker.failures == 0 else worker.pause)
        self._wake.clear()
        stopping = self._stop.is_set()
        with self._pace.working():
            self._take(worker)
            if stopping:
                worker.stop()
            worker.work(self._deadline, lambda: bool(self._events))
        if not worker.pending and not self._events:
            self._idle.set()
            if self._events:  # something came in between
                self._idle.clear()
        if stopping:
            # When spans could not be sent, this will not work either: one attempt is enough.
            tries = 0 if self._delivery.waiting else _TRIES_AT_EXIT
            if not worker.pending or worker.failures > tries or time.monotonic() > self._deadline:
                return False
            time.sleep(min(worker.failures, 1))  # a server may just be restarting
        return True

    def _take(self, worker: RunWriter) -> None:
        for _ in range(len(self._events)):  # what comes in between waits: runs are written in the meantime
            what, span, more = self._events.popleft()
            try:
                if what == "start":
                    worker.tree.start(span, more)
                elif what == "sent":
                    worker.deliver(span)
                else:
                    worker.tree.end(span)
            except Exception:
                _logger.debug("%s of %r is not followed", what, span.name, exc_info=True)
        with contextlib.suppress(Exception):
            worker.tree.refresh()


def _has_a_run(span: ReadableSpan) -> bool:
    return is_ours(span) and kind_of(span) in _WITH_RUN


def is_for_run(span: ReadableSpan) -> bool:
    """Whether a delivered span has its trace linked to a run, or scored."""
    return is_ours(span) and (span.parent is None or kind_of(span) is Kind.EXAMPLE) and belongs(span)


def exit_seconds() -> float:
    """Most time that the end of the program may take for what is left, from the environment."""
    named = os.environ.get(ENV_EXIT_SECONDS, "").strip()
    try:
        seconds = float(named or EXIT_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        say(_logger.warning, "dspy-otel: %s: use a number of seconds; using %g", ENV_EXIT_SECONDS, EXIT_SECONDS)
        return EXIT_SECONDS
    return seconds


def _counter_of_spans() -> Callable[[int, str | None], None]:
    """What counts spans that are done with: sent, or lost for a reason."""
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


def track_runs(provider: Any) -> None:
    """Add a :class:`RunTracker` to a tracer provider for each exporter it feeds that has none yet.

    One whose exporter wants no runs delivers spans only, in the same way.

    Args:
        provider: a tracer provider; one that is not the SDK's is left alone.
    """
    add = getattr(provider, "add_span_processor", None)
    if add is None:
        return
    for exporter in exporters_of(provider):
        if exporter.tracker is None:
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
