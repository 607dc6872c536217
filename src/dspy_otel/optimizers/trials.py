"""Trials: scored candidates."""

from __future__ import annotations

from typing import Any

from dspy_otel import semconv
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference
from dspy_otel.core.usage import Totals
from dspy_otel.optimizers.lineage import remember
from dspy_otel.optimizers.program_state import differences, put_state, state_of
from dspy_otel.optimizers.run import PERCENT, Run, Scored
from dspy_otel.optimizers.state import TrialState, tracker_of
from dspy_otel.optimizers.trace_sampling import end_trial
from dspy_otel.optimizers.tracker import Trial


class TrialOperation(Operation):
    """One scored candidate. Called with a :class:`Trial` in place of an instance."""

    kind = "trial"
    identity = (
        semconv.OPTIMIZER_NAME,
        semconv.OPTIMIZER_RUN_ID,
        semconv.OPTIMIZER_ROOT_RUN_ID,
        semconv.OPTIMIZER_PHASE,
        semconv.PROGRAM_NAME,
        semconv.PROGRAM_ID,
        semconv.TRIAL_NUMBER,
        semconv.TRIAL_KIND,
        semconv.TRIAL_SIZE,
        semconv.CANDIDATE_ID,
        semconv.CANDIDATE_PARENT_IDS,
    )

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        trial: Trial = instance
        tracker = tracker_of(parent)
        if tracker is None or parent is None:
            return None
        run = tracker.run
        context = CallContext(self.kind, trial, parent)
        totals = Totals(by_role=True)
        context.totals = (*context.totals, totals)
        number = run.next_number()
        context.state = TrialState(trial, tracker, context, number, totals)
        inherited = {semconv.OPTIMIZER_PHASE: trial.phase, **context.inherited, semconv.TRIAL_NUMBER: number}
        if trial.candidate is not None:
            inherited[semconv.CANDIDATE_ID] = trial.candidate
        context.inherited = inherited
        attributes: Attributes = {semconv.TRIAL_KIND: trial.kind, semconv.OPTIMIZER_NAME: run.name}
        if run.program_name is not None:
            attributes[semconv.PROGRAM_NAME] = run.program_name
        if trial.candidate is not None:
            attributes[semconv.PROGRAM_ID] = trial.candidate
        if trial.size is not None:
            attributes[semconv.TRIAL_SIZE] = trial.size
        if trial.parents:
            attributes[semconv.CANDIDATE_PARENT_IDS] = list(trial.parents)
        attributes.update({semconv.TRIAL_PARAMS_PREFIX + name: value for name, value in trial.params.items()})
        openinference(attributes, self.telemetry, semconv.KIND_EVALUATOR)
        return SpanStart(semconv.SPAN_TRIAL, context, attributes, identity=self.identity)

    def start_attributes(self, call: Call) -> Attributes:
        trial: Trial = call.instance
        attributes: Attributes = {}
        run: Run = call.context.state.tracker.run
        if trial.program is None or trial.candidate is None or not self.telemetry.config.content_on_spans:
            return attributes
        state = state_of(trial.program)
        if run.remember_state(trial.candidate, state):
            put_state(self.telemetry, attributes, trial.program)
        parent = next((run.states[id_] for id_ in trial.parents if id_ in run.states), None)
        if parent is not None:
            self.telemetry.put_content(attributes, semconv.CANDIDATE_DIFF, differences(parent, state))
        return attributes

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        trial: Trial = call.instance
        state: TrialState = call.context.state
        run = state.tracker.run
        decides = trial.score is not None and trial.kind in state.tracker.deciding
        scored = Scored(state.number, trial.kind, trial.candidate, trial.score, decides)
        is_best, state.best_score = run.finish_trial(scored, error is not None)
        state.is_best = is_best
        end_trial(state)
        remember(run, scored)
        if call.context.budget is not None and trial.candidate is not None and trial.score is not None:
            run.keep_best(trial.program, scored, guard("copy of the best program")(state.tracker.copied))
        accepted = trial.end_attributes.get(semconv.TRIAL_ACCEPTED)
        if isinstance(accepted, bool):
            run.verdict(accepted)

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        trial: Trial = call.instance
        state: TrialState = call.context.state
        attributes: Attributes = {**state.totals.attributes(), **trial.end_attributes}
        if state.is_best is not None:
            attributes.setdefault(semconv.TRIAL_IS_BEST, state.is_best)
        if trial.score is not None:
            attributes[semconv.TRIAL_SCORE] = trial.score
            if trial.reported is not None and state.tracker.run.scale == PERCENT:
                attributes[semconv.TRIAL_SCORE_REPORTED] = trial.reported
        if state.best_score is not None:
            attributes[semconv.TRIAL_BEST_SCORE] = state.best_score
        return attributes
