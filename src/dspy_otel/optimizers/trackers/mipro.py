"""MIPROv2: bootstrap, propose, search; each trial a choice of instruction and demos for every predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.operations.module_tree import named_predictors
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.tracker import Evaluation, Phase, Tracker, hooks, tracks
from dspy_otel.optimizers.trackers.optuna import StudyTracker
from dspy_otel.patching import Patches, argument, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers


@tracks("MIPROv2")
class MIPROv2Tracker(StudyTracker):
    """The N-th evaluation is DSPy's trial N: baseline, then minibatch or full ones."""

    failed_score = 0.0  # eval_candidate_program() turns an exception into this

    def __init__(self, run: Run, instance: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(run, instance, arguments)
        self.chosen: Attributes = {}
        self.known: dict[str | None, Attributes] = {}

    def params(self, about: Evaluation) -> Attributes:
        if self.chosen:
            self.known[about.program_id], self.chosen = self.chosen, {}
        # A full evaluation is of a candidate that minibatches have seen before.
        return self.known.get(about.program_id, {})

    def choose(self, params: Mapping[str, Any]) -> None:
        """Set what the next candidate is made of: ``{"0_predictor_instruction": 1, "0_predictor_demos": 2, ...}``.

        DSPy numbers the predictors; we name them.
        """
        names = [] if self.run.student is None else [name for name, _ in named_predictors(self.run.student)]
        self.chosen = {_named(key, names): index for key, index in params.items() if type(index) is int}


def _named(key: str, names: Sequence[str]) -> str:
    """``describe.instruction_index`` for ``0_predictor_instruction``."""
    number, found, part = key.partition("_predictor_")
    if not found or not number.isdecimal() or int(number) >= len(names):
        return key
    return f"{names[int(number)]}.{part}_index"


@hooks
def patch(optimizers: Optimizers, patches: Patches) -> None:
    """Phases, and the parameters of each trial."""
    owner = resolve("dspy.teleprompt.mipro_optimizer_v2", "MIPROv2")
    bootstrap = optimizers.phases.hook(lambda *_: Phase(semconv.PHASE_BOOTSTRAP, semconv.ROLE_TEACHER))
    propose = optimizers.phases.hook(lambda *_: Phase(semconv.PHASE_PROPOSE, semconv.ROLE_PROPOSER))
    search = optimizers.phases.hook(_search)
    patches.around(owner, "_bootstrap_fewshot_examples", bootstrap, loses="MIPROv2's bootstrap phase")
    patches.around(owner, "_propose_instructions", propose, loses="MIPROv2's propose phase")
    patches.around(owner, "_optimize_prompt_parameters", search, loses="MIPROv2's search phase")

    def chosen(instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tracker = optimizers.running(MIPROv2Tracker)
        if tracker is not None:
            trial = argument(args, kwargs, 3, "trial")
            tracker.begin_trial(trial)
            tracker.choose(trial.params)

    choice = "_select_and_insert_instructions_and_demos"
    patches.after(owner, choice, chosen, loses="the parameters of MIPROv2's trials")


def _search(tracker: Tracker, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Phase:
    # (program, instruction_candidates, demo_candidates, evaluate, valset, num_trials, minibatch, minibatch_size,
    #  minibatch_full_eval_steps, seed)
    trials = introspection.whole(argument(args, kwargs, 5, "num_trials"))
    minibatch = introspection.truth(argument(args, kwargs, 6, "minibatch"))
    steps = introspection.whole(argument(args, kwargs, 8, "minibatch_full_eval_steps"))
    if trials is not None and minibatch is not None:
        full = trials // steps + bool(trials % steps) if minibatch and steps else 0
        tracker.run.plan_trials(1 + trials + full)
    return Phase(semconv.PHASE_SEARCH, semconv.ROLE_PROPOSER, has_trials=True)
