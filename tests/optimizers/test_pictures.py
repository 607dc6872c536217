"""What a compile looks like: its trace, its trial table, and beside it what DSPy itself reports."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.optimizers import common
from tests.optimizers.common import quietly, scripted_lm, table
from tests.support.registry import broken_rules

SHOWN = ("compile ", "bootstrap", "propose", "search", "sample", "reflect", "final_evaluation", "trial", "evaluate ")


def outline(telemetry: Any, span: Any, indent: str = "") -> list[str]:
    """The compile's own trace, down to its evaluations; equal neighbours are counted."""
    lines: list[list[str]] = []
    for child in telemetry.children(span):
        if child.name.startswith(SHOWN):
            number = child.attributes.get("dspy.trial.number") if child.name == "trial" else None
            own = [f"{indent}{child.name}{'' if number is None else f' {number}'}"]
            lines.append(own + outline(telemetry, child, indent + "  "))
    text: list[str] = []
    for place, block in enumerate(lines):
        if place and block == lines[place - 1]:
            continue
        again = next((step for step, other in enumerate(lines[place:]) if other != block), len(lines) - place)
        text += [block[0] + (f" x{again}" if again > 1 else ""), *block[1:]]
    return text


def reported(program: Any) -> list[str]:
    """What DSPy left on the program."""
    lines = []
    for number, log in getattr(program, "trial_logs", {}).items():
        kept = {key: value for key, value in log.items() if isinstance(value, (int, float))}
        lines.append(f"trial_logs[{number}]: {kept}")
    for entry in getattr(program, "candidate_programs", []):
        plain = {
            key: value for key, value in entry.items() if key in ("score", "seed", "depth", "strategy", "full_eval")
        }
        lines.append(f"candidate: {plain}")
    results = getattr(program, "detailed_results", None)
    if results is not None:
        lines.append(f"val_aggregate_scores: {[round(score, 4) for score in results.val_aggregate_scores]}")
        lines.append(f"parents: {results.parents}")
    return lines


@pytest.mark.parametrize("name", sorted(name for name, scenario in common.SCENARIOS.items() if scenario.columns))
def test_picture(telemetry: Any, snapshot: Callable[..., None], name: str) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    scenario = common.SCENARIOS[name]
    program, _ = quietly(scenario.run, lm)
    span = common.compile_span(telemetry, name)
    columns = ["trial.number", "trial.kind", "trial.size", *(f"trial.{column}" for column in scenario.columns)]
    columns += ["candidate.id", "candidate.parent_ids", "trial.score", "trial.best_score", "trial.is_best"]
    totals = {
        key.removeprefix("dspy."): value
        for key, value in sorted(span.attributes.items())
        if key.startswith(("dspy.optimizer.", "dspy.usage."))
        and "params" not in key
        and not key.endswith((".id", "cost"))
    }
    parts = [
        "\n".join([span.name, *outline(telemetry, span, "  ")]),
        table(telemetry, name, *columns),
        "\n".join(["DSPy:", *reported(program)]),
        "\n".join(f"{key}: {value}" for key, value in totals.items()),
    ]
    snapshot("\n\n".join(parts), name)
    assert not undocumented(telemetry)
    assert not broken_rules(telemetry)


PAGE = (Path(__file__).parent.parent.parent / "docs" / "semantic-conventions.md").read_text(encoding="utf-8")
ROLE = re.compile(r"usage\.(task|judge|proposer|reflection|teacher)\.")


def undocumented(telemetry: Any) -> set[str]:
    """Attributes, events and metrics of an optimization that the reference page does not list."""
    spans = telemetry.spans
    emitted = {key for span in spans for key in span.attributes}
    emitted |= {key for span in spans for event in span.events for key in (event.name, *event.attributes)}
    for name, metric in telemetry.metrics().items():
        emitted |= {name, *(key for point in metric.data.data_points for key in point.attributes)}
    families = ("dspy.optimizer.params.", "dspy.trial.params.", "dspy.optimizer.all_attempts.")
    listed = {next((f"{family}*" for family in families if key.startswith(family)), key) for key in emitted}
    return {key for key in listed if "`" + ROLE.sub("usage.", key) + "`" not in PAGE}
