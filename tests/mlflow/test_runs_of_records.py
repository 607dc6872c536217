"""Records to the runs that should be in MLflow: the contract of ``mlflow/runs.py``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from dspy_otel.mlflow.runs import (
    Run,
    Score,
    assessments_of,
    key_of,
    readable,
    runs_of,
    score_of,
    whole_metrics,
    whole_tags,
)
from dspy_otel.record.model import (
    Candidate,
    Dataset,
    Evaluation,
    Example,
    Failure,
    Optimization,
    Phase,
    Trace,
    Trial,
    Usage,
)
from dspy_otel.record.stored import read_optimization

ROWS = json.dumps([{"q": "1", "n": 2}, {"q": "3", "n": 4}])
STATE = json.dumps({"qa": {"signature": {"instructions": "Answer."}, "demos": []}})
VAL = Dataset("val", 2, "digest", ROWS)
TRIAL = Trial(
    2,
    "full",
    "c2",
    ("c1",),
    score=0.75,
    best=0.75,
    accepted=True,
    params={"step": 3},
    usage=Usage(lm_calls=4, by_role={"task": Usage(lm_calls=4)}),
    spent=Usage(lm_calls=9),
    optimization="r",
    optimizer="Best",
    program_name="QA",
    dataset=VAL,
    program=Candidate("c2", STATE),
    examples_so_far=6,
    accepted_so_far=1,
    started=1_000_000,
    ended=2_000_000,
)
OVER = Optimization(
    id="r",
    optimizer="Best",
    program_name="QA",
    outcome="finished",
    baseline=0.5,
    best=0.75,
    winner=2,
    done=1,
    initial=Candidate("c1", STATE),
    returned=Candidate("c2"),
    candidates={"c1": Candidate("c1", STATE), "c2": Candidate("c2", STATE, altered=True)},
    train=Dataset("train", 3, "other", ROWS),
    val=VAL,
    trials=(dataclasses.replace(TRIAL, program=None),),
    phases=(Phase("trials", usage=Usage(lm_calls=4)),),
    started=1_000_000,
    ended=3_000_000,
)


def points(run: Run) -> dict[str, float]:
    return {point.key: point.value for point in run.metrics}


def test_a_trial_gives_its_own_run_and_points_for_one_other() -> None:
    own, curves = runs_of(TRIAL, {"dspy.version": "1"}, "users")
    assert (own.key, own.parent, own.user_run, own.name) == ("r/2", "r", "users", "2 ✓ 0.75 full, step 3")
    assert (own.started, own.ended, own.status) == (1, 2, "FINISHED")
    assert points(own) == {"score": 0.75}
    assert whole_metrics(whole_tags(own.tags), points(own)) == {"score": 0.75, "lm_calls": 4}
    assert own.params["qa.instructions"] == "Answer."
    assert own.artifacts == {"model.json": STATE}
    (dataset,) = own.datasets
    assert (dataset.name, dataset.columns) == ("QA val", (("q", "string"), ("n", "long")))
    assert (curves.key, curves.name, curves.status) == ("r", None, None)
    assert points(curves) == {"score": 0.75, "best_score": 0.75}
    assert whole_metrics(curves.tags, {}) == {"examples_evaluated": 6, "lm_calls": 9, "accepted": 1}
    assert (set(curves.tags), curves.params, curves.artifacts) == ({"dspy.numbers"}, {}, {})
    assert {point.step for run in (own, curves) for point in run.metrics} == {2}


@pytest.mark.parametrize(
    ("usage", "name", "value"),
    [
        (Usage(lm_calls=4, input_tokens=100, output_tokens=20, cost=0.5), "cost", 0.5),
        (Usage(lm_calls=4, input_tokens=100, output_tokens=20, unpriced_calls=4), "tokens", 120),
        (Usage(lm_calls=4, input_tokens=100, cost=0.0), "tokens", 100),  # a local model
        (Usage(lm_calls=4, cache_hits=4, input_tokens=100, cost=0.0), "tokens", None),
    ],
)
def test_a_trial_has_two_metrics(usage: Usage, name: str, value: float | None) -> None:
    own = runs_of(dataclasses.replace(TRIAL, usage=usage), {})[0]
    assert points(own) == {"score": 0.75, **({} if value is None else {name: value})}
    assert Usage.of(whole_metrics(whole_tags(own.tags), points(own))) == usage


def test_all_runs_together_have_four_metrics() -> None:
    """In a window of 1280 pixels, MLflow's "Evaluation runs" cuts a trial's number from the fifth on."""
    usage = Usage(lm_calls=9, cache_hits=1, input_tokens=90, output_tokens=9, cost=0.5, unpriced_calls=1)
    usage = dataclasses.replace(usage, by_role={"task": usage, "proposer": usage})
    trial = dataclasses.replace(TRIAL, usage=usage, spent=usage, rejected_so_far=1)
    over = dataclasses.replace(OVER, usage=usage, gain=0.25, accepted=1, rejected=1, evaluated=6, done=1)
    evaluation = Evaluation("e", failures=1, parse_failures=1, score=0.5, usage=usage, started=1, ended=2)
    of_trial = dataclasses.replace(evaluation, own=False, optimization="r", trial=2)
    runs = [run for record in (trial, over, evaluation, of_trial) for run in runs_of(record, {})]
    assert {point.key for run in runs for point in run.metrics} == {"score", "best_score", "gain", "cost"}
    record = read_optimization(whole_tags(runs[2].tags), runs[2].params, whole_metrics(runs[2].tags, points(runs[2])))
    for part in ("baseline", "best", "gain", "done", "accepted", "rejected", "evaluated", "usage"):
        assert getattr(record, part) == getattr(over, part), part
    assert runs[3].tags["dspy.winner"] == "true"
    assert {run.tags["dspy.failures"] for run in runs[4:]} == {"1"}
    older = {"dspy.usage": '{"lm_calls": 4}'}
    assert whole_metrics(older, {"score": 0.5, "failures": 1}) == {"lm_calls": 4, "score": 0.5, "failures": 1}


def test_what_cannot_be_compared_is_on_no_curve_of_its_optimization() -> None:
    curves = runs_of(dataclasses.replace(TRIAL, kind="minibatch"), {})[1]
    assert points(curves) == {"best_score": 0.75}
    assert [(point.key, point.step) for point in runs_of(OVER, {})[0].metrics] == [("score", 3), ("best_score", 2)]


@pytest.mark.parametrize(
    ("changes", "name", "sentence"),
    [
        ({}, "2 ✓ 0.75 full", "0.75"),
        ({"accepted": False, "kind": "minibatch"}, "2 ✗ minibatch", "0.75"),
        ({"accepted": None, "score": 0.784, "is_best": True}, "2 0.78 full", "0.78, best so far"),
        (
            {"changes": '{"describe": {}, "choose": {}}', "made_from": (1, 18)},
            "2 ✓ 0.75 full",
            "0.75; changed `describe`, `choose`; made from trials 1, 18",
        ),
        ({"score": None, "failure": Failure("ValueError")}, "2 ✓ full", "**FAILED**: ValueError"),
        ({"params": {"step": 3, "strategy": "append_a_demo"}}, "2 ✓ 0.75 full, step 3 append_a_demo", "0.75"),
    ],
)
def test_a_trials_name_and_description(changes: dict[str, Any], name: str, sentence: str) -> None:
    own = runs_of(dataclasses.replace(TRIAL, **{"params": {}, **changes}), {})[0]
    assert (own.name, own.tags["mlflow.note.content"]) == (name, sentence)


def test_it_is_pure() -> None:
    for record in (TRIAL, OVER, Evaluation("e", started=1, ended=1)):
        assert runs_of(record, {}) == runs_of(record, {})


def test_a_run_that_has_begun_says_what_it_is_and_nothing_of_results() -> None:
    (trial,) = runs_of(dataclasses.replace(TRIAL, ended=None, examples_so_far=None), {})
    (compile_,) = runs_of(dataclasses.replace(OVER, ended=None, outcome="running", winner=None), {})
    for run in (trial, compile_):
        assert (run.status, run.ended, run.metrics) == (None, None, ())
    assert set(compile_.artifacts) == {"trainset.json", "valset.json", "initial_model.json"}
    assert compile_.tags["dspy.dataset.train.rows"] == "2 of 3 (content limit)"


def test_an_optimization_that_is_over_names_its_trials_runs() -> None:
    over, winner = runs_of(OVER, {})
    assert (winner.key, winner.tags["mlflow.runName"]) == ("r/2", "2 ★ 0.75 full, step 3")
    assert "candidates.json" not in over.artifacts
    found = over.resolved({"r/2": "id2"})
    assert found.tags["dspy.winner.run_id"] == "id2"
    table = json.loads(found.artifacts["candidates.json"])
    assert [dict(zip(table["columns"], row, strict=True))["run_id"] for row in table["data"]] == ["id2"]
    assert "best_model.incomplete.json" in found.artifacts
    assert [one["path"] for one in json.loads(found.tags["mlflow.loggedArtifacts"])] == [
        *("trainset.json", "valset.json", "phases.json", "candidates.json")
    ]
    assert found.tags["mlflow.note.content"].startswith("Best score **0.75** (trial 2), baseline 0.50, 1 trials.")
    lost = over.resolved({})
    assert "dspy.winner.run_id" not in lost.tags
    assert json.loads(lost.artifacts["candidates.json"])["data"][0][-1] is None


@pytest.mark.parametrize(
    ("changes", "there"),
    [({}, True), ({"done": 2}, False), ({"done": 2, "resumed": True}, True)],
    ids=["all trials", "some were lost", "some are of another process"],
)
def test_a_table_of_trials_that_would_lack_some_is_left_out(changes: dict[str, Any], there: bool) -> None:
    over = runs_of(dataclasses.replace(OVER, **changes), {})[0].resolved({})
    assert ("candidates.json" in over.artifacts) is there
    assert ("phases.json" in over.artifacts) is there


def test_an_optimization_inside_another_has_no_datasets_and_no_report_of_its_own() -> None:
    (run,) = runs_of(dataclasses.replace(OVER, parent="p", trials=(), winner=None), {})
    assert run.parent == "p"
    assert run.datasets == ()
    assert set(run.artifacts) == {"best_model.incomplete.json"}


@pytest.mark.parametrize(
    ("failure", "status", "note"),
    [
        (None, "FINISHED", None),
        (Failure("ValueError", "why"), "FAILED", "**FAILED**: ValueError: why"),
        (
            Failure("Exception", "given up", Example(3, error="LookupError", message="no answer")),
            "FAILED",
            "**FAILED**: Exception: given up\n\nExample 3 failed: LookupError: no answer",
        ),
        (Failure("asyncio.CancelledError"), "KILLED", "**KILLED**: asyncio.CancelledError"),
        (Failure(None, "The program ended."), "KILLED", "**KILLED**: The program ended."),
    ],
)
def test_status_and_reason(failure: Failure | None, status: str, note: str | None) -> None:
    (run,) = runs_of(Evaluation("e", failure=failure, ended=1), {})
    assert (run.status, run.tags.get("mlflow.note.content")) == (status, note)


def test_an_evaluation_of_a_trial_adds_to_the_trials_run() -> None:
    examples = (Example(0, "a", score=1.0, trace_id=255), Example(1, "b", error="ValueError", trace_id=256))
    record = Evaluation("e", "r", 2, own=False, failures=1, examples=examples, without_content=1)
    assert runs_of(record, {}) == []
    (run,) = runs_of(dataclasses.replace(record, ended=1), {})
    assert (run.key, run.name, run.status, points(run)) == ("r/2", None, None, {})
    assert run.tags["dspy.failures"] == "1"
    table = json.loads(run.artifacts["evaluation_table.json"])
    assert table["columns"] == ["index", "id", "score", "error", "trace_id"]
    assert table["data"][0] == [0, "a", 1.0, None, "tr-" + "0" * 30 + "ff"]
    (own,) = runs_of(dataclasses.replace(record, own=True, ended=1), {})
    assert (own.key, own.parent) == ("evaluation/e", "r/2")
    assert own.tags["dspy.content"].startswith("off: ")
    assert [dataset.size for dataset in own.datasets] == [2]


@pytest.mark.parametrize(
    ("places", "key"),
    [(("r", 2, None), "r/2"), (("r", None, None), "r"), (("r", 2, "e"), "evaluation/e"), ((None, None, None), None)],
)
def test_a_trace_belongs_to_one_run(places: tuple[Any, ...], key: str | None) -> None:
    trace = Trace(1, None, True, *places, metric="exact", example=Example(3, score=float("nan")))
    assert key_of(trace) == key
    score = score_of(trace)
    assert (None if score is None else score.key) == key
    if score is not None:
        assert (score.name, score.value, score.error, score.row) == ("exact", None, "score is nan", 3)
        assert score.id == score_of(trace).id  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ({"a": "yes", "n": 2, "none": None}, [("a", "yes"), ("n", 2)]),
        ({"a": {"b": [1, "\ud800"]}}, [("a", {"b": [1, "?"]})]),
        ({"a": "caf\ufffd", "b": ["\ufffd"], "c": "yes"}, [("c", "yes")]),
        ({"a": float("nan"), "b": "x" * 9000}, [("a", "nan"), ("b", "x" * 7999 + "…")]),
        ({str(n): n for n in range(9)}, [("expected", {str(n): n for n in range(9)})]),
        ('{"a": "cut by the SDK', [("expected", '{"a": "cut by the SDK')]),
        ({}, []),
        (None, []),
    ],
)
def test_what_was_expected_is_an_expectation_for_each_field(expected: Any, found: list[tuple[str, Any]]) -> None:
    example = Example(3, score=1.0, expected=expected)
    score, *others = assessments_of(Trace(1, 255, False, "r", 2, None, metric="exact", example=example))
    assert isinstance(score, Score)
    assert [(one.name, one.value) for one in others] == found
    assert {(one.key, one.trace_id, one.span_id, one.row) for one in others} <= {
        (score.key, score.trace_id, score.span_id, 3)
    }
    assert len({one.id for one in (score, *others)}) == 1 + len(found)
    unscored = dataclasses.replace(example, score=None)
    assert assessments_of(Trace(1, 255, False, "r", 2, None, metric="exact", example=unscored)) == []


@pytest.mark.parametrize(
    ("score", "metric"),
    [(2 / 3, 0.6667), (0.875, 0.875), (1.0, 1.0), (3.25, 3.25), (0.00012345, 0.0001234), (-1 / 3, -0.3333), (0.0, 0.0)],
)
def test_scores_are_readable(score: float, metric: float) -> None:
    assert readable(score) == pytest.approx(metric, rel=1e-3)
    assert len(str(readable(score)).lstrip("-")) <= 9


def test_what_nobody_searches_by_is_in_one_tag() -> None:
    run = runs_of(dataclasses.replace(TRIAL, reported=75.0, is_best=True), {"dspy_otel.version": "1"})[0]
    assert {name for name in run.tags if not name.startswith("mlflow.")} == {
        *("dspy.run.kind", "dspy.run.key", "dspy.optimizer.name", "dspy.optimizer.run.id", "dspy.program.name"),
        *("dspy.program.id", "dspy.trial.number", "dspy.trial.kind", "dspy.trial.accepted", "dspy.details"),
    }
    assert json.loads(run.tags["dspy.details"]) == {
        "dspy_otel.version": "1",
        "dspy.trial.score.reported": "75.0",
        "dspy.trial.is_best": "true",
        "dspy.candidate.id": "c2",
        "dspy.candidate.parent_ids": '["c1"]',
        "dspy.numbers": '{"lm_calls": 4}',
    }
    assert whole_tags(run.tags)["dspy.candidate.id"] == "c2"
    assert whole_tags({"a": "b", "dspy.details": "no JSON"})["a"] == "b"
    many = dataclasses.replace(TRIAL, parents=tuple(map(str, range(9000))), is_best=True)
    assert json.loads(runs_of(many, {})[0].tags["dspy.details"])["dspy.trial.is_best"] == "true"
