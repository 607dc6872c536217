"""InferRules: bootstrap, then for each candidate new rules and a trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .. import semconv as names
from ..patching import Patches, resolve
from ..telemetry.attributes import Attributes
from .plan import Evaluation, Phase, Plan

if TYPE_CHECKING:
    from . import Optimizers


class InferRulesPlan(Plan):
    """The rules are in the candidate's instructions: its state and its difference to the parent show them."""

    def begin(self) -> None:
        if isinstance(self.instance.num_candidates, int):
            self.run.plan_trials(self.instance.num_candidates)

    def params(self, about: Evaluation) -> Attributes:
        return {"candidate": self._trials - 1}


PLANS: Final[dict[str, type[Plan]]] = {"InferRules": InferRulesPlan}


def patch(optimizers: Optimizers, patches: Patches) -> None:
    """The phase in which rules are found."""
    propose = optimizers.phases.around(lambda run, args, kwargs: Phase(names.PHASE_PROPOSE, names.ROLE_PROPOSER))
    owner = resolve("dspy.teleprompt.infer_rules", "InferRules")
    patches.wrap(owner, "induce_natural_language_rules", propose, loses="InferRules' propose phases")
