"""COPRO: at each depth, new instructions are proposed for each predictor, and each of them is a trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.operations.module_tree import named_predictors
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.tracker import Evaluation, Phase, Tracker, hooks, tracks
from dspy_otel.patching import Patches, argument, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers


@tracks("COPRO")
class COPROTracker(Tracker):
    """The depth follows from the proposals so far: one for each predictor at each depth."""

    def __init__(self, run: Run, instance: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(run, instance, arguments)
        self.proposals = 0
        self.changed: Any = None
        self.place: tuple[int, str | None] | None = None
        self.index = 0

    def arguments_known(self) -> None:
        if self.run.student is None:
            return
        predictors = len(named_predictors(self.run.student))
        breadth, depth = (
            introspection.whole(introspection.field(self.instance, name)) for name in ("breadth", "depth")
        )
        if breadth is None or depth is None:
            return
        # A single predictor's new proposals are scored; of several predictors, all proposals at each depth.
        rounds = depth if predictors == 1 else depth * (depth + 1) // 2
        self.run.plan_trials(predictors * breadth * rounds)

    @property
    def depth(self) -> int:
        """The depth that is worked on, from 0 as in ``candidate_programs``."""
        predictors = len(named_predictors(self.run.student)) if self.run.student is not None else 1
        return max(self.proposals - 1, 0) // max(predictors, 1)

    def module_phase(self, module: Any) -> Phase | None:
        self.proposals += 1
        return Phase(semconv.PHASE_PROPOSE, attributes={f"{semconv.TRIAL_PARAMS_PREFIX}depth": self.depth})

    def params(self, about: Evaluation) -> Attributes:
        found = (name for name, predictor in named_predictors(about.program) if predictor is self.changed)
        predictor = next(found, None)
        place = (self.depth, predictor)
        self.index = self.index + 1 if place == self.place else 0
        self.place = place
        params: Attributes = {"depth": self.depth, "candidate": self.index}
        if predictor is not None:
            params["predictor"] = predictor
        return params


@hooks
def patch(optimizers: Optimizers, patches: Patches) -> None:
    """Which predictor a candidate changes."""

    def changed(instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tracker = optimizers.running(COPROTracker)
        if tracker is not None:
            tracker.changed = argument(args, kwargs, 0, "predictor")

    owner = resolve("dspy.teleprompt.copro_optimizer", "COPRO")
    patches.after(owner, "_set_signature", changed, loses="which predictor a trial of COPRO changes")
