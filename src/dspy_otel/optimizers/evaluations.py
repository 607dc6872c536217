"""Evaluations by an optimizer, and their examples: by ``Evaluate``, or by means of the optimizer's own."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext, current_call_context, enclosing_state
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, SpanStart, detach
from dspy_otel.operations.evaluation import (
    EvaluateOperation,
    EvaluationState,
    ExampleOperation,
    ExampleRun,
    arguments,
    score_of,
)
from dspy_otel.operations.texts import Texts
from dspy_otel.optimizers.enclosing import EnclosedOperation
from dspy_otel.optimizers.parameters import dataset_attributes
from dspy_otel.optimizers.phases import PhaseOperation
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.state import CompileState, PhaseState, run_of, tracker_of
from dspy_otel.optimizers.trace_sampling import begin_example, end_example, has_failed
from dspy_otel.optimizers.tracker import Evaluation, Phase, Trial
from dspy_otel.optimizers.trials import TrialOperation


class CandidateEvaluation(EnclosedOperation, EvaluateOperation):
    """``Evaluate``, which directly inside a compile is one trial."""

    enclosed_by = (CompileState, PhaseState)

    def __init__(self, telemetry: Any, programs: Any, phases: PhaseOperation, trials: TrialOperation) -> None:
        super().__init__(telemetry, programs)
        self.phases = phases
        self.trials = trials

    def enclose(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        context = current_call_context()
        if context is None:
            return None
        state = context.state
        if not (isinstance(state, CompileState) or (isinstance(state, PhaseState) and state.phase.has_trials)):
            return None
        tracker = tracker_of(context)
        if tracker is None:
            return None
        about = self._describe(instance, args, kwargs)
        kind = guard("optimizer")(tracker.evaluation)(about)
        if isinstance(kind, Phase):
            return self.phases.open(kind, (), {})
        if not isinstance(kind, Trial):
            return None
        if not kind.mixed:
            kind.candidate = about.program_id
        kind.program, kind.size = about.program, about.size
        if kind.kind in (semconv.TRIAL_BASELINE, semconv.TRIAL_FULL) and not tracker.run.validation:
            tracker.run.validation = dataset_attributes(self.programs, about.devset, "val")
        call = self.trials.open(kind, (), {})
        kind.call = call
        return call

    def _describe(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Evaluation:
        given = arguments(instance, args, kwargs)
        program = given["program"]
        found = self.programs.find(program) if introspection.has_method(program, "named_predictors") else None
        metadata = kwargs.get("callback_metadata")
        return Evaluation(
            program,
            found.id if found is not None else None,
            given["devset"],
            metadata if type(metadata) is dict else {},
        )

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        start = super().start(instance, args, kwargs, parent)
        if start is not None and parent is not None and parent.role == semconv.ROLE_TEACHER:
            start.context.role = semconv.ROLE_TEACHER
        return start

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        run = run_of(call.context.parent) if Run.live else None
        around = enclosing_state(call.context.parent, EvaluationState, until=(CompileState,)) if run else None
        if around is not None and type(around.program) is Texts:
            # An adapter of GEPA's that evaluates with DSPy: the same examples, which the adapter's call counts.
            around.executing = True
            run = None
        if run is not None and error is None:
            with guard("optimizer"):
                run.add_examples(introspection.length(introspection.field(result, "results")) or 0)
        super().close(call, result, error)

    def close_enclosing(self, enclosing: Call, result: Any, error: BaseException | None) -> None:
        trial, tracker = enclosing.instance, tracker_of(enclosing.context)
        if isinstance(trial, Trial) and tracker is not None:
            trial.reported = guard("optimizer")(tracker.score)(result, error)
            trial.score = tracker.run.mean(trial.reported)
            if error is None:
                with guard("optimizer"):
                    tracker.scored(trial, result)
                if trial.awaits_verdict:
                    # The span stays open, for the verdict; nothing more happens inside it.
                    detach(enclosing.token)
                    enclosing.token = None
                    return
            trial.awaits_verdict = False
        super().close_enclosing(enclosing, result, error)

    # --- for optimizers that do not use Evaluate ----------------------------------------------------------------------
    def open_for(self, program: Any, metric: Any, devset: Any, num_threads: Any = None) -> Call | None:
        """Open the spans of an evaluation that an optimizer does by itself, and make nothing current.

        The examples have to run in the call's ``context``.
        """
        return self.open_apart(SimpleNamespace(program=program, metric=metric, devset=devset, num_threads=num_threads))

    def open_apart(self, stand_in: Any) -> Call | None:
        """Likewise, from an object that has ``program``, ``metric``, ``devset`` and ``num_threads``."""
        enclosing, call = self.open_both(stand_in, (), {})
        for opened in (call, enclosing):  # in reverse
            if opened is not None:
                detach(opened.token)
                opened.token = None
        return call


@dataclass
class CandidateRun(ExampleRun):
    """One example, of an evaluation that mixes candidates.

    Attributes:
        candidate: ``dspy.program.id`` of the one that answers this example.
    """

    candidate: str | None = None


class CandidateExample(ExampleOperation):
    """One example of an evaluation, also of optimizers that do not use ``Evaluate``."""

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        start = super().start(instance, args, kwargs, parent)
        if start is not None:
            begin_example(self.telemetry, start.context)
        if start is not None and isinstance(instance, CandidateRun) and instance.candidate is not None:
            start.context.inherited = {**start.context.inherited, semconv.CANDIDATE_ID: instance.candidate}
        return start

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        score = score_of(result) if introspection.is_a(result, (int, float)) else None
        if score is not None:  # ReAnchor keeps only the score.
            return {semconv.EXAMPLE_SCORE: score}
        return super().end_attributes(call, as_pair(result), error)

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        super().measure(call, as_pair(result), error, seconds)

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        super().close(call, result, error)
        if call.context.deferred is not None:
            end_example(call, has_failed(as_pair(result), error))


def as_pair(result: Any) -> Any:
    """The result of one run of an example in the form of ``Evaluate``: (prediction, score)."""
    if type(result) is dict and "score" in result and "prediction" in result:  # SIMBA's wrapped programs
        return result["prediction"], result["score"]
    return (None, result) if introspection.is_a(result, (int, float)) else result
