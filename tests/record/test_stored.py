"""What is written of a record by name is what is read back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dspy_otel.mlflow.runs import as_text
from dspy_otel.record import stored
from dspy_otel.record.model import Candidate, Dataset, Evaluation, Failure, Optimization, Phase, Trial, Usage

numbers = st.none() | st.floats(0, 100)
words = st.none() | st.text("abc ", min_size=1)
usages = st.builds(Usage, lm_calls=numbers, input_tokens=numbers, cost=numbers)
trials = st.builds(
    Trial,
    number=st.integers(1, 99),
    kind=st.sampled_from(["baseline", "full", "minibatch"]),
    candidate=words,
    parents=st.lists(st.text("0123", min_size=1)).map(tuple),
    score=numbers,
    best=numbers,
    size=st.none() | st.integers(0, 9),
    accepted=st.none() | st.booleans(),
    reason=words,
    reported=numbers,
    before=numbers,
    after=numbers,
    on_front=st.none() | st.booleans(),
    phase=words,
    params=st.dictionaries(st.sampled_from(["step", "batch"]), st.integers()),
    usage=usages,
    spent=usages,
    failure=st.none() | st.builds(Failure, type=st.text("abc", min_size=1)),
    changes=words,
)


def texts(values: dict[str, Any]) -> dict[str, str]:
    return {name: as_text(value) for name, value in values.items() if value is not None}


@given(trials)
def test_a_trials_row_is_the_trial(trial: Trial) -> None:
    row = stored.trial_row(trial)
    assert tuple(row) == stored.TRIAL_COLUMNS
    assert stored.read_trial_row(json.loads(json.dumps(row))) == trial


@given(trials)
def test_a_trials_own_names_and_values_are_the_trial(trial: Trial) -> None:
    trial = dataclasses.replace(trial, optimization="r", evaluated=trial.size)
    metrics = {"score": trial.score, **trial.usage.flat()}
    found = stored.read_trial(
        texts(stored.trial_tags(trial)),
        texts(stored.trial_params(trial)),
        {name: value for name, value in metrics.items() if value is not None},
        failed=trial.failure is not None,
    )
    for part in (
        "number",
        "kind",
        "candidate",
        "parents",
        "score",
        "is_best",
        "size",
        "accepted",
        "reason",
        "on_front",
    ):
        assert getattr(found, part) == getattr(trial, part), part
    assert (found.phase, found.usage, found.optimization) == (trial.phase, trial.usage, "r")
    assert found.params == {name: str(value) for name, value in trial.params.items()}
    assert (found.failure is None) == (trial.failure is None)


def test_an_optimizations_names_and_values_are_the_optimization() -> None:
    usage = Usage(lm_calls=4, cost=0.5, by_role={"task": Usage(lm_calls=3)})
    record = Optimization(
        id="r",
        optimizer="Best",
        program_name="QA",
        parent="p",
        root="p",
        scale="percent",
        baseline=10.0,
        best=20.0,
        gain=10.0,
        winner=2,
        initial=Candidate("first"),
        returned=Candidate("last"),
        params={"metric": "exact"},
        metric="exact",
        train=Dataset("train", 5),
        val=Dataset("val", 3),
        planned=9,
        done=2,
        accepted=1,
        rejected=1,
        evaluated=6,
        usage=usage,
    )
    metrics = {**stored.optimization_metrics(record), **usage.flat()}
    found = stored.read_optimization(
        texts(stored.optimization_tags(record)), texts(stored.optimization_params(record)), metrics
    )
    assert found == record


def test_scores_of_one_that_runs_are_those_of_its_trials() -> None:
    trials = (Trial(1, "baseline", score=1.0, best=1.0), Trial(2, "full", score=3.0, best=3.0), Trial(3, "minibatch"))
    found = stored.read_optimization({}, {}, {}, trials)
    assert (found.baseline, found.best) == (1.0, 3.0)


def test_a_phases_row_is_the_phase() -> None:
    phase = Phase("search", 2, 1.5, Usage(lm_calls=3, cache_hits=1, input_tokens=5, output_tokens=6, cost=0.1))
    assert stored.read_phase_row(stored.phase_row(phase)) == phase


def test_what_is_not_known_is_left_out() -> None:
    assert texts(stored.evaluation_tags(Evaluation("e"))) == {"dspy.evaluation.id": "e"}
    assert stored.evaluation_params(Evaluation("e", models={"task": ("a", "b")}))["task.model"] == "a, b"
