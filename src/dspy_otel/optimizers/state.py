"""What the calls of an optimization keep, and how the calls inside them find it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dspy_otel.core.call_context import CallContext, current_call_context, enclosing_state
from dspy_otel.core.deferred_spans import DeferredTrace
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.core.usage import Totals
from dspy_otel.optimizers.run import Run, Scored
from dspy_otel.optimizers.tracker import Phase, Tracker, Trial


@dataclass(slots=True)
class CompileState:
    """What is kept of one call of ``compile()``. Written in its thread.

    Attributes:
        tracker: follows the optimization.
        arguments: of ``compile()``; a subclass's ``compile()`` may add to them when it calls the one it overrides.
        result_id: ``dspy.program.id`` of the program it returned.
        winner: the trial that scored that program.
    """

    tracker: Tracker
    arguments: dict[str, Any]
    result_id: str | None = None
    winner: Scored | None = None


@dataclass(slots=True)
class PhaseState:
    """What is kept of a phase in flight.

    Attributes:
        phase: its description.
        totals: of the LM calls inside.
    """

    phase: Phase
    totals: Totals


@dataclass(slots=True)
class TrialState:
    """What is kept of a trial in flight. Its examples read it in worker threads.

    Attributes:
        trial: its description.
        tracker: follows the optimization.
        context: call context of the trial.
        number: ``dspy.trial.number``.
        totals: of the LM calls inside.
        is_best: whether it is the best so far; ``None`` until it has its score.
        best_score: the best score so far, its own included.
        deferred: traces of examples that wait for the score.
    """

    trial: Trial
    tracker: Tracker
    context: CallContext
    number: int
    totals: Totals
    is_best: bool | None = None
    best_score: float | None = None
    deferred: list[DeferredTrace] = field(default_factory=list)


def tracker_of(context: CallContext | None) -> Tracker | None:
    """The tracker of the optimization that ``context`` is inside of: the innermost one."""
    state = enclosing_state(context, CompileState)
    return None if state is None else state.tracker


def run_of(context: CallContext | None) -> Run | None:
    """The optimization that ``context`` is inside of: the innermost one."""
    tracker = tracker_of(context)
    return None if tracker is None else tracker.run


@guard("optimizer")
def current_tracker(telemetry: Telemetry) -> Tracker | None:
    """The tracker of the optimization that is running here, if any, and if instrumentation is on."""
    return tracker_of(current_call_context()) if Run.live and telemetry.enabled() else None
