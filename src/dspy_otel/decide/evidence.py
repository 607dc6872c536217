"""What a comparison found, as immutable records, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dspy_otel.decide.results import Results
from dspy_otel.record.model import Example
from dspy_otel.reports.words import Piece
from dspy_otel.statistics import Paired

BETTER: Final = "better"
WORSE: Final = "worse"
NOT_SHOWN: Final = "no difference shown"


@dataclass(frozen=True, slots=True)
class Change:
    """An example with another score.

    Attributes:
        key: id of the example, or its place.
        index: its place in the dataset.
        a, b: its scores, mean of repeats.
        of_a, of_b: its answers, shortened; the first of repeats.
    """

    key: str | int
    index: int | None
    a: float
    b: float
    of_a: Example
    of_b: Example


@dataclass(frozen=True, slots=True)
class Count:
    """A number of rows, of A and of B."""

    a: int
    b: int

    def __bool__(self) -> bool:
        return bool(self.a or self.b)


@dataclass(frozen=True, slots=True)
class Score:
    """One metric's comparison.

    Attributes:
        metric: its name.
        result: the numbers.
        verdict: ``better``, ``worse`` or ``no difference shown``.
        regression: it is worse by more than the greatest drop that was allowed.
        failed: examples that raised; they count as a score, or not, as the comparison says.
        unscored: examples without a score that did not fail.
        nameless: answers that are paired with nothing, for nothing says to which example they are.
        repeated: examples that were answered more than once.
        only: examples that the other side does not have.
        changes: examples with another score, greatest losses first.
    """

    metric: str
    result: Paired
    verdict: str
    regression: bool
    failed: Count
    unscored: Count
    nameless: Count
    repeated: Count
    only: Count
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class PredictorChange:
    """What distinguishes a predictor of B from that of A.

    Attributes:
        name: of the predictor.
        instructions: what changed, word by word; empty when nothing did.
        demos: how many there are; None when they are the same.
    """

    name: str
    instructions: tuple[Piece, ...]
    demos: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """Whether B is better than A, and what that is known by.

    Attributes:
        a, b: what was compared.
        scores: by metric.
        alpha: level of all tests together; each of several metrics has its share.
        max_drop: drop of a score that is no regression.
        failed_score: score of failed examples; None when they are left out.
        predictors: what differs in the programs, where both are recorded.
        programs_known: whether they are.
        other_metrics: names of metrics that only one side has.
        few_pairs: names of metrics that people and evaluators gave to too few of the same examples.
    """

    a: Results
    b: Results
    scores: tuple[Score, ...]
    alpha: float
    max_drop: float
    failed_score: float | None
    predictors: tuple[PredictorChange, ...]
    programs_known: bool
    other_metrics: tuple[str, ...]
    few_pairs: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        """Whether B is worse in any metric by more than the allowed drop."""
        return any(score.regression for score in self.scores)

    @property
    def verdict(self) -> str:
        """``worse`` if any metric is, else ``better`` if any is, else ``no difference shown``."""
        found = {score.verdict for score in self.scores}
        return next((one for one in (WORSE, BETTER) if one in found), NOT_SHOWN)


def quantile(values: Sequence[float], share: float) -> float | None:
    """A quantile of sorted values; None without any."""
    if not values:
        return None
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Cost:
    """One line of what A and B took. A value is None where it is not known."""

    name: str
    a: float | None
    b: float | None
    unit: str = ""


def costs(evidence: Evidence) -> list[Cost]:
    """What both took, for each answer: calls, tokens, cost, cache, latency, failures."""
    sides = (evidence.a, evidence.b)

    def line(name: str, values: Sequence[float | None], unit: str = "") -> Cost:
        return Cost(name, values[0], values[1], unit)

    def used(name: str, attribute: str, unit: str = "") -> Cost:
        return line(name, [getattr(side.usage, attribute) for side in sides], unit)

    return [
        line("answers", [float(len(side.rows)) for side in sides]),
        used("cost", "cost", "$"),
        used("input tokens", "input_tokens"),
        used("output tokens", "output_tokens"),
        used("LM calls", "lm_calls"),
        used("cache hits", "cache_hits"),
        line("latency p50", [quantile(side.seconds, 0.5) for side in sides], "s"),
        line("latency p95", [quantile(side.seconds, 0.95) for side in sides], "s"),
        line("parse failures", [None if one.parse_failures is None else float(one.parse_failures) for one in sides]),
        line("failed answers", [float(sum(row.example.error is not None for row in side.rows)) for side in sides]),
    ]


def model_changes(evidence: Evidence) -> list[tuple[str, str, str]]:
    """Roles whose models differ, with both."""
    a, b = evidence.a.models, evidence.b.models
    texts = {role: (", ".join(a.get(role, ())), ", ".join(b.get(role, ()))) for role in sorted({*a, *b})}
    return [(role, *pair) for role, pair in texts.items() if all(pair) and pair[0] != pair[1]]
