"""BootstrapFinetune and GRPO: the program writes training data, and its model is trained on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dspy_otel import semconv
from dspy_otel.core.attributes import Attributes
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.tracker import Evaluation, Phase, Tracker, Trial, tracks
from dspy_otel.patching import Patches, resolve

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


def patch(optimizers: Optimizers, patches: Patches) -> None:
    """The finetune phase, and GRPO's steps."""
    owner = resolve("dspy.teleprompt.bootstrap_finetune", "BootstrapFinetune")
    patches.wrap(owner, "finetune_lms", optimizers.phases.around(_jobs), loses="BootstrapFinetune's finetune phase")

    def note_step(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(self_: Any, *args: Any, **kwargs: Any) -> Any:
            tracker = optimizers.running(GRPOTracker)
            if tracker is None:
                return original(self_, *args, **kwargs)
            # (self, student, trainset, valset, logger, step_idx=-1)
            step = kwargs.get("step_idx", args[4] if len(args) > 4 else -1)
            tracker.step = step if isinstance(step, int) else None
            try:
                return original(self_, *args, **kwargs)
            finally:
                tracker.step = None

        return wrapper

    owner = resolve("dspy.teleprompt.grpo", "GRPO")
    patches.wrap(owner, "report_validation_metrics", note_step, loses="GRPO's trials")


def _jobs(run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Phase:
    jobs = args[-1] if args else kwargs["finetune_dict"]
    models = [str(job["lm"].model) for job in jobs.values()]
    attributes: Attributes = {semconv.FINETUNE_JOBS: len(jobs), semconv.FINETUNE_MODELS: models}
    return Phase(semconv.PHASE_FINETUNE, attributes=attributes)
