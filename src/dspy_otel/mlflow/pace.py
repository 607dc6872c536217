"""How much of the processor exporting may take while the program itself computes.

Exporting is Python code too: while one of its threads encodes, none of the program's runs. A program that waits for
language models leaves room enough. One that computes, or gets its answers from a cache, would be slowed down: so work
waits in the queue while the program is busy, as long as the queue has room, and is done when the program waits or ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_BUSY: Final = 0.4
"""Processors' worth of computing from which on the program counts as busy."""
_SHARE: Final = 0.08
"""Of the time, for exporting while the program is busy."""
_WINDOW: Final = 0.1
"""Seconds over which the program's load is measured at least."""
_LONGEST: Final = 10.0
"""Seconds of one pause at most."""
_FULL: Final = 0.8
"""Of its room taken, a queue is emptied at full speed."""


class Pace:
    """Shared by the threads that export. Each says what it used, and is told how long to rest.

    Args:
        urgent: set while somebody waits for what is left: then nobody rests.
    """

    def __init__(self, urgent: threading.Event) -> None:
        self._urgent = urgent
        self._lock = threading.Lock()
        self._ours = 0.0
        self._load = 0.0
        self._mark = (time.monotonic(), time.process_time(), 0.0)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around work of a thread that exports."""
        began = time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self._ours += time.thread_time() - began

    def load(self) -> float:
        """Processors that the program's own threads use, lately."""
        with self._lock:
            now, used = time.monotonic(), time.process_time()
            then, used_then, ours_then = self._mark
            if now - then >= _WINDOW:
                self._load = max(0.0, (used - used_then) - (self._ours - ours_then)) / (now - then)
                self._mark = (now, used, self._ours)
            return self._load

    def rest(self, cost: float, filled: float, most: float = _LONGEST) -> None:
        """Rest after a piece of work, when the program is busy.

        Args:
            cost: seconds of the processor that the work took.
            filled: how much of the room for what waits is taken, from 0 to 1.
            most: seconds.
        """
        if self._urgent.is_set() or filled >= _FULL or self.load() < _BUSY:
            return
        self._urgent.wait(min(most, cost * (1 / _SHARE - 1) * (1 - filled / _FULL)))
