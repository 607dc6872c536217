"""Optimizations that outlive their process: a small file beside the optimizer's own state says which run it is.

GEPA with a ``log_dir`` takes up a killed run where it last saved its state. So do we: the same run id, the next
attempt, trial numbers and totals that go on. What a killed process could not say, its successor says for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
from dspy_otel.core.operation import Call
from dspy_otel.core.telemetry import Telemetry

if TYPE_CHECKING:
    from dspy_otel.optimizers.run import Run

FILE: Final = "dspy_otel_run.json"
_VERSION: Final = 1
_RUNNING: Final = "running"
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
# What a compile span knows at its start, except content.
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


class Attempt:
    """One process's attempt at an optimization, and what the attempts before it left.

    Args:
        path: the file.
        before: what it said, or ``None`` when this is the first attempt.
    """

    def __init__(self, path: Path, before: dict[str, Any] | None) -> None:
        self.path = path
        self.before = before
        self.number = 1 if before is None else int(before["attempt"]) + 1
        self.started = time.time_ns()
        self.outcome = _RUNNING
        self._lock = threading.Lock()
        self.own: dict[str, Any] = {}
        self.pool: dict[int, str] = {}

    @classmethod
    def of(cls, run: Run) -> Attempt | None:
        """The attempt that begins now; ``None`` for an optimizer that keeps no state."""
        folder, state = run.tracker.log_dir(), run.tracker.state_file
        if folder is None:
            return None
        path = Path(folder) / FILE
        before = _read(path, run.name)
        if before is not None and before["outcome"] == "finished" and not (path.parent / state).exists():
            before = None  # the optimizer begins anew
        return cls(path, before)

    # --- what came before -------------------------------------------------------------------------------------------
    def resume(self, run: Run) -> None:
        """Go on where the attempt before was: its run id, its trials, its numbers."""
        if self.before is not None:
            self.pool = {int(index): str(candidate) for index, candidate in self.before["pool"].items()}
            run.restore(self.before)
            run.id = str(self.before["run_id"])

    def start_attributes(self) -> Attributes:
        """What the compile span says of it."""
        said: Attributes = {semconv.OPTIMIZER_ATTEMPT: self.number}
        if self.before is not None:
            said[semconv.OPTIMIZER_RESUMED] = True
            said[semconv.OPTIMIZER_PREVIOUS_OUTCOME] = self._outcome_before()
        return said

    def _outcome_before(self) -> str:
        assert self.before is not None
        return "interrupted" if self.before["outcome"] == _RUNNING else str(self.before["outcome"])

    def links(self) -> list[Link]:
        """A link to the compile span of the attempt before."""
        if self.before is None or not self.before["span_id"]:
            return []
        return [Link(_context(self.before["trace_id"], self.before["span_id"]))]

    def _link_to_here(self) -> list[str]:
        before = self.before
        return [before["trace_id"], before["span_id"]] if before is not None and before["span_id"] else []

    def speak_for_the_killed(self, telemetry: Telemetry) -> None:
        """End the compile span of a killed attempt in its place, with what is known of it."""
        before = self.before
        if before is None or before["outcome"] != _RUNNING or not before["span_id"]:
            return
        around = Context()
        if before["parent_id"]:
            around = set_span_in_context(NonRecordingSpan(_context(before["trace_id"], before["parent_id"])), around)
        said: Attributes = {**before["attributes"], **before["own"], semconv.OPTIMIZER_OUTCOME: "interrupted"}
        with given_ids(int(before["trace_id"], 16), int(before["span_id"], 16)):
            span = telemetry.tracer.start_span(
                f"{semconv.SPAN_COMPILE} {said[semconv.OPTIMIZER_NAME]}",
                around,
                attributes=said,
                links=[Link(_context(*before["link"]))] if len(before.get("link", ())) == 2 else None,
                start_time=before["started"],
            )
        restore_dropped(span, said)
        span.set_status(Status(StatusCode.ERROR, "the process ended without a word"))
        span.end(before["written"])

    # --- what goes on -----------------------------------------------------------------------------------------------
    def opened(self, call: Call) -> None:
        """The compile span is open: note what its successor would have to say."""
        context = call.span.get_span_context()
        parent = getattr(call.span, "parent", None)
        recorded = context.is_valid and context.trace_flags.sampled
        known = {**(getattr(call.span, "attributes", None) or {}), **call.attributes}
        self.own = {
            "trace_id": f"{context.trace_id:032x}",
            "span_id": f"{context.span_id:016x}" if recorded else "",
            "parent_id": f"{parent.span_id:016x}" if parent is not None else "",
            "started": self.started,
            "link": self._link_to_here(),
            "attributes": {
                **{
                    key: value
                    for key, value in known.items()
                    if key in _KEPT or key.startswith(semconv.OPTIMIZER_PARAMS_PREFIX)
                },
                **self.start_attributes(),
            },
        }

    def usage(self, run: Run) -> Attributes:
        """``dspy.usage.*`` of all attempts together."""
        total: dict[str, Any] = dict(self.before["usage"]) if self.before is not None else {}
        for key, value in run.totals.attributes().items():
            total[key] = total.get(key, 0) + value
        return total

    def end_attributes(self, run: Run) -> Attributes:
        """Usage of all attempts, under names of its own: ``dspy.usage.*`` on the span is this attempt's."""
        if self.before is None:
            return {}
        return {
            semconv.OPTIMIZER_ALL_ATTEMPTS_PREFIX + key.removeprefix("dspy."): value
            for key, value in self.usage(run).items()
        }

    def save(self, run: Run) -> None:
        """Write what is known to the file, whole or not at all."""
        with self._lock:
            if self.own:
                self._save(run)

    def _save(self, run: Run) -> None:
        state = {
            "version": _VERSION,
            "optimizer": run.name,
            "run_id": run.id,
            "attempt": self.number,
            "outcome": self.outcome,
            "written": time.time_ns(),
            "pool": dict(self.pool),
            "usage": self.usage(run),
            **run.progress(),
            "own": {**run.totals.attributes(), **run.attributes(), **self.end_attributes(run)},
        }
        state.update((key, value) for key, value in self.own.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{FILE}.{os.getpid()}.tmp")
        try:
            beside.write_text(json.dumps(state), encoding="utf-8")
            os.replace(beside, self.path)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()


_TYPES: Final[dict[str, type | tuple[type, ...]]] = {
    "run_id": str,
    "attempt": int,
    "outcome": str,
    "trace_id": str,
    "span_id": str,
    "parent_id": str,
    "started": int,
    "written": int,
    "pool": dict,
    "usage": dict,
    "own": dict,
    "attributes": dict,
    "trials": list,
    "numbers": int,
    "examples": int,
}


def _read(path: Path, optimizer: str) -> dict[str, Any] | None:
    """What the attempt before has written; ``None`` if there was none, or it is not readable as such."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(state, dict) or state.get("version") != _VERSION or state.get("optimizer") != optimizer:
        return None
    return state if all(isinstance(state.get(key), kind) for key, kind in _TYPES.items()) else None


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, _SAMPLED)
