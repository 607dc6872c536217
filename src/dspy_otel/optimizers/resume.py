"""Checkpoints: an optimization that continues in another process is one run, and its trace has a root.

GEPA with a ``log_dir`` continues a killed compile from its last saved state: a spot instance that is taken away, a
cluster job at its time limit, a process out of memory. Beside that state stands a file of ours, so that the next
process continues the run too: the same run id, the next attempt, trial numbers and totals that go on.

A killed process has exported its trials, but not its compile span: spans are exported when they end. Without that span
the trials have a parent that no backend has: no root, no parameters, and no outcome. So the next process exports it,
with the ids that the trials know, and the outcome ``interrupted``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from dspy_otel import semconv
from dspy_otel.core.attributes import Attributes, restore_dropped
from dspy_otel.core.id_generator import given_ids
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call
from dspy_otel.optimizers.run import Run, Scored, Snapshot

FILE: Final = "dspy_otel_run.json"
_VERSION: Final = 1
_RUNNING: Final = "running"
_INTERRUPTED: Final = "interrupted"
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
# Attributes of a compile span at its start, except content.
_KEPT: Final = (
    semconv.OPTIMIZER_NAME,
    semconv.OPTIMIZER_RUN_ID,
    semconv.OPTIMIZER_ROOT_RUN_ID,
    semconv.OPTIMIZER_PARENT_RUN_ID,
    semconv.PROGRAM_NAME,
    semconv.INITIAL_PROGRAM_ID,
    semconv.OPENINFERENCE_SPAN_KIND,
    semconv.DATASET_TRAIN_SIZE,
    semconv.DATASET_TRAIN_DIGEST,
    semconv.DATASET_VAL_SIZE,
    semconv.DATASET_VAL_DIGEST,
)


@dataclass(frozen=True, slots=True)
class SavedSpan:
    """The compile span of a process, for the next one to export if the process is killed.

    Attributes:
        trace_id: in hexadecimal digits.
        span_id: likewise; empty if the span is not sampled.
        parent_id: likewise; empty if it has no parent.
        linked: trace id and span id of the compile span before it; empty if there is none.
        started: when, in nanoseconds.
        attributes: at its start.
    """

    trace_id: str
    span_id: str
    parent_id: str
    linked: Sequence[str]
    started: int
    attributes: Attributes

    @property
    def ids(self) -> tuple[str, ...]:
        """Trace id and span id; empty if the span is not sampled."""
        return (self.trace_id, self.span_id) if self.span_id else ()


@dataclass(frozen=True, slots=True)
class Saved:
    """The contents of the file that one process leaves to the next.

    Attributes:
        version: of this format.
        optimizer: class name of the optimizer.
        run_id: ``dspy.optimizer.run.id``.
        attempt: number of the process, from 1.
        outcome: ``running`` until the compile has ended.
        written: when, in nanoseconds.
        pool: ``dspy.program.id`` of candidates by the optimizer's own index.
        usage: ``dspy.usage.*`` of all processes so far.
        run: how far the run has come.
        span: the compile span.
        end_attributes: of the compile span, if it ended now.
    """

    version: int
    optimizer: str
    run_id: str
    attempt: int
    outcome: str
    written: int
    pool: dict[str, str]
    usage: dict[str, Any]
    run: Snapshot
    span: SavedSpan
    end_attributes: dict[str, Any]

    @classmethod
    def read(cls, path: Path, optimizer: str) -> Saved | None:
        """What the process before has written; ``None`` if it has not, or for another optimizer or version."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            run = {**values["run"], "trials": tuple(Scored(**trial) for trial in values["run"]["trials"])}
            saved = cls(**{**values, "run": Snapshot(**run), "span": SavedSpan(**values["span"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return saved if saved.version == _VERSION and saved.optimizer == optimizer else None

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{FILE}.{os.getpid()}.tmp")
        try:
            beside.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
            os.replace(beside, path)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()


class Checkpoint:
    """The file of a run, read when the run begins and written whenever it has made progress.

    Args:
        run: the run; it continues the one in the file.
        path: the file.
        previous: its contents, or ``None`` if this is the first process.

    Attributes:
        outcome: ``running`` until the compile has ended; then how.
        pool: ``dspy.program.id`` of candidates by the optimizer's own index.
    """

    def __init__(self, run: Run, path: Path, previous: Saved | None) -> None:
        self.run = run
        self.path = path
        self.previous = previous
        self.number = 1
        self.outcome = _RUNNING
        self.pool: dict[int, str] = {}
        self._started = time.time_ns()
        self._lock = threading.Lock()
        if previous is not None:
            self.number = previous.attempt + 1
            self.pool = {int(index): candidate for index, candidate in previous.pool.items()}
            run.restore(previous.run)
            run.id = previous.run_id

    @classmethod
    def of(cls, run: Run, state_file: Path | None) -> Checkpoint | None:
        """The checkpoint of a run that begins; ``None`` for an optimizer without a file of its own state."""
        if state_file is None:
            return None
        path = state_file.with_name(FILE)
        previous = Saved.read(path, run.name)
        if previous is not None and previous.outcome == "finished" and not state_file.exists():
            previous = None  # The optimizer begins anew.
        return cls(run, path, previous)

    # --- at the start -----------------------------------------------------------------------------------------------
    def start_attributes(self) -> Attributes:
        """Attributes of the compile span at its start."""
        attributes: Attributes = {semconv.OPTIMIZER_ATTEMPT: self.number}
        if self.previous is not None:
            outcome = self.previous.outcome
            attributes[semconv.OPTIMIZER_RESUMED] = True
            attributes[semconv.OPTIMIZER_PREVIOUS_OUTCOME] = _INTERRUPTED if outcome == _RUNNING else outcome
        return attributes

    def links(self) -> list[Link]:
        """A link to the compile span of the process before."""
        return _links(() if self.previous is None else self.previous.span.ids)

    @guard("compile span of a killed process")
    def export_killed_span(self) -> None:
        """Export the compile span of a process that was killed, with the contents of its last file."""
        previous = self.previous
        if previous is None or previous.outcome != _RUNNING or not previous.span.ids:
            return
        span = previous.span
        parent = Context()
        if span.parent_id:
            parent = set_span_in_context(NonRecordingSpan(_span_context(span.trace_id, span.parent_id)), parent)
        attributes = {**span.attributes, **previous.end_attributes, semconv.OPTIMIZER_OUTCOME: _INTERRUPTED}
        with given_ids(int(span.trace_id, 16), int(span.span_id, 16)):
            exported = self.run.telemetry.tracer.start_span(
                f"{semconv.SPAN_COMPILE} {previous.optimizer}",
                parent,
                attributes=attributes,
                links=_links(span.linked) or None,
                start_time=span.started,
            )
        restore_dropped(exported, attributes)
        exported.set_status(Status(StatusCode.ERROR, "the process ended without a word"))
        exported.end(previous.written)

    # --- while it runs ----------------------------------------------------------------------------------------------
    @guard("optimizer's run file")
    def span_started(self, call: Call) -> None:
        """The compile span is open: from now on the file is written."""
        context = call.span.get_span_context()
        parent = getattr(call.span, "parent", None)
        sampled = context.is_valid and context.trace_flags.sampled
        known = {**(getattr(call.span, "attributes", None) or {}), **call.attributes}
        kept = {
            key: value
            for key, value in known.items()
            if key in _KEPT or key.startswith(semconv.OPTIMIZER_PARAMS_PREFIX)
        }
        span = SavedSpan(
            f"{context.trace_id:032x}",
            f"{context.span_id:016x}" if sampled else "",
            f"{parent.span_id:016x}" if parent is not None else "",
            () if self.previous is None else self.previous.span.ids,
            self._started,
            {**kept, **self.start_attributes()},
        )
        self.run.checkpoint = functools.partial(self._save, span)
        self.run.checkpoint()

    @guard("optimizer's run file")
    def _save(self, span: SavedSpan) -> None:
        run = self.run
        with self._lock:
            pool = {str(index): candidate for index, candidate in self.pool.copy().items()}
            end = {**run.totals.attributes(), **run.attributes(), **self.end_attributes()}
            Saved(
                *(_VERSION, run.name, run.id, self.number, self.outcome, time.time_ns()),
                *(pool, self._usage(), run.snapshot(), span, end),
            ).write(self.path)

    # --- at the end -------------------------------------------------------------------------------------------------
    def _usage(self) -> dict[str, Any]:
        """``dspy.usage.*`` of all processes together."""
        total = {} if self.previous is None else dict(self.previous.usage)
        for key, value in self.run.totals.attributes().items():
            total[key] = total.get(key, 0) + value
        return total

    def end_attributes(self) -> Attributes:
        """Usage of all processes, under names of its own: ``dspy.usage.*`` on the span is that of this process."""
        if self.previous is None:
            return {}
        prefix = semconv.OPTIMIZER_ALL_ATTEMPTS_PREFIX
        return {prefix + key.removeprefix("dspy."): value for key, value in self._usage().items()}


def _links(ids: Sequence[str]) -> list[Link]:
    return [Link(_span_context(*ids))] if ids else []


def _span_context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, _SAMPLED)
