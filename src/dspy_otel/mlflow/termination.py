"""SIGTERM (a container stops) and SIGHUP (a terminal closes) end a process at once. This module delivers first.

A worker of ``multiprocessing``, or of a pool of processes, ends without the functions of ``atexit``: the other case.

The signal is handled only where no other handler is set, and the process still ends by it, at most a few seconds
later. A handler that the program sets afterwards replaces ours; a server such as uvicorn that handles the signal ends
the program in the usual way, and then this module has nothing to do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import weakref
from functools import partial
from multiprocessing import process, util
from typing import Any, Final, Protocol

from dspy_otel.mlflow.threads import start_thread

SECONDS: Final = 8.0
"""Most time for the delivery. Docker kills a container ten seconds after the signal, Kubernetes after thirty."""
_LAST: Final = 2.0
"""Of these, what is left when delivery has to stop: for the journal, and for the line in the log."""
_LAST_BEFORE_CHILDREN_END: Final = 0
"""The priority of a finalizer of ``multiprocessing``: after those of the program, which may still make spans."""


_SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class SupportsShutdown(Protocol):
    """An object to shut down before the process is terminated."""

    def shutdown(self, seconds: float | None = None) -> None:
        """Deliver what is pending, within this time."""


_running: weakref.WeakSet[Any] = weakref.WeakSet()


def before_termination(running: SupportsShutdown) -> None:
    """Shut an object down when the process gets such a signal; it is referenced weakly."""
    _running.add(running)
    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            _set(number, _terminate)


def before_worker_ends(running: SupportsShutdown) -> None:
    """Shut an object down when a worker process of ``multiprocessing`` ends; it is referenced weakly."""
    util.register_after_fork(running, _add_finalizer)
    _add_finalizer(running)


def _add_finalizer(running: SupportsShutdown) -> None:
    found = weakref.ref(running)

    def shut_down() -> None:
        # Asked here, because a spawned process does not know its parent yet while it imports the program.
        if process.parent_process() is not None and (one := found()) is not None:
            one.shutdown()

    util.Finalize(None, shut_down, exitpriority=_LAST_BEFORE_CHILDREN_END)


def after_shutdown(ended: SupportsShutdown) -> None:
    """Leave the signals as they were found, once nothing needs them any more."""
    _running.discard(ended)
    if not _running:
        _restore()


def _terminate(number: int, _: Any) -> None:
    # In other threads: the interrupted thread may own any lock.
    with contextlib.suppress(BaseException):
        until = time.monotonic() + SECONDS
        ends = [partial(one.shutdown, SECONDS - _LAST) for one in list(_running)]
        threads = [start_thread(end, "dspy-otel-mlflow-end") for end in ends]
        for thread in filter(None, threads):
            thread.join(max(0.0, until - time.monotonic()))
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container: the kernel ignores the signal there


def _set(number: int, handler: Any) -> None:
    with contextlib.suppress(ValueError):  # only the main thread may do so
        signal.signal(number, handler)


def _restore() -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) is _terminate:
            _set(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    # A handler in Python runs when native code returns, and a pool ends its workers by SIGTERM in the middle of that.
    os.register_at_fork(after_in_child=_restore)
