"""A comparison as text: a table for a terminal, Markdown, JSON, and JUnit's XML for CI."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from textwrap import shorten, wrap
from typing import Any, Final
from xml.etree.ElementTree import Element, SubElement, tostring

from dspy_otel.decide.evidence import BETTER, Change, Cost, Evidence, PredictorChange, Score, costs, model_changes
from dspy_otel.decide.results import Results
from dspy_otel.record.model import Example
from dspy_otel.reports.markup import clean
from dspy_otel.statistics import USUAL

WIDTH: Final = 80
MAX_LOSSES: Final = 5
MAX_WINS: Final = 3
"""Most changed examples that are shown of one metric."""
_AROUND: Final = 60
"""Characters of unchanged text that are shown between changes."""


# --- words and numbers ----------------------------------------------------------------------------------------------


def decision(comparison: Evidence) -> str:
    """The verdict as a sentence."""
    if comparison.regression:
        names = ", ".join(score.metric for score in comparison.scores if score.regression)
        return f"B is worse than A ({names})."
    worse = [score.metric for score in comparison.scores if score.verdict == "worse"]
    if worse:
        return f"B is worse than A ({', '.join(worse)}), by no more than the allowed {comparison.max_drop:g}."
    better = [score.metric for score in comparison.scores if score.verdict == BETTER]
    return f"B is better than A ({', '.join(better)})." if better else "No difference is shown."


def score_text(value: float) -> str:
    """A score."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def signed(value: float) -> str:
    """A difference of scores."""
    return f"+{score_text(value)}" if value > 0 else score_text(value + 0.0)


def p_text(p: float) -> str:
    """A p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def amount(value: float | None, unit: str = "") -> str:
    """A cost, a duration or a count."""
    if value is None:
        return "-"
    if unit == "$":
        return f"${value:,.2f}" if value >= 100 else f"${value:.4f}"
    return f"{value:.3g} s" if unit == "s" else f"{value:,.0f}"


def change_of(cost: Cost, comparison: Evidence) -> str:
    """By how much B took more or less than A: durations as they are, all else for each answer."""
    if cost.name == "answers" or cost.a is None or cost.b is None or not cost.a:
        return ""
    answers = len(comparison.a.rows), len(comparison.b.rows)
    share = cost.b / cost.a if cost.unit == "s" or not all(answers) else cost.b / answers[1] / (cost.a / answers[0])
    return f"{(share - 1) * 100:+.0f} %"


def known_costs(comparison: Evidence) -> list[Cost]:
    """The costs that are known of one side at least."""
    return [cost for cost in costs(comparison) if cost.a is not None or cost.b is not None]


def detectable_text(score: Score) -> str:
    """What the sample could have shown."""
    result = score.result
    if not math.isfinite(result.detectable):
        return "So few pairs cannot show any difference"
    return f"{result.pairs:,} pairs would show a difference of {score_text(result.detectable)} four times of five"


def interval_text(score: Score) -> str:
    """The interval of the difference; empty where one pair says nothing about it."""
    result = score.result
    return f"{signed(result.low)} to {signed(result.high)}" if math.isfinite(result.low) else ""


def level_text(score: Score) -> str:
    """The level of the interval, as ``95 %``."""
    return f"{100 * (1 - score.result.level):.3g} %"


def difference_text(score: Score) -> str:
    """The difference with its interval."""
    interval = interval_text(score)
    return signed(score.result.difference) + (f" ({level_text(score)}: {interval})" if interval else "")


def test_text(score: Score) -> str:
    """Name and outcome of the test."""
    alpha = score.result.alpha
    level = "" if alpha == USUAL else " (each difference counts)" if alpha >= 1 else f" (alpha {alpha:.3g})"
    return f"{score.result.test}: {p_text(score.result.p)}{level}"


def left_out(comparison: Evidence) -> list[str]:
    """What was not compared, or counts otherwise, in sentences."""
    found = []
    for name, side in (("A", comparison.a), ("B", comparison.b)):
        if side.unfinished:
            found.append(f"{name}: an evaluation did not finish.")
        if side.lost:
            found.append(f"{name}: {side.lost:,} of {side.size:,} evaluated examples were not recorded.")
    for score in comparison.scores:
        of = f" ({score.metric})" if len(comparison.scores) > 1 else ""
        if score.failed:
            counted = "are left out" if comparison.failed_score is None else f"count as {comparison.failed_score:g}"
            found.append(f"Failed answers {counted}{of}: {score.failed.a:,} of A, {score.failed.b:,} of B.")
        if score.unscored:
            found.append(f"Answers without a score{of}: {score.unscored.a:,} of A, {score.unscored.b:,} of B.")
        if score.nameless:
            found.append(
                f"Answers whose example is not known, for their inputs were not recorded whole{of}: "
                f"{score.nameless.a:,} of A, {score.nameless.b:,} of B."
            )
        if score.only:
            found.append(f"Examples of one side only{of}: {score.only.a:,} of A, {score.only.b:,} of B.")
        if score.repeated:
            found.append(
                f"Examples with repeats, averaged first{of}: {score.repeated.a:,} of A, {score.repeated.b:,} of B."
            )
    if comparison.few_pairs:
        found.append(f"Not compared, for too few examples of both have it: {', '.join(comparison.few_pairs)}.")
    if comparison.other_metrics:
        found.append(f"Metrics of one side only: {', '.join(comparison.other_metrics)}.")
    if len(comparison.scores) > 1 and comparison.alpha < 1:
        found.append(f"{len(comparison.scores)} metrics share alpha {comparison.alpha:g}.")
    return found


def shown_changes(score: Score, losses: int = MAX_LOSSES, wins: int = MAX_WINS) -> list[Change]:
    """The greatest losses, then the greatest wins."""
    lost = [change for change in score.changes if change.b < change.a]
    won = sorted((change for change in score.changes if change.b > change.a), key=lambda one: one.a - one.b)
    return [*lost[:losses], *won[:wins]]


def content(value: Any) -> str:
    """Inputs or an answer as one text: a single field without its name."""
    if isinstance(value, Mapping):
        if len(value) == 1:
            return content(next(iter(value.values())))
        return ", ".join(f"{name}: {content(part)}" for name, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def answer_text(example: Example) -> str:
    """An answer, or why there is none; empty when content was not recorded."""
    if example.error is not None:
        return example.error
    return "" if example.prediction is None else content(example.prediction)


def program_lines(comparison: Evidence) -> list[str]:
    """What differs in the programs and models, one line each, without the text of instructions."""
    a, b = comparison.a.program, comparison.b.program
    found = [f"{role} model: {before} -> {after}" for role, before, after in model_changes(comparison)]
    if a is not None and b is not None and a.id == b.id:
        return [f"the same program, {a.id}", *found]
    ids = [one.id if one is not None else "unknown" for one in (a, b)]
    if not comparison.programs_known and (a is not None or b is not None):
        found.append(f"program {ids[0]} -> {ids[1]}; what differs was not recorded")
    elif a is not None and b is not None:
        demos = all(one.demos is not None for side in (a, b) for one in side.predictors.values())
        same = "" if comparison.predictors else "; the instructions are the same"
        if same or not demos:
            found.append(f"program {ids[0]} -> {ids[1]}{same}{'' if demos else '; demos were not recorded'}")
    return found


def demos_text(change: PredictorChange) -> str:
    """How the demos of a predictor changed."""
    before, after = change.demos or (0, 0)
    return f"demos {before} -> {after}" + (", others" if before == after else "")


def _words(change: PredictorChange) -> str:
    """Changed instructions: [-removed-] and {+added+}, with some of what stayed around them."""
    found = []
    for piece in change.instructions:
        text = " ".join(piece.text.split())
        if piece.kind == "same":
            text = text if len(text) <= _AROUND else f"{text[: _AROUND // 2]} ... {text[-_AROUND // 2 :]}"
        else:
            text = f"{{+{text}+}}" if piece.kind == "added" else f"[-{text}-]"
        found.append(f"{text} " if piece.text[-1:].isspace() else text)
    return "".join(found)


def _side(results: Results) -> str:
    program = "" if results.program is None else f", program {results.program.id}"
    return f"{results.what}{program}"


# --- a terminal -----------------------------------------------------------------------------------------------------


def table(comparison: Evidence) -> str:
    """The comparison for a terminal, at most 80 columns wide."""
    return "\n".join(line.rstrip() for line in _table(comparison)) + "\n"


def _table(comparison: Evidence) -> Iterator[str]:
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        yield from wrapped(f"{letter}  {side.name}: {_side(side)}", "   ")
    yield ""
    yield _columns("", "A", "B", "difference")
    for score in comparison.scores:
        result = score.result
        difference, interval = signed(result.difference), interval_text(score)
        yield _columns(cut(clean(score.metric), 30), score_text(result.a), score_text(result.b), difference)
        if interval:
            yield _columns(f"  {level_text(score)} interval", "", "", interval)
        yield f"  {result.pairs:,} pairs: B better {result.wins:,}, worse {result.losses:,}, same {result.ties:,}"
        yield f"  {test_text(score)}: {score.verdict}"
        yield f"  {detectable_text(score)}"
    yield ""
    yield _columns("", "A", "B", "for each answer")
    for cost in known_costs(comparison):
        yield _columns(cost.name, amount(cost.a, cost.unit), amount(cost.b, cost.unit), change_of(cost, comparison))
    if sentences := left_out(comparison):
        yield ""
        for sentence in sentences:
            yield from wrapped(sentence, "  ")
    for score in comparison.scores:
        if changes := shown_changes(score):
            yield ""
            yield f"Examples with another {cut(clean(score.metric), 30)}, greatest losses first"
            for change in changes:
                yield from _changed(change)
            if more := result_changes(score) - len(changes):
                yield f"  and {more:,} more"
    lines = program_lines(comparison)
    if lines or comparison.predictors:
        yield ""
        yield "Programs"
        for line in lines:
            yield from wrapped(f"  {line}", "    ")
        for one in comparison.predictors:
            name = cut(clean(one.name), 40)
            if one.demos is not None:
                yield f"  {name}: {demos_text(one)}"
            if one.instructions:
                yield f"  {name}: instructions"
                yield from wrapped(f"    {shorten(clean(_words(one)), 1200, placeholder=' ...')}", "    ")
    yield ""
    yield from wrapped(decision(comparison), "  ")


def result_changes(score: Score) -> int:
    """How many examples have another score."""
    return score.result.wins + score.result.losses


def _changed(change: Change) -> Iterator[str]:
    place = f"#{change.index}" if change.index is not None else str(change.key)
    inputs = "" if change.of_b.inputs is None else content(change.of_b.inputs)
    yield cut(f"  {place:<6} {change.a:.3g} -> {change.b:.3g}  {line(inputs)}", WIDTH)
    for letter, example in (("A", change.of_a), ("B", change.of_b)):
        if text := answer_text(example):
            yield cut(f"         {letter}: {line(text)}", WIDTH)


def line(text: str) -> str:
    """A text on one line, without control characters."""
    return " ".join(clean(text).split())


def cut(text: str, width: int) -> str:
    """A text that takes at most so many columns; signs of East Asia and pictures take two."""
    if len(text) <= width and (text.isascii() or _columns_of(text) <= width):
        return text
    found = text[: width - 3]
    while _columns_of(found) > width - 3:
        found = found[:-1]
    return found + "..."


def _columns_of(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)


def _columns(name: str, *values: str) -> str:
    a, b, change = values
    return f"{name:<30}{a:>14}{b:>14}{change:>21}"


def wrapped(text: str, indent: str) -> Iterable[str]:
    """The lines of a text, with what stands before each but the first."""
    return wrap(clean(text), WIDTH, subsequent_indent=indent, break_long_words=True, break_on_hyphens=False)


# --- Markdown -------------------------------------------------------------------------------------------------------


def markdown(comparison: Evidence) -> str:
    """The comparison as Markdown, as for a comment on a pull request."""
    found = [f"**{_escaped(decision(comparison))}**", ""]
    found += [
        f"- {letter}: `{_code(side.name)}`: {_escaped(_side(side))}"
        for letter, side in (("A", comparison.a), ("B", comparison.b))
    ]
    found += ["", "| metric | A | B | difference | pairs | better / worse / same | test | verdict |"]
    found.append("|---|--:|--:|--:|--:|--:|---|---|")
    for score in comparison.scores:
        result = score.result
        cells = [_escaped(score.metric), score_text(result.a), score_text(result.b)]
        cells += [difference_text(score), f"{result.pairs:,}"]
        cells += [f"{result.wins:,} / {result.losses:,} / {result.ties:,}", test_text(score), score.verdict]
        found.append(f"| {' | '.join(cells)} |")
    found += ["", *(f"{detectable_text(score)}." for score in comparison.scores)]
    found += ["", "| | A | B | for each answer |", "|---|--:|--:|--:|"]
    for cost in known_costs(comparison):
        cells = [cost.name, amount(cost.a, cost.unit), amount(cost.b, cost.unit), change_of(cost, comparison)]
        found.append(f"| {' | '.join(cells)} |")
    found += ["", *(f"- {_escaped(sentence)}" for sentence in left_out(comparison))]
    for score in comparison.scores:
        changes = shown_changes(score)
        if not changes:
            continue
        found += ["", f"<details><summary>Examples with another {_escaped(score.metric)}</summary>", ""]
        found += ["| example | A | B | inputs | answer of A | answer of B |", "|---|--:|--:|---|---|---|"]
        for change in changes:
            texts = ["" if change.of_b.inputs is None else content(change.of_b.inputs)]
            texts += [answer_text(change.of_a), answer_text(change.of_b)]
            place = str(change.key if change.index is None else change.index)
            cells = [place, f"{change.a:.3g}", f"{change.b:.3g}", *(_escaped(cut(line(text), 200)) for text in texts)]
            found.append(f"| {' | '.join(cells)} |")
        found += ["", "</details>"]
    lines = program_lines(comparison)
    if lines or comparison.predictors:
        found += ["", "Programs:", "", *(f"- {_escaped(line)}" for line in lines)]
        for one in comparison.predictors:
            if one.demos is not None:
                found.append(f"- `{_code(one.name)}`: {demos_text(one)}")
            if one.instructions:
                found.append(f"- `{_code(one.name)}`: `{_code(shorten(_words(one), 1200, placeholder=' ...'))}`")
    return "\n".join(found) + "\n"


def _escaped(text: str) -> str:
    """A text in which nothing is Markdown or HTML."""
    for sign in "\\`*_[]|~#":
        text = text.replace(sign, f"\\{sign}")
    return clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    return line(text).replace("`", "'")


# --- JSON and JUnit -------------------------------------------------------------------------------------------------


def to_dict(comparison: Evidence) -> dict[str, Any]:
    """The comparison as values of JSON; the names are part of the interface."""
    return {
        "verdict": comparison.verdict,
        "regression": comparison.regression,
        "alpha": comparison.alpha,
        "max_drop": comparison.max_drop,
        "failed_score": comparison.failed_score,
        "a": _results(comparison.a),
        "b": _results(comparison.b),
        "scores": [_score(score) for score in comparison.scores],
        "costs": [{"name": one.name, "unit": one.unit, "a": one.a, "b": one.b} for one in costs(comparison)],
        "left_out": left_out(comparison),
        "programs": {
            "known": comparison.programs_known,
            "models": [{"role": role, "a": a, "b": b} for role, a, b in model_changes(comparison)],
            "predictors": [
                {
                    "name": one.name,
                    "instructions": [{"kind": piece.kind, "text": piece.text} for piece in one.instructions],
                    "demos": one.demos,
                }
                for one in comparison.predictors
            ],
        },
    }


def _results(results: Results) -> dict[str, Any]:
    return {
        "name": results.name,
        "what": results.what,
        "run_id": results.run_id,
        "program_id": None if results.program is None else results.program.id,
        "answers": len(results.rows),
        "models": {role: list(names) for role, names in results.models.items()},
    }


def _score(score: Score) -> dict[str, Any]:
    numbers = {name: _finite(value) for name, value in asdict(score.result).items() if name != "direction"}
    return {
        "metric": score.metric,
        "verdict": score.verdict,
        "regression": score.regression,
        **numbers,
        **{
            name: {"a": count.a, "b": count.b}
            for name, count in (
                ("failed", score.failed),
                ("unscored", score.unscored),
                ("nameless", score.nameless),
                ("repeated", score.repeated),
                ("only", score.only),
            )
        },
        "changes": [
            {
                "example": change.key,
                "index": change.index,
                "a": change.a,
                "b": change.b,
                "inputs": change.of_b.inputs,
                "expected": change.of_b.expected,
                "answer_a": change.of_a.prediction,
                "answer_b": change.of_b.prediction,
                "error_a": change.of_a.error,
                "error_b": change.of_b.error,
            }
            for change in score.changes
        ],
    }


def _finite(value: Any) -> Any:
    """A value that JSON has."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(comparison: Evidence) -> str:
    """The comparison as JSON."""
    return json.dumps(to_dict(comparison), indent=2, ensure_ascii=False, default=str) + "\n"


def junit(comparison: Evidence) -> str:
    """The comparison as JUnit's XML: a test for each metric, which fails when that is a regression."""
    failures = sum(score.regression for score in comparison.scores)
    suite = Element("testsuite", name="dspy-otel compare", tests=str(len(comparison.scores)), failures=str(failures))
    for score in comparison.scores:
        case = SubElement(suite, "testcase", classname="dspy_otel.compare", name=clean(score.metric))
        result = score.result
        scores = f"{score_text(result.a)} -> {score_text(result.b)}, {difference_text(score)}, {result.pairs} pairs"
        summary = f"{scores}, {test_text(score)}: {score.verdict}"
        if score.regression:
            failure = SubElement(case, "failure", message=summary)
            failure.text = clean(table(comparison))
        else:
            SubElement(case, "system-out").text = summary
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(suite, encoding="unicode") + "\n"


def _markdown_error(reason: str) -> str:
    return f"**Cannot be compared.** {_escaped(reason)}\n"


def _json_error(reason: str) -> str:
    return json.dumps({"verdict": None, "error": reason}, indent=2, ensure_ascii=False) + "\n"


def _junit_error(reason: str) -> str:
    suite = Element("testsuite", name="dspy-otel compare", tests="1", errors="1")
    case = SubElement(suite, "testcase", classname="dspy_otel.compare", name="compare")
    SubElement(case, "error", message=clean(reason))
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(suite, encoding="unicode") + "\n"


FORMATS: Final[Mapping[str, Callable[[Evidence], str]]] = {
    "table": table,
    "markdown": markdown,
    "json": as_json,
    "junit": junit,
}
ERRORS: Final[Mapping[str, Callable[[str], str]]] = {
    "markdown": _markdown_error,
    "json": _json_error,
    "junit": _junit_error,
}
"""What cannot be compared, and why; a terminal has that on stderr."""
