"""InferRules: bootstrap, then for each candidate new rules and a trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.optimizers.tracker import Evaluation, Phase, Tracker, hooks, tracks
from dspy_otel.patching import Patches, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers


@tracks("InferRules")
class InferRulesTracker(Tracker):
    """The rules are in the candidate's instructions: its state and its difference to the parent show them."""

    def begin(self) -> None:
        planned = introspection.whole(introspection.field(self.instance, "num_candidates"))
        if planned is not None:
            self.run.plan_trials(planned)

    def params(self, about: Evaluation) -> Attributes:
        return {"candidate": self._trials - 1}

    def copied(self, program: Any) -> Any:
        # InferRules writes its rules into the signatures, which are classes, and so shared by all copies.
        copied = super().copied(program)
        for predictor in copied.predictors():
            predictor.signature = predictor.signature.with_instructions(predictor.signature.instructions)
        return copied


@hooks
def patch(optimizers: Optimizers, patches: Patches) -> None:
    """The phase in which rules are found."""
    propose = optimizers.phases.hook(lambda *_: Phase(semconv.PHASE_PROPOSE, semconv.ROLE_PROPOSER))
    owner = resolve("dspy.teleprompt.infer_rules", "InferRules")
    patches.around(owner, "induce_natural_language_rules", propose, loses="InferRules' propose phases")
