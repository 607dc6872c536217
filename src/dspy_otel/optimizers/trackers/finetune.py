"""BootstrapFinetune and GRPO: the program writes training data, and its model is trained on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.tracker import Evaluation, Phase, Tracker, Trial, hooks, tracks
from dspy_otel.patching import Leave, Patches, argument, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers


@tracks("BootstrapFinetune")
class BootstrapFinetuneTracker(Tracker):
    """Each teacher's pass over the training set is a phase, not a trial: nothing is chosen by its score."""

    role = semconv.ROLE_TEACHER

    def evaluation(self, about: Evaluation) -> Trial | Phase | None:
        return Phase(semconv.PHASE_BOOTSTRAP, semconv.ROLE_TEACHER)


@tracks("GRPO")
class GRPOTracker(Tracker):
    """Rollouts are phases; the program scored before the first and after each training step is a trial."""

    role = semconv.ROLE_TASK

    def __init__(self, run: Run, instance: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(run, instance, arguments)
        self.step: int | None = None

    def evaluation(self, about: Evaluation) -> Trial | Phase | None:
        if self.step is None:
            return Phase(semconv.PHASE_SAMPLE, semconv.ROLE_TASK)
        kind = semconv.TRIAL_BASELINE if self.step < 0 else semconv.TRIAL_VALIDATION
        # The weights change, and not the program's text: each step's candidate has the same id.
        return Trial(kind, {"step": self.step})


@hooks
def patch(optimizers: Optimizers, patches: Patches) -> None:
    """The finetune phase, and GRPO's steps."""
    owner = resolve("dspy.teleprompt.bootstrap_finetune", "BootstrapFinetune")
    finetune = optimizers.phases.hook(_finetune)
    patches.around(owner, "finetune_lms", finetune, loses="BootstrapFinetune's finetune phase")

    def validation(instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        tracker = optimizers.running(GRPOTracker)
        if tracker is None:
            return None
        # (student, trainset, valset, logger, step_idx=-1)
        step = argument(args, kwargs, 4, "step_idx", -1)
        tracker.step = introspection.whole(step)

        def leave(result: Any, error: BaseException | None) -> None:
            tracker.step = None

        return leave

    owner = resolve("dspy.teleprompt.grpo", "GRPO")
    patches.around(owner, "report_validation_metrics", validation, loses="GRPO's trials")


def _finetune(tracker: Tracker, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Phase:
    jobs = argument(args, kwargs, 0, "finetune_dict")
    models = [str(job["lm"].model) for job in jobs.values()]
    attributes: Attributes = {semconv.FINETUNE_JOBS: len(jobs), semconv.FINETUNE_MODELS: models}
    return Phase(semconv.PHASE_FINETUNE, attributes=attributes)
