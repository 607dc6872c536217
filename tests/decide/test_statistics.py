"""The tests and intervals: by hand, against SciPy, and by simulation."""

from __future__ import annotations

import math
import sys
from itertools import product
from typing import Any

import pytest

from dspy_otel.decide.comparison import compare_results
from dspy_otel.decide.errors import CannotCompareError
from dspy_otel.decide.results import Results, Row
from dspy_otel.record.model import Example
from dspy_otel.statistics import MCNEMAR, WILCOXON, needed_pairs, paired

stats = pytest.importorskip("scipy.stats")
np = pytest.importorskip("numpy")

TIMES = 2000


def right_or_wrong(both: int, wins: int, losses: int, neither: int) -> tuple[list[float], list[float]]:
    a = [1.0] * both + [0.0] * wins + [1.0] * losses + [0.0] * neither
    b = [1.0] * both + [1.0] * wins + [0.0] * losses + [0.0] * neither
    return a, b


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    # Twice the tail of a coin thrown `wins + losses` times, counted by hand.
    [(0, 0, 1.0), (6, 0, 2 / 64), (5, 0, 2 / 32), (1, 7, 2 * 9 / 256), (2, 8, 2 * 56 / 1024), (5, 5, 1.0)],
)
def test_mcnemar_is_exact(wins: int, losses: int, p: float) -> None:
    found = paired(*right_or_wrong(20, wins, losses, 10))
    assert (found.test, found.wins, found.losses, found.ties) == (MCNEMAR, wins, losses, 30)
    assert found.p == pytest.approx(p)
    assert found.difference == pytest.approx((wins - losses) / found.pairs)
    assert found.a == pytest.approx((20 + losses) / found.pairs)
    assert found.direction == (wins > losses) - (wins < losses)


def test_the_interval_of_shares_is_the_wider_of_two() -> None:
    # Bonett and Price (2012), by hand: 100 pairs, 20 won, 10 lost, one more of each.
    found = paired(*right_or_wrong(50, 20, 10, 20))
    won, lost = 21 / 102, 11 / 102
    half = 1.959964 * math.sqrt((won + lost - (won - lost) ** 2) / 102)
    exact = stats.binomtest(20, 30).proportion_ci(0.95, "exact")
    assert found.high == pytest.approx(won - lost + half, abs=1e-6)
    assert found.high > (2 * exact.high - 1) * 0.3
    assert found.low == pytest.approx((2 * exact.low - 1) * 0.3)
    assert found.low < won - lost - half
    nothing = paired(*right_or_wrong(10, 0, 0, 10))
    assert nothing.low < -0.1 < 0.1 < nothing.high


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_interval_has_zero_when_the_test_shows_nothing(alpha: float) -> None:
    for pairs in (10, 30, 200):
        for wins in range(min(pairs, 25) + 1):
            for losses in range(min(wins, pairs - wins) + 1):
                found = paired(*right_or_wrong(pairs - wins - losses, wins, losses, 0), alpha)
                assert found.shown or found.low <= 0 <= found.high


def test_graded_scores_are_tested_as_scipy_does() -> None:
    a = [0.1, 0.4, 0.35, 0.8, 0.5, 0.9, 0.2, 0.66, 0.0, 0.3]
    b = [0.3, 0.4, 0.45, 0.68, 0.9, 0.95, 0.5, 0.7, 0.15, 0.31]
    found = paired(a, b)
    changes = np.asarray(b) - np.asarray(a)
    assert found.test == WILCOXON
    assert found.p == pytest.approx(stats.wilcoxon(changes[changes != 0]).pvalue)
    assert (found.wins, found.losses, found.ties, found.direction) == (8, 1, 1, 1)
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    # By hand: six ranks, all on one side, have a chance of 2 / 64.
    assert paired([0.5] * 6, [0.6, 0.7, 0.8, 0.9, 0.95, 0.99]).p == pytest.approx(2 / 64)


@pytest.mark.parametrize("steps", [5, 7, 1000])
def test_signed_ranks_are_counted_with_ties_too(steps: int) -> None:
    # Every way to give ten changes their signs, counted one by one.
    random = np.random.default_rng(steps)
    changes = random.integers(1, steps, 10) * random.choice([-1, 1], 10, p=[0.2, 0.8]) / steps
    ranks = stats.rankdata(np.abs(changes))
    sums = [sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign) for signs in product((0, 1), repeat=10)]
    won = ranks[changes > 0].sum()
    tails = sum(one <= won for one in sums), sum(one >= won for one in sums)
    assert paired([0.5] * 10, 0.5 + changes).p == pytest.approx(min(1, 2 * min(tails) / 1024))
    if steps == 1000:
        assert paired([0.5] * 10, 0.5 + changes).p == pytest.approx(stats.wilcoxon(changes, method="exact").pvalue)


def test_many_signed_ranks_are_as_scipy_has_them() -> None:
    random = np.random.default_rng(3)
    changes = random.normal(0.1, 1, 51)
    assert paired([0.0] * 51, changes).p == pytest.approx(stats.wilcoxon(changes, method="approx").pvalue)


def test_repeats_of_right_or_wrong_are_graded() -> None:
    assert paired([0.5, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]).test == WILCOXON


def test_sums_that_were_rounded_are_no_change() -> None:
    found = paired([(0.1 + 0.2) / 2] * 8, [0.15] * 8)
    assert (found.ties, found.p, found.difference) == (8, 1.0, 0.0)


def test_at_level_one_each_difference_counts() -> None:
    # Ranks point up, the mean down: nothing is shown, and nothing is asked to be.
    scores = [0.5] * 10, [0.6] * 9 + [-0.5]
    assert (paired(*scores).shown, paired(*scores, alpha=1).shown) == (0, -1)
    tested, untested = paired(*right_or_wrong(5, 0, 5, 0)), paired(*right_or_wrong(5, 0, 5, 0), alpha=1)
    assert (tested.shown, untested.shown) == (0, -1)
    # The interval and the smallest difference are the usual ones, not those of no confidence at all.
    assert (untested.low, untested.high, untested.detectable) == (tested.low, tested.high, tested.detectable)
    assert paired([0.1, 0.2, 0.3], [0.3, 0.2, 0.1], alpha=1).shown == 0
    assert paired([1.0] * 3, [0.0] * 3, alpha=1).detectable == math.inf


@pytest.mark.parametrize(("alpha", "pairs"), [(0.05, 6), (0.01, 8), (1.0, 1), (0.5, 2)])
def test_fewer_pairs_could_show_nothing(alpha: float, pairs: int) -> None:
    assert needed_pairs(alpha) == pairs
    assert paired(*right_or_wrong(0, pairs, 0, 0), alpha).p <= alpha
    if pairs > 1:
        assert paired(*right_or_wrong(0, pairs - 1, 0, 0), alpha).p > alpha


@pytest.mark.slow
def test_the_smallest_difference_is_found_four_times_of_five() -> None:
    random = np.random.default_rng(5)
    a = random.normal(0, 1, (TIMES, 50))
    noise = random.normal(0, 0.5, (TIMES, 50))
    detectable = float(np.mean([paired(x, x + y).detectable for x, y in zip(a[:50], noise[:50], strict=True)]))
    found = sum(paired(x, x + y + detectable).p <= 0.05 for x, y in zip(a, noise, strict=True))
    assert 0.74 < found / TIMES < 0.86


@pytest.mark.parametrize(("pairs", "wins", "losses"), [(24, 1, 1), (30, 2, 1), (50, 6, 6), (100, 0, 0), (200, 31, 18)])
def test_what_right_or_wrong_could_show_is_found_four_times_of_five(pairs: int, wins: int, losses: int) -> None:
    both = pairs - wins - losses
    detectable = paired(*right_or_wrong(both, wins, losses, 0)).detectable
    # As many examples change as did, but at least those that are the difference.
    changing = max((wins + losses) / pairs, detectable)
    won = (changing + detectable) / 2 / changing
    found = 0.0
    for changed in range(1, pairs + 1):
        critical = stats.binom.ppf(0.025, changed, 0.5)  # most losses of a significant result, or one more
        most = critical if 2 * stats.binom.cdf(critical, changed, 0.5) <= 0.05 else critical - 1
        found += stats.binom.pmf(changed, pairs, changing) * stats.binom.cdf(most, changed, 1 - won)
    assert 0.74 < found < 0.86


def expected_counts(share: float) -> tuple[int, int]:
    """What so many throws give in all but one of ten thousand experiments."""
    low, high = stats.binom.interval(0.9999, TIMES, share)
    return int(low), int(high)


def scores(kind: str, random: Any, difference: float) -> tuple[Any, Any]:
    """Scores of sixty examples, which are as hard for both programs; B is better by the difference."""
    hardness = random.uniform(0.2, 0.8, 60)
    if kind == "right or wrong":
        draw = random.uniform(size=(2, 60))
        return (draw[0] < hardness).astype(float), (draw[1] < hardness + difference).astype(float)
    return hardness + random.normal(0, 0.1, 60), hardness + difference + random.normal(0, 0.1, 60)


def test_few_examples_with_grades_are_not_too_sure() -> None:
    random = np.random.default_rng(18)
    found = [paired(*random.integers(0, 4, (2, 8)) / 3).p <= 0.05 for _ in range(TIMES)]
    assert sum(found) <= expected_counts(0.05)[1]


@pytest.mark.parametrize("kind", ["right or wrong", "graded"])
def test_with_no_difference_one_in_twenty_is_significant(kind: str) -> None:
    random = np.random.default_rng(16)
    found = [paired(*scores(kind, random, 0.0)) for _ in range(TIMES)]
    significant = sum(one.p <= 0.05 for one in found)
    low, high = expected_counts(0.05)
    assert significant <= high
    # An exact test of few whole numbers cannot use all of its level; ranks can.
    assert significant >= (low if kind == "graded" else TIMES * 0.01)
    # The interval has the true difference, zero, nineteen times of twenty.
    covered = sum(one.low <= 0 <= one.high for one in found)
    assert covered >= expected_counts(0.95)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["right or wrong", "graded"])
def test_the_interval_has_the_difference(kind: str) -> None:
    random = np.random.default_rng(17)
    covered = 0
    for _ in range(TIMES):
        found = paired(*scores(kind, random, 0.1))
        covered += found.low <= 0.1 <= found.high
    low, high = expected_counts(0.95)
    assert covered >= low
    assert kind == "right or wrong" or covered <= high


def test_without_scipy_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results("A", "a program", tuple(Row(n, {"m": 1.0}, Example(n)) for n in range(6)), ("m",))
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(CannotCompareError, match=r"needs scipy: pip install 'dspy-otel\[decide\]'\.$"):
        compare_results(results, results)
