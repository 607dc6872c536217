"""Why the winner of an optimization is better, as text, JSON and HTML, from wherever it was recorded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import tostring

from dspy_otel.decide.errors import CannotCompareError
from dspy_otel.decide.results import read_file
from dspy_otel.decide.show import WIDTH, content, cut, line, wrapped
from dspy_otel.record.history import optimizations
from dspy_otel.record.model import Optimization, Origin
from dspy_otel.reports.markup import tag
from dspy_otel.reports.page import names_of
from dspy_otel.reports.reasons import (
    MAX_LEAKS,
    changes_text,
    contrast_text,
    gain_text,
    leak_text,
    reasons,
    row_text,
    shorter_text,
    spending_text,
    step_text,
    train_text,
)
from dspy_otel.reports.why import Demo, Explanation, Sentence, Step, explain

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

_PART = "#"
_CAME = 12
"""Width of the column that says where a line comes from."""
_STYLE = (
    ".dspy-why table{border-collapse:collapse;margin:0}.dspy-why td,.dspy-why th{text-align:left;"
    "vertical-align:top;padding:3px 12px 3px 0;font-size:inherit}.dspy-why figcaption{font-weight:bold}"
    ".dspy-why .n{text-align:right}.dspy-why .soft,.dspy-why .note{opacity:.7}.dspy-why .nw{white-space:nowrap}"
    ".dspy-why .good{color:#2da44e}.dspy-why .bad{color:#cf222e}.dspy-why .says{white-space:pre-wrap}"
    ".dspy-why .warn{border-left:3px solid #b26a00;padding:4px 12px}.dspy-why figure{margin:12px 0;max-width:560px}"
    ".dspy-why svg text{fill:currentColor;font-size:12px}.dspy-why .grid{stroke:#8884}.dspy-why .k-full{fill:#1f6feb}"
    ".dspy-why .k-baseline{fill:#b26a00}.dspy-why .k-validation{fill:#8250df}.dspy-why .rejected{opacity:.45}"
    ".dspy-why .ring{fill:none;stroke:#2da44e;stroke-width:2.5}"
)
"""What the section needs in a notebook, whose own colours stay; every rule is for the section alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Why(Explanation):
    """Why the winner is better, as Python and notebooks show it.

    Attributes:
        record: the optimization.
    """

    record: Optimization = dataclasses.field(default_factory=Optimization, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All of it as values of JSON."""
        return to_dict(self)

    def __str__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        section = tag("div", tag("style", _STYLE), reasons(self.record, names_of(self.record)), class_="dspy-why")
        return tostring(section, encoding="unicode", method="html")


def why_of(record: Optimization) -> Why:
    """Explain an optimization.

    Args:
        record: of it.
    """
    found = explain(record)
    return Why(**{one.name: getattr(found, one.name) for one in dataclasses.fields(found)}, record=record)


# --- where it is ----------------------------------------------------------------------------------------------------


def find_optimization(
    reference: str | os.PathLike[str] | Origin | Iterable[ReadableSpan],
    experiment: str | None = None,
    tracking_uri: str | None = None,
) -> Optimization:
    """The optimization that is meant; the arguments are those of :func:`dspy_otel.why`.

    Raises:
        CannotCompareError: it is not there.
    """
    if isinstance(reference, Origin):
        if reference.mlflow_run_id is None:
            raise CannotCompareError(
                f"The optimization {reference.run_id} is not in MLflow: give its spans, or a file of them."
            )
        reference = reference.mlflow_run_id
    if not isinstance(reference, (str, os.PathLike)):
        return _chosen(optimizations(reference), "spans", None)
    text = os.fspath(reference)
    if Path(text).is_file():
        return _chosen(read_file(Path(text)).optimizations, text, None)
    place, _, part = text.rpartition(_PART)
    if place and Path(place).is_file():
        return _chosen(read_file(Path(place)).optimizations, place, part.partition("/")[0])
    if Path(text).suffix in (".json", ".jsonl", ".pb") or os.sep in text:
        raise CannotCompareError(f"There is no file {place or text}.")
    from dspy_otel.mlflow.read import read_optimization
    from dspy_otel.mlflow.retry import ExportError

    try:
        found = read_optimization(place or text, experiment=experiment, tracking_uri=tracking_uri)
    except (ExportError, LookupError) as error:
        raise CannotCompareError(str(error)) from error
    return found.optimization


def _chosen(found: Iterable[Optimization], name: str, part: str | None) -> Optimization:
    """That with the id, or the newest that is no step of another one."""
    there = list(found)
    chosen = [one for one in there if (one.parent is None if part is None else one.id == part)]
    if not chosen:
        known = ", ".join(one.id for one in there) or "none"
        raise CannotCompareError(f"{name}: there is no such optimization; there are {known}.")
    return chosen[-1]


# --- text -----------------------------------------------------------------------------------------------------------


def text_of(found: Explanation) -> str:
    """The explanation for a terminal, at most 80 columns wide."""
    return "\n".join(one.rstrip() for one in _lines(found)) + "\n"


def _lines(found: Explanation) -> Iterator[str]:
    yield "Why it got better"
    if found.leaks:
        yield from wrapped(f"  ! {leak_text(found)}", "    ")
        for leak in found.leaks[:MAX_LEAKS]:
            yield cut(f"    {row_text(leak)}: {line(leak.words)}", WIDTH)
    both = found.train_and_validation
    if both is not None:
        yield from wrapped(f"  {'! ' if both.parted else ''}{train_text(both)}", "    ")
    if not found.steps:
        yield (
            "  No candidate was better than the initial program." if found.winner == found.initial else "  Nothing yet."
        )
    things: list[Sentence | Demo] = [*found.sentences, *found.demos]
    for step in found.steps:
        yield from _step(found, step)
    for predictor in dict.fromkeys(one.predictor for one in things):
        yield cut(f"  {line(predictor)}", WIDTH)
        own = [one for one in things if one.predictor == predictor]
        for _, part in groupby(own, key=lambda one: (one.step, one.certain, one.tried)):
            yield from _said(found.step_of, list(part))
    for contrast in found.contrasts:
        yield from wrapped(f"  {contrast_text(contrast)}", "    ")
    if found.shorter is not None:
        yield from wrapped(f"  {shorter_text(found, found.shorter)}", "    ")
    if len(found.spending) > 1:
        yield from wrapped(f"  {spending_text(found)}", "    ")
    for text in found.missing:
        yield from wrapped(f"  {text}", "    ")


def _step(found: Explanation, step: Step) -> Iterator[str]:
    gain = "" if step.gain is None else f" ({step.gain:+.3g})"
    changes = changes_text(found, step)
    together = f"; {changes}" if changes else ""
    yield from wrapped(f"  {step_text(step)}: {gain_text(step)}{gain}{together}", "    ")


def _said(steps: Mapping[str, Step], part: Sequence[Sentence | Demo]) -> Iterator[str]:
    first = part[0]
    step = steps.get(first.step or "")
    came = step_text(step) + ("" if first.certain else " at the latest")
    if step is not None and first.tried is not None and step.trial is not None and first.tried < step.trial:
        came += f" (tried in {first.tried})"
    if len(came) > _CAME:
        yield f"    {came}"
    for at, one in enumerate(part):
        text = one.text if isinstance(one, Sentence) else _demo(one)
        yield cut(f"    {came if at == 0 and len(came) <= _CAME else '':<{_CAME}} {line(text)}", WIDTH)


def _demo(demo: Demo) -> str:
    kind = "bootstrapped" if demo.bootstrapped else "labeled"
    value = demo.value
    if isinstance(value, dict):
        value = {name: part for name, part in value.items() if name not in ("augmented", "reasoning")}
    return f"{kind} demo: {content(value)}"


# --- JSON -----------------------------------------------------------------------------------------------------------


def to_dict(found: Explanation) -> dict[str, Any]:
    """The explanation as values of JSON; the names are part of the interface."""
    both, steps = found.train_and_validation, found.step_of

    def origin(one: Sentence | Demo) -> dict[str, Any]:
        step = steps.get(one.step or "")
        trial = None if step is None else step.trial
        return {
            "predictor": one.predictor,
            "trial": trial,
            "candidate": one.step,
            "certain": one.certain,
            "tried": one.tried,
        }

    return {
        "optimization": found.optimization,
        "optimizer": found.optimizer,
        "program": found.program,
        "initial": found.initial,
        "winner": found.winner,
        "winner_trial": found.winner_trial,
        "baseline": found.baseline,
        "best": found.best,
        "steps": [{**dataclasses.asdict(one), "gain": one.gain, "together": one.together} for one in found.steps],
        "sentences": [{**origin(one), "text": one.text} for one in found.sentences],
        "demos": [{**origin(one), "bootstrapped": one.bootstrapped, "value": one.value} for one in found.demos],
        "contrasts": [dataclasses.asdict(one) for one in found.contrasts],
        "leaks": [dataclasses.asdict(one) for one in found.leaks],
        "rows": {"searched": found.rows_searched, "known": found.rows_known},
        "lengths": [{**dataclasses.asdict(one), "characters": one.characters} for one in found.lengths],
        "train_and_validation": None
        if both is None
        else {**dataclasses.asdict(both), "gap": both.gap, "gap_before": both.gap_before, "parted": both.parted},
        "spending": {
            "unit": found.unit,
            "elsewhere": found.elsewhere,
            "candidates": [{**dataclasses.asdict(one), "per_point": one.per_point} for one in found.spending],
        },
        "missing": list(found.missing),
    }
