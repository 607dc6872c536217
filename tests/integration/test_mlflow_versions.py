"""An optimization's result as a model, prompts and a dataset in a real MLflow, read by MLflow's client."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from dspy_otel import program_id, semconv
from dspy_otel.cli import main
from dspy_otel.cli.demo.task import ColourFamily
from dspy_otel.mlflow import load_best
from dspy_otel.mlflow.replay import replay
from tests.integration.test_mlflow_ends import line, start
from tests.optimizers.common import RUNS, quietly, scripted_lm
from tests.support.mlflow_store import Store
from tests.support.nightly import at_night
from tests.support.waiting import wait_for_exit

pytest.importorskip("mlflow")
pytestmark = pytest.mark.integration


def models(store: Store) -> list[Any]:
    return list(store.client.search_logged_models([store.experiment_id]))


def artifacts_of(store: Store, model: Any) -> dict[str, str]:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository = get_artifact_repository(model.artifact_location, tracking_uri=store.uri)
    return {
        item.path: Path(repository.download_artifacts(item.path)).read_text() for item in repository.list_artifacts()
    }


def prompts(store: Store) -> dict[str, list[str]]:
    """The texts of all versions, the first one first, of the prompts that the experiment's page shows."""
    found = {}
    for prompt in store.client.search_prompts():
        if f",{store.experiment_id}," in prompt.tags.get("_mlflow_experiment_ids", ""):
            condition = f"name = '{prompt.name}' AND tags.`mlflow.prompt.is_prompt` = 'true'"
            versions = sorted(store.client.search_model_versions(condition), key=lambda one: int(one.version))
            found[prompt.name] = [version.tags["mlflow.prompt.text"] for version in versions]
    return found


def datasets(store: Store) -> dict[str, list[Any]]:
    tracking = store.client._tracking_client.store
    return {
        one.name: tracking._load_dataset_records(one.dataset_id)[0]
        for one in tracking.search_datasets([store.experiment_id])
    }


def optimize(store: Store, **options: Any) -> tuple[Any, Any]:
    """An optimized program, and its run."""
    store.instrument(**options)
    program, _ = quietly(RUNS["MIPROv2"], scripted_lm())
    store.flush()
    (span,) = [one for one in store.named("compile") if semconv.OPTIMIZER_PARENT_RUN_ID not in one.attributes]
    return program, store.runs()[span.attributes[semconv.OPTIMIZER_RUN_ID]]


def test_the_winner_is_a_version_that_can_be_promoted_and_loaded(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    program, run = optimize(store)
    tracking = {"tracking_uri": store.uri, "allow_unsafe_lm_state": True}
    mlflow.set_tracking_uri(store.uri)

    # One model, named by program and id, the output of its run, with the state and the traces of the winning trial.
    (model,) = models(store)
    assert model.name == f"ColourFamily-{program_id(program)}"
    assert str(model.status) == "READY"
    assert model.source_run_id == run.info.run_id
    assert run.data.tags["dspy.model.id"] == model.model_id
    # "Evaluation runs" of MLflow's pages would not show a run that has an output, nor those below it.
    assert not any(one.outputs.model_outputs for one in store.runs().values())
    assert list(artifacts_of(store, model)) == ["best_model.json"]
    winner = next(one for one in store.runs().values() if one.data.tags.get("dspy.winner") == "true")
    of_model = store.client.search_traces(
        locations=[store.experiment_id], filter_string=f"request_metadata.`mlflow.modelId` = '{model.model_id}'"
    )
    assert {trace.info.trace_id for trace in of_model} == {one.info.trace_id for one in store.traces(winner)}
    assert all(trace.info.assessments and trace.info.state == "OK" and trace.data.spans for trace in of_model)

    # Its instructions are versions of prompts: the seed's first. One that did not change has one version.
    instructions = {name: predictor.signature.instructions for name, predictor in program.named_predictors()}
    seed = {name: predictor.signature.instructions for name, predictor in ColourFamily().named_predictors()}
    found = prompts(store)
    for name, text in instructions.items():
        assert found[f"ColourFamily.{name}"] == list(dict.fromkeys([seed[name], text]))
    linked = store.client.get_run(run.info.run_id).data.tags["mlflow.linkedPrompts"]
    assert model.tags["mlflow.linkedPrompts"] == linked

    # The validation set is a dataset.
    ((name, rows),) = datasets(store).items()
    assert name.startswith("ColourFamily val ")
    assert {frozenset(row.inputs) for row in rows} == {frozenset({"colour_name"})}
    assert {frozenset(row.expectations) for row in rows} == {frozenset({"family"})}
    val = next(one for one in run.inputs.dataset_inputs if one.tags[0].value == "val")
    assert len(rows) == int(val.dataset.profile.split(":")[1].strip(" }"))

    # An alias, set twice: one version.
    with pytest.raises(LookupError, match="dspy-otel promote"):
        load_best(ColourFamily(), alias="production", **tracking)
    for _ in range(2):
        assert main(["promote", run.info.run_id, "--alias", "production", "--tracking-uri", store.uri]) == 0
    assert "ColourFamily version" in capsys.readouterr().out
    mine = [
        version
        for version in store.client.search_model_versions("name = 'ColourFamily'")
        if version.tags.get("dspy.model.id") == model.model_id
    ]
    assert len(mine) == 1
    assert program_id(load_best(ColourFamily(), alias="production", **tracking)) == program_id(program)
    assert program_id(load_best(ColourFamily(), experiment=store.experiment, **tracking)) == program_id(program)
    assert "Downloading" not in capsys.readouterr().err  # a bar of MLflow's for each file
    for name, text in instructions.items():
        assert mlflow.genai.load_prompt(f"prompts:/ColourFamily.{name}@production").template == text

    # What cannot be promoted is refused in one sentence.
    for wrong, why in ((winner.info.run_id, "is no optimization"), ("0" * 32, "There is no run")):
        assert main(["promote", wrong, "--alias", "x", "--tracking-uri", store.uri]) == 1
        assert why in capsys.readouterr().err
    assert main(["promote", run.info.run_id, "--alias", "not good", "--tracking-uri", store.uri]) == 1
    assert "cannot be an alias" in capsys.readouterr().err


def test_without_content_nothing_leaves_but_the_model_is_there(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    program, run = optimize(store, capture_content="no_content")
    (model,) = models(store)
    assert (model.name, str(model.status)) == (f"ColourFamily-{program_id(program)}", "READY")
    assert artifacts_of(store, model) == {}
    assert (prompts(store), datasets(store)) == ({}, {})
    assert "mlflow.linkedPrompts" not in model.tags
    assert main(["promote", run.info.run_id, "--alias", "x", "--tracking-uri", store.uri]) == 1
    assert "CAPTURE_MESSAGE_CONTENT=span_only" in capsys.readouterr().err


@pytest.fixture
def switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("MODELS", "PROMPTS", "DATASETS"):
        monkeypatch.setenv(f"OTEL_DSPY_MLFLOW_{part}", "false")


def test_each_part_can_be_switched_off(switched_off: None, store: Store) -> None:
    program, _ = optimize(store)
    assert (models(store), prompts(store), datasets(store)) == ([], {}, {})
    loaded = load_best(ColourFamily(), experiment=store.experiment, tracking_uri=store.uri, allow_unsafe_lm_state=True)
    assert program_id(loaded) == program_id(program)


KILLED = """
    import io, os, signal, sys
    import dspy, dspy_otel
    from tests.optimizers.common import scripted_lm, ColourFamily, load_examples, same_family
    dspy_otel.configure(capture_content="span_only")
    from opentelemetry import trace
    from dspy_otel.mlflow.exporter import exporters_of
    from dspy_otel.mlflow.run_writer import RunWriter
    scripted_lm()
    def killed(writer, backend, run, model, prompts):
        made = backend.registry.put_model(model, run.key, str(run.run_id), prompts, run.experiment)
        os.write(1, b"pending\\n")
        os.kill(os.getpid(), signal.SIGKILL)
    RunWriter._put_model = killed
    stdout, sys.stdout = sys.stdout, io.StringIO()  # the optimizer prints
    optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=same_family, num_candidate_programs=2, num_threads=1)
    optimizer.compile(ColourFamily(), trainset=load_examples("train", 6), valset=load_examples("val", 6))
    trace.get_tracer_provider().force_flush(100_000)
"""


@pytest.mark.parametrize("uri", ["server", *at_night("sqlite")], indirect=True)
def test_a_model_that_was_pending_at_a_kill_is_ready_after_replay_and_not_twice(uri: str, tmp_path: Path) -> None:
    process = start(tmp_path, KILLED, uri, "killed with a model")
    assert line(process) == "pending"
    assert wait_for_exit(process, "the program") == -signal.SIGKILL
    store = Store(uri, "killed with a model")
    store.provider.shutdown()
    assert [str(model.status) for model in models(store)] == ["PENDING"]
    for _ in range(2):
        assert replay([tmp_path / "spool"]).left == []
        (model,) = models(store)
        assert str(model.status) == "READY"
        assert list(artifacts_of(store, model)) == ["best_model.json"]
        (top,) = [one for one in store.runs().values() if one.info.run_id == model.source_run_id]
        assert top.data.tags["dspy.model.id"] == model.model_id
        assert all(len(set(texts)) == len(texts) for texts in prompts(store).values())
        assert len(datasets(store)) == 1
