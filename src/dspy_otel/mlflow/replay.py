"""Replay delivers the journal of a process that has ended, or other OTLP files.

The :mod:`.worker` applies the spans, all starts first, and delivers the segments. What still ran when the process ended
is ended as killed. Writing everything twice does no harm, so it does not matter how much of it MLflow has.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel import semconv
from dspy_otel.mlflow.account import KINDS, SPANS
from dspy_otel.mlflow.backends import open_backend
from dspy_otel.mlflow.journal import (
    Journal,
    JournalDirectory,
    JournalError,
    Segment,
    complete_messages,
    is_refused,
    is_sent,
    journal_directories,
    read_file,
    unsent,
)
from dspy_otel.mlflow.pending import PendingRuns
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.runs import evaluation_key, key_of, trace_id_of
from dspy_otel.mlflow.source import saved_tags
from dspy_otel.mlflow.target import Target, public_uri
from dspy_otel.mlflow.translate import finished_group, restore, translate, user_run_of
from dspy_otel.mlflow.versions import enabled, saved_parts
from dspy_otel.mlflow.worker import Worker, group_of, versions
from dspy_otel.record.history import History, starts
from dspy_otel.record.otlp import decode, decode_lines, encode
from dspy_otel.record.spans import RUN_KINDS, Kind, is_ours, kind_of

MOST_FAILURES: Final = 4
"""Failures in a row after which a replay stops."""
_STRUCTURE: Final = RUN_KINDS | {Kind.PHASE}
_BATCH_SPANS: Final = 512

Progress = Callable[[str], object]


@dataclass
class Outcome:
    """What a replay did.

    Attributes:
        sent: counts by kind.
        left: what was not delivered, with reasons.
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
    progress: Progress = lambda _: None,
) -> Outcome:
    """Deliver what is in spools and files.

    Args:
        sources: directories (a spool, or one process's part), and files of OTLP: protobuf (``.pb``) or lines of JSON.
        to: tracking URI in place of the journal's; for files, ``MLFLOW_TRACKING_URI`` is the default.
        experiment: name or id, likewise.
        progress: called with lines of progress.

    Returns:
        What was done. What could not be delivered stays where it is. Files that are not of a spool always stay.
    """
    outcome = Outcome()
    for source in sources:
        if source.is_dir():
            for place in journal_directories(source):
                outcome.found = True
                _deliver_place(place, to, experiment, progress, outcome)
        elif source.exists():
            outcome.found = True
            _attempt(_Files(source), Target(to, experiment, create=True), True, progress, outcome)
    return outcome


def recover(directory: Path | None, target: Target, over: Callable[[], bool]) -> None:
    """Deliver the journals of ended processes for one target, except refused spans.

    Args:
        directory: of the spool.
        target: the target of the journals.
        over: whether this process ends: then no further journal is started.
    """
    mine = target.about()
    for place in [] if directory is None else journal_directories(directory):
        if over():
            return
        try:
            about = place.about()
            same = all(about.get(name) == mine[name] for name in ("tracking_uri", "experiment", "experiment_is_id"))
            if same and not all(map(is_refused, place.undelivered()) if place.undelivered() else [place.empty()]):
                _deliver_place(place, None, None, lambda _: None, Outcome(), target)
        except (JournalError, OSError, ValueError):
            continue


def _deliver_place(
    place: JournalDirectory,
    to: str | None,
    experiment: str | None,
    progress: Progress,
    outcome: Outcome,
    target: Target | None = None,
) -> None:
    try:
        if not place.acquire():
            why = "in use, by the program that writes it or by another replay" if place.path.exists() else None
            if why is not None and not (place.path / "about.json").exists():
                why = "no directory of ours: it has no about.json"
            if why is not None:
                outcome.left.append(f"{place.path}: {why}")
            return
    except JournalError as error:
        if os.path.lexists(place.path):  # else another process has delivered it meanwhile
            outcome.left.append(str(error))
        return
    try:
        about = place.about()
        if target is None:
            target = Target.from_about(about)
            target = Target(
                to or target.given,
                experiment if experiment is not None else target.experiment,
                None if experiment is not None else target.experiment_is_id,
            )
        if _attempt(place, target, bool(about.get("runs", True)), progress, outcome):
            place.discard()
    except (JournalError, OSError, ValueError) as error:
        outcome.left.append(f"{place.path}: {error}")
    finally:
        place.release()


def _attempt(
    source: JournalDirectory | _Files, target: Target, runs: bool, progress: Progress, outcome: Outcome
) -> bool:
    """Deliver one source; True when nothing is left of it."""
    delivery = _Delivery(source, target, runs, progress)
    try:
        with suppress_instrumentation():
            delivery.deliver()
    except (ExportError, JournalError, OSError, ValueError) as error:
        outcome.left.append(f"{source.path}: {error}")
        return False
    finally:
        delivery.close()
        written = delivery.worker.account.written
        outcome.sent.update({name: written[name] for name in KINDS if written[name]})
    outcome.left += [f"{path}: {reason}" for path, reason in delivery.broken.items()]
    if delivery.left:
        outcome.left.append(f"{source.path}: {', '.join(delivery.left)} that MLflow refuses")
    return not delivery.left and not delivery.broken


class _Files:
    """An OTLP file that is not of a spool: it is only read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def batches(self) -> Iterator[list[ReadableSpan]]:
        if self.path.suffix == ".pb":
            yield decode(self.path.read_bytes())
            return
        with self.path.open(encoding="utf-8") as lines:
            yield from decode_lines(lines)


class _Delivery:
    """The delivery of one source."""

    def __init__(self, source: JournalDirectory | _Files, target: Target, runs: bool, progress: Progress) -> None:
        self._source = source
        self._progress = progress
        self._target = target
        self._runs = runs
        self._foreign = isinstance(source, _Files)
        # in memory: refused spans stay in the source
        self._journal = Journal(None, 1, target.about, lambda *_: None)
        about = {} if isinstance(source, _Files) else source.about()
        parts = enabled() if isinstance(source, _Files) else saved_parts(about.get("parts"))
        pending = PendingRuns(
            {**versions(), **saved_tags(about.get("source"))}, History(forget=not self._foreign), parts
        )
        self.worker = Worker(
            self._journal,
            lambda: open_backend(target),
            runs=runs,
            pending=pending,
            unkept="It stays in the file",
        )
        self.left: list[str] = []
        self.broken: dict[Path, str] = {}
        """Files of a journal that cannot be read, with the reasons: all others are delivered."""
        self._examples: set[int] = set()
        """Span ids of examples that were applied."""
        self._known: dict[str, bool] = {}
        """Whether MLflow had a run, by key."""

    def close(self) -> None:
        """Release connections."""
        self.worker.close()

    def deliver(self) -> None:
        """All of it.

        Raises:
            ExportError: MLflow does not take it now.
            JournalError, OSError, ValueError: a file cannot be read.
        """
        self._progress(f"{self._source.path}: to {public_uri(self._target.raw_uri)}")
        if self._runs:
            structure = self._begin()
        when = 0
        for path, spans in self._batches():
            when = max([when, *(span.end_time or 0 for span in spans)])
            segment = self._segment(spans, send=path is None or not is_sent(path))
            if segment is not None:
                self._send(segment)
            refused = self.worker.account.refused[SPANS] + self.worker.account.dropped[SPANS]
            if path is not None and segment is not None and refused:
                self._keep_refused(path, refused)
        if self._runs:
            for span in sorted(structure, key=lambda span: span.end_time or 0):
                self.worker.pending.end(span, group_of(span))
            self.worker.stop(when or time.time_ns())
            self._settle()
        account = self.worker.account
        self.left += [f"{count} {name}" for name, count in account.refused.items() if count and name != SPANS]
        if isinstance(self._source, JournalDirectory) and self.broken and not self.left:
            self._source.remove_all_but(self.broken)

    def _begin(self) -> list[ReadableSpan]:
        """Start all that has started; what ended of it comes at the end.

        A span may be there twice: in its segment, and set aside. One that is only set aside, and whose start is not
        there any more, adds nothing to a run: MLflow had that in full when the start was removed.
        """
        begun, over = self._begun()
        user_runs = {span.context.span_id: user_run_of(span) for span in begun if span.context is not None}
        ended: dict[int, ReadableSpan] = {}
        set_aside: dict[int, ReadableSpan] = {}
        for path, spans in self._batches():
            found = set_aside if path is not None and is_refused(path) else ended
            for span in spans:
                if span.context is None or not is_ours(span) or kind_of(span) not in _STRUCTURE:
                    continue
                if group_of(span) not in over:
                    found.setdefault(span.context.span_id, span)
        for span_id, span in set_aside.items():
            if span_id in user_runs:
                ended.setdefault(span_id, span)
        structure = list(ended.values())
        unended = [span for span in begun if span.context is not None and span.context.span_id not in ended]
        for span in starts([*{span.context.span_id: span for span in unended if span.context}.values(), *structure]):
            user_run = None if span.context is None else user_runs.get(span.context.span_id)
            self.worker.pending.start(span, user_run, group_of(span))
        for run in self.worker.pending.runs.values():
            run.tried = True  # it may be in MLflow already
            if self._foreign and run.parent is None and run.parent_key is not None:
                self.worker.find(run.parent_key)
        return structure

    def _begun(self) -> tuple[list[ReadableSpan], set[str]]:
        """Spans as they started, and the optimizations and evaluations that MLflow has in full."""
        begun: list[ReadableSpan] = []
        over: set[str] = set()
        for span in self._starts():
            group = finished_group(span)
            if group is not None:
                over.add(group)
                begun = [one for one in begun if group_of(one) != group]
            elif is_ours(span):
                over.discard(group_of(span))  # it was resumed
                begun.append(span)
        return begun, over

    def _starts(self) -> list[ReadableSpan]:
        if isinstance(self._source, _Files) or not os.path.lexists(self._source.starts):
            return []
        return self._read(self._source.starts)

    def _read(self, path: Path) -> list[ReadableSpan]:
        """The spans of a file of a journal; none if it is broken, as after a power failure.

        Raises:
            JournalError: it cannot be read now.
        """
        try:
            return decode(complete_messages(read_file(path)))
        except (JournalError, ValueError) as error:
            if isinstance(error, JournalError) and error.passing:
                raise
            self.broken[path] = str(error)
            return []

    def _batches(self) -> Iterator[tuple[Path | None, list[ReadableSpan]]]:
        if isinstance(self._source, _Files):
            for spans in self._source.batches():
                yield None, spans
            return
        for path in self._source.files():
            spans = self._read(path)
            lost = self._runs and is_sent(path) and self._is_lost(spans)
            yield unsent(path) if lost else path, spans

    def _is_lost(self, spans: list[ReadableSpan]) -> bool:
        """Whether MLflow had delivered spans and has them no more: it lacks the run that they belong to."""
        return not all(map(self._had, {group_of(span) for span in spans if is_ours(span)} - {""}))

    def _segment(self, spans: list[ReadableSpan], *, send: bool) -> Segment | None:
        """Apply spans; return a segment of them if they are to be sent."""
        segment = Segment(0, closed=True, applied=True)
        for original in spans if self._runs else ():
            if not is_ours(original):
                continue
            span = restore(original)
            self._find_run_of(span)
            kind = kind_of(span)
            if kind is Kind.EXAMPLE and span.context is not None:
                if span.context.span_id in self._examples:
                    self.worker.place(span, segment)
                    continue
                self._examples.add(span.context.span_id)
            if kind not in _STRUCTURE:
                self.worker.end(span, segment)
            else:
                trace = self.worker.pending.history.trace(span)
                key = None if trace is None or not trace.root else key_of(trace)
                if trace is not None and key is not None:
                    segment.links.append((key, trace_id_of(trace.trace_id)))
        if not send:
            return None
        segment.spans = spans
        return segment

    def _send(self, whole: Segment) -> None:
        """Send spans as segments of the usual size, with the links and scores of each."""
        spans = whole.spans or []
        for start in range(0, len(spans), _BATCH_SPANS):
            some = spans[start : start + _BATCH_SPANS]
            ids = {trace_id_of(span.context.trace_id) for span in some if span.context is not None}
            body = encode(translate(some) if self._foreign else some)
            roots = sum(span.parent is None for span in some)
            last = start + _BATCH_SPANS >= len(spans)
            segment = Segment(0, len(some), len(body), parts=[body], roots=roots, closed=True, applied=True)
            self._journal.segments.append(segment)
            segment.links = [one for one in whole.links if one[1] in ids or last]
            whole.links = [one for one in whole.links if one not in segment.links]
            segment.scores = [one for one in whole.scores if one.trace_id in ids or last]
            whole.scores = [one for one in whole.scores if one not in segment.scores]
            self._settle()

    def _settle(self) -> None:
        """Run the worker until it is done.

        Raises:
            ExportError: MLflow does not take it now.
        """
        while not self.worker.done:
            self.worker.round()
            backoff = self.worker.backoff
            if backoff.error is not None and (backoff.error.permanent or backoff.failures >= MOST_FAILURES):
                raise backoff.error
            if self.worker.failures > 2 * MOST_FAILURES:
                raise ExportError("refused", "MLflow answers with errors")
            if not self.worker.done:
                time.sleep(min(self.worker.wait_seconds(), 1.0))

    def _keep_refused(self, path: Path, refused: int) -> None:
        """Mark a file of which MLflow refuses something, so that it can be delivered elsewhere."""
        self.left.append(f"{refused} spans")
        self.worker.account.refused[SPANS] = self.worker.account.dropped[SPANS] = 0
        if not is_refused(path):
            path.rename(path.with_suffix(".refused.pb"))

    def _find_run_of(self, span: ReadableSpan) -> None:
        """Look up the run of a span in MLflow when its start is not here."""
        history = self.worker.pending.history
        trace = history.trace(span)
        if trace is None:
            return
        evaluation = (span.attributes or {}).get(semconv.EVALUATION_ID)
        if evaluation is not None and self._find(evaluation_key(str(evaluation))):
            history.own[str(evaluation)] = None
            return
        key = key_of(trace)
        if key is not None:
            self._find(key)

    def _find(self, key: str) -> bool:
        """Whether a run exists."""
        return key in self.worker.pending.runs or self._had(key)

    def _had(self, key: str) -> bool:
        """Whether MLflow had a run before this; it is asked once."""
        if key not in self._known:
            self._known[key] = self.worker.find(key) is not None
        return self._known[key]
