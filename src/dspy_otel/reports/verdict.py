"""Is the winner better than the initial program, by how much, and is that certain?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dspy_otel.record.model import RUNNING, Optimization, number
from dspy_otel.reports.examples import Compared
from dspy_otel.reports.numbers import change_text, score_text
from dspy_otel.statistics import Paired, needed_pairs, paired

ALPHA: Final = 0.05
"""How often a difference may be shown where there is none."""
_FAILED: Final = 0.0
"""The score of an example that raised, as ``dspy.Evaluate`` counts it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer in words.

    Attributes:
        headline: a few words.
        sentences: what it is known by.
        good: whether it is good news; None when it is neither.
    """

    headline: str
    sentences: tuple[str, ...]
    good: bool | None = None


def verdict_of(report: Optimization, examples: Sequence[Compared]) -> Verdict | None:
    """The verdict; None while nothing has been scored.

    Args:
        report: the optimization.
        examples: the winner against the baseline, by example.
    """
    if report.best is None and report.baseline is None:
        return None
    running = report.outcome == RUNNING
    if report.baseline is None or report.best is None:
        return Verdict(f"Best score {score_text(report.best)}", ("The initial program was not scored.",))
    scores = f"{score_text(report.baseline)} → {score_text(report.best)}"
    gain = report.best - report.baseline
    if gain <= 0:
        words = "No candidate is better so far" if running else "No candidate was better than the initial program"
        return Verdict(f"{words}: {score_text(report.baseline)}", _reported(report), None)
    result = _tested(examples)
    if isinstance(result, str):
        return Verdict(f"Better by {gain:.3g}: {scores}", (result, *_reported(report)), True)
    certain = result.shown > 0
    chance = f"p {result.p:.2g}" if result.p >= 0.001 else "p < 0.001"
    facts = (
        f"{result.wins} of {result.pairs} examples got better, {result.losses} got worse, {result.ties} stayed; the "
        f"change is {change_text(result.difference)}, 95 % interval {change_text(result.low)} to "
        f"{change_text(result.high)} ({result.test}, {chance})."
    )
    notes = [facts]
    if not certain:
        notes.append(
            f"So few changed examples can be chance: of {result.pairs}, a change of about {result.detectable:.2g} "
            "would show."
        )
    full = sum(trial.kind == "full" for trial in report.trials)
    if certain and full > 1:
        notes.append(
            f"The winner is the best of {full} candidates on these same examples, so part of its gain is choice: "
            "compare the two on examples that it has not seen (dspy-otel compare)."
        )
    headline = f"{'Better' if certain else 'Better, but not certain'}: {scores} ({change_text(gain)})"
    return Verdict(headline, (*notes, *_reported(report)), True if certain else None)


def _tested(examples: Sequence[Compared]) -> Paired | str:
    """The paired test, or why there is none."""
    if not examples:
        return "Whether that is certain is not known: both programs' scores of single examples were not recorded."
    if len(examples) < needed_pairs(ALPHA):
        return (
            f"Whether that is certain cannot be known from {len(examples)} examples: {needed_pairs(ALPHA)} are needed."
        )
    sides = [[number(side.score) for side in (one.before, one.after)] for one in examples]
    before, after = ([_FAILED if pair[side] is None else float(pair[side] or 0.0) for pair in sides] for side in (0, 1))
    try:
        return paired(before, after, ALPHA)
    except ModuleNotFoundError as error:
        return f"To see whether that is certain, install {error.name}: pip install 'dspy-otel[decide]'."


def _reported(report: Optimization) -> tuple[str, ...]:
    """The optimizer's own number of the winner, where it is another one."""
    winner = report.winning
    if winner is None or winner.reported is None or winner.reported == winner.score:
        return ()
    return (f"{report.optimizer} itself reports {winner.reported:.6g}.",)
