"""The result of an optimization as a model, prompt versions and a dataset."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_otel.mlflow import versions
from dspy_otel.mlflow.backends.rest_registry import RestRegistry
from dspy_otel.mlflow.replay import replay
from dspy_otel.mlflow.versions import (
    DATASETS,
    MODELS,
    PARTS,
    PROMPTS,
    PromptVersion,
    enabled,
    linked_prompts,
    model_name,
    prompt_name,
    read_linked_prompts,
    registered_name,
    saved_parts,
    version_of,
)
from dspy_otel.record.model import Candidate, Dataset, Example, Optimization, Trial
from tests.mlflow.fake_server import FakeMLflow, Fault, fake_mlflow
from tests.mlflow.programs import Disk, Event, Plan, run
from tests.mlflow.programs import Optimization as Story
from tests.mlflow.programs import Trial as StoryOfTrial
from tests.mlflow.test_property import quick


def state(*instructions: str) -> str:
    return json.dumps(
        {f"p{i}": {"signature": {"instructions": one}, "demos": []} for i, one in enumerate(instructions)}
    )


RECORD = Optimization(
    "run1",
    "GEPA",
    "QA",
    best=0.87654,
    winner=2,
    initial=Candidate("seed", state("Answer.", "Check.")),
    returned=Candidate("best", state("Answer well.", "Check.")),
    val=Dataset("val", 2, "d1g", json.dumps([{"q": "1", "a": "x"}, {"q": "2", "a": None}])),
    trials=(Trial(1, "baseline"), Trial(2, "full")),
    candidates={"seed": Candidate("seed", state("Answer.", "Check."))},
    examples={2: (Example(0, inputs={"q": "1"}, expected={"a": "x"}),)},
    ended=1,
)


def test_the_result_is_a_model_prompts_and_a_dataset() -> None:
    found = version_of(RECORD, {"best_model.json": "{}"}, PARTS)
    assert found is not None
    assert found.model is not None
    assert found.dataset is not None
    assert (found.model.name, found.model.trial) == ("QA-best", "run1/2")
    assert found.model.tags["dspy.program.id"] == "best"
    assert found.model.tags["dspy.best_score"] == "0.8765"
    assert found.model.artifacts == {"best_model.json": "{}"}
    assert [(one.name, one.text) for one in found.prompts] == [("QA.p0", "Answer well."), ("QA.p1", "Check.")]
    assert [one.text for one in found.before] == ["Answer.", "Check."]
    assert found.before[1].id == found.prompts[1].id  # one text, one version
    assert found.dataset.name == "QA val d1g"
    assert found.dataset.rows == (({"q": "1"}, {"a": "x"}), ({"q": "2"}, {}))
    assert found.dataset.tags["dspy.dataset.rows"] == "2"


@pytest.mark.parametrize("part", sorted(PARTS))
def test_each_part_can_be_switched_off(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(versions.ENV_PARTS[part], " Off ")
    found = version_of(RECORD, {}, enabled())
    assert found is not None
    there = {MODELS: found.model, PROMPTS: found.prompts, DATASETS: found.dataset}
    assert [name for name, value in there.items() if not value] == [part]
    assert saved_parts(sorted(enabled())) == enabled()


def test_without_any_part_there_is_nothing() -> None:
    assert version_of(RECORD, {}, frozenset()) is None
    assert saved_parts(None) == PARTS  # a journal of a version that had none of them


@pytest.mark.parametrize(
    "change", [{"parent": "another"}, {"returned": None}], ids=["a step of another", "nothing was returned"]
)
def test_what_is_no_result(change: dict[str, Any]) -> None:
    assert version_of(dataclasses.replace(RECORD, **change), {}, PARTS) is None


def test_without_content_a_model_has_no_artifact_and_there_are_no_prompts() -> None:
    record = dataclasses.replace(
        RECORD, returned=Candidate("best"), initial=Candidate("seed"), candidates={}, val=Dataset("val", 2), examples={}
    )
    found = version_of(record, {}, PARTS)
    assert found is not None
    assert found.model is not None
    assert (found.model.name, found.model.artifacts, found.prompts, found.before) == ("QA-best", {}, (), ())
    assert found.dataset is None


def test_a_masked_text_and_one_that_is_too_long_are_no_prompts() -> None:
    masked = dataclasses.replace(RECORD, returned=Candidate("best", state("key [REDACTED]"), altered=True))
    found = version_of(masked, {}, frozenset({PROMPTS}))
    assert found is None or not found.prompts
    long = dataclasses.replace(RECORD, returned=Candidate("best", state("x" * (versions.MAX_PROMPT + 1), "Check.")))
    found = version_of(long, {}, frozenset({PROMPTS}))
    assert found is not None
    assert [one.text for one in found.prompts] == ["Check."]


def test_a_dataset_that_was_cut_says_so_and_one_whose_inputs_are_unknown_is_none() -> None:
    cut = dataclasses.replace(RECORD, val=dataclasses.replace(RECORD.val, size=9))  # type: ignore[type-var]
    found = version_of(cut, {}, frozenset({DATASETS}))
    assert found is not None
    assert found.dataset is not None
    assert found.dataset.tags["dspy.dataset.rows"] == "2 of 9 (content limit)"
    assert version_of(dataclasses.replace(RECORD, examples={}), {}, frozenset({DATASETS})) is None


def test_names_are_those_that_mlflow_takes() -> None:
    assert model_name("a/b:c.d%'\"", "12") == "a_b_c_d___-12"
    assert prompt_name("Größe", "hop[0].généré") == "Gr__e.hop_0_.g_n_r_"
    assert registered_name("a/b:c") == "a_b_c"
    pairs = [PromptVersion("a.b", 3)]
    assert read_linked_prompts({versions.LINKED_PROMPTS: linked_prompts(pairs)}) == pairs
    assert read_linked_prompts({versions.LINKED_PROMPTS: "no JSON"}) == []


STORY = Story((StoryOfTrial((1.0, 0.5), 75.0), StoryOfTrial((0.0,), 50.0)))


@pytest.fixture
def server() -> Iterator[FakeMLflow]:
    with fake_mlflow() as server:
        yield server


@pytest.mark.parametrize("fault", [Fault("page"), Fault("status", 500), Fault("object"), None], ids=str)
def test_a_registry_that_fails_holds_nothing_else_up(
    server: FakeMLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault | None
) -> None:
    plan = Plan((STORY,))
    for endpoint in ("models", "prompts", "datasets") if fault is not None else ():
        for _ in range(500):
            server.faults.add(endpoint, fault)
    if fault is None:
        monkeypatch.setattr(RestRegistry, "put_prompt", lambda *_: {}["no such key"])
    with quick(plan, tmp_path, Disk(), "60"):  # it gives up after some failures, long before
        done = run(plan, server.url, server.faults, Disk())
        account = done.account
        assert account is not None
        assert account.written["spans"] == account.produced["spans"]
        assert account.written["scores"] == account.produced["scores"]
        assert {one["status"] for one in server.runs.values()} == {"FINISHED"}
        assert account.kept["runs"] == 1  # its model is missing
        assert not server.models
        server.faults.mend()
        monkeypatch.undo()
        assert replay([tmp_path]).left == []
    assert [one["status"] for one in server.contents()["models"].values()] == ["READY"]


def test_a_killed_program_leaves_no_model_pending(server: FakeMLflow, tmp_path: Path) -> None:
    # The answer to the status is lost, and the program is killed right after.
    plan = Plan((STORY,), events=(Event(100, "round"),), end="kill")
    server.faults.add("models", Fault("reset", applied=True))
    with quick(plan, tmp_path, Disk(), "0.5"):
        run(plan, server.url, server.faults, Disk())
        server.faults.mend()
        assert replay([tmp_path]).left == []
        assert replay([tmp_path]).left == []
    contents = server.contents()
    (model,) = contents["models"].values()
    assert (model["status"], model["name"]) == ("READY", "QA-c1")
    assert contents["runs"]["o0"]["tags"]["dspy.model.id"] == "<model of o0>"
    assert len(model["traces"]) == 2
    assert model["artifacts"] == {"best_model.json": contents["runs"]["o0"]["artifacts"]["best_model.json"]}
    assert contents["prompts"] == {"QA.qa": ["Answer."]}
    assert list(contents["datasets"]) == ["QA val digest of o0"]


def test_what_was_switched_off_stays_off_in_a_replay(
    server: FakeMLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in PARTS:
        monkeypatch.setenv(versions.ENV_PARTS[part], "false")
    plan = Plan((STORY,), end="kill")
    with quick(plan, tmp_path, Disk(), "0.5"):
        run(plan, server.url, None, Disk())
        for part in PARTS:
            monkeypatch.delenv(versions.ENV_PARTS[part])
        assert replay([tmp_path]).left == []
    contents = server.contents()
    assert contents["runs"]["o0"]["status"] == "FINISHED"
    assert (contents["models"], contents["prompts"], contents["datasets"]) == ({}, {}, {})
