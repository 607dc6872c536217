"""What changed in the program: the winner against the initial one, step by step, and the other candidates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Final
from xml.etree.ElementTree import Element

from dspy_otel.record.model import RUNNING, Example, Optimization, Predictor, Trial, number
from dspy_otel.reports import lineage
from dspy_otel.reports.lineage import Node
from dspy_otel.reports.markup import Child, cut, tag
from dspy_otel.reports.numbers import change_text, count_text, score_text
from dspy_otel.reports.parts import MAX_VALUE, Source, json_text, plain, trace_link, value_of
from dspy_otel.reports.words import differences

MAX_CANDIDATES: Final = 40
"""Most candidates whose texts are shown."""
MAX_STEPS: Final = 20
"""Most steps of the winner's line whose texts are shown."""
MAX_DEMOS: Final = 8
"""Most demos shown for one predictor."""
MAX_FEEDBACK: Final = 4
"""Most examples with feedback that are shown for one step."""
MAX_TEXT: Final = 12_000
"""Most characters of one instruction."""
MAX_TEXTS: Final = 600_000
"""Most characters of all instructions and demos; candidates beyond are left out."""


def line_of_winner(report: Optimization, names: Mapping[str, str], found: Mapping[str, Node]) -> list[Child]:
    """The winner's line, in a row that breaks where the page ends; all candidates as a graph on demand."""
    graph = lineage.graph(report, names)
    way = lineage.line(report, found)
    if graph is None or len(way) < 2:
        return []
    steps: list[Child] = []
    shown = way if len(way) <= 40 else [*way[:20], *way[-20:]]
    before: float | None = None
    for at, id_ in enumerate(shown):
        node = found[id_]
        changed = None
        if before is not None and node.score is not None and node.score != before:
            better = node.score > before
            changed = tag("span", f" {change_text(node.score - before)}", class_="good" if better else "bad")
        before = node.score if node.score is not None else before
        more = (
            tag("span", f"… {len(way) - len(shown)} more …", class_="soft")
            if len(shown) < len(way) and at == 20
            else None
        )
        class_ = "step winner" if id_ == way[-1] else "step"
        steps += [
            more,
            tag("span", tag("b", names.get(id_, id_)), f" {score_text(node.score)}", changed, class_=class_),
        ]
    front = any(node.on_front for node in found.values())
    caption = "From the initial program (seed), left, to the winner (ringed). Hollow: rejected."
    caption += " Violet rim: on the Pareto front." if front else ""
    winner = "The best so far was" if report.outcome == RUNNING else "The winner was"
    return [
        tag("h2", "Lineage"),
        tag("p", f"{winner} made in {len(way) - 1} step{'s' * (len(way) != 2)}:", class_="note"),
        tag("div", steps, class_="steps"),
        tag(
            "details",
            tag("summary", f"All {len(found)} candidates"),
            tag("p", caption, class_="note"),
            graph,
            open="" if len(found) <= 12 else None,
        ),
    ]


class Texts:
    """The texts of candidates, up to the most that a page may have."""

    def __init__(self, report: Optimization) -> None:
        self._report = report
        self._spent = 0

    def predictors(self, id_: str | None) -> Mapping[str, Predictor] | None:
        """Those of a candidate; None when they are not known or the page is full."""
        candidate = self._report.candidates.get(id_ or "")
        if candidate is None or self._spent > MAX_TEXTS:
            return None
        found = candidate.predictors
        self._spent += sum(
            min(len(one.instructions or ""), MAX_TEXT) + len(json_text((one.demos or ())[:MAX_DEMOS]))
            for one in found.values()
        )
        return found


def what_changed(report: Optimization) -> str | None:
    """What the winner has that the initial program had not, in a sentence."""
    before = report.candidates.get(report.initial_id or "")
    after = report.candidates.get(lineage.best_of(report) or "")
    if before is None or after is None or before.id == after.id:
        return None
    old, new = before.predictors, after.predictors
    texts = [name for name, one in new.items() if one.instructions != old.get(name, Predictor(None)).instructions]
    demos = sum(len(one.demos or ()) for one in new.values()) - sum(len(one.demos or ()) for one in old.values())
    parts = []
    if texts:
        parts.append(f"the instructions of {' and '.join(cut(name, 60) for name in texts[:6])}")
    if demos:
        parts.append(f"{abs(demos)} demo{'s' * (abs(demos) != 1)} {'added' if demos > 0 else 'removed'}")
    return f"Changed: {', '.join(parts)}." if parts else None


def programs(report: Optimization, names: Mapping[str, str], found: Mapping[str, Node], source: Source) -> list[Child]:
    """The whole section."""
    texts = Texts(report)
    seed = texts.predictors(report.initial_id)
    if seed is None or len(report.candidates) < 2:
        return []
    section: list[Child] = [tag("h2", "What changed in the program")]
    best = lineage.best_of(report)
    if best == report.initial_id:
        section.append(tag("p", "The initial program was returned: no candidate was better."))
    elif (program := texts.predictors(best)) is not None:
        which = "best program so far" if report.returned_id is None else "returned program"
        name = names.get(best or "", "")
        section.append(tag("p", f"The {which} ({name}) against the initial one. ", _key(), class_="note"))
        section += _changes(seed, program)
        section += _steps(report, names, found, source, texts)
    section += _others(report, names, found, texts, seed)
    return section


def samples(report: Optimization) -> list[int]:
    """Numbers of the trials with the feedback that is shown: those that the steps to the winner were made from."""
    way = lineage.line(report, lineage.nodes(report))[-MAX_STEPS - 1 :]
    found = (_sample(report, _proposal(report, child), parent) for parent, child in pairwise(way))
    return [one.number for one in found if one is not None]


def _steps(
    report: Optimization, names: Mapping[str, str], found: Mapping[str, Node], source: Source, texts: Texts
) -> list[Child]:
    """Each step of the winner's line against the one before, with the feedback that it was made from."""
    way = lineage.line(report, found)[-MAX_STEPS - 1 :]
    steps: list[Child] = []
    for parent, child in pairwise(way):
        before, after = texts.predictors(parent), texts.predictors(child)
        if before is None or after is None:
            continue
        proposal = _proposal(report, child)
        sample = _sample(report, proposal, parent)
        rollouts = None if sample is None else report.examples.get(sample.number)
        learned = None if not rollouts else _feedback(rollouts, source)
        title = f"{names.get(parent, parent)} → {names.get(child, child)}"
        parts = () if proposal is None else proposal.params.get("components")
        title += f", {cut(', '.join(map(str, parts)), 200)}" if isinstance(parts, (list, tuple)) and parts else ""
        score = found[child].score
        steps.append(
            tag(
                "details",
                tag("summary", title, "" if score is None else f": {score_text(score)}"),
                None if learned is None else [_stage(f"Feedback, trial {sample.number if sample else ''}"), learned],
                None if learned is None else _stage("Reflection and new instruction"),
                _changes(before, after),
                _outcome(proposal),
            )
        )
    if not steps or (len(way) == 2 and _proposal(report, way[1]) is None):
        return []  # one step is what has been shown already
    return [tag("h3", "Step by step, each against the one before"), steps]


def _stage(text: str) -> Element:
    return tag("p", text, class_="stage")


def _proposal(report: Optimization, child: str) -> Trial | None:
    """The trial in which a candidate was proposed, where the optimizer goes by iterations."""
    return next((one for one in report.trials if one.candidate == child and "iteration" in one.params), None)


def _sample(report: Optimization, proposal: Trial | None, parent: str) -> Trial | None:
    """The rollouts of the parent that a proposal was made from."""
    if proposal is None:
        return None
    return next(
        (
            one
            for one in report.trials
            if one.kind == "sample"
            and one.candidate == parent
            and one.params.get("iteration") == proposal.params.get("iteration")
        ),
        None,
    )


def _feedback(examples: Iterable[Example], source: Source) -> Element:
    """The examples of a sample, the worst first, as a model was shown them."""
    ranked = sorted(examples, key=lambda one: number(one.score) or 0.0)
    items = []
    for one in ranked[:MAX_FEEDBACK]:
        text = one.feedback if one.feedback is not None else one.error or ""
        items.append(
            tag(
                "li",
                tag("b", score_text(number(one.score))),
                " ",
                None if one.inputs is None else [value_of(one.inputs), " "],
                tag("span", cut(str(text), MAX_VALUE), class_="soft"),
                " ",
                trace_link(source, one.trace_id),
            )
        )
    if len(ranked) > MAX_FEEDBACK:
        items.append(tag("li", f"{len(ranked) - MAX_FEEDBACK} more", class_="soft"))
    return tag("ul", items)


def _outcome(proposal: Trial | None) -> Element | None:
    if proposal is None or proposal.accepted is None:
        return None
    words = "Accepted" if proposal.accepted else "Rejected"
    if proposal.before is not None and proposal.after is not None:
        words += f": {score_text(proposal.before)} → {score_text(proposal.after)} on the same examples"
    return tag("p", f"{words}.", class_="note")


def _others(
    report: Optimization,
    names: Mapping[str, str],
    found: Mapping[str, Node],
    texts: Texts,
    seed: Mapping[str, Predictor],
) -> list[Child]:
    shown: list[Child] = []
    skipped = {report.initial_id, lineage.best_of(report)}
    for node in sorted(
        found.values(), key=lambda node: (node.score is None, -(node.score or 0), node.accepted is False)
    ):
        if node.id not in report.candidates or node.id in skipped or len(shown) >= MAX_CANDIDATES:
            continue
        program = texts.predictors(node.id)
        if program is None:
            break
        parent = node.parents[0] if len(node.parents) == 1 else None
        before = None if parent in (None, report.initial_id) else texts.predictors(parent)
        against = [tag("p", "Against the initial program:", class_="note"), *_changes(seed, program)]
        if before is not None:
            name = names.get(parent or "", "")
            body: Child = [
                tag("p", f"Against {name}, which it was made from:", class_="note"),
                *_changes(before, program),
                tag("details", tag("summary", "Against the initial program"), against[1:]),
            ]
        else:
            body = against
        shown.append(tag("details", tag("summary", names.get(node.id, node.id), _about(node, names)), body))
    section: list[Child] = []
    if shown:
        count = f"Other candidates ({len(shown)}), the best first"
        section.append(tag("details", tag("summary", count), shown))
    left = len(set(report.candidates) - skipped) - len(shown)
    if left > 0:
        section.append(tag("p", f"{count_text(left)} more candidates are not shown.", class_="note"))
    return section


def _about(node: Node, names: Mapping[str, str]) -> str:
    made = " and ".join(names.get(parent, parent) for parent in node.parents[:5])
    parts = [
        "" if node.score is None else score_text(node.score),
        {True: "accepted", False: "rejected", None: ""}[node.accepted],
        f"made from {made}" if made and made != "seed" else "",
    ]
    text = ", ".join(part for part in parts if part)
    return f": {text}" if text else ""


def _changes(seed: Mapping[str, Predictor], program: Mapping[str, Predictor]) -> list[Child]:
    found: list[Child] = []
    same = []
    for name, predictor in list(program.items())[:50]:
        before = seed.get(name, Predictor(None))
        demos, demos_before = predictor.demos or (), before.demos or ()
        known = {json_text(demo) for demo in demos_before}
        added = [demo for demo in demos if json_text(demo) not in known]
        removed = len(demos_before) - sum(json_text(demo) in known for demo in demos)
        text, text_before = predictor.instructions or "", before.instructions or ""
        if text_before == text and not added and removed <= 0:
            same.append(name)
            continue
        found.append(tag("h3", cut(name, MAX_VALUE)))
        if text_before != text:
            found.append(_text_changes(text_before, text))
        else:
            found.append(tag("p", "Instructions as before.", class_="note"))
        if added:
            found.append(tag("p", f"{len(added)} demo{'s' * (len(added) > 1)} added:"))
            found += [tag("div", _demo(demo), class_="text") for demo in added[:MAX_DEMOS]]
            if len(added) > MAX_DEMOS:
                found.append(tag("p", f"{len(added) - MAX_DEMOS} more", class_="note"))
        if removed > 0:
            found.append(tag("p", f"{removed} demo{'s' * (removed > 1)} removed."))
    if same:
        found.append(tag("p", f"As before: {cut(', '.join(same), 1000)}.", class_="note"))
    return found


def _text_changes(before: str, after: str) -> Element:
    pieces: list[Child] = []
    for piece in differences(cut(before, MAX_TEXT), cut(after, MAX_TEXT)):
        name = {"added": "ins", "removed": "del"}.get(piece.kind)
        pieces.append(piece.text if name is None else tag(name, piece.text))
    return tag("div", pieces, class_="text")


def _key() -> list[Child]:
    return [tag("ins", "added"), " ", tag("del", "removed")]


def _demo(demo: Any) -> Child:
    if not isinstance(demo, dict):
        return cut(json_text(demo), MAX_VALUE)
    fields = [(name, value) for name, value in demo.items() if name != "augmented"]
    return tag("dl", [[tag("dt", cut(str(name), 80)), tag("dd", plain(value))] for name, value in fields[:30]])
