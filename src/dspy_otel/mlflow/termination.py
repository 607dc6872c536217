"""SIGTERM ends a process without any clean-up, as when a container stops. This module delivers what is pending first.

The signal is handled only where no other handler is set, and the process still ends by it, at most a few seconds
later. A handler that the program sets afterwards replaces ours; a server such as uvicorn that handles the signal ends
the program in the usual way, and then this module has nothing to do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import weakref
from functools import partial
from typing import Any, Final, Protocol

from dspy_otel.mlflow.threads import start_thread

SECONDS: Final = 8.0
"""Most time for the delivery. Docker kills a container ten seconds after the signal, Kubernetes after thirty."""
_LAST: Final = 2.0
"""Of these, what is left when delivery has to stop: for the journal, and for the line in the log."""


class Ending(Protocol):
    """An object to shut down before the process is terminated."""

    def shutdown(self, seconds: float | None = None) -> None:
        """Deliver what is pending, within this time."""


_endings: weakref.WeakSet[Any] = weakref.WeakSet()


def before_termination(ending: Ending) -> None:
    """Shut an object down when the process gets SIGTERM; it is referenced weakly."""
    _endings.add(ending)
    if threading.current_thread() is not threading.main_thread():
        return

    def terminate(number: int, _: Any) -> None:
        # In other threads: the interrupted thread may own any lock.
        with contextlib.suppress(BaseException):
            until = time.monotonic() + SECONDS
            ends = [partial(one.shutdown, SECONDS - _LAST) for one in list(_endings)]
            threads = [start_thread(end, "dspy-otel-mlflow-end") for end in ends]
            for thread in filter(None, threads):
                thread.join(max(0.0, until - time.monotonic()))
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)  # the first process of a container: the kernel ignores the signal there

    with contextlib.suppress(Exception):
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminate)
