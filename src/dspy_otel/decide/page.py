"""A comparison as HTML, for notebooks: one element, without scripts, in which no text can become markup."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from xml.etree.ElementTree import Element, tostring

from dspy_otel.decide import show
from dspy_otel.decide.evidence import Evidence, PredictorChange, Score
from dspy_otel.record.model import Example
from dspy_otel.reports.markup import Child, cut, tag

MAX_LOSSES: Final = 20
MAX_WINS: Final = 10
"""Most changed examples that are shown of one metric."""
_MAX_TEXT: Final = 300
_LEFT: Final = "text-align:left"
_COLORS: Final = {"added": "background:#2da44e40", "removed": "background:#cf222e40;text-decoration:line-through"}


def fragment(comparison: Evidence) -> str:
    """The comparison as one element of HTML."""
    return tostring(_element(comparison), encoding="unicode", method="html")


def _element(comparison: Evidence) -> Element:
    scores, sides = comparison.scores, (("A", comparison.a), ("B", comparison.b))
    return tag(
        "div",
        tag("p", tag("b", show.decision(comparison))),
        tag("ul", [tag("li", f"{letter}: ", tag("code", side.name), f": {side.what}") for letter, side in sides]),
        _table(
            ("metric", "A", "B", "difference", "pairs", "better / worse / same", "test"),
            [_score(score) for score in scores],
        ),
        [tag("p", f"{show.detectable_text(score)}.") for score in scores],
        _table(
            ("", "A", "B", "for each answer"),
            [
                (one.name, show.amount(one.a, one.unit), show.amount(one.b, one.unit), show.change_of(one, comparison))
                for one in show.known_costs(comparison)
            ],
        ),
        tag("ul", [tag("li", sentence) for sentence in show.left_out(comparison)]),
        [_changes(score) for score in scores if score.changes],
        tag("ul", [tag("li", line) for line in show.program_lines(comparison)]),
        [_predictor(change) for change in comparison.predictors],
    )


def _score(score: Score) -> tuple[Child, ...]:
    result = score.result
    difference = f"{show.signed(result.difference)} ({show.signed(result.low)} to {show.signed(result.high)})"
    counts = f"{result.wins:,} / {result.losses:,} / {result.ties:,}"
    verdict = f"{show.test_text(score)}: {score.verdict}"
    values = (show.score_text(result.a), show.score_text(result.b), difference, f"{result.pairs:,}", counts, verdict)
    return (score.metric, *values)


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
        _table(("example", "A", "B", "inputs", "answer of A", "answer of B"), rows),
    )


def _answer(example: Example) -> str:
    return cut(show.answer_text(example), _MAX_TEXT)


def _predictor(change: PredictorChange) -> Element:
    demos = None if change.demos is None else show.demos_text(change)
    pieces = [tag("span", piece.text, style=_COLORS.get(piece.kind)) for piece in change.instructions]
    text = tag("div", pieces, style="white-space:pre-wrap") if pieces else None
    return tag("details", tag("summary", change.name), tag("p", demos) if demos else None, text)


def _table(head: Iterable[str], rows: Iterable[Iterable[Child]]) -> Element:
    body = [tag("tr", [tag("td", cell, style=_LEFT) for cell in row]) for row in rows]
    return tag("table", tag("thead", tag("tr", [tag("th", name, style=_LEFT) for name in head])), tag("tbody", body))
