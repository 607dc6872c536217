"""Two scores of each of the same examples: is the difference more than chance? Pure; needs SciPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

POWER: Final = 0.8
"""How often a difference of the smallest detectable size would be found."""
MCNEMAR: Final = "exact McNemar"
WILCOXON: Final = "Wilcoxon signed-rank"
USUAL: Final = 0.05
"""The level of intervals where nothing is tested."""
_EXACT: Final = 50
"""Most changed examples whose signed ranks are counted; more are close enough to normal."""
_DIGITS: Final = 9
"""Digits of changes that count: equal ones differ in their last, for sums and differences are rounded."""
NOISE: Final = 10.0**-_DIGITS
"""Differences of means up to that are rounding."""


@dataclass(frozen=True, slots=True)
class Paired:
    """A paired comparison of the scores of two programs.

    Attributes:
        pairs: how many examples both were scored on.
        a, b: mean scores on those.
        difference: ``b - a``.
        low, high: its confidence interval.
        wins, losses, ties: examples that B did better, worse and equally well.
        test: name of the test.
        p: chance of a difference at least as large where there is none, two-sided.
        detectable: the smallest difference that so many pairs would show, four times of five; infinite where they are
            too few to show any.
        alpha: level of the test; 1 for none, where each difference counts.
        direction: 1 where the test points to B, -1 where it points to A, else 0.
    """

    pairs: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    test: str
    p: float
    detectable: float
    alpha: float
    direction: int

    @property
    def level(self) -> float:
        """Level of the interval and of the smallest detectable difference."""
        return _level(self.alpha)

    @property
    def shown(self) -> int:
        """1 where B is shown to be better than A, -1 where it is shown to be worse, else 0.

        Ranks may move one way and the mean the other: then nothing is shown.
        """
        sign = (self.difference > NOISE) - (self.difference < -NOISE)
        return sign if self.alpha >= 1 or (self.p <= self.alpha and sign == self.direction) else 0


def _level(alpha: float) -> float:
    return alpha if alpha < 1 else USUAL


def needed_pairs(alpha: float) -> int:
    """The fewest pairs that could show anything: with fewer, not even a win on every example is significant."""
    return max(1, math.ceil(math.log2(2 / alpha) - 1e-9))


def paired(a: Sequence[float], b: Sequence[float], alpha: float = 0.05) -> Paired:
    """Compare scores of the same examples, in the same order.

    Right or wrong (every score is 0 or 1) is tested exactly, by McNemar, and its interval is Bonett and Price's, or
    Clopper and Pearson's for the examples that changed where that is wider. Graded scores are tested by Wilcoxon's
    signed ranks, and the interval is Student's for the mean difference.

    Args:
        a: scores of A.
        b: scores of B.
        alpha: level of the test and of the interval; 1 for no test, and the usual interval.

    Raises:
        ImportError: SciPy is missing.
    """
    import numpy as np
    from scipy import special  # the functions that scipy.stats is made of: importing that takes a second

    of_a, of_b = np.asarray(a, float), np.asarray(b, float)
    changes = np.round(of_b - of_a, _DIGITS)
    wins, losses, pairs = int((changes > 0).sum()), int((changes < 0).sum()), len(changes)
    difference, level = float(changes.mean()), _level(alpha)
    binary = bool(np.isin(of_a, (0.0, 1.0)).all() and np.isin(of_b, (0.0, 1.0)).all())
    if binary:
        test, p, towards = MCNEMAR, _mcnemar(special, wins, losses), float(wins - losses)
        # One more win and one more loss: without, no change at all would look like certainty.
        spread = _spread_of_shares((wins + 1) / (pairs + 2), (losses + 1) / (pairs + 2)) / math.sqrt(pairs + 2)
        middle, times = (wins - losses) / (pairs + 2), float(special.ndtri(1 - level / 2))
        # At least as wide as the exact interval for the examples that changed: it has zero when the test shows nothing.
        least, most = _signs(special, wins, losses, level)
        low = max(-1.0, min(middle - times * spread, least / pairs))
        high = min(1.0, max(middle + times * spread, most / pairs))
        error = _spread_of_shares(wins / pairs, losses / pairs) / math.sqrt(pairs)
    else:
        test, (p, towards) = WILCOXON, _wilcoxon(special, np, changes)
        error = float(changes.std(ddof=1)) / math.sqrt(pairs) if pairs > 1 else math.inf
        times = float(special.stdtrit(pairs - 1, 1 - level / 2)) if pairs > 1 else math.inf
        low, high = difference - times * error, difference + times * error
    detectable, needed = math.inf, needed_pairs(level)
    if pairs >= needed:
        # So many examples must change at all: the share of all that do is large enough, four times of five.
        share = float(special.betaincinv(needed, pairs - needed + 1, POWER))
        largest = 1.0 if binary else float(np.abs(changes).max()) or 1.0
        few = share * largest if binary or wins + losses < needed else 0.0
        detectable = max(float(special.ndtri(1 - level / 2) + special.ndtri(POWER)) * error, few)
    return Paired(
        pairs,
        float(of_a.mean()),
        float(of_b.mean()),
        difference,
        low,
        high,
        wins,
        losses,
        pairs - wins - losses,
        test,
        p,
        detectable,
        alpha,
        direction=(towards > 0) - (towards < 0),
    )


def _spread_of_shares(wins: float, losses: float) -> float:
    return math.sqrt(max(0.0, wins + losses - (wins - losses) ** 2))


def _mcnemar(special: Any, wins: int, losses: int) -> float:
    """Both tails of a coin thrown as often as an example changed."""
    return min(1.0, 2 * float(special.bdtr(min(wins, losses), wins + losses, 0.5))) if wins + losses else 1.0


def _signs(special: Any, wins: int, losses: int, level: float) -> tuple[float, float]:
    """Clopper and Pearson's interval for ``wins - losses``, of as many changes."""
    low = float(special.betaincinv(wins, losses + 1, level / 2)) if wins else 0.0
    high = float(special.betaincinv(wins + 1, losses, 1 - level / 2)) if losses else 1.0
    return (2 * low - 1) * (wins + losses), (2 * high - 1) * (wins + losses)


def _wilcoxon(special: Any, np: Any, changes: Any) -> tuple[float, float]:
    """The p-value, and the sum of signed ranks."""
    changed = changes[changes != 0]
    if not len(changed):
        return 1.0, 0.0
    _, places, ties = np.unique(np.abs(changed), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[places]
    towards = float((ranks * np.sign(changed)).sum())
    if len(changed) > _EXACT:
        # The sum of signed ranks has mean zero and, sign by sign, the variance of their squares.
        return 2 * float(special.ndtr(-abs(towards) / math.sqrt(float((ranks**2).sum())))), towards
    # How likely each sum of the ranks of wins is when every sign is a coin's. Ranks of ties are halves, so all are
    # doubled. SciPy counts so too, but not with ties, which grades have: of few, its approximation is far too sure.
    doubled = np.rint(2 * ranks).astype(int)
    chances = np.ones(1)
    for rank in doubled:
        longer = np.zeros(len(chances) + rank)
        longer[: len(chances)] += chances / 2
        longer[rank:] += chances / 2
        chances = longer
    won = int(doubled[changed > 0].sum())
    return min(1.0, 2 * float(min(chances[: won + 1].sum(), chances[won:].sum()))), towards
