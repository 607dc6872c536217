"""Spans to MLflow as they end, with room to wait: what the SDK's batch processor would drop is kept here.

``BatchSpanProcessor`` holds 2,048 spans and drops what comes on top; a burst of a fast evaluation is more than that,
and so is what ends while a server restarts. Once runs are recorded, spans come this way instead, from the same place.

They wait in memory; when there are too many, the oldest go to the spool on disk, and are sent from there. When that is
full or off, spans of evaluated examples and of plain calls are dropped, never those of compiles, trials, evaluations.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel.mlflow.base import ExportError, first_line, say
from dspy_otel.mlflow.pace import Pace
from dspy_otel.mlflow.spool import Spool, SpoolError

_logger = logging.getLogger(__name__)

MAX_BYTES: Final = 64 * 1024 * 1024
"""Most that spans may take in memory, roughly; what is above goes to the spool. At twice that, spans are dropped."""
_SPAN_BYTES: Final = 3000
"""What a span takes beside its text: measured, with the attributes of an LM call."""
_WEIGH_ONE_OF: Final = 16
_BATCH: Final = 512
_SPILL: Final = 2048
"""Spans in one file, at most."""
_LINGER: Final = 1.0
"""Seconds between a span and its batch; a full batch goes sooner."""
_PAUSES: Final = (1.0, 2.0, 5.0)
_TRIES_AT_EXIT: Final = 2
_MOST_TRIES: Final = 12
"""For one batch, when MLflow works otherwise: about 50 s. It may be the batch that MLflow cannot take."""
_PROBES: Final = 4
"""Spans that are sent alone, to find out whether MLflow takes any."""
_SECONDS_FOR_A_FILE: Final = 10.0
"""To be waited for at the end, at most."""
_AGAIN: Final = 30.0
"""Seconds after a failure to write to the spool before the next attempt."""
_AWAY: Final = frozenset({"unreachable", "credentials", "store", "endpoint", "experiment", "redirect", "request"})
"""Causes that have nothing to do with what is sent, and last until somebody puts it right."""
_PASSING: Final = frozenset({*_AWAY, "write", "answer"})


class _Batch(NamedTuple):
    """Spans on their way; ``path`` is their file, if they come from the spool."""

    spans: list[ReadableSpan]
    path: Path | None


class Delivery:
    """A queue of finished spans and the thread that sends them.

    Args:
        send: delivers a batch or raises.
        sent: told of each delivered batch.
        alive: whether MLflow answers at all.
        precious: whether a span belongs to a compile, a trial or an evaluation.
        counted: told of spans that are done: how many, and why they were lost, if they were.
        spool: where spans go when there is no more room, or no more time; None for nowhere.
        pace: keeps out of a busy program's way.
    """

    def __init__(
        self,
        send: Callable[[Sequence[ReadableSpan]], None],
        sent: Callable[[Sequence[ReadableSpan]], None],
        *,
        alive: Callable[[], bool],
        precious: Callable[[ReadableSpan], bool],
        counted: Callable[[int, str | None], None],
        spool: Spool | None,
        pace: Pace,
    ) -> None:
        self._send = send
        self._sent = sent
        self._alive = alive
        self._precious = precious
        self._counted = counted
        self.spool = spool
        self._pace = pace
        self._queue: deque[ReadableSpan] = deque()
        self._weight = float(_SPAN_BYTES)
        self._until_weighed = 0
        self._current: _Batch | None = None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None
        self._spilling: threading.Thread | None = None
        self._on_the_way = 0
        self._no_spool_until = 0.0
        self._deadline = float("inf")
        self._failures = 0
        self._reported: set[str] = set()
        self.dead = False
        """Trying again cannot help."""
        self._over = False
        self.done = 0
        self.lost = 0
        self.kept = 0
        """Spans that were left in the spool at the end."""

    @property
    def waiting(self) -> int:
        """Spans that are not yet sent, the spool's included."""
        spooled = 0 if self.spool is None else self.spool.waiting()
        current = self._current
        sending = len(current.spans) if current is not None and current.path is None else 0
        return len(self._queue) + spooled + sending + self._on_the_way

    def put(self, span: ReadableSpan) -> None:
        """Add a span; never waits."""
        if self._until_weighed <= 0:
            # One for many: what a span holds is found out by looking at each of its attributes.
            self._until_weighed = _WEIGH_ONE_OF
            self._weight += (weight(span) - self._weight) / 4
        self._until_weighed -= 1
        bytes_waiting = self._bytes
        if self._stop.is_set() or (bytes_waiting > 2 * MAX_BYTES and not self._precious(span)):
            self._drop("already_shutdown" if self._stop.is_set() else "queue_full")
            return
        self._queue.append(span)
        if self._idle.is_set():
            self._idle.clear()
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = start_thread(self._run, "dspy-otel-mlflow-spans")
        if bytes_waiting > MAX_BYTES and self._spilling is None and self.spool is not None:
            self._start_to_spill()
        if not self._wake.is_set():
            self._wake.set()

    def _drop(self, why: str) -> None:
        if why == "queue_full":
            self._report(
                why,
                "Too many spans wait for MLflow: traces of examples and calls are dropped, those of optimizations, "
                "trials and evaluations are kept.",
            )
        self._lose(1, why)

    @property
    def _bytes(self) -> float:
        return len(self._queue) * self._weight

    def flush(self, seconds: float) -> bool:
        """Wait until all spans so far are sent; False when they are not within the time."""
        self._wake.set()
        return self._idle.wait(seconds)

    def stop(self, deadline: float, hangs_after: float) -> None:
        """Send what is left.

        Args:
            deadline: until then at most (monotonic clock).
            hangs_after: seconds without any answer until MLflow is given up.
        """
        self._deadline = deadline
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            join(self._thread, deadline, hangs_after, lambda: (self.done, self._failures))
        elif self._queue:
            self._run()

    def leave(self) -> None:
        """Put what has not been sent into the spool. Nothing else must be called after it."""
        if (spilling := self._spilling) is not None:
            spilling.join(_SECONDS_FOR_A_FILE)
        with self._lock:
            spans = [] if self._current is None or self._current.path is not None else list(self._current.spans)
            spans += self._queue
            self._queue.clear()
        for start in range(0, len(spans), _SPILL):
            some = spans[start : start + _SPILL]
            if self.spool is None:
                self._lose(len(some), "not_sent")
                continue
            try:
                dropped = self.spool.put(some, self._precious)
            except SpoolError as error:
                self._report("spool", f"Spans cannot be kept: {error}.")
                dropped = len(some)
            self._lose(dropped, "spool_full")
        self.kept = 0 if self.spool is None else self.spool.waiting()
        self._over = True

    # --- to MLflow --------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        with suppress_instrumentation():  # what we send is not to be watched, and sent in turn
            self._send_all()

    def _send_all(self) -> None:
        while not (self._stop.is_set() and not self._next()):
            self._wake.wait()
            if len(self._queue) < _BATCH:
                self._stop.wait(_LINGER)
            self._wake.clear()
            while (batch := self._next()) is not None:
                if self.dead:
                    if self._stop.is_set():
                        return
                    break
                began = time.thread_time()
                with self._pace.working():
                    advanced = self._send_some(batch)
                if self._over:  # nobody waits for it any more
                    return
                if advanced:
                    self._pace.rest(time.thread_time() - began, self._bytes / MAX_BYTES)
                    continue
                if self._stop.is_set() and (self._failures > _TRIES_AT_EXIT or time.monotonic() > self._deadline):
                    return
                pause = _PAUSES[min(self._failures, len(_PAUSES)) - 1]
                if self._stop.wait(pause):
                    time.sleep(min(pause, 1.0))  # at exit: a server may just be restarting
            if self.dead:
                continue
            self._idle.set()
            if self._queue:  # something came in between
                self._idle.clear()
                self._wake.set()

    def _next(self) -> _Batch | None:
        """The batch that is to be sent: what has failed before, else from the spool, else from the queue."""
        if self._current is not None or self.dead:
            return self._current
        while self.spool is not None and (path := self.spool.oldest()) is not None:
            try:
                spans = self.spool.read(path)
            except (OSError, ValueError) as error:  # somebody has been at it
                say(_logger.error, "Spans in %s cannot be read: %s", path, first_line(error))
                path.rename(path.with_suffix(".broken"))
                continue
            self._current = _Batch(spans, path)
            return self._current
        with self._lock:
            taken = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            self._current = _Batch(taken, None) if taken else None
        return self._current

    def _send_some(self, batch: _Batch) -> bool:
        """Send a batch, in parts if it is large; False when it has to be tried again."""
        spans = batch.spans
        while spans:
            try:
                self._send(spans[:_BATCH])
            except Exception as error:
                if not self._failed(error, spans[:_BATCH]):
                    return False
            else:
                if self._failures:
                    say(_logger.warning, "MLflow takes spans again.")
                    self._reported.clear()
                self._failures = 0
                self._succeeded(spans[:_BATCH])
            del spans[:_BATCH]
        if batch.path is not None and self.spool is not None:
            self.spool.remove(batch.path)
        self._current = None
        return True

    def _succeeded(self, spans: Sequence[ReadableSpan]) -> None:
        self.done += len(spans)
        self._counted(len(spans), None)
        self._sent(spans)

    def _failed(self, error: Exception, spans: list[ReadableSpan], works: bool = False) -> bool:
        """Deal with a failure; True when these spans are done with.

        Args:
            error: of the attempt.
            spans: that were to be sent.
            works: MLflow has just taken others, so that an error which otherwise passes is about these.
        """
        explained = error if isinstance(error, ExportError) else None
        cause = type(error).__name__ if explained is None else explained.cause
        why = str(explained or first_line(error))
        if explained is not None and explained.permanent:
            self.dead = True
            self._report(cause, f"Spans could not be written: {why} {self._then()}")
            return False
        passing = explained is not None and _is_passing(cause)
        if passing and not (works and cause not in _AWAY) and not self._is_about(cause, spans):
            self._failures += 1
            self._report(cause, f"Spans could not be written: {why} They wait until it works.")
            return False
        if len(spans) > 1:
            # One span that MLflow refuses takes all of its request with it.
            half = len(spans) // 2
            first = self._one_half(spans[:half], passing)
            return self._one_half(spans[half:], passing) and first
        if self._put_aside(spans):
            self._report(f"refused: {cause}", f"MLflow refuses a span: {why} It is set aside in the spool.")
        else:
            self._report(f"refused: {cause}", f"MLflow refuses a span: {why} It is lost.")
            self._lose(len(spans), cause)
        return True

    def _is_about(self, cause: str, spans: Sequence[ReadableSpan]) -> bool:
        """Whether an error that lasts is about these spans: MLflow takes others, one by one, in the meantime."""
        if self._failures < _MOST_TRIES or cause in _AWAY or not self._alive():
            return False
        among = [*spans[:_PROBES], spans[-1]] if len(spans) > 1 else []
        for span in (*among, *islice(tuple(self._queue), _PROBES)):
            with contextlib.suppress(Exception):
                self._send([span])
                return True
        return False

    def _one_half(self, spans: list[ReadableSpan], works: bool) -> bool:
        try:
            self._send(spans)
        except Exception as error:
            return self._failed(error, spans, works)
        self._succeeded(spans)
        return True

    def _put_aside(self, spans: list[ReadableSpan]) -> bool:
        if self.spool is None:
            return False
        try:
            self.spool.set_aside(spans)
        except Exception as error:  # The disk, or a span that nothing can encode: the thread has to go on.
            self._report("spool", f"Spans cannot be set aside: {first_line(error)}.")
            return False
        return True

    # --- to the spool -----------------------------------------------------------------------------------------------
    def _start_to_spill(self) -> None:
        with self._lock:
            if self._spilling is None and time.monotonic() >= self._no_spool_until:
                self._spilling = start_thread(self._spill, "dspy-otel-mlflow-spool")

    def _spill(self) -> None:
        """Move the oldest spans to disk until half of the room in memory is free."""
        try:
            with suppress_instrumentation(), self._pace.working():
                while self._bytes > MAX_BYTES // 2 and not self._stop.is_set() and self._spill_some():
                    pass
        finally:
            with self._lock:  # who starts this holds it, until it is noted
                self._spilling = None

    def _spill_some(self) -> bool:
        assert self.spool is not None
        with self._lock:
            taken = [self._queue.popleft() for _ in range(min(_SPILL, len(self._queue)))]
            self._on_the_way = len(taken)
        if not taken:
            return False
        try:
            dropped = self.spool.put(taken, self._precious)
        except Exception as error:
            with self._lock:
                self._queue.extendleft(reversed(taken))
                self._on_the_way = 0
            self._no_spool_until = time.monotonic() + _AGAIN
            self._report("spool", f"Too many spans wait for MLflow, and {error}. The next ones may be lost.")
            return False
        self._on_the_way = 0
        if dropped:
            self._report(
                "spool full",
                f"The spool in {self.spool.directory} is full: traces of examples are dropped, those of "
                "optimizations, trials and evaluations are kept.",
            )
            self._lose(dropped, "spool_full")
        self._wake.set()
        return True

    # --- what is said of it -----------------------------------------------------------------------------------------
    def _lose(self, count: int, why: str) -> None:
        if count:
            self.lost += count
            self._counted(count, why)

    def _then(self) -> str:
        return "Spans are lost." if self.spool is None else "Spans are kept in the spool, at the end of the program."

    def _report(self, cause: str, message: str) -> None:
        if cause not in self._reported and not self._over:
            self._reported.add(cause)
            say(_logger.error, "%s", message)


def weight(span: ReadableSpan) -> int:
    """Roughly what a span takes in memory."""
    attributes = span.attributes
    if not attributes:
        return _SPAN_BYTES
    return _SPAN_BYTES + sum([len(value) for value in attributes.values() if value.__class__ is str])


def start_thread(function: Callable[[], None], name: str) -> threading.Thread | None:
    """A running daemon thread; None when the interpreter is going down and starts no more."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def join(thread: threading.Thread, deadline: float, hangs_after: float, progress: Callable[[], object]) -> None:
    """Wait for a thread's end, as long as it gets on."""
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
        before = progress()
        thread.join(min(left, hangs_after))
        if progress() == before:
            return


def _is_passing(cause: str) -> bool:
    return cause in _PASSING or cause.startswith("status 5")
