"""BootstrapFewShotWithRandomSearch: one trial for each seed."""

from __future__ import annotations

from typing import Final

from dspy_otel.core.attributes import Attributes
from dspy_otel.optimizers.tracker import Evaluation, Tracker, tracks

# As random_search.py treats its seeds; all others are bootstrapped from a shuffled training set.
_STRATEGIES: Final = {-3: "zero_shot", -2: "labeled", -1: "bootstrap_unshuffled"}


@tracks("BootstrapFewShotWithRandomSearch")
class RandomSearchTracker(Tracker):
    """The k-th evaluation belongs to the k-th seed that is not left out by ``restrict``."""

    def arguments_known(self) -> None:
        restrict = self.arguments.get("restrict")
        chosen = None if restrict is None else set(restrict)
        last = self.instance.num_candidate_sets
        self.seeds = [seed for seed in range(-3, last) if chosen is None or seed in chosen]
        self.run.plan_trials(len(self.seeds))

    def params(self, about: Evaluation) -> Attributes:
        seed = self.seeds[self._trials - 1]
        return {"seed": seed, "strategy": _STRATEGIES.get(seed, "bootstrap_shuffled")}
