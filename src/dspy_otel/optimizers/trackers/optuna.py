"""BootstrapFewShotWithOptuna: bootstrap once, then one trial for each choice of demos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.tracker import Evaluation, Tracker, Trial, hooks, tracks
from dspy_otel.patching import Patches, argument, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers


class StudyTracker(Tracker):
    """Of an optimizer whose trials are those of a study of Optuna's, which can be stopped between two of them."""

    def __init__(self, run: Run, instance: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(run, instance, arguments)
        self.trial: Any = None

    def begin_trial(self, trial: Any) -> None:
        """Optuna has begun a trial."""
        self.trial = trial
        self.ends_itself = hasattr(getattr(trial, "study", None), "stop")

    def scored(self, trial: Trial, result: Any) -> None:
        if self.ends_itself and self.must_stop():
            self.ends_itself = False  # if it cannot be stopped after all
            self.trial.study.stop()
            self.ends_itself = True


@tracks("BootstrapFewShotWithOptuna")
class OptunaTracker(StudyTracker):
    """Optuna's own trial has the demo that each predictor got."""

    def begin(self) -> None:
        planned = introspection.whole(introspection.field(self.instance, "num_candidate_sets"))
        if planned is not None:
            self.run.plan_trials(planned)

    def params(self, about: Evaluation) -> Attributes:
        return {} if self.trial is None else dict(self.trial.params)


@hooks
def patch(optimizers: Optimizers, patches: Patches) -> None:
    """The parameters of each trial."""

    def objective(instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tracker = optimizers.running(OptunaTracker)
        if tracker is not None:
            tracker.begin_trial(argument(args, kwargs, 0, "trial"))

    owner = resolve("dspy.teleprompt.teleprompt_optuna", "BootstrapFewShotWithOptuna")
    patches.before(owner, "objective", objective, loses="the parameters of BootstrapFewShotWithOptuna's trials")
