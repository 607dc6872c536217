"""A line in the terminal for each running optimization: trials, best score, spending, time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from dspy_otel.core.internal_errors import failed, warn_once

if TYPE_CHECKING:
    from dspy_otel.optimizers.run import Run

_PER_SECOND: Final = 4
_INSTALL: Final = "pip install 'dspy-otel[progress]'"


class ProgressDisplay:
    """Shows the optimizations of this process while they run, from their own state.

    Quiet when stderr is no terminal; without `rich` there is one warning instead.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: list[_Row] = []
        self._live: Any = None

    def begin(self, run: Run) -> None:
        """A run begins: show it from now on."""
        with self._lock:
            # While the display is on, rich replaces stderr; before rich 15, isatty() of that is False.
            if self._live is None and not _is_terminal(sys.stderr):
                return
            self._rows.append(_Row(run))
            if self._live is None:
                self._live = _start(self._render)

    def end(self, run: Run) -> None:
        """A run has ended. When all have, the display stays as it is and is no longer refreshed."""
        with self._lock:
            row = next((row for row in self._rows if row.run is run), None)
            if row is None:
                return
            row.ended = time.monotonic()
            if run.parent is not None:
                self._rows.remove(row)
            if all(row.ended is not None for row in self._rows):
                live, self._live = self._live, None
                try:
                    if live is not None:
                        live.stop()
                finally:
                    self._rows.clear()

    def _render(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        try:
            for row in list(self._rows):
                if row.run.parent is None or row.run.finished:
                    table.add_row(*(Text(cell) for cell in row.cells()))
        except Exception as error:  # Raised in rich's thread, it would be printed to the terminal.
            failed("progress display", error)
        return table


class _Row:
    """One run, and its times."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.began = time.monotonic()
        self.ended: float | None = None

    def cells(self) -> list[str]:
        """Name, trials, best score, spending by role, elapsed time, time left."""
        run = self.run
        elapsed = (self.ended or time.monotonic()) - self.began
        depth, around = 0, run.parent
        while around is not None:
            depth, around = depth + 1, around.parent
        best = "" if run.best is None or run.best.score is None else f"best {run.best.score:.4g}"
        left = ""
        if self.ended is None:
            seconds = seconds_left(elapsed, share_done(run))
            left = "" if seconds is None else f"{clock(seconds)} left"
        return ["  " * depth + run.name, trials_done(run), best, spending(run), clock(elapsed), left]


def trials_done(run: Run) -> str:
    """Trials done, of the planned ones if their number is known, else examples of the budgeted ones."""
    done = len(run.finished)
    if run.planned is not None:
        return f"{done}/{run.planned} trials"
    if run.planned_examples is not None:
        return f"{done} trials, {run.examples}/{run.planned_examples} examples"
    return f"{done} trial{'s' * (done != 1)}"


def share_done(run: Run) -> float | None:
    """How much of a run is done, from 0 to 1; ``None`` if unknown. Trials of earlier processes do not count."""
    if run.planned is not None:
        done, planned = len(run.finished) - run.restored_trials, run.planned - run.restored_trials
    elif run.planned_examples is not None:
        done, planned = run.examples - run.restored_examples, run.planned_examples - run.restored_examples
    else:
        return None
    return min(done / planned, 1.0) if planned > 0 else None


def seconds_left(elapsed: float, share: float | None) -> float | None:
    """Time left if the rest goes on at the same rate; ``None`` if the share done is unknown or zero."""
    return elapsed * (1 - share) / share if share else None


def spending(run: Run) -> str:
    """LM calls and cost, by role."""
    parts = []
    for role, totals in sorted(run.totals.by_role().items(), key=lambda item: -item[1].calls):
        cost = f" ${totals.cost:.4f}" if totals.priced else ""
        parts.append(f"{role} {totals.calls} call{'s' * (totals.calls != 1)}{cost}")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _is_terminal(stream: Any) -> bool:
    return stream is not None and bool(stream.isatty())


def _start(render: Callable[[], Any]) -> Any:
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        warn_once(("progress", "rich"), "the progress display needs rich; install it with: %s", _INSTALL)
        return None
    # The program's output to the terminal is printed above the display, line by line; redirected output stays as it is.
    live = Live(
        get_renderable=render,
        console=Console(stderr=True),
        refresh_per_second=_PER_SECOND,
        redirect_stdout=_is_terminal(sys.stdout),
    )
    live.start()
    return live
