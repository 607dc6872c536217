"""The spans inside a compile: phases, trials, their evaluations, and modules called by the optimizer itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.digest import digest
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext, current_call_context
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, Operation, Start, detach, openinference
from dspy_otel.core.usage import Totals
from dspy_otel.operations.evaluation import EvaluateOperation, ExampleOperation, ExampleRun, arguments
from dspy_otel.operations.module import ModuleOperation
from dspy_otel.optimizers.enclosing import EnclosedOperation
from dspy_otel.optimizers.lineage import remember
from dspy_otel.optimizers.program_state import differences, put_state, state_of
from dspy_otel.optimizers.run import CompileState, Run, Scored, run_of
from dspy_otel.optimizers.trace_sampling import begin_example, end_example, end_trial, has_failed
from dspy_otel.optimizers.tracker import Evaluation, Phase, PhaseState, Trial, TrialState


class PhaseOperation(Operation):
    """One phase. Called with a :class:`Phase` in place of an instance."""

    kind = "phase"
    identity = (
        semconv.OPTIMIZER_NAME,
        semconv.OPTIMIZER_RUN_ID,
        semconv.OPTIMIZER_ROOT_RUN_ID,
        semconv.OPTIMIZER_PHASE,
    )

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> Start | None:
        phase: Phase = instance
        if run_of(parent) is None:
            return None
        context = CallContext(self.kind, phase, parent)
        context.inherited = {**context.inherited, semconv.OPTIMIZER_PHASE: phase.name}
        if phase.role is not None:
            context.role = phase.role
        totals = Totals(by_role=True)
        context.totals = (*context.totals, totals)
        context.state = PhaseState(phase, totals)
        attributes = dict(phase.attributes)
        openinference(attributes, self.telemetry, semconv.KIND_CHAIN)
        return Start(phase.name, context, attributes, identity=self.identity)

    def result(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        return {**call.instance.attributes, **call.context.state.totals.attributes()}

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        run = run_of(call.context)
        if run is not None:
            run.report_spending()

    def around(
        self,
        describe: Callable[[Run, tuple[Any, ...], dict[str, Any]], Phase | None],
        finish: Callable[[Run, Phase, Any], None] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Makes a wrapper that puts a phase around a method.

        Args:
            describe: gives the phase, from the run and the method's arguments (its instance first).
            finish: called with what the method returned, before the phase ends.
        """

        def decorate(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                run = current_run(self)
                phase = None if run is None else guard("phase")(describe)(run, args, kwargs)
                call = None if phase is None else self.open(phase, (), {})
                if run is None or phase is None or call is None:
                    return original(*args, **kwargs)
                try:
                    result = original(*args, **kwargs)
                except BaseException as error:
                    self.fail(call, error)
                    raise
                if finish is not None:
                    with guard("phase"):
                        finish(run, phase, result)
                self.close(call, result, None)
                return result

            return wrapper

        return decorate


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
    ) -> Start | None:
        trial: Trial = instance
        run = run_of(parent)
        if run is None or parent is None:
            return None
        context = CallContext(self.kind, trial, parent)
        totals = Totals(by_role=True)
        context.totals = (*context.totals, totals)
        number = run.next_number()
        context.state = TrialState(trial, run, context, number, totals)
        inherited = {semconv.OPTIMIZER_PHASE: trial.phase, **context.inherited, semconv.TRIAL_NUMBER: number}
        if trial.candidate is not None:
            inherited[semconv.CANDIDATE_ID] = trial.candidate
        context.inherited = inherited
        attributes: Attributes = {semconv.TRIAL_KIND: trial.kind, semconv.OPTIMIZER_NAME: run.name, **trial.attributes}
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
        return Start(semconv.SPAN_TRIAL, context, attributes, identity=self.identity)

    def detail(self, call: Call) -> Attributes:
        trial: Trial = call.instance
        attributes: Attributes = {}
        run: Run = call.context.state.run
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
        run = state.run
        decides = trial.score is not None and trial.kind in run.tracker.deciding
        scored = Scored(state.number, trial.kind, trial.candidate, trial.score, decides)
        is_best, state.best_score = run.finish_trial(scored, error is not None)
        state.is_best = is_best
        end_trial(state)
        remember(run, scored)
        accepted = trial.end_attributes.get(semconv.TRIAL_ACCEPTED)
        if isinstance(accepted, bool):
            run.verdict(accepted)

    def result(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        trial: Trial = call.instance
        state: TrialState = call.context.state
        attributes: Attributes = {**state.totals.attributes(), **trial.end_attributes}
        if state.is_best is not None:
            attributes.setdefault(semconv.TRIAL_IS_BEST, state.is_best)
        if trial.score is not None:
            attributes[semconv.TRIAL_SCORE] = trial.score
        if state.best_score is not None:
            attributes[semconv.TRIAL_BEST_SCORE] = state.best_score
        return attributes


class CandidateEvaluation(EnclosedOperation, EvaluateOperation):
    """``Evaluate``, which directly inside a compile is one trial."""

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
        run = run_of(context)
        if run is None:
            return None
        about = self._describe(instance, args, kwargs)
        kind = guard("optimizer")(run.tracker.evaluation)(about)
        if isinstance(kind, Phase):
            return self.phases.open(kind, (), {})
        if not isinstance(kind, Trial):
            return None
        if not kind.mixed:
            kind.candidate = about.program_id
        kind.program, kind.size = about.program, about.size
        if kind.kind in (semconv.TRIAL_BASELINE, semconv.TRIAL_FULL) and not run.validation:
            run.validation = dataset_attributes(self.programs, about.devset, "val")
        call = self.trials.open(kind, (), {})
        kind.call = call
        return call

    def _describe(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Evaluation:
        given = arguments(instance, args, kwargs)
        program = given["program"]
        found = self.programs.find(program) if hasattr(program, "named_predictors") else None
        metadata = kwargs.get("callback_metadata")
        return Evaluation(
            program,
            found.id if found is not None else None,
            given["devset"],
            given["metric"],
            metadata if isinstance(metadata, dict) else {},
        )

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> Start | None:
        start = super().start(instance, args, kwargs, parent)
        if start is not None and parent is not None and parent.role == semconv.ROLE_TEACHER:
            start.context.role = semconv.ROLE_TEACHER
        return start

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        run = run_of(call.context.parent) if Run.live else None
        if run is not None and error is None:
            rows = getattr(result, "results", None)
            if isinstance(rows, (list, tuple)):
                with guard("optimizer"):
                    run.add_examples(len(rows))
        super().close(call, result, error)

    def close_enclosing(self, enclosing: Call, result: Any, error: BaseException | None) -> None:
        trial, run = enclosing.instance, run_of(enclosing.context)
        if isinstance(trial, Trial) and run is not None:
            trial.score = guard("optimizer")(run.tracker.score)(result, error)
            if error is None:
                with guard("optimizer"):
                    run.tracker.scored(trial, result)
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

        The call's ``context`` is what its examples have to run in.
        """
        stand_in = SimpleNamespace(program=program, metric=metric, devset=devset, num_threads=num_threads)
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
    ) -> Start | None:
        start = super().start(instance, args, kwargs, parent)
        if start is not None:
            begin_example(self.telemetry, start.context)
        if start is not None and isinstance(instance, CandidateRun) and instance.candidate is not None:
            start.context.inherited = {**start.context.inherited, semconv.CANDIDATE_ID: instance.candidate}
        return start

    def result(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        if isinstance(result, (bool, int, float)):  # ReAnchor keeps the score alone
            return {semconv.EXAMPLE_SCORE: float(result)}
        return super().result(call, as_pair(result), error)

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        super().measure(call, as_pair(result), error, seconds)

    def close(self, call: Call, result: Any, error: BaseException | None) -> None:
        super().close(call, result, error)
        if call.context.deferred is not None:
            end_example(call, has_failed(as_pair(result), error))


class DirectModule(EnclosedOperation, ModuleOperation):
    """A module; one that the optimizer itself calls has a role, and may make up a phase."""

    def __init__(self, telemetry: Any, programs: Any, phases: PhaseOperation) -> None:
        super().__init__(telemetry, programs)
        self.phases = phases

    def enclose(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        context = current_call_context()
        if context is None or not isinstance(context.state, CompileState):
            return None
        run = run_of(context)
        if run is None or is_program_of(run, instance):
            return None
        phase = run.tracker.module_phase(instance)
        return None if phase is None else self.phases.open(phase, (), {})

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> Start | None:
        start = super().start(instance, args, kwargs, parent)
        around = parent
        while around is not None and around.kind == "parallel":  # dspy.Parallel, Module.batch
            around = around.parent
        if start is not None and around is not None and isinstance(around.state, CompileState):
            run = run_of(around)
            if run is not None and is_program_of(run, instance):
                start.context.role = run.tracker.program_role
        return start


def is_program_of(run: Run, module: Any) -> bool:
    """Whether ``module`` is a version of the program that ``run`` optimizes."""
    if run.student is None or type(module) is not type(run.student):
        return False
    # A bare Predict or ChainOfThought: so may be what proposes.
    fields = (list(getattr(getattr(one, "signature", None), "fields", ())) for one in (module, run.student))
    return next(fields) == next(fields)


def as_pair(result: Any) -> Any:
    """What one run of an example gave, as ``Evaluate`` gives it: (prediction, score)."""
    if isinstance(result, dict) and "score" in result and "prediction" in result:  # SIMBA's wrapped programs
        return result["prediction"], result["score"]
    return (None, result) if isinstance(result, (bool, int, float)) else result


def dataset_attributes(programs: Any, rows: Any, role: str) -> Attributes:
    """Size and digest of a dataset; ``role`` is ``train`` or ``val``."""
    count = introspection.length(rows)
    if count is None:
        return {}
    size, digest_name = {
        "train": (semconv.DATASET_TRAIN_SIZE, semconv.DATASET_TRAIN_DIGEST),
        "val": (semconv.DATASET_VAL_SIZE, semconv.DATASET_VAL_DIGEST),
    }[role]
    return {size: count, digest_name: digest([programs.example_id(row) for row in introspection.items(rows)])}


@guard("optimizer")
def current_run(operation: Operation) -> Run | None:
    """The optimization that is running here, if any, and if instrumentation is on."""
    if not Run.live or not operation.telemetry.enabled():
        return None
    return run_of(current_call_context())
