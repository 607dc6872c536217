"""ReAnchor (DSPy 3.4, experimental): each setting of the program's decision parameters that is scored is a trial."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from dspy_otel import semconv
from dspy_otel.content.encoder import Content
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.internal_errors import guard
from dspy_otel.operations.module_tree import attributes, named_predictors
from dspy_otel.optimizers.run import MEAN
from dspy_otel.optimizers.tracker import Evaluation, Tracker, hooks, mean_of, tracks
from dspy_otel.patching import Leave, Patches, argument, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers

_CONTENT: Final = Content(limit=4096)


@tracks("ReAnchor")
class ReAnchorTracker(Tracker):
    """Only the training set decides; the validation set is scored for the report."""

    role = semconv.ROLE_TASK
    scale = MEAN
    deciding = frozenset({semconv.TRIAL_BASELINE, semconv.TRIAL_FULL})

    def kind_of(self, about: Evaluation) -> str:
        if about.devset is self.arguments.get("valset"):
            return semconv.TRIAL_VALIDATION
        return super().kind_of(about)

    def params(self, about: Evaluation) -> Attributes:
        # Thresholds, cuts and weights: numbers under names from the signature.
        fields = {name: attributes(predictor).get("fields") for name, predictor in named_predictors(about.program)}
        fields = {name: each for name, each in fields.items() if type(each) is dict and each}
        return {"fields": _CONTENT.json(fields)} if fields else {}

    def score(self, result: Any, error: BaseException | None) -> float | None:
        return mean_of(result)


@hooks
def patch(optimizers: Optimizers, patches: Patches) -> None:
    """``calibrate.scores``: one pass over the examples with one setting."""
    module = resolve("dspy.teleprompt.reanchor.calibrate")
    if module is None:
        return  # DSPy 3.3

    def evaluation(instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        if optimizers.running(Tracker) is None:
            return None
        names = ("program", "examples", "metric", "num_threads")
        program, rows, metric, threads = (argument(args, kwargs, place, name) for place, name in enumerate(names))
        stand_in = SimpleNamespace(program=program, metric=metric, devset=rows, num_threads=threads)
        call = optimizers.evaluate.open(stand_in, (), {})
        if call is None:
            return None

        def leave(values: Any, error: BaseException | None) -> None:
            optimizers.evaluate.close(call, None if error is not None else guard("ReAnchor")(_result)(values), error)

        return leave

    patches.around(module, "scores", evaluation, loses="ReAnchor's trials")


def _result(values: list[float]) -> SimpleNamespace:
    """The result of an ``Evaluate`` with these scores."""
    percent = round(100 * sum(values) / len(values), 2) if values else None
    return SimpleNamespace(score=percent, results=[(None, None, value) for value in values])
