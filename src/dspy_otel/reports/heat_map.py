"""Examples against candidates: what always fails, what every candidate solves, and what flips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.etree.ElementTree import Element

from dspy_otel.record.model import Example, Optimization, Trial, number
from dspy_otel.reports.examples import by_example
from dspy_otel.reports.markup import Child, cut, tag
from dspy_otel.reports.numbers import score_text

MAX_ROWS: Final = 100
"""Most examples that are drawn; those that all candidates solve come last."""
MAX_COLUMNS: Final = 80
"""Most candidates that are drawn: the baseline, the winner, and the best of the others."""
PASSED: Final = 0.5
"""Share of the scale of scores from which an example counts as solved, as ``dspy-otel runs --examples`` has it."""
_CELL, _WIDEST, _LEFT, _TOP = 11, 22, 170, 34
_FRAME: Final = 900
_LEVELS: Final = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One example: its scores in each column, None where it was not scored, and one that tells what it is."""

    example: Example
    scores: tuple[float | None, ...]

    @property
    def known(self) -> list[float]:
        """The scores that there are."""
        return [score for score in self.scores if score is not None]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """The scores of the examples of the whole dataset, by trial.

    Attributes:
        trials: the columns.
        rows: the hardest first.
        failing, flipping, solved: how many examples no candidate solves, some do, and all do.
        left_out: trials that are no column.
    """

    trials: tuple[Trial, ...]
    rows: tuple[Row, ...]
    failing: int
    flipping: int
    solved: int
    left_out: int


def heat_map(report: Optimization) -> HeatMap | None:
    """The map; None when fewer than two trials have the scores of their examples."""
    kinds = ("baseline", report.whole_kind)
    whole = [one for one in report.trials if one.kind in kinds and report.examples.get(one.number)]
    ranked = sorted(
        whole, key=lambda one: (one.kind != "baseline", one.number != report.winner, -(one.score or 0.0), one.number)
    )
    chosen = sorted(ranked[:MAX_COLUMNS], key=lambda one: one.number)
    if len(chosen) < 2:
        return None
    columns = [by_example(report.examples[trial.number]) for trial in chosen]
    shown: dict[Any, Example] = {}
    for column in columns:
        for key, example in column.items():
            if key not in shown or shown[key].inputs is None:
                shown[key] = example
    rows = [Row(example, tuple(_score(column.get(key)) for column in columns)) for key, example in shown.items()]
    low, high = _scale(rows)

    def solved(score: float) -> bool:
        return (score - low) / (high - low) >= PASSED

    outcomes = [[solved(score) for score in row.known] for row in rows]
    failing = sum(not any(one) for one in outcomes)
    always = sum(all(one) for one in outcomes)
    order = sorted(
        range(len(rows)),
        key=lambda at: (all(outcomes[at]), any(outcomes[at]), sum(rows[at].known) / len(rows[at].known)),
    )
    return HeatMap(
        tuple(chosen),
        tuple(rows[at] for at in order),
        failing,
        len(rows) - failing - always,
        always,
        len(whole) - len(chosen),
    )


def _score(example: Example | None) -> float | None:
    return None if example is None else number(example.score) or 0.0


def _scale(rows: Sequence[Row]) -> tuple[float, float]:
    """Both ends of the scale of scores; a metric that says right or wrong has 0 and 1."""
    known = [score for row in rows for score in row.known]
    return min(0.0, *known), max(1.0, *known)


def drawing(found: HeatMap, report: Optimization, names: Mapping[str, str]) -> Element:
    """The map as a picture: one path for each shade, so that it stays small."""
    rows = found.rows[:MAX_ROWS]
    wide = max(_CELL, min(_WIDEST, _FRAME // len(found.trials)))
    width = _LEFT + wide * len(found.trials) + 8
    height = _TOP + _CELL * len(rows) + 6
    low, high = _scale(found.rows)
    paths: list[list[str]] = [[] for _ in range(_LEVELS)]
    parts: list[Child] = []
    for at, row in enumerate(rows):
        y = _TOP + at * _CELL
        for place, score in enumerate(row.scores):
            if score is not None:
                level = min(_LEVELS - 1, max(0, int((score - low) / (high - low) * (_LEVELS - 1) + 0.5)))
                paths[level].append(f"M{_LEFT + place * wide} {y}h{wide - 1}v10h-{wide - 1}z")
        parts.append(
            tag(
                "g",
                tag("title", _about(row)),
                tag("path", d=f"M0 {y}H{width}V{y + _CELL}H0z", class_="hit"),
                tag("text", _name(row.example), x=_LEFT - 6, y=y + 9, text_anchor="end"),
            )
        )
    for level, path in enumerate(paths):
        if path:
            parts.append(tag("path", d="".join(path), class_=f"h{level}"))
    for place, trial in enumerate(found.trials):
        x, winner = _LEFT + place * wide, trial.number == report.winner
        if winner or trial.kind == "baseline":
            name = names.get(trial.candidate or "", f"trial {trial.number}")
            parts.append(
                tag(
                    "path",
                    d=f"M{x - 0.5} {_TOP - 1}v{_CELL * len(rows) + 1}h{wide}v-{_CELL * len(rows) + 1}z",
                    class_="mine",
                )
            )
            anchor = "end" if place > len(found.trials) - 3 else "start"
            parts.append(
                tag(
                    "text",
                    "winner" if winner else name,
                    x=x + (wide if anchor == "end" else 0),
                    y=_TOP - (20 if winner else 6),
                    text_anchor=anchor,
                )
            )
    label = f"Scores of {len(found.rows)} examples by {len(found.trials)} candidates"
    return tag(
        "svg",
        parts,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
        class_="heat",
    )


def _name(example: Example) -> str:
    """The beginning of an example's inputs, or its place."""
    place = "" if example.index is None else f"{example.index}"
    value = example.inputs
    if isinstance(value, dict):
        value = next(iter(value.values()), None)
    return f"{place} {cut(str(value), 22)}".strip() if value is not None else f"example {place or '?'}"


def _about(row: Row) -> str:
    return f"{_name(row.example)}: mean {score_text(sum(row.known) / len(row.known))} of {len(row.known)} candidates"
