"""Deliver later what could not be sent: from the spool, or from files of OTLP that something else has written.

A program that ended in order has left what MLflow lacks of runs, links and scores; it is written as it would have been.
Of one that was killed, and in files of a Collector, there are spans alone: then runs are built from them, by the same
:class:`~dspy_otel.record.history.History` as when they happened.

Everything may be written twice without harm: a span by its id, a run by its key, a metric's point by its value, step
and time, a score by an id that follows from its trace.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel.mlflow.base import ExportError, WantedExperiment, first_line, public_uri
from dspy_otel.mlflow.exporter import MLflowSpanExporter
from dspy_otel.mlflow.pace import Pace
from dspy_otel.mlflow.runs import key_of
from dspy_otel.mlflow.spool import Place, SpoolError, count_of, places
from dspy_otel.mlflow.tracker import is_for_run
from dspy_otel.mlflow.writer import RunWriter
from dspy_otel.record.history import History, starts
from dspy_otel.record.otlp import decode, decode_lines
from dspy_otel.record.spans import Kind, is_ours, kind_of

_BATCH: Final = 512
_MOST_FAILURES: Final = 4
"""In a row, until what is left is left for another time."""

Say = Callable[[str], object]


@dataclass
class Outcome:
    """What a replay did.

    Attributes:
        sent: how many of what.
        left: what is still there, with reasons.
        found: whether there was anything to deliver.
    """

    sent: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    found: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self.sent.items() if count) or "nothing"


def replay(
    sources: Sequence[Path],
    *,
    to: str | None = None,
    experiment: str | None = None,
    say: Say = lambda _: None,
) -> Outcome:
    """Deliver what is in spools and files.

    Args:
        sources: directories (a spool, or one process's part), and files of OTLP: protobuf (``.pb``) or lines of JSON.
        to: where to, instead of where it was to go; for files, ``MLFLOW_TRACKING_URI`` without it.
        experiment: name or id, likewise.
        say: told of the progress.

    Returns:
        What was done. What could not be delivered stays where it is. Files that are not of a spool always stay.
    """
    outcome = Outcome()
    with suppress_instrumentation():
        for source in sources:
            if source.is_dir():
                for place in places(source):
                    outcome.found = True
                    _deliver_place(place, to, experiment, say, outcome)
            else:
                outcome.found = True
                _attempt(_Files(source), MLflowSpanExporter(to, experiment=experiment), say, outcome)
    return outcome


def _deliver_place(place: Place, to: str | None, experiment: str | None, say: Say, outcome: Outcome) -> None:
    if (why := place.refusal()) is not None:
        outcome.left.append(f"{place.path}: refused, {why}")
        return
    if not place.acquire():
        outcome.left.append(f"{place.path}: in use, by the program that writes it or by another replay")
        return
    try:
        exporter = _exporter_for(place.about(), to, experiment)
        if _attempt(place, exporter, say, outcome) and place.empty():
            place.discard()
    except (OSError, ValueError) as error:
        outcome.left.append(f"{place.path}: {first_line(error)}")
    finally:
        place.release()


def _exporter_for(about: Mapping[str, Any], to: str | None, experiment: str | None) -> MLflowSpanExporter:
    uri = to or str(about["tracking_uri"])
    ours = os.environ.get("MLFLOW_TRACKING_URI", "")
    if to is None and public_uri(ours) == uri:
        uri = ours  # a user name and password in it are not kept in the spool
    exporter = MLflowSpanExporter(uri, experiment=experiment, runs=bool(about.get("runs", True)))
    if experiment is None:
        exporter.wanted = WantedExperiment(str(about["experiment"]), about.get("experiment_is_id"))
    return exporter


def _attempt(source: Place | _Files, exporter: MLflowSpanExporter, say: Say, outcome: Outcome) -> bool:
    """Deliver one source; False, and a line in the outcome, when it has to be tried another time."""
    delivery = _Delivery(source, exporter, say, outcome)
    try:
        delivery.deliver()
    except (ExportError, SpoolError, OSError, ValueError) as error:
        outcome.left.append(
            f"{source.path}: {error if isinstance(error, (ExportError, SpoolError)) else first_line(error)}"
        )
        return False
    finally:
        delivery.close()
    return True


class _Files:
    """A file that is not of a spool: it is read, and stays."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> list[Path]:
        return [self.path]

    def state(self) -> None:
        return None


class _Delivery:
    """The delivery of one source."""

    def __init__(self, source: Place | _Files, exporter: MLflowSpanExporter, say: Say, outcome: Outcome) -> None:
        self._source = source
        self._exporter = exporter
        self._say = say
        self._outcome = outcome
        exporter.patience.insists = False  # this does
        urgent = threading.Event()
        urgent.set()
        self._writer = RunWriter(exporter.open_runs, threading.Event(), Pace(urgent), History(forget=False))
        self._spans = sum(count_of(path) for path in source.files())
        self._done = 0
        self._refused: dict[Path, list[ReadableSpan]] = {}

    def close(self) -> None:
        """Count what was written, and release connections."""
        self._outcome.sent.update(self._writer.counts)
        self._writer.close()
        self._exporter.shutdown()
        self._exporter.close()

    def deliver(self) -> None:
        """All of it.

        Raises:
            ExportError: MLflow does not take it now.
            OSError, ValueError: a file cannot be read.
        """
        state = self._source.state()
        self._say(f"{self._source.path}: {self._spans or 'some'} spans to {public_uri(self._exporter.given_uri)}")
        if not self._exporter.wants_runs:
            for path, spans in self._batches():
                self._send(path, spans)
                self._finished(path)
        elif state is not None:
            self._writer.restore(state)
            self._settle()
            self._keep_state()
            for path, spans in self._batches():
                self._send(path, spans)
                self._hand_over(spans)
                self._settle()
                self._finished(path)
            if isinstance(self._source, Place):
                self._source.remove(self._source.path / "runs.json")
        else:
            self._rebuild()

    # --- spans ------------------------------------------------------------------------------------------------------
    def _batches(self) -> Iterator[tuple[Path | None, list[ReadableSpan]]]:
        """Spans, and their file with the last of them."""
        for path in self._source.files():
            if path.suffix == ".pb":
                yield path, decode(path.read_bytes())
                continue
            with path.open(encoding="utf-8") as lines:
                for spans in decode_lines(lines):
                    yield None, spans

    def _send(self, path: Path | None, spans: list[ReadableSpan]) -> None:
        refused: list[ReadableSpan] = []
        for start in range(0, len(spans), _BATCH):
            self._send_some(spans[start : start + _BATCH], refused)
        self._done += len(spans)
        self._outcome.sent["spans"] += len(spans) - len(refused)
        if self._spans:
            self._say(f"{self._source.path}: {self._done:,} of {self._spans:,} spans")
        if refused:
            if path is not None:
                self._refused[path] = refused
            self._outcome.left.append(f"{self._source.path}: {len(refused)} spans that MLflow refuses")

    def _send_some(self, spans: list[ReadableSpan], refused: list[ReadableSpan]) -> None:
        """Send spans, in ever smaller parts as long as MLflow refuses them."""
        failures = 0
        while True:
            try:
                self._exporter.write(spans)
            except ExportError as error:
                if error.cause.startswith("status 4") or (
                    error.cause.startswith("status 5") and self._exporter.alive()
                ):
                    break
                failures += 1
                if error.permanent or failures >= _MOST_FAILURES:
                    raise
                time.sleep(failures)
            else:
                return
        if len(spans) == 1:
            refused.extend(spans)
            return
        half = len(spans) // 2
        self._send_some(spans[:half], refused)
        self._send_some(spans[half:], refused)

    def _hand_over(self, spans: Sequence[ReadableSpan]) -> None:
        for span in spans:
            if is_for_run(span):
                self._writer.deliver(span)

    def _finished(self, path: Path | None) -> None:
        self._keep_state()
        if path is not None and isinstance(self._source, Place):
            if refused := self._refused.pop(path, None):
                self._source.set_aside(path, refused)
            else:
                self._source.remove(path)

    # --- runs -------------------------------------------------------------------------------------------------------
    def _settle(self) -> None:
        """Write all that is known of runs, links and scores."""
        while self._writer.pending or self._writer.dead:
            self._writer.work(float("inf"), lambda: False)
            if (error := self._writer.error) is None:
                continue
            if self._writer.dead or self._writer.failures >= _MOST_FAILURES:
                self._keep_state()
                raise error
            time.sleep(self._writer.pause)

    def _keep_state(self) -> None:
        """So that nothing is done again, should this process be killed."""
        if isinstance(self._source, Place) and (self._source.path / "runs.json").exists():
            self._source.put_state(self._writer.state())

    def _rebuild(self) -> None:
        """Build runs from spans alone: first all starts, then the examples, file by file, then all ends, in order."""
        tree = self._writer.tree
        structure: list[ReadableSpan] = []
        for _, spans in self._batches():
            for span in filter(is_ours, spans):
                kind = kind_of(span)
                if kind in (Kind.LM_CALL, Kind.EMBEDDING):
                    tree.end(span)
                elif kind not in (Kind.EXAMPLE, Kind.OTHER):
                    structure.append(span)
        for span in starts(structure):
            tree.start(span, None)
        for run in tree.runs.values():
            run.tried = True  # it may be in MLflow already
            if run.parent is None and run.above is not None:
                run.outside = self._find(run.above)
        read: list[Path] = []
        for path, spans in self._batches():
            self._send(path, spans)
            for span in spans:
                if is_ours(span) and kind_of(span) is Kind.EXAMPLE:
                    tree.end(span)
                if is_for_run(span):
                    self._find_run_of(span)
                    self._writer.deliver(span)
            self._settle()
            if path is not None:
                read.append(path)
        for span in sorted(structure, key=lambda span: span.end_time or 0):
            tree.end(span)
        self._writer.stop()
        self._settle()
        for path in read:
            self._finished(path)

    def _find_run_of(self, span: ReadableSpan) -> None:
        """Look a run up that is in MLflow, but not in the files."""
        trace = self._writer.tree.history.trace(span)
        key = None if trace is None else key_of(trace)
        if key is not None:
            self._find(key)

    def _find(self, key: str) -> str | None:
        return None if key in self._writer.tree.runs else self._writer.find(key)
