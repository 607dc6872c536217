"""Scores as SVG, drawn by hand: a page that loads nothing cannot load a chart library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from xml.etree.ElementTree import Element

from dspy_otel.record.model import Optimization, Trial
from dspy_otel.reports.markup import Child, tag
from dspy_otel.reports.numbers import tick_text

WIDTH, HEIGHT, LOW = 560, 280, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 26, 14, 40
MAX_POINTS: Final = 1500
_PARTS: Final = frozenset({"minibatch", "sample"})
"""Kinds that are scored on some examples, and have a chart of their own."""
_HUGE: Final = 1e100
"""Larger scores are not drawn: one would make all others look equal."""

KINDS: Final = {
    "baseline": "the initial program",
    "full": "all examples",
    "validation": "all examples, a second time",
    "minibatch": "some examples",
    "sample": "rollouts to learn from",
}
"""Kinds of trials, in the order of the legend, with what they are scored on."""


WHOLE: Final = frozenset({"baseline", "full", "validation"})
"""Kinds whose scores can be compared: all on the same examples."""


def by_trial(report: Optimization, label: Callable[[Trial], str], parts: bool = False) -> Element | None:
    """Score against the number of the trial.

    Args:
        report: the optimization.
        label: the text of a point.
        parts: of trials on some examples, in place of those on all.
    """
    highest = max((trial.number for trial in report.trials), default=1)
    points = [(float(trial.number), trial) for trial in report.trials if (trial.kind in _PARTS) is parts]
    return _chart(report, points, label, "trial", _whole(highest), LOW if parts else HEIGHT)


def by_spend(report: Optimization, label: Callable[[Trial], str]) -> tuple[str, Element] | None:
    """Score against what had been spent when the trial ended, and what that is: tokens when no call has a price."""
    for what, used in (
        ("cost", [trial.spent.cost for trial in report.trials]),
        ("tokens", [trial.spent.tokens for trial in report.trials]),
        ("LM calls", [trial.spent.lm_calls for trial in report.trials]),
    ):
        # An unknown total counts as zero: the first calls may all have come from the cache.
        points = [(value or 0.0, trial) for value, trial in zip(used, report.trials, strict=True)]
        if any(value > 0 for value, _ in points):
            across = ticks(0, max(value for value, _ in points))
            title = "USD" if what == "cost" else what
            points = [(value, trial) for value, trial in points if trial.kind not in _PARTS]
            chart = _chart(report, points, label, f"{title} so far", across)
            return None if chart is None else (what, chart)
    return None


def by_price(report: Optimization, label: Callable[[Trial], str]) -> tuple[str, Element] | None:
    """Score against what one answer of the candidate takes: a better program may cost more for good.

    Trials with calls from the cache, as far as that is known, are left out: they cost less than their programs do.
    """
    nothing_cached = report.usage.cache_hits == 0
    whole = [
        one for one in report.trials if one.kind in WHOLE and one.size and (nothing_cached or one.usage.cache_hits == 0)
    ]
    for what, used in (
        ("cost", [trial.usage.cost for trial in whole]),
        ("tokens", [trial.usage.tokens for trial in whole]),
    ):
        points = [
            (1000 * value / trial.size, trial) for value, trial in zip(used, whole, strict=True) if value and trial.size
        ]
        if len({trial.candidate for _, trial in points}) > 1:
            values = [value for value, _ in points]
            title = "USD" if what == "cost" else what
            across = ticks(min(values), max(values))
            chart = _chart(report, points, label, f"{title} for 1,000 examples", across, line=False)
            return None if chart is None else (what, chart)
    return None


def by_length(report: Optimization, characters: Mapping[int, int], label: Callable[[Trial], str]) -> Element | None:
    """Score against how long a candidate's instructions and demos are.

    Args:
        report: the optimization.
        characters: by number of the trial.
        label: the text of a point.
    """
    points = [(float(characters[trial.number]), trial) for trial in report.trials if trial.number in characters]
    if len(set(characters.values())) < 2:
        return None
    across = ticks(min(characters.values()), max(characters.values()), 5)
    return _chart(report, points, label, "characters of instructions and demos", across, LOW, line=False)


def legend(report: Optimization) -> Element:
    """What the marks mean, for the kinds that occur."""
    present = {trial.kind for trial in report.trials if trial.score is not None}
    items: list[Child] = [
        tag("span", tag("svg", mark(kind, 8, 8), width=16, height=16, aria_hidden="true"), f"{kind}: {meaning}")
        for kind, meaning in KINDS.items()
        if kind in present
    ]
    if any(trial.best is not None for trial in report.trials):
        line = tag("path", d="M0 8H16", class_="best")
        items.append(tag("span", tag("svg", line, width=16, height=16, aria_hidden="true"), "best so far"))
    if report.winning is not None:
        ring = tag("circle", cx=8, cy=8, r=7, class_="ring")
        items.append(tag("span", tag("svg", ring, width=16, height=16, aria_hidden="true"), "winner"))
    return tag("p", items, class_="legend")


def mark(kind: str, x: float, y: float) -> Element:
    """The mark of a trial: a form and a colour for each kind, so that either is enough to distinguish them."""
    shapes = {
        "baseline": f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z",
        "validation": f"M{x:.1f} {y - 5.5:.1f}l5.5 10h-11z",
        "sample": f"M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0 -7l-7 7",
    }
    if kind in shapes:
        return tag("path", d=shapes[kind], class_=f"k-{kind}")
    known = kind if kind in KINDS else "full"
    return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.5 if known == "minibatch" else 5, class_=f"k-{known}")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that span ``low`` to ``high``."""
    if high - low <= max(abs(low), abs(high)) * 1e-9 or high - low < 1e-200:
        high = low + (abs(low) if abs(low) > 1e-200 else 1.0)
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough), 10 * power)
    first = math.floor(low / step + 1e-9)
    count = math.ceil(high / step - 1e-9) - first
    return [(first + place) * step for place in range(count + 1)]


def _whole(highest: int) -> list[float]:
    step = max(1, round(ticks(0, max(highest, 5))[1]))
    return [float(value) for value in range(0, highest + step, step)]


def _chart(
    report: Optimization,
    points: Sequence[tuple[float, Trial]],
    label: Callable[[Trial], str],
    what: str,
    across: list[float],
    height: int = HEIGHT,
    line: bool = True,
) -> Element | None:
    drawn = [(x, trial.score, trial) for x, trial in points if trial.score is not None and abs(trial.score) < _HUGE]
    if not drawn:
        return None
    scores = [score for _, score, _ in drawn]
    low, high = min(scores), max(scores)
    around = 0.1 * max(1.0, abs(low)) if low == high else 0.0  # equal scores are in the middle
    up = ticks(low - around, high + around)
    left, right, bottom, top = across[0], across[-1], up[0], up[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (WIDTH - _LEFT - _RIGHT) * (x - left) / (right - left),
            height - _BOTTOM - (height - _TOP - _BOTTOM) * (y - bottom) / (top - bottom),
        )

    parts: list[Any] = []
    for value in up:
        y = place(left, value)[1]
        parts.append(tag("path", d=f"M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}", class_="grid"))
        parts.append(tag("text", tick_text(value), x=_LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    for value in across:
        x = place(value, bottom)[0]
        parts.append(tag("text", tick_text(value), x=f"{x:.1f}", y=height - _BOTTOM + 16, text_anchor="middle"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(tag("text", what, x=middle, y=height - 6, text_anchor="middle", class_="axis"))
    steps = [
        (*place(x, min(max(trial.best, bottom), top)), x)
        for x, trial in sorted(points, key=_at)
        if trial.best is not None and abs(trial.best) < _HUGE
    ]
    if line and steps and any(trial.kind not in _PARTS for _, _, trial in drawn):
        parts.append(tag("path", d=_steps(steps), class_="best"))
    # The winner and the large marks come last, on top; when there are too many points, the small ones are left out.
    order = {"sample": 0, "minibatch": 1}
    drawn.sort(key=lambda point: (point[2].number == report.winner, order.get(point[2].kind, 2)))
    for x, score, trial in drawn[-MAX_POINTS:]:
        at = place(x, score)
        dot = mark(trial.kind, *at)
        if trial.accepted is False:
            dot.set("class", dot.get("class", "") + " rejected")
        parts.append(tag("g", tag("title", label(trial)), dot))
        if trial.number == report.winner:
            parts.append(tag("circle", cx=f"{at[0]:.1f}", cy=f"{at[1]:.1f}", r=9, class_="ring"))
    description = f"Scores of {len(drawn)} trials against {what}"
    return tag("svg", parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=description, class_="chart")


def _at(point: tuple[float, Trial]) -> tuple[float, int]:
    return point[0], point[1].number


def _steps(points: Sequence[tuple[float, float, float]]) -> str:
    """A line that stays level until the next point."""
    if not points:
        return ""
    path = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    path += [f"H{x:.1f}V{y:.1f}" for x, y, _ in points[1:]]
    return "".join(path)
