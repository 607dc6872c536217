"""Spans to MLflow as they end, with room to wait: what the SDK's batch processor would drop is kept here.

``BatchSpanProcessor`` holds 2,048 spans and drops what comes on top; a burst of a fast evaluation is more than that,
and so is what ends while a server restarts. Once runs are recorded, spans come this way instead, from the same place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel.exporters.mlflow.base import ExportError, first_line

_logger = logging.getLogger(__name__)

MAX_SPANS: Final = 100_000
"""Most spans waiting. What ends above it is lost, and counted."""
_BATCH: Final = 512
_LINGER: Final = 1.0
"""Seconds between a span and its batch; a full batch goes sooner."""
_PAUSES: Final = (1.0, 2.0, 5.0)
_TRIES_AT_EXIT: Final = 2
_MOST_TRIES: Final = 12
"""For one batch, when MLflow can be reached: about 50 s. It may be the batch that MLflow cannot take."""
_AWAY: Final = frozenset({"unreachable", "credentials"})
_PASSING: Final = frozenset({*_AWAY, "write", "store", "answer"})
"""Causes that may be over the next time; a batch that is refused for another one is given up."""


class Delivery:
    """A queue of finished spans and the thread that sends them.

    Args:
        send: delivers a batch or raises.
        sent: told of each delivered batch.
    """

    def __init__(
        self, send: Callable[[Sequence[ReadableSpan]], None], sent: Callable[[Sequence[ReadableSpan]], None]
    ) -> None:
        self._send = send
        self._sent = sent
        self._queue: deque[ReadableSpan] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None
        self._deadline = float("inf")
        self._failures = 0
        self._reported: set[str] = set()
        self.lost = 0

    @property
    def waiting(self) -> int:
        """Spans that are not yet sent."""
        return len(self._queue)

    def put(self, span: ReadableSpan) -> None:
        """Add a span; never waits."""
        if self._stop.is_set() or len(self._queue) >= MAX_SPANS:
            self.lost += 1
            return
        self._idle.clear()
        self._queue.append(span)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = start_thread(self._run, "dspy-otel-mlflow-spans")
        if len(self._queue) >= _BATCH or not self._wake.is_set():
            self._wake.set()

    def flush(self, seconds: float) -> bool:
        """Wait until all spans so far are sent; False when they are not within the time."""
        self._wake.set()
        return self._idle.wait(seconds)

    def stop(self, deadline: float) -> None:
        """Send what is left, until ``deadline`` (of the monotonic clock) at most."""
        self._deadline = deadline
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        elif self._queue:
            self._run()
        self.lost += len(self._queue)

    def _run(self) -> None:
        with suppress_instrumentation():  # what we send is not to be watched, and sent in turn
            self._send_all()

    def _send_all(self) -> None:
        while not (self._stop.is_set() and not self._queue):
            self._wake.wait()
            if len(self._queue) < _BATCH:
                self._stop.wait(_LINGER)
            self._wake.clear()
            while self._queue:
                if not self._send_some():
                    if self._stop.is_set() and (self._failures > _TRIES_AT_EXIT or time.monotonic() > self._deadline):
                        return
                    pause = _PAUSES[min(self._failures, len(_PAUSES)) - 1]
                    if self._stop.wait(pause):
                        time.sleep(min(pause, 1.0))  # at exit: a server may just be restarting
            self._idle.set()
            if self._queue:  # something came in between
                self._idle.clear()
                self._wake.set()

    def _send_some(self) -> bool:
        """Send the oldest batch; False when it has to be tried again."""
        batch = [self._queue[place] for place in range(min(_BATCH, len(self._queue)))]
        try:
            self._send(batch)
        except Exception as error:
            explained = error if isinstance(error, ExportError) else None
            cause = type(error).__name__ if explained is None else explained.cause
            passing = explained is not None and not explained.permanent and _is_passing(cause)
            if self._failures >= _MOST_TRIES and cause not in _AWAY:
                passing = False
                self._failures = 0
                self._reported.discard(cause)
            if cause not in self._reported:
                self._reported.add(cause)
                then = "They wait until it works." if passing else "They are lost."
                _logger.error("Spans could not be written: %s %s", explained or first_line(error), then)
            if passing:
                self._failures += 1
                return False
            self.lost += len(batch)
        else:
            if self._failures:
                _logger.warning("MLflow takes spans again.")
                self._reported.clear()
            self._failures = 0
            self._sent(batch)
        for _ in batch:
            self._queue.popleft()
        return True


def start_thread(function: Callable[[], None], name: str) -> threading.Thread | None:
    """A running daemon thread; None when the interpreter is going down and starts no more."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def _is_passing(cause: str) -> bool:
    return cause in _PASSING or cause.startswith("status 5")
