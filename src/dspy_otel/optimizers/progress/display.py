"""Which optimizations are shown, and where."""

from __future__ import annotations

import threading
import time
from typing import Final

from dspy_otel.config import Progress
from dspy_otel.optimizers.progress.notebook import Notebook
from dspy_otel.optimizers.progress.terminal import Terminal
from dspy_otel.optimizers.progress.view import RUNNING, View, view_of
from dspy_otel.optimizers.run import Run


class ProgressDisplay:
    """Shows the optimizations of this process while they run, from their own state.

    Args:
        progress: ``on``: in a notebook or a terminal. ``auto``: in a notebook.
    """

    def __init__(self, progress: Progress) -> None:
        self._terminals: Final = progress == "on"
        self._lock = threading.RLock()
        self._rows: list[_Row] = []
        self._screen: Notebook | Terminal | None = None

    def begin(self, run: Run) -> None:
        """A run begins: it is shown from now on, one inside another one as what that is doing."""
        with self._lock:
            if self._screen is None:
                if not (screen := self._usable()):
                    return
                screen.start()
                self._screen = screen
            row = _Row(run)
            self._rows.append(row)
            if run.parent is None:
                self._screen.begin(self._view(row))

    def end(self, run: Run, outcome: str) -> None:
        """A run has ended: what came of it stays. When all have, the display is gone.

        Args:
            run: the run.
            outcome: ``finished``, ``failed`` or ``interrupted``.
        """
        with self._lock:
            row = next((row for row in self._rows if row.run is run), None)
            if row is None:
                return
            view = self._view(row, outcome)
            self._rows.remove(row)
            try:
                if self._screen is not None and row.run.parent is None:
                    self._screen.end(view)
            finally:
                if not self._rows and self._screen is not None:
                    screen, self._screen = self._screen, None
                    screen.stop()

    def _usable(self) -> Notebook | Terminal | None:
        if Notebook.usable():
            return Notebook(self._views)
        return Terminal(self._views) if self._terminals and Terminal.usable() else None

    def _views(self) -> list[View]:
        return [self._view(row) for row in list(self._rows) if row.run.parent is None]

    def _view(self, row: _Row, outcome: str = RUNNING) -> View:
        inside = [other.run for other in list(self._rows) if other.run.root is row.run]
        return view_of(row.run, inside[-1] if inside else row.run, time.monotonic() - row.began, outcome)


class _Row:
    """One run, and when it began."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.began = time.monotonic()
