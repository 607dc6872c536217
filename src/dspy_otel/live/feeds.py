"""Where an optimization that runs is read from."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from dspy_otel import semconv
from dspy_otel.core.internal_errors import guard
from dspy_otel.record.history import History, optimizations, running
from dspy_otel.record.model import RUNNING, Optimization
from dspy_otel.record.otlp import decode_lines
from dspy_otel.record.spans import Kind, is_ours, kind_of
from dspy_otel.reports import Source

MAX_OVER: Final = 20
"""Most optimizations of this process that are kept after their end."""
_IN_RECORDS: Final = frozenset({*Kind} - {Kind.OTHER})


@dataclass(frozen=True, slots=True)
class View:
    """An optimization as it is now.

    Attributes:
        optimization: None while there is none.
        source: where it is read from.
        phase: the part of it that runs.
        waiting: why there is no optimization, or why it is not up to date.
    """

    optimization: Optimization | None = None
    source: Source | None = None
    phase: str | None = None
    waiting: str | None = None


class Feed(Protocol):
    """Gives an optimization as it is now.

    ``read`` is called by one thread at a time, and raises nothing that belongs to what it reads: a place that cannot
    be read is :attr:`View.waiting`.
    """

    @property
    def name(self) -> str:
        """What is watched, for people."""
        ...

    def read(self) -> View:
        """The optimization as it is now."""
        ...


# --- this process ---------------------------------------------------------------------------------------------------


class SpanFeed(SpanProcessor):
    """The newest optimization among the spans of this process. What a span has no content of, the page has none of."""

    name = "this program"

    def __init__(self) -> None:
        self._history = History()
        self._over: OrderedDict[str, Optimization] = OrderedDict()
        self._phases: dict[int, str] = {}
        self._compiles: dict[int, ReadableSpan] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._following = True

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """A span has started."""
        with guard("live page"):
            if not self._following or os.getpid() != self._process:
                return
            kind = kind_of(span)
            if kind not in _IN_RECORDS:
                return
            with self._lock:
                self._history.start(span)
                if kind is Kind.PHASE and span.context is not None:
                    self._phases[span.context.span_id] = span.name
                elif kind is Kind.COMPILE and span.context is not None:
                    self._compiles[span.context.span_id] = span
                elif kind is Kind.TRIAL:
                    for compile_ in self._compiles.values():
                        self._history.start(compile_)  # parameters and the number of trials come after its start

    def on_end(self, span: ReadableSpan) -> None:
        """A span has ended."""
        with guard("live page"):
            if not self._following or os.getpid() != self._process:
                return
            kind = kind_of(span)
            if kind not in _IN_RECORDS:
                return
            with self._lock:
                if kind is Kind.COMPILE:
                    self._history.start(span)
                    if span.context is not None:
                        self._compiles.pop(span.context.span_id, None)
                changed = self._history.end(span)
                if kind is Kind.PHASE and span.context is not None:
                    self._phases.pop(span.context.span_id, None)
                if kind is Kind.COMPILE and changed and isinstance(changed[0], Optimization):
                    self._over[changed[0].id] = changed[0]
                    while len(self._over) > MAX_OVER:
                        self._over.popitem(last=False)

    def shutdown(self) -> None:
        """Follow nothing any more. A tracer provider keeps its processors for good."""
        self._following = False

    def read(self) -> View:
        """The optimization as it is now."""
        with self._lock:
            known = self._history.running() or [*self._over.values()]
            phase = next(reversed(self._phases.values()), None)
        chosen = newest(known)
        if chosen is None:
            return View(waiting="No optimization has started yet.")
        return View(chosen, phase=phase or phase_of(chosen))


# --- a file that grows ----------------------------------------------------------------------------------------------


class FileFeed:
    """The newest optimization in a file of OTLP JSON that something appends to.

    Only whole lines are read: the last one may be in the middle of being written.

    Args:
        path: of the file; it may come later.
        optimization: id of one, in place of the newest.
    """

    def __init__(self, path: Path, optimization: str | None = None) -> None:
        self.name = str(path)
        self._path, self._optimization = path, optimization
        self._spans: list[ReadableSpan] = []
        self._offset = self._unread = 0
        self._identity: tuple[int, int] | None = None
        self._rest = b""
        self._view = View(waiting=f"There is no {path} yet.")
        self._process: int | None = None

    def read(self) -> View:
        """The optimization as it is now."""
        try:
            fresh = self._append()
        except OSError as error:
            return self._kept(f"{self.name} cannot be read: {error.strerror or type(error).__name__}.")
        if fresh or self._view.optimization is None:
            self._view = self._made()
            self._process = self._process_of(self._view.optimization)
        if self._process is not None and not _is_running(self._process):
            gone = f"The program (process {self._process}) has ended, without an end of the optimization so far."
            return self._kept(gone)
        return self._view

    def _process_of(self, optimization: Optimization | None) -> int | None:
        """The process that an optimization runs in, if that is on this machine and its resource says so."""
        if optimization is None or optimization.outcome != RUNNING:
            return None
        for span in reversed(self._spans):
            if (span.attributes or {}).get(semconv.OPTIMIZER_RUN_ID) == optimization.id:
                process, host = (span.resource.attributes.get(name) for name in ("process.pid", "host.name"))
                return process if isinstance(process, int) and process > 0 and host == socket.gethostname() else None
        return None

    def _append(self) -> bool:
        """Read what has been appended; whether there is something new."""
        with self._path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if (stat.st_dev, stat.st_ino) != self._identity or stat.st_size < self._offset:
                self._identity = (stat.st_dev, stat.st_ino)
                self._spans, self._offset, self._rest, self._unread = [], 0, b"", 0
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                (spans,) = decode_lines([line.decode()]) if line.strip() else ([],)
            except ValueError:
                self._unread += not _is_other(line)
                continue
            self._spans += [span for span in spans if is_ours(span) and kind_of(span) in _IN_RECORDS]
        return bool(lines)

    def _made(self) -> View:
        known = [*optimizations(self._spans), *running(self._spans)]
        chosen = newest([one for one in known if self._optimization in (None, one.id)])
        lost = f"{self._unread} lines of the file are no OTLP JSON, and are left out." if self._unread else None
        if chosen is None:
            return View(waiting=lost or f"{self.name} has no scored trial yet.")
        return View(chosen, phase=phase_of(chosen), waiting=lost)

    def _kept(self, reason: str) -> View:
        if self._view.optimization is None:
            return View(waiting=reason)
        return View(self._view.optimization, self._view.source, self._view.phase, reason)


def _is_running(process: int) -> bool:
    """Whether there is a process; True where that cannot be asked without harm."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _is_other(line: bytes) -> bool:
    """Whether a line is OTLP of another signal."""
    try:
        loaded = json.loads(line)
    except ValueError:
        return False
    return isinstance(loaded, Mapping) and bool({"resourceLogs", "resourceMetrics"} & loaded.keys())


# --- MLflow ---------------------------------------------------------------------------------------------------------


class MLflowFeed:
    """An optimization in MLflow.

    Args:
        run_id: its run; None for the newest optimization of the experiment, each time.
        experiment: as for ``dspy-otel report``.
        tracking_uri: likewise.
    """

    def __init__(
        self, run_id: str | None = None, experiment: str | None = None, tracking_uri: str | None = None
    ) -> None:
        self.name = run_id or experiment or "MLflow"
        self._run_id, self._experiment, self._tracking_uri = run_id, experiment, tracking_uri
        self._view = View()

    def read(self) -> View:
        """The optimization as it is now."""
        from dspy_otel.mlflow.read import read_optimization
        from dspy_otel.mlflow.retry import ExportError

        try:
            found = read_optimization(self._run_id, experiment=self._experiment, tracking_uri=self._tracking_uri)
        except (ExportError, LookupError) as error:
            return View(self._view.optimization, self._view.source, self._view.phase, str(error))
        self._view = View(found.optimization, found.source, phase_of(found.optimization))
        return self._view


# --- optimizations --------------------------------------------------------------------------------------------------


def newest(known: Sequence[Optimization]) -> Optimization | None:
    """The optimization that started last; one that is a step of another is shown by that one, if that is there."""
    ids = {one.id for one in known}
    outermost = [one for one in known if one.parent not in ids]
    return max(outermost, key=lambda one: one.started or 0, default=None)


def phase_of(optimization: Optimization) -> str | None:
    """The phase of the last trial."""
    return next((trial.phase for trial in reversed(optimization.trials) if trial.phase), None)


def seconds_left(optimization: Optimization, now: float | None = None) -> float | None:
    """How long it takes from now if it goes on at the same rate; None when that is not known.

    Args:
        optimization: that runs.
        now: seconds since 1970.
    """
    done, planned = float(len(optimization.trials)), optimization.planned
    budget = str(optimization.params.get("max_metric_calls", ""))
    if planned is None and budget.isdigit():
        planned = int(budget)
        done = float(sum(trial.size or 0 for trial in optimization.trials))
    if not planned or not done or optimization.started is None:
        return None
    elapsed = (time.time() if now is None else now) - optimization.started / 1e9
    return max(0.0, elapsed * (planned - done) / done)
