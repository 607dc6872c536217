"""Which traces of evaluated examples are kept (``optimization_traces``).

Trials, evaluations, phases, totals and metrics do not depend on it.
"""

from __future__ import annotations

from typing import Any, Final

from dspy_otel.core.call_context import CallContext, enclosing_state
from dspy_otel.core.deferred_spans import DeferredTrace, DroppedTrace
from dspy_otel.core.operation import Call
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.operations.evaluation import ExampleState, verdict_of
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.state import CompileState, TrialState, run_of

MAX_DEFERRED_SPANS: Final = 5000
"""Most spans of one trial that wait for its score. Traces beyond that are kept if they fail, and else dropped."""


def begin_example(telemetry: Telemetry, context: CallContext) -> None:
    """An example or attempt begins: inside an optimization, defer or drop its trace, depending on the mode."""
    mode = telemetry.config.optimization_traces
    if mode == "all" or not Run.live or context.deferred is not None:
        return
    run = run_of(context)
    if run is None or run.inference_time:
        return
    context.deferred = DroppedTrace() if mode == "none" else DeferredTrace(telemetry.tracer)


def end_example(call: Call, failed: bool) -> None:
    """An example or attempt has ended: keep its trace if it failed, else leave that to its trial's score."""
    context, around = call.context, call.context.parent
    deferred = context.deferred
    if not isinstance(deferred, DeferredTrace) or around is None or around.deferred is deferred:
        return
    if failed:
        _keep(deferred, around)
        return
    trial = enclosing_state(around, TrialState, until=(CompileState, ExampleState))
    if (
        trial is None
        or trial.trial.kind not in trial.tracker.deciding
        or trial.is_best is False
        or sum(map(len, trial.deferred)) + len(deferred) > MAX_DEFERRED_SPANS
    ):
        deferred.drop()
    elif trial.is_best:  # a straggler
        _keep(deferred, trial.context)
    else:
        trial.deferred.append(deferred)


def end_trial(trial: TrialState) -> None:
    """A trial has its score: keep the traces of its examples if that is the best so far."""
    waiting, trial.deferred = trial.deferred, []
    for deferred in waiting:
        if trial.is_best:
            _keep(deferred, trial.context)
        else:
            deferred.drop()


def has_failed(result: Any, error: BaseException | None) -> bool:
    """Whether an example counts as failed: it raised, or its score is 0 or less (``False`` too), or not finite."""
    if error is not None:
        return True
    verdict = verdict_of(result[1] if type(result) is tuple and len(result) == 2 else result)
    score = verdict.score
    return score <= 0 if score is not None else verdict.unusable is not None


def _keep(deferred: DeferredTrace, around: CallContext) -> None:
    kept = deferred.keep()
    if kept is None or around.span is None or not kept.trace_flags.sampled:
        return
    if kept.trace_id != around.span.get_span_context().trace_id:
        around.add_link(kept)
