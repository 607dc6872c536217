"""MIPROv2: bootstrap, propose, search; each trial a choice of instruction and demos for every predictor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from dspy_otel import semconv
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.internal_errors import guard
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.tracker import Evaluation, Phase, Tracker, tracks
from dspy_otel.patching import Patches, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers


@tracks("MIPROv2")
class MIPROv2Tracker(Tracker):
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
        """Note what the next candidate is made of: ``{"0_predictor_instruction": 1, "0_predictor_demos": 2, ...}``."""
        self.chosen = {name: index for name, index in params.items() if isinstance(index, int)}


def patch(optimizers: Optimizers, patches: Patches) -> None:
    """Phases, and the parameters of each trial."""
    owner = resolve("dspy.teleprompt.mipro_optimizer_v2", "MIPROv2")
    around = optimizers.phases.around
    patches.wrap(
        owner,
        "_bootstrap_fewshot_examples",
        around(lambda run, args, kwargs: Phase(semconv.PHASE_BOOTSTRAP, semconv.ROLE_TEACHER)),
        loses="MIPROv2's bootstrap phase",
    )
    patches.wrap(
        owner,
        "_propose_instructions",
        around(lambda run, args, kwargs: Phase(semconv.PHASE_PROPOSE, semconv.ROLE_PROPOSER)),
        loses="MIPROv2's propose phase",
    )
    patches.wrap(owner, "_optimize_prompt_parameters", around(_search), loses="MIPROv2's search phase")

    def note_choice(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(self_: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self_, *args, **kwargs)
            with guard("MIPROv2 trial"):
                _note(optimizers, self_, args, kwargs)
            return result

        return wrapper

    choice = "_select_and_insert_instructions_and_demos"
    patches.wrap(owner, choice, note_choice, loses="the parameters of MIPROv2's trials")


def _search(run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Phase:
    # (self, program, instruction_candidates, demo_candidates, evaluate, valset, num_trials, minibatch,
    #  minibatch_size, minibatch_full_eval_steps, seed)
    trials, minibatch, steps = (_argument(args, kwargs, *place) for place in _PLANNING)
    if isinstance(trials, int):
        full = trials // steps + bool(trials % steps) if minibatch and isinstance(steps, int) else 0
        run.plan_trials(1 + trials + full)
    return Phase(semconv.PHASE_SEARCH, semconv.ROLE_PROPOSER, has_trials=True)


_PLANNING: Final = ((6, "num_trials"), (7, "minibatch"), (9, "minibatch_full_eval_steps"))


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int, name: str) -> Any:
    return kwargs[name] if name in kwargs else args[index] if index < len(args) else None


def _note(optimizers: Optimizers, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    tracker = optimizers.running(MIPROv2Tracker)
    if tracker is not None:
        tracker.choose(_argument(args, kwargs, 3, "trial").params)
