"""BootstrapFewShotWithRandomSearch: one trial for each seed."""

from __future__ import annotations

from typing import Any, Final

from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.optimizers.tracker import Evaluation, Tracker, tracks

# As random_search.py treats its seeds; all others are bootstrapped from a shuffled training set.
_CONTAINERS: Final = frozenset(map(id, (list, tuple, set, frozenset)))
_STRATEGIES: Final = {-3: "zero_shot", -2: "labeled", -1: "bootstrap_unshuffled"}


@tracks("BootstrapFewShotWithRandomSearch")
class RandomSearchTracker(Tracker):
    """The k-th evaluation belongs to the k-th seed that is not left out by ``restrict``."""

    seeds: list[int] | None = None
    """``None`` where only iterating over an object of the user's would tell them."""

    def arguments_known(self) -> None:
        restrict = self.arguments.get("restrict")
        last = introspection.whole(introspection.field(self.instance, "num_candidate_sets"))
        if last is None or not (restrict is None or _is_plain(restrict)):
            return
        self.seeds = [seed for seed in range(-3, last) if restrict is None or seed in restrict]
        self.run.plan_trials(len(self.seeds))

    def params(self, about: Evaluation) -> Attributes:
        if self.seeds is None:
            return {}
        seed = self.seeds[self._trials - 1]
        return {"seed": seed, "strategy": _STRATEGIES.get(seed, "bootstrap_shuffled")}


def _is_plain(seeds: Any) -> bool:
    """Whether ``seeds`` can be searched again and again, and without code of a user's class."""
    kind = type(seeds)
    return kind is range or (id(kind) in _CONTAINERS and all(type(seed) is int or type(seed) is bool for seed in seeds))
