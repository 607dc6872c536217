"""An optimization whose programs answer in worker processes: its totals are those of the same run in one process."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_otel import budget
from tests.optimizers import processes
from tests.optimizers.common import compile_span, quietly, trials
from tests.support.spans import Recorder

OF_WORKERS = {"usage.worker_tasks", "usage.unanswered_tasks"}


def without_ids(attributes: dict[str, Any]) -> dict[str, Any]:
    """What is the same in each run; costs without the last digits of their sums, which hang on the order."""
    kept = {key: value for key, value in attributes.items() if key not in OF_WORKERS and not key.endswith("run.id")}
    return {key: round(value, 9) if isinstance(value, float) else value for key, value in kept.items()}


def seen(telemetry: Recorder, name: str) -> dict[str, Any]:
    """The totals of everything that an optimization is made of, in order; and of its trials, all else."""
    compiled = compile_span(telemetry, name)
    of = {key.removeprefix("dspy."): value for key, value in compiled.attributes.items()}
    usage = {key: value for key, value in of.items() if key.startswith("usage.")}
    phases = [
        [phase.name, {key: value for key, value in phase.attributes.items() if key.startswith("dspy.usage.")}]
        for kind in ("bootstrap", "propose", "reflect")
        for phase in telemetry.named(kind)
    ]
    return {
        "compile": without_ids(usage),
        "phases": [
            [kind, without_ids({key.removeprefix("dspy."): each[key] for key in each})] for kind, each in phases
        ],
        "trials": [without_ids(trial) for trial in trials(telemetry, name)],
    }


def metrics(telemetry: Recorder) -> dict[str, Any]:
    """What the progress of the optimization says it has spent, by role."""
    found = {}
    for resource in telemetry.reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                if metric.name in ("dspy.optimizer.lm_calls", "dspy.optimizer.cost"):
                    for point in metric.data.data_points:
                        found[metric.name, point.attributes["dspy.lm.role"]] = round(point.value, 9)
    return found


@pytest.mark.parametrize("name", sorted(processes.RUNS))
def test_totals_are_those_of_one_process(telemetry: Recorder, name: str) -> None:
    telemetry.instrument()
    with budget(tokens=10**9) as alone:
        quietly(processes.RUNS[name])
    here = seen(telemetry, name)
    by_role = metrics(telemetry)
    calls_here = len(telemetry.named("chat "))
    telemetry.clear()
    with processes.pool(), budget(tokens=10**9) as together:
        quietly(processes.RUNS[name])
    there = seen(telemetry, name)
    assert there == here
    assert len(telemetry.named("chat ")) < calls_here / 2, "the programs have not answered elsewhere"
    assert {key: round(value - by_role[key], 9) for key, value in metrics(telemetry).items()} == by_role
    spent, expected = together.spent, alone.spent
    assert (spent.tokens, spent.lm_calls, round(spent.cost, 9)) == (
        expected.tokens,
        expected.lm_calls,
        round(expected.cost, 9),
    )
    compiled = compile_span(telemetry, name).attributes
    assert compiled["dspy.usage.worker_tasks"] > 20
    assert "dspy.usage.unanswered_tasks" not in compiled
