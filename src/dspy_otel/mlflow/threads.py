"""Threads: starting them, a small pool, and logging that does not end one."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from opentelemetry.instrumentation.utils import suppress_instrumentation

from dspy_otel.mlflow.backends.base import unexpected
from dspy_otel.mlflow.retry import ExportError

_Item = TypeVar("_Item")

HELPERS: Final = 8
"""Threads that put scores on traces of a server: it takes them one by one only, 80 ms each over one connection and 20
over eight (measured with MLflow 3.17.2 on two cores)."""


class Helpers:
    """A pool of threads."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[Any], Any], Any, SimpleQueue[tuple[int, Any]], int] | None]
        self._tasks = SimpleQueue()
        self._threads = 0

    def run(self, function: Callable[[_Item], bool], items: Sequence[_Item], threads: int) -> list[bool | Exception]:
        """What ``function`` returns or raises for each item, in order.

        Args:
            function: called with each item.
            items: any number.
            threads: most calls at once; 0 for calls in this thread.
        """
        if len(items) > 1:
            self._start(min(threads, len(items)))
        if not self._threads or not threads or len(items) < 2:
            return [attempt(function, item) for item in items]
        done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        waiting = enumerate(items)

        def begin(count: int) -> None:
            for place, item in islice(waiting, count):
                self._tasks.put((function, item, done, place))

        begin(threads)
        found: list[Any] = [None] * len(items)
        for _ in items:
            place, result = done.get()
            begin(1)
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
                done.put((place, attempt(function, item)))


class Throttle:
    """Rests of a thread that works beside a program that computes: Python runs one thread of a process at a time.

    A program that waits for its models uses no CPU, so the thread rests for one step only. It rests at most for some
    seconds in a row of work, so what has to be written never waits much longer than it would without.
    """

    SHARE: Final = 3.0
    """Seconds of rest for each CPU second of work: a busy program is slowed down by a quarter at most."""
    MOST_SECONDS: Final = 10.0
    """Seconds that a row of work takes before it is done without rests."""
    _STEP: Final = 0.05
    _BUSY: Final = 0.1
    """CPU seconds per second of a program that computes, on a machine with other work too."""

    def __init__(self) -> None:
        self._callers: set[object] = set()
        self.restart()

    def restart(self) -> None:
        """Begin a row of work: all earlier work is done."""
        self._until = time.monotonic() + self.MOST_SECONDS

    def hurry(self, caller: object) -> None:
        """Do not rest until :meth:`relax`: ``caller`` waits for the work. Any thread may call it; it takes no lock."""
        self._callers.add(caller)

    def relax(self, caller: object) -> None:
        """``caller`` waits no longer."""
        self._callers.discard(caller)

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Work, and rest afterwards."""
        before = time.thread_time()
        yield
        until = min(time.monotonic() + self.SHARE * (time.thread_time() - before), self._until)
        while not self._callers and (left := until - time.monotonic()) > 0:
            began, used = time.monotonic(), time.process_time()
            time.sleep(min(left, self._STEP))
            if time.process_time() - used < self._BUSY * (time.monotonic() - began):
                return


def attempt(function: Callable[[_Item], bool], item: _Item) -> bool | Exception:
    """What ``function`` returns or raises for an item; an unexpected exception as :class:`ExportError`."""
    try:
        return function(item)
    except ExportError as error:
        return error
    except Exception as error:
        return unexpected(error)


def log_safely(log: Callable[..., object], message: str, *arguments: object) -> None:
    """Log a message. An exception of a log handler of the user's is suppressed.

    Args:
        log: a method of a logger.
        message: a %-format.
        arguments: for the format.
    """
    with contextlib.suppress(Exception):
        log(message, *arguments)


def announce(logger: logging.Logger, message: str, *arguments: object) -> None:
    """Log a message at INFO; where nobody has set up logging, which drops that, write it to a terminal.

    Args:
        logger: the caller's.
        message: a %-format.
        arguments: for the format.
    """
    with contextlib.suppress(Exception):
        if logger.hasHandlers() or not sys.stderr.isatty():
            logger.info(message, *arguments)
        else:
            print(message % arguments, file=sys.stderr)


def start_thread(function: Callable[[], None], name: str) -> threading.Thread | None:
    """Start a daemon thread; None when the interpreter shuts down and starts no threads."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread
