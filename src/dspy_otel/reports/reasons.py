"""The section of the page that says why the winner is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Final
from xml.etree.ElementTree import Element

from dspy_otel.record.model import Optimization, Trial
from dspy_otel.reports import charts
from dspy_otel.reports.leaks import Leak
from dspy_otel.reports.markup import Child, cut, tag
from dspy_otel.reports.numbers import change_text, count_text, duration_text, money_text, score_text
from dspy_otel.reports.parts import MAX_VALUE, candidate, plain, table
from dspy_otel.reports.why import (
    NO_TEXTS,
    Change,
    Contrast,
    Demo,
    Explanation,
    Length,
    Sentence,
    Spending,
    Step,
    TrainAndValidation,
    explain,
)

MAX_STEPS: Final = 6
"""Most steps that are shown at once, those that gained most; more are there on demand."""
MAX_ALL_STEPS: Final = 100
"""Most steps that are there on demand, the last ones."""
MAX_ROWS: Final = 16
"""Most rows that are shown at once; more are there on demand."""
MAX_GROUPS: Final = 40
"""Most rows of one predictor."""
MAX_TEXT: Final = 4000
"""Most characters of one row."""
MAX_DEMOS: Final = 8
"""Most demos of one row."""
MAX_SPENDING: Final = 5
"""Most candidates that are listed with what they cost."""
MAX_LEAKS: Final = 5
"""Most rows that a warning shows."""
_ROLES: Final = {"train": "training", "val": "validation"}


def reasons(report: Optimization, names: Mapping[str, str]) -> list[Child]:
    """The whole section.

    Args:
        report: the optimization.
        names: short names of candidates.
    """
    if len(report.trials) < 2:
        return []
    found = explain(report)
    body: list[Child] = [_leaks(found), _parted(found.train_and_validation)]
    if found.steps:
        body += _origins(found, names)
        body += [tag("p", contrast_text(one)) for one in found.contrasts]
    beside = [one for one in (_train_and_validation(found), _spending(found, names)) if one is not None]
    length = _length(report, found, names)
    side = [one for one in (length, tag("div", beside) if beside else None) if one is not None]
    # The head of the page says already that there are no texts.
    notes = [tag("p", text, class_="note") for text in found.missing if text != NO_TEXTS]
    shown = [one for one in body if one is not None]
    if not shown and not side:
        return []
    return [tag("h2", "Why it got better", id="why"), shown, notes, tag("div", side, class_="pair") if side else None]


# --- sentences ------------------------------------------------------------------------------------------------------


def leak_text(found: Explanation) -> str:
    """That rows of datasets stand in the instructions, in a sentence."""
    roles = [_ROLES[role] for role in ("train", "val") if any(one.role == role for one in found.leaks)]
    rows = len(found.leaks)
    return (
        f"{rows} {' and '.join(roles)} row{'s stand' if rows > 1 else ' stands'} word for word in the instructions: "
        "on such rows the score says what was copied, not what was learned."
    )


def row_text(leak: Leak) -> str:
    """Which row, and which of its fields."""
    return f"{_ROLES.get(leak.role, leak.role)} row {leak.row}, {' and '.join(leak.fields)}"


def step_text(step: Step | None, name: str = "") -> str:
    """The step that brought something."""
    if step is None:
        return "the start"
    trial = "not scored by itself" if step.trial is None else f"trial {step.trial}"
    return f"{name}, {trial}" if name else trial


def gain_text(step: Step) -> str:
    """What a step gained: on all examples, or else on the same part of them."""
    if step.gain is not None:
        return f"{score_text(step.before)} → {score_text(step.after)}"
    if step.part_before is not None and step.part_after is not None:
        examples = "the same examples" if step.part_size is None else f"the same {step.part_size} examples"
        return f"{score_text(step.part_before)} → {score_text(step.part_after)}, on {examples} only"
    return "not known: not both were scored on all examples"


def changes_text(found: Explanation, step: Step) -> str:
    """What a step changed, or that nothing is new; empty when that is not known."""
    if step.changes == ():
        return "no new sentence or demo"
    replaced = "" if found.is_left(step) else "; nothing in the winner comes from it"
    return f"{'all together: ' if step.together else ''}{', '.join(_changes(step.changes or ()))}{replaced}"


def _changes(changes: Iterable[Change]) -> list[str]:
    found = []
    for one in changes:
        thing = "sentence" if one.part == "instructions" else "demo"
        (first, done), *more = [item for item in ((one.added, "added"), (one.removed, "removed")) if item[0]]
        text = f"{first} {thing}{'s' * (first > 1)} of {cut(one.predictor, 60)} {done}"
        found.append(" and ".join([text, *(f"{count} {also}" for count, also in more)]))
    return found


def contrast_text(one: Contrast) -> str:
    """What another candidate says about one kind of thing alone."""
    same = "demos" if one.part == "instructions" else "instructions"
    other = "the initial" if one.initial else "other"
    gain = f"the {one.part} alone gain {change_text(one.gain)}" if one.gain else f"the {one.part} alone gain nothing"
    return f"With the same {same} and {other} {one.part}, trial {one.trial} scored {score_text(one.score)}: {gain}."


def train_text(found: TrainAndValidation) -> str:
    """The scores on both sets, and whether they part."""
    scores = (
        f"The winner's lineage scores {score_text(found.train_after)} on training examples ({found.rollouts_after:,} "
        f"rollouts) and {score_text(found.validation_after)} on validation ({found.validation_size:,} examples), a gap "
        f"of {change_text(found.gap)}; the initial program {score_text(found.train_before)} and "
        f"{score_text(found.validation_before)}, {change_text(found.gap_before)}."
    )
    if found.error is None:
        return f"{scores} Whether that is chance is not judged: scores are not between 0 and 1."
    error = f"twice its standard error ({2 * found.error:.2g})"
    if found.parted:
        return f"{scores} The gap, and its growth, are more than {error}: judge by validation alone."
    return f"{scores} The gap, or its growth, is within {error}: no parting is shown."


def shorter_text(found: Explanation, shorter: Length) -> str:
    """That a shorter candidate is as good."""
    own = next(one for one in found.lengths if one.candidate == found.winner)
    return (
        f"Trial {shorter.trial} scores as much ({score_text(shorter.score)}) with {count_text(shorter.characters)} "
        f"characters in place of {count_text(own.characters)}."
    )


def amount_text(value: float, unit: str) -> str:
    """An amount of what was spent."""
    if unit == "USD":
        return money_text(value)
    return duration_text(value) if unit == "seconds" else f"{count_text(value)} tokens"


def spending_text(found: Explanation) -> str:
    """How much went to candidates that raised nothing."""
    idle = [one for one in found.spending if one.per_point is None]
    total = sum(one.spent for one in found.spending)
    text = (
        f"{len(idle)} of {len(found.spending)} candidates did not raise the best score. They took "
        f"{amount_text(sum(one.spent for one in idle), found.unit)} of {amount_text(total, found.unit)}"
    )
    if not found.elsewhere:
        return f"{text}."
    return f"{text}; {amount_text(found.elsewhere, found.unit)} went to proposals, bootstrapping and rollouts."


# --- elements -------------------------------------------------------------------------------------------------------


def _leaks(found: Explanation) -> Element | None:
    if not found.leaks:
        return None
    sentences: dict[str, list[Leak]] = {}
    for one in found.leaks[:MAX_LEAKS]:
        sentences.setdefault(one.sentence, []).append(one)
    items = [
        tag(
            "li",
            [tag("div", f"{row_text(one)}: ", tag("b", cut(one.words, 200))) for one in rows],
            tag("div", cut(sentence, 400), class_="soft"),
        )
        for sentence, rows in sentences.items()
    ]
    more = len(found.leaks) - MAX_LEAKS
    rest = tag("p", f"{more} more", class_="soft") if more > 0 else None
    return tag("div", tag("p", tag("b", "Leak: "), leak_text(found)), tag("ul", items), rest, class_="warn")


def _parted(found: TrainAndValidation | None) -> Element | None:
    if found is None or not found.parted:
        return None
    return tag("p", tag("b", "Training and validation part: "), train_text(found), class_="warn")


def _origins(found: Explanation, names: Mapping[str, str]) -> list[Child]:
    """The winner's instructions and demos in their order, each beside the step that brought it."""
    steps = found.step_of
    things: list[Sentence | Demo] = [*found.sentences, *found.demos]
    shown = found.steps
    largest = sorted(shown, key=lambda one: -math.inf if one.gain is None else one.gain)[-MAX_STEPS:]
    section: list[Child] = [tag("ul", [_step(found, one, names) for one in shown if one in largest])]
    if len(shown) > MAX_STEPS:
        summary = tag("summary", f"These gained most. All {len(shown)} steps")
        section.append(tag("details", summary, tag("ul", [_step(found, one, names) for one in shown[-MAX_ALL_STEPS:]])))
    rows: list[Element] = []
    predictors = dict.fromkeys(one.predictor for one in things)
    for predictor in predictors:
        own = [one for one in found.sentences if one.predictor == predictor]
        demos = [one for one in found.demos if one.predictor == predictor]
        lines = [_sentence_row(list(part), steps, names) for _, part in groupby(own, key=_origin)]
        lines += [_demo_row(list(part), steps, names) for _, part in groupby(demos, key=_origin)]
        if len(predictors) > 1:
            rows.append(tag("tr", tag("th", cut(predictor, MAX_VALUE), colspan=2, class_="part")))
        rows += lines[:MAX_GROUPS]
        if len(lines) > MAX_GROUPS:
            rows.append(tag("tr", tag("td", f"{len(lines) - MAX_GROUPS} more parts", colspan=2, class_="soft")))
    if rows:
        note = "The winner, sentence by sentence, with the step of its lineage that brought each first:"
        whole = tag("div", table(("came with", "what it says"), rows, class_="why"), class_="wide")
        if len(rows) > MAX_ROWS:
            section.append(tag("details", tag("summary", note.rstrip(":")), whole))
        else:
            section += [tag("p", note, class_="note"), whole]
    return section


def _step(found: Explanation, step: Step, names: Mapping[str, str]) -> Element:
    changes = changes_text(found, step)
    changed = f"; {changes}" if changes else ""
    return tag("li", _name(step, names), ": ", _gain(step), f"{gain_text(step)}{changed}")


def _name(step: Step, names: Mapping[str, str]) -> Element:
    trial = "" if step.trial is None else f", trial {step.trial}"
    return tag("span", candidate(names, step.candidate), trial, class_="nw")


def _gain(step: Step) -> list[Child]:
    if step.gain is None:
        return []
    class_ = "good" if step.gain > 0 else "bad" if step.gain < 0 else None
    return [tag("b", change_text(step.gain) if step.gain else "+0", class_=class_), " "]


def _sentence_row(part: Sequence[Sentence], steps: Mapping[str, Step], names: Mapping[str, str]) -> Element:
    return _row(part[0], steps, names, [cut(" ".join(one.text for one in part), MAX_TEXT)])


def _demo_row(part: Sequence[Demo], steps: Mapping[str, Step], names: Mapping[str, str]) -> Element:
    bootstrapped = sum(one.bootstrapped for one in part)
    kinds = [(bootstrapped, "bootstrapped"), (len(part) - bootstrapped, "labeled")]
    title = " and ".join(f"{count} {kind}" for count, kind in kinds if count)
    items = [tag("li", _demo_text(one)) for one in part[:MAX_DEMOS]]
    return _row(part[0], steps, names, [f"{title} demo{'s' * (len(part) > 1)}", tag("ul", items)])


def _demo_text(demo: Demo) -> str:
    if not isinstance(demo.value, dict):
        return cut(plain(demo.value), 160)
    fields = [(name, value) for name, value in demo.value.items() if name not in ("augmented", "reasoning")]
    return cut(", ".join(f"{name}: {plain(value)}" for name, value in fields), 160)


def _origin(one: Sentence | Demo) -> tuple[str | None, bool, int | None]:
    return one.step, one.certain, one.tried


def _row(
    first: Sentence | Demo, steps: Mapping[str, Step], names: Mapping[str, str], content: Sequence[Child]
) -> Element:
    step = steps.get(first.step or "")
    if step is None:
        start = tag("td", step_text(None), class_="soft nw")
        return tag("tr", start, tag("td", tag("div", content, class_="soft says")))
    latest = None if first.certain else tag("div", "at the latest", class_="soft")
    tried = None
    if first.tried is not None and step.trial is not None and first.tried < step.trial:
        tried = tag("div", f"first tried in trial {first.tried}", class_="soft")
    came = tag("td", _name(step, names), " ", _gain(step), latest, tried)
    return tag("tr", came, tag("td", tag("div", content, class_="says")))


def _length(report: Optimization, found: Explanation, names: Mapping[str, str]) -> Element | None:
    lengths = {one.trial: one for one in found.lengths}

    def label(trial: Trial) -> str:
        name = names.get(trial.candidate or "", trial.candidate or "")
        return (
            f"{name}, trial {trial.number}: {lengths[trial.number].characters:,} characters, {score_text(trial.score)}"
        )

    chart = charts.by_length(report, {trial: one.characters for trial, one in lengths.items()}, label)
    if chart is None:
        return None
    note = None if found.shorter is None else tag("p", shorter_text(found, found.shorter), class_="note")
    return tag("figure", tag("figcaption", "Score against the length of the prompt's own texts"), chart, note)


def _train_and_validation(found: Explanation) -> Element | None:
    both = found.train_and_validation
    if both is None or both.parted:
        return None
    return tag("div", tag("h3", "Training and validation"), tag("p", train_text(both)))


def _spending(found: Explanation, names: Mapping[str, str]) -> Element | None:
    if len(found.spending) < 2:
        return None
    columns = ("candidate", "trial", "spent", "gained", "for 0.01")
    rows = [
        tag(
            "tr",
            tag("td", candidate(names, one.candidate), class_="nw"),
            [tag("td", text, class_="n") for text in texts],
        )
        for one in found.spending[:MAX_SPENDING]
        for texts in [_spending_cells(one, found.unit)]
    ]
    return tag(
        "div",
        tag("h3", "What cost most for least"),
        tag("p", spending_text(found)),
        tag("div", table(columns, rows, set(columns[1:])), class_="wide"),
    )


def _spending_cells(one: Spending, unit: str) -> list[str]:
    per_point = "-" if one.per_point is None else amount_text(one.per_point, unit)
    return [str(one.trial), amount_text(one.spent, unit), change_text(one.gained) if one.gained else "0", per_point]
