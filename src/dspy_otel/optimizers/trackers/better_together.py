"""BetterTogether: the program as it is, then one trial after each step of the strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dspy_otel.content import introspection
from dspy_otel.content.names import class_name
from dspy_otel.core.attributes import Attributes
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.tracker import Evaluation, Tracker, tracks

_SEPARATOR: Final = " -> "


@tracks("BetterTogether")
class BetterTogetherTracker(Tracker):
    """The k-th evaluation follows the k-th step; number 0 is the original program. A failing step is the last."""

    failed_score = 0.0  # eval_candidate_program() turns an exception into this

    def __init__(self, run: Run, instance: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(run, instance, arguments)
        self.steps: list[str] = []
        self.last: str | None = None

    def arguments_known(self) -> None:
        if "optimizers" not in introspection.instance_dict(self.instance):
            return  # Before DSPy 3.2 it evaluates nothing between its steps.
        strategy = introspection.text(self.arguments.get("strategy"))
        self.steps = strategy.split(_SEPARATOR) if strategy is not None else []
        ratio = self.arguments.get("valset_ratio")
        share = introspection.real(ratio)
        if introspection.truth(self.arguments.get("valset")) or ratio is None or (share is not None and share > 0):
            self.run.plan_trials(1 + len(self.steps))

    def params(self, about: Evaluation) -> Attributes:
        done = self.steps[: self._trials - 1]
        params: Attributes = {"strategy": _SEPARATOR.join(done)}
        if done:
            params["optimizer"] = class_name(type(introspection.field(self.instance, "optimizers")[done[-1]]))
        return params

    def parents(self, about: Evaluation) -> list[str]:
        parent, self.last = self.last, about.program_id
        return [parent] if parent is not None else []
