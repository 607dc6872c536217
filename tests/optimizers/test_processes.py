"""An optimization whose programs answer in worker processes: its totals are those of the same run in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dspy_otel import BudgetExceeded, budget
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


def test_a_budget_ends_an_optimization_at_the_same_place(telemetry: Recorder) -> None:
    telemetry.instrument()
    with budget(lm_calls=50) as alone:
        quietly(processes.run_gepa)
    here = seen(telemetry, "GEPA")
    telemetry.clear()
    with processes.pool(), budget(lm_calls=50) as together:
        quietly(processes.run_gepa)
    assert seen(telemetry, "GEPA") == here
    assert together.exceeded == alone.exceeded == "lm_calls"
    assert together.spent.lm_calls == alone.spent.lm_calls >= 50
    assert together.spent.tokens == alone.spent.tokens
    alerts = [each for each in compile_span(telemetry, "GEPA").events if each.name == "dspy.budget.alert"]
    assert [each.attributes["dspy.budget.percent"] for each in alerts] == [50, 80, 100]


def test_a_budget_stops_what_does_not_end_by_itself(telemetry: Recorder) -> None:
    telemetry.instrument()
    with processes.pool(), budget(lm_calls=40) as block:
        with pytest.raises(BudgetExceeded) as stopped:
            quietly(processes.run_random_search)
    assert 40 <= block.spent.lm_calls <= 40 + 2 * 2  # two threads, with a task of two calls each
    assert block.spent.unanswered_tasks == 0
    assert isinstance(stopped.value.program, processes.Anywhere)
    trial = next(each for each in trials(telemetry, "BootstrapFewShotWithRandomSearch") if each["trial.number"] == 1)
    assert (stopped.value.trial, stopped.value.score) == (1, trial["trial.score"])


def test_a_lost_worker_is_said_in_its_trial(telemetry: Recorder, tmp_path: Path) -> None:
    """The program asks once more, in another pool. What the lost one had used is not known; nothing else is lost."""
    name = "BootstrapFewShotWithRandomSearch"
    telemetry.instrument()
    quietly(processes.run_random_search, threads=1)
    here = seen(telemetry, name)
    telemetry.clear()
    with processes.pool(processes=1, kill_at=30, folder=tmp_path):
        quietly(processes.run_random_search, threads=1)
    there = seen(telemetry, name)
    assert there == here
    compiled = compile_span(telemetry, name).attributes
    lost = [trial for trial in trials(telemetry, name) if "usage.unanswered_tasks" in trial]
    assert compiled["dspy.usage.unanswered_tasks"] == 1
    assert [trial["usage.unanswered_tasks"] for trial in lost] == [1]
