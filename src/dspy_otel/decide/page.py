"""A comparison as HTML, for notebooks: one element, without scripts, in which no text can become markup."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import Final
from xml.etree.ElementTree import Element, tostring

from dspy_otel.decide import show
from dspy_otel.decide.evidence import BETTER, WORSE, Evidence, PredictorChange, Score
from dspy_otel.decide.results import Results
from dspy_otel.record.model import Example
from dspy_otel.reports.markup import Child, cut, tag

MAX_LOSSES: Final = 20
MAX_WINS: Final = 10
"""Most changed examples that are shown of one metric."""
_MAX_TEXT: Final = 300
_FEW: Final = 6
"""Most changed examples that are shown at once; more are there on demand."""
_WIDTH: Final = 140
_LEFT: Final = "text-align:left;vertical-align:top;padding:3px 12px 3px 0"
_RIGHT: Final = "text-align:right;vertical-align:top;padding:3px 12px 3px 0;white-space:nowrap"
_COLORS: Final = {"added": "background:#2da44e40", "removed": "background:#cf222e40;text-decoration:line-through"}


def fragment(comparison: Evidence) -> str:
    """The comparison as one element of HTML."""
    return tostring(_element(comparison), encoding="unicode", method="html")


def _element(comparison: Evidence) -> Element:
    scores, sides = comparison.scores, (("A", comparison.a), ("B", comparison.b))
    return tag(
        "div",
        tag("p", tag("b", show.decision(comparison))),
        tag("ul", [tag("li", tag("b", letter), " ", _side(letter, side)) for letter, side in sides]),
        _table(
            ("metric", "A", "B", "difference", "", "pairs", "better / worse / same", "test"),
            [_score(score) for score in scores],
            numbers=(1, 2, 3, 5),
        ),
        [tag("p", f"{show.detectable_text(score)}.") for score in scores],
        _table(
            ("", "A", "B", "for each answer"),
            [
                (one.name, show.amount(one.a, one.unit), show.amount(one.b, one.unit), show.change_of(one, comparison))
                for one in show.known_costs(comparison)
            ],
            numbers=(1, 2, 3),
        ),
        tag("ul", [tag("li", sentence) for sentence in show.left_out(comparison)]),
        [_changes(score) for score in scores if score.changes],
        tag("ul", [tag("li", line) for line in show.program_lines(comparison)]),
        [_predictor(change) for change in comparison.predictors],
    )


def _side(letter: str, side: Results) -> list[Child]:
    name = None if side.name == letter else [tag("code", cut(side.name, _MAX_TEXT)), ": "]
    return [name, side.what, None if side.program is None else [", program ", tag("code", side.program.id)]]


def _interval(score: Score) -> Element:
    """The difference and its interval beside zero, as a line with a dot."""
    result = score.result
    widest = max(abs(result.low), abs(result.high), abs(result.difference)) or 1.0
    if not math.isfinite(widest):
        return tag("span")
    color = {BETTER: "#2da44e", WORSE: "#cf222e"}.get(score.verdict, "currentColor")

    def x(value: float) -> str:
        return f"{_WIDTH / 2 * (1 + 0.94 * value / widest):.1f}"

    return tag(
        "svg",
        tag("title", f"{show.level_text(score)} interval: {show.interval_text(score)}; the line is no difference"),
        tag("path", d=f"M{_WIDTH / 2} 0V16", stroke="currentColor", stroke_width=1, opacity=0.4),
        tag("path", d=f"M{x(result.low)} 8H{x(result.high)}", stroke=color, stroke_width=2),
        tag("circle", cx=x(result.difference), cy=8, r=4, fill=color),
        width=_WIDTH,
        height=16,
        role="img",
    )


def _score(score: Score) -> tuple[Child, ...]:
    result = score.result
    counts = f"{result.wins:,} / {result.losses:,} / {result.ties:,}"
    verdict = f"{show.test_text(score)}: {score.verdict}"
    scores = (show.score_text(result.a), show.score_text(result.b), show.difference_text(score))
    return (score.metric, *scores, _interval(score), f"{result.pairs:,}", counts, verdict)


def _changes(score: Score) -> Element:
    rows = [
        (
            change.key if change.index is None else change.index,
            *(f"{change.a:.3g}", f"{change.b:.3g}"),
            "" if change.of_b.inputs is None else cut(show.content(change.of_b.inputs), _MAX_TEXT),
            *(_answer(change.of_a), _answer(change.of_b)),
        )
        for change in show.shown_changes(score, MAX_LOSSES, MAX_WINS)
    ]
    return tag(
        "details",
        tag("summary", f"{show.result_changes(score):,} examples with another {score.metric}"),
        _table(("example", "A", "B", "inputs", "answer of A", "answer of B"), rows, numbers=(1, 2)),
        open="" if len(rows) <= _FEW else None,
    )


def _answer(example: Example) -> str:
    return cut(show.answer_text(example), _MAX_TEXT)


def _predictor(change: PredictorChange) -> Element:
    demos = None if change.demos is None else show.demos_text(change)
    pieces = [tag("span", piece.text, style=_COLORS.get(piece.kind)) for piece in change.instructions]
    text = tag("div", pieces, style="white-space:pre-wrap") if pieces else None
    return tag("details", tag("summary", change.name), tag("p", demos) if demos else None, text, open="")


def _table(head: Iterable[str], rows: Iterable[Iterable[Child]], numbers: Container[int] = ()) -> Element:
    """A table.

    Args:
        head: titles of its columns.
        rows: of cells.
        numbers: places of columns whose cells stand right.
    """

    def cells(name: str, row: Iterable[Child]) -> Element:
        return tag("tr", [tag(name, cell, style=_RIGHT if at in numbers else _LEFT) for at, cell in enumerate(row)])

    return tag("table", tag("thead", cells("th", head)), tag("tbody", [cells("td", row) for row in rows]))
