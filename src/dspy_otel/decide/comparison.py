"""Two programs' results to a verdict with its evidence. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from dspy_otel.decide import page, show
from dspy_otel.decide.errors import CannotCompareError
from dspy_otel.decide.evidence import BETTER, NOT_SHOWN, WORSE, Change, Count, Evidence, PredictorChange, Score
from dspy_otel.decide.results import Results, Row
from dspy_otel.record.history import preview
from dspy_otel.record.model import Candidate, Example, Predictor
from dspy_otel.reports.words import differences
from dspy_otel.statistics import NOISE, USUAL, needed_pairs, paired

MAX_CHANGES: Final = 1000
"""Most changed examples that are kept for one metric, the greatest losses first."""
FAILED_SCORE: Final = 0.0
"""The score of a failed example, as ``dspy.Evaluate`` counts it by default."""


@dataclass(frozen=True, slots=True)
class Comparison(Evidence):
    """Whether B is better than A, and what that is known by, as Python and notebooks show it."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as values of JSON."""
        return show.to_dict(self)

    def __str__(self) -> str:
        return show.table(self)

    def _repr_html_(self) -> str:
        return page.fragment(self)


def matching(
    of_a: Sequence[Results], of_b: Sequence[Results], metrics: Sequence[str] | None = None
) -> tuple[Results, Results]:
    """Which results of two programs to compare: the first that have a metric and examples in common, or else the first.

    Args:
        of_a: results of A.
        of_b: results of B.
        metrics: names of those that are to be compared; None for any.
    """

    def pairs(a: Results, b: Results) -> int:
        names = {*a.metrics} & {*b.metrics}
        if a.production is not b.production or not names or not names.issuperset(metrics or ()):
            return 0
        return len({row.key for row in a.rows} & {row.key for row in b.rows} - {None})

    found = [(pairs(a, b), a, b) for a in of_a for b in of_b]
    enough = [both for both in found if both[0] >= needed_pairs(USUAL)]
    _, a, b = enough[0] if enough else max(found, key=lambda both: both[0])
    return _instead(a, of_a), _instead(b, of_b)


def _instead(chosen: Results, of_side: Sequence[Results]) -> Results:
    others = "; ".join(one.what for one in of_side if one is not chosen)
    return dataclasses.replace(chosen, what=f"{chosen.what} (and not: {others})") if others else chosen


def compare_results(
    a: Results,
    b: Results,
    *,
    metrics: Sequence[str] | None = None,
    alpha: float = 0.05,
    max_drop: float = 0.0,
    failed_score: float | None = FAILED_SCORE,
) -> Comparison:
    """Compare the results of two programs.

    Args:
        a: results.
        b: results; the question is whether they are better or worse than those of A.
        metrics: names; None for all that both have.
        alpha: how often a difference may be shown where there is none, over all metrics.
        max_drop: drop of a score that is no regression.
        failed_score: score of examples that raised; None leaves them out.

    Raises:
        CannotCompareError: other examples, other metrics, or too few of them; or SciPy is missing.
    """
    if not 0 < alpha <= 1:
        raise CannotCompareError(f"alpha is {alpha:g}: choose a number above 0 and at most 1, such as 0.05.")
    if not max_drop >= 0:
        raise CannotCompareError(f"max_drop is {max_drop:g}: choose 0 or a positive number.")
    both = [metric for metric in a.metrics if metric in b.metrics]
    names = both if metrics is None else list(dict.fromkeys(metrics))
    missing = [name for name in names if name not in both]
    if missing or not names:
        raise CannotCompareError(
            f"Other metrics: A has {_listed(a.metrics)}, B has {_listed(b.metrics)}"
            + (f", and not both have {_listed(missing)}." if missing else ".")
        )
    sides = {name: (_side(a.rows, name, failed_score), _side(b.rows, name, failed_score)) for name in names}
    few = [] if metrics is not None else _without_few(sides, {*a.judged, *b.judged}, alpha)
    share = _share(alpha, len(sides))
    known = a.program is not None and b.program is not None and bool(a.program.state and b.program.state)
    try:
        scores = tuple(_score(name, *both, share, max_drop) for name, both in sides.items())
    except ModuleNotFoundError as error:
        raise CannotCompareError(f"Comparing needs {error.name}: pip install 'dspy-otel[decide]'.") from error
    return Comparison(
        a,
        b,
        scores,
        alpha,
        max_drop,
        failed_score,
        _predictor_changes(a.program, b.program) if known else (),
        known,
        tuple(name for name in dict.fromkeys((*a.metrics, *b.metrics)) if name not in both),
        tuple(few),
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _share(alpha: float, metrics: int) -> float:
    """The level of each of several metrics; with level 1 nothing is tested."""
    return alpha / metrics if alpha < 1 else alpha


# --- one metric -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Side:
    """The examples of one side, with their scores in one metric; those of repeats are averaged."""

    scores: dict[str | int, float] = field(default_factory=dict)
    first: dict[str | int, Example] = field(default_factory=dict)
    failed: int = 0
    unscored: int = 0
    nameless: int = 0
    repeated: int = 0


def _side(rows: Sequence[Row], metric: str, failed_score: float | None) -> _Side:
    found = _Side()
    values: dict[str | int, list[float]] = {}
    for row in rows:
        if metric not in row.scores:
            continue
        score = row.scores[metric]
        if score is None and row.example.error is not None:
            found.failed += 1
            score = failed_score
        elif score is None:
            found.unscored += 1
        if score is not None and row.key is None:
            found.nameless += 1
        elif score is not None and row.key is not None:
            values.setdefault(row.key, []).append(score)
            found.first.setdefault(row.key, row.example)
    found.repeated = sum(len(scores) > 1 for scores in values.values())
    found.scores = {key: sum(scores) / len(scores) for key, scores in values.items()}
    # What is scored by several metrics has a row for each, or one for all.
    known = {row.key for row in rows if row.key is None or metric in row.scores}
    found.unscored += len({row.key for row in rows} - known)
    return found


def _shared(of_a: _Side, of_b: _Side) -> list[str | int]:
    return [key for key in of_a.scores if key in of_b.scores]


def _without_few(sides: dict[str, tuple[_Side, _Side]], judged: Container[str], alpha: float) -> list[str]:
    """Take away what people and evaluators gave to too few of the same examples, as long as something stays."""
    taken = []
    pairs = {name: len(_shared(*both)) for name, both in sides.items() if name in judged}
    for name in sorted(pairs, key=lambda name: pairs[name]):
        if len(sides) > 1 and pairs[name] < needed_pairs(_share(alpha, len(sides))):
            taken.append(name)
            del sides[name]
    return taken


def _score(metric: str, of_a: _Side, of_b: _Side, alpha: float, max_drop: float) -> Score:
    shared = _shared(of_a, of_b)
    only = Count(len(of_a.scores) - len(shared), len(of_b.scores) - len(shared))
    nameless = Count(of_a.nameless, of_b.nameless)
    if not shared and nameless:
        raise CannotCompareError(
            f"Other rows: of A, {nameless.a:,} scored answers, of B, {nameless.b:,} have inputs that were not recorded "
            "whole, so that nothing says which are to the same question. Record content."
        )
    if not (of_a.scores and of_b.scores):
        raise CannotCompareError(
            f"No scores ({metric}): A has {len(of_a.scores):,} scored examples and {of_a.unscored:,} answers without a "
            f"score, B has {len(of_b.scores):,} and {of_b.unscored:,}."
        )
    if not shared:
        raise CannotCompareError(
            f"Other rows: A has {len(of_a.scores)} scored examples, B has {len(of_b.scores)}, and none is the same. "
            "Evaluate both on one dataset; with content off, with the same OTEL_DSPY_ID_KEY."
        )
    if len(shared) < needed_pairs(alpha):
        raise CannotCompareError(
            f"Too few: {len(shared)} {'example is' if len(shared) == 1 else 'examples are'} scored by both, and at "
            f"least {needed_pairs(alpha)} are needed to show anything at alpha {alpha:g}."
        )
    result = paired([of_a.scores[key] for key in shared], [of_b.scores[key] for key in shared], alpha)
    verdict = {1: BETTER, -1: WORSE}.get(result.shown, NOT_SHOWN)
    changed = sorted(
        (key for key in shared if abs(of_b.scores[key] - of_a.scores[key]) > NOISE),
        key=lambda key: of_b.scores[key] - of_a.scores[key],
    )
    kept = changed if len(changed) <= MAX_CHANGES else [*changed[: MAX_CHANGES // 2], *changed[-MAX_CHANGES // 2 :]]
    return Score(
        metric,
        result,
        verdict,
        verdict == WORSE and -result.difference > max_drop + NOISE,
        Count(of_a.failed, of_b.failed),
        Count(of_a.unscored, of_b.unscored),
        nameless,
        Count(of_a.repeated, of_b.repeated),
        only,
        tuple(
            Change(
                key,
                of_b.first[key].index,
                of_a.scores[key],
                of_b.scores[key],
                preview(of_a.first[key]),
                preview(of_b.first[key]),
            )
            for key in kept
        ),
    )


# --- the programs ---------------------------------------------------------------------------------------------------


def _predictor_changes(a: Candidate | None, b: Candidate | None) -> tuple[PredictorChange, ...]:
    before = {} if a is None else a.predictors
    after = {} if b is None else b.predictors
    found = []
    # Of a program that is known by its calls alone, predictors that were not called are not known.
    partial = any(one.demos is None for one in (*before.values(), *after.values()))
    for name in dict.fromkeys((*before, *after)):
        if partial and not (name in before and name in after):
            continue
        old, new = before.get(name, Predictor(None, ())), after.get(name, Predictor(None, ()))
        texts = old.instructions or "", new.instructions or ""
        pieces = tuple(differences(*texts)) if texts[0] != texts[1] else ()
        counts = None
        if old.demos is not None and new.demos is not None and old.demos != new.demos:
            counts = (len(old.demos), len(new.demos))
        if pieces or counts is not None:
            found.append(PredictorChange(name, pieces, counts))
    return tuple(found)
