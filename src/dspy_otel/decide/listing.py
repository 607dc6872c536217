"""Overviews as text, for a terminal of 80 columns, and as values of JSON."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from dspy_otel.decide.evidence import Evidence
from dspy_otel.decide.overview import OPTIMIZATION, PASSED, Examples, Group, Outcomes, Summary
from dspy_otel.decide.show import (
    WIDTH,
    amount,
    content,
    cut,
    decision,
    detectable_text,
    difference_text,
    line,
    program_lines,
    score_text,
    signed,
    test_text,
    wrapped,
)
from dspy_otel.record.model import FINISHED

MAX_SHOWN: Final = 10
"""Most examples of one list that are shown."""


def groups_text(groups: Sequence[Group]) -> str:
    """Groups of runs."""
    return "\n".join(text.rstrip() for group in groups for text in _group(group)) + "\n"


def _group(group: Group) -> Iterator[str]:
    size = "an unknown number of" if group.size is None else f"{group.size:,}"
    dataset = "an unknown dataset" if group.digest is None else f"dataset {group.digest}"
    yield cut(line(f"{group.metric} on {size} examples, {dataset}"), WIDTH)
    for run in sorted(group.runs, key=lambda run: -1e300 if run.best is None else run.best, reverse=True):
        yield cut(f"  {line(run.id)}  {line(run.title)}", WIDTH)
        yield cut(f"    {when(run.started)}  {_result(run)}  {_spend(run)}", WIDTH)
    if group.examples is not None:
        yield from _examples(group.examples)
    yield ""


def _result(run: Summary) -> str:
    if run.best is None:
        return run.outcome
    found = score_text(run.best)
    if run.baseline is not None:
        found = f"{score_text(run.baseline)} -> {found} ({signed(run.best - run.baseline)})"
    return found if run.outcome == FINISHED else f"{found}, {run.outcome}"


def _spend(run: Summary) -> str:
    parts = [] if run.trials is None else [f"{run.trials:,} trials"]
    if run.usage.cost is not None:
        parts.append(amount(run.usage.cost, "$"))
    if run.usage.lm_calls is not None:
        parts.append(f"{run.usage.lm_calls:,.0f} calls")
    return ", ".join([*parts, *run.models.get("task", ())])


def _examples(examples: Examples) -> Iterator[str]:
    if len(examples.runs) < 2:
        yield f"  Examples are recorded of {len(examples.runs)} of these runs: two are needed."
        return
    yield f"  Examples in {len(examples.runs)} runs, the oldest first; + passed, - failed (below {PASSED:g})"
    for place_of_run, run in enumerate(examples.runs):
        models = ", ".join(run.models.get("task", ()))
        about = f"{'.' * place_of_run}^  {when(run.started)}  {line(run.title)}{f', {line(models)}' if models else ''}"
        yield cut(f"    {about}", WIDTH)
    for title, found in (("fail in every run", examples.failing), ("pass in some runs", examples.flipping)):
        yield f"  {len(found):,} {title}"
        for one in found[:MAX_SHOWN]:
            yield cut(f"    {_outcomes(one)}  {place(one)}  {line(content(one.example.inputs or ''))}", WIDTH)
        if len(found) > MAX_SHOWN:
            yield f"    and {len(found) - MAX_SHOWN:,} more"


def _outcomes(one: Outcomes) -> str:
    return "".join(" " if score is None else "+" if score >= PASSED else "-" for score in one.scores)


def place(one: Outcomes) -> str:
    """An example, by its place in the dataset, or else its id."""
    return f"#{one.example.index}" if one.example.index is not None else str(one.key)


def when(started: int) -> str:
    """A time, in the time zone of the user."""
    if not started:
        return "unknown time"
    return datetime.datetime.fromtimestamp(started / 1e9).astimezone().strftime("%Y-%m-%d %H:%M")


def summary_text(run: Summary, evidence: Evidence | None, reason: str | None) -> str:
    """One run, with the comparison of its baseline and its winner, or why there is none."""
    return "\n".join(text.rstrip() for text in _summary(run, evidence, reason)) + "\n"


def _summary(run: Summary, evidence: Evidence | None, reason: str | None) -> Iterator[str]:
    yield cut(line(f"{run.title}, {run.outcome}"), WIDTH)
    size = "" if run.size is None else f"{run.size:,} examples"
    rows = [
        ("run", run.id),
        ("started", when(run.started)),
        ("metric", run.metric),
        ("data", ", ".join(part for part in (size, f"dataset {run.digest}" if run.digest else "") if part)),
        ("score", _result(run) if run.best is not None else ""),
        ("trials", "" if run.trials is None else f"{run.trials:,}"),
        ("spent", _spent(run)),
        ("program", run.program or ""),
        *((f"{role} model", ", ".join(names)) for role, names in run.models.items()),
    ]
    for name, text in rows:
        if text:
            yield cut(f"  {name:<18}{line(text)}", WIDTH)
    for role, usage in run.usage.by_role.items():
        if usage.lm_calls:
            cost = "" if usage.cost is None else f", {amount(usage.cost, '$')}"
            yield cut(f"  {line(role) + ' calls':<18}{usage.lm_calls:,.0f}{cost}", WIDTH)
    if run.kind == OPTIMIZATION:
        yield ""
        yield from _verdict(evidence, reason)


def _spent(run: Summary) -> str:
    usage = run.usage
    parts = [] if usage.cost is None else [amount(usage.cost, "$")]
    if usage.lm_calls is not None:
        parts.append(f"{usage.lm_calls:,.0f} calls")
    if usage.tokens is not None:
        parts.append(f"{usage.tokens:,.0f} tokens")
    return ", ".join(parts)


def _verdict(evidence: Evidence | None, reason: str | None) -> Iterator[str]:
    if evidence is None:
        yield from wrapped(f"Baseline and winner: {reason}", "  ")
        return
    yield "Baseline (A) against winner (B)"
    for score in evidence.scores:
        result = score.result
        scores = f"{score_text(result.a)} -> {score_text(result.b)}, {difference_text(score)}"
        yield cut(f"  {line(score.metric)}: {scores}", WIDTH)
        yield f"  {test_text(score)}; better {result.wins:,}, worse {result.losses:,}, same {result.ties:,}"
        yield f"  {detectable_text(score)}"
    for text in program_lines(evidence):
        yield from wrapped(f"  {text}", "    ")
    for change in evidence.predictors:
        what = [name for name, there in (("instructions", change.instructions), ("demos", change.demos)) if there]
        yield cut(f"  {line(change.name)}: other {' and '.join(what)}", WIDTH)
    yield from wrapped(decision(evidence), "  ")


def groups_dict(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Groups as values of JSON."""
    return [
        {
            "metric": group.metric,
            "dataset": group.digest,
            "size": group.size,
            "runs": [summary_dict(run) for run in group.runs],
            **({} if group.examples is None else {"examples": _examples_dict(group.examples)}),
        }
        for group in groups
    ]


def _examples_dict(examples: Examples) -> dict[str, Any]:
    def values(found: Iterable[Outcomes]) -> list[dict[str, Any]]:
        return [
            {"example": one.key, "index": one.example.index, "inputs": one.example.inputs, "scores": list(one.scores)}
            for one in found
        ]

    return {
        "runs": [run.id for run in examples.runs],
        "failing": values(examples.failing),
        "flipping": values(examples.flipping),
    }


def summary_dict(run: Summary) -> dict[str, Any]:
    """A run as values of JSON."""
    return {
        "id": run.id,
        "kind": run.kind,
        "title": run.title,
        "outcome": run.outcome,
        "started": run.started,
        "metric": run.metric,
        "dataset": run.digest,
        "size": run.size,
        "baseline": run.baseline,
        "best": run.best,
        "trials": run.trials,
        "program_id": run.program,
        "models": {role: list(names) for role, names in run.models.items()},
        "usage": run.usage.flat(),
    }
