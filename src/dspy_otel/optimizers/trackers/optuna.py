"""BootstrapFewShotWithOptuna: bootstrap once, then one trial for each choice of demos."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dspy_otel.core.attributes import Attributes
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.tracker import Evaluation, Tracker, tracks
from dspy_otel.patching import Patches, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers


@tracks("BootstrapFewShotWithOptuna")
class OptunaTracker(Tracker):
    """Optuna's own trial says which demo each predictor got."""

    def __init__(self, run: Run, instance: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(run, instance, arguments)
        self.trial: Any = None

    def begin(self) -> None:
        if isinstance(self.instance.num_candidate_sets, int):
            self.run.plan_trials(self.instance.num_candidate_sets)

    def params(self, about: Evaluation) -> Attributes:
        return {} if self.trial is None else dict(self.trial.params)


def patch(optimizers: Optimizers, patches: Patches) -> None:
    """The parameters of each trial."""

    def note_trial(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(self_: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
            tracker = optimizers.running(OptunaTracker)
            if tracker is not None:
                tracker.trial = trial
            return original(self_, trial, *args, **kwargs)

        return wrapper

    owner = resolve("dspy.teleprompt.teleprompt_optuna", "BootstrapFewShotWithOptuna")
    patches.wrap(owner, "objective", note_trial, loses="the parameters of BootstrapFewShotWithOptuna's trials")
