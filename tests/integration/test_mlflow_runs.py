"""Optimizations as runs in a real MLflow: every optimizer, on a server and in sqlite, read by MLflow's client."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_otel import DSPyInstrumentor, optimization, program_id, semconv
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family, same_family_with_feedback
from dspy_otel.live.feeds import MLflowFeed, seconds_left
from dspy_otel.mlflow import load_best
from dspy_otel.mlflow.read import read_optimization
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.runs import readable
from dspy_otel.record.history import optimizations
from dspy_otel.record.model import ON_VALIDATION, Example
from dspy_otel.reports.examples import compared
from dspy_otel.reports.heat_map import heat_map
from dspy_otel.reports.programs import samples
from tests.optimizers.common import RUNS, quietly, scripted_lm
from tests.support.mlflow_server import mlflow_server
from tests.support.mlflow_store import Store, scores
from tests.support.nightly import at_night
from tests.support.waiting import wait_for, wait_for_exit

pytest.importorskip("mlflow")
pytestmark = pytest.mark.integration

OPTIMIZERS = ["MIPROv2", "GEPA", *at_night("BootstrapFewShotWithRandomSearch", "SIMBA", "COPRO", "BetterTogether")]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_runs_are_what_the_spans_say(store: Store, optimizer: str, tmp_path: Path) -> None:
    if optimizer == "GEPA":
        pytest.importorskip("gepa")
    lm = scripted_lm()
    store.instrument()
    program, _ = quietly(RUNS[optimizer], lm)
    store.flush()
    runs = store.runs()
    compiles = {span.attributes[semconv.OPTIMIZER_RUN_ID]: span for span in store.named("compile")}
    trials = {
        f"{s.attributes[semconv.OPTIMIZER_RUN_ID]}/{s.attributes[semconv.TRIAL_NUMBER]}": s
        for s in store.named("trial")
    }

    # The tree: one run for each compile and trial, each under its own parent, none at the top but the outermost.
    assert set(runs) == set(compiles) | set(trials)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    ids = {key: run.info.run_id for key, run in runs.items()}
    for key, run in runs.items():
        above = key.split("/")[0] if key in trials else compiles[key].attributes.get(semconv.OPTIMIZER_PARENT_RUN_ID)
        assert run.data.tags.get("mlflow.parentRunId") == (None if above is None else ids[above]), key
    (top,) = [key for key, span in compiles.items() if semconv.OPTIMIZER_PARENT_RUN_ID not in span.attributes]
    assert runs[top].info.run_name == f"{optimizer} ColourFamily"
    made = optimization(program)
    page = f"{store.uri}/#/experiments/{store.experiment_id}/runs/{ids[top]}" if store.uri.startswith("http") else None
    assert made is not None
    assert (made.mlflow_run_id, made.url) == (ids[top], page)

    # Scores: each trial's own, and those that can be compared as a curve on the parent, with the result at its end.
    for key, span in trials.items():
        kind, score = span.attributes[semconv.TRIAL_KIND], span.attributes.get(semconv.TRIAL_SCORE)
        metrics = runs[key].data.metrics
        assert metrics.get("score") == readable(score), key
        first, *rest = runs[key].info.run_name.partition(",")[0].split()
        assert (first, rest[-1]) == (str(span.attributes[semconv.TRIAL_NUMBER]), kind)
    expected = {
        (span.attributes[semconv.TRIAL_NUMBER], readable(span.attributes[semconv.TRIAL_SCORE]))
        for key, span in trials.items()
        if key.startswith(top) and span.attributes[semconv.TRIAL_KIND] in ON_VALIDATION
    }
    result = max(span.attributes[semconv.TRIAL_NUMBER] for key, span in trials.items() if key.startswith(top)) + 1
    curve = store.client.get_metric_history(ids[top], "score")
    best = readable(compiles[top].attributes[semconv.OPTIMIZER_BEST_SCORE])
    assert {(point.step, point.value) for point in curve} == {*expected, (result, best)}

    # Parameters and totals of the parent.
    parent, attributes = runs[top], compiles[top].attributes
    for key, value in attributes.items():
        if key.startswith(semconv.OPTIMIZER_PARAMS_PREFIX) and not isinstance(value, (str, tuple, bool)):
            assert float(parent.data.params[key.removeprefix(semconv.OPTIMIZER_PARAMS_PREFIX)]) == float(value)
    assert parent.data.metrics["best_score"] == readable(attributes[semconv.OPTIMIZER_BEST_SCORE])
    assert set(parent.data.metrics) - {"gain"} == {"score", "best_score", "cost"}
    numbers = json.loads(parent.data.tags["dspy.numbers"])
    assert numbers["lm_calls"] == attributes[semconv.USAGE_LM_CALLS]
    assert parent.data.metrics["cost"] == pytest.approx(attributes[semconv.USAGE_COST])
    assert numbers["task.input_tokens"] == attributes["dspy.usage.task.input_tokens"]
    assert parent.data.tags["dspy.program.id"] == program_id(program)
    assert parent.data.params["task.model"] == "scripted"
    spent = store.client.get_metric_history(ids[top], "cost")
    assert [point.value for point in spent] == sorted(point.value for point in spent)

    # Datasets: real inputs, once each.
    inputs = {item.tags[0].value: item.dataset for item in parent.inputs.dataset_inputs}
    assert len(inputs) == len(parent.inputs.dataset_inputs)
    assert inputs["train"].digest == attributes[semconv.DATASET_TRAIN_DIGEST]
    assert json.loads(inputs["train"].profile) == {"num_rows": attributes[semconv.DATASET_TRAIN_SIZE]}
    rows = store.artifact(parent, "trainset.json", tmp_path)
    assert rows["columns"] == ["colour_name", "family"]
    assert len(rows["data"]) == attributes[semconv.DATASET_TRAIN_SIZE]

    # Traces: every example on the run of its trial, with its score.
    for key in trials:
        mine = [
            s
            for s in store.named("example")
            if f"{s.attributes[semconv.OPTIMIZER_RUN_ID]}/{s.attributes[semconv.TRIAL_NUMBER]}" == key
        ]
        expected = {f"tr-{span.context.trace_id:032x}": span.attributes[semconv.EXAMPLE_SCORE] for span in mine}
        got = {trace.info.trace_id: [a.value for a in scores(trace)] for trace in store.traces(runs[key])}
        assert got == {trace_id: [score] for trace_id, score in expected.items()}, key
        table = store.artifact(runs[key], "evaluation_table.json", tmp_path)
        of_table = {
            row[table["columns"].index("trace_id")]: row[table["columns"].index("score")] for row in table["data"]
        }
        assert of_table == expected

    # Programs: every trial's and the best one load, and are the program they are said to be.
    for key, span in trials.items():
        if semconv.CANDIDATE_ID in span.attributes:
            path = store.client.download_artifacts(ids[key], "model.json", str(tmp_path))
            assert loaded(path) == span.attributes[semconv.CANDIDATE_ID]
    assert loaded(store.client.download_artifacts(ids[top], "best_model.json", str(tmp_path))) == program_id(program)
    best = load_best(ColourFamily(), experiment=store.experiment, tracking_uri=store.uri, allow_unsafe_lm_state=True)
    assert program_id(best) == program_id(program)
    quietly(best, colour_name="teal")
    assert store.named("invoke_workflow")[-1].attributes[semconv.PROGRAM_ID] == parent.data.tags["dspy.program.id"]

    # The report: an artifact, and made anew from what MLflow has it tells the same.
    expected = next(one for one in optimizations(store.spans.get_finished_spans()) if one.id == top)
    page = store.client.download_artifacts(ids[top], "report.html", str(tmp_path))
    html = Path(page).read_text(encoding="utf-8")
    found = read_optimization(experiment=store.experiment, tracking_uri=store.uri)
    assert found.run_id == ids[top]
    record = found.optimization
    for part in ("optimizer", "program_name", "outcome", "failure", "scale", "winner"):
        assert getattr(record, part) == getattr(expected, part), part
    for part in ("baseline", "best", "gain"):
        assert getattr(record, part) == readable(getattr(expected, part)), part
    for part in ("initial_id", "returned_id", "planned", "accepted", "rejected", "evaluated", "content"):
        assert getattr(record, part) == getattr(expected, part), part
    assert record.candidates == expected.candidates
    assert compared(record) == [
        dataclasses.replace(one, before=untimed(one.before), after=untimed(one.after)) for one in compared(expected)
    ]
    mine, theirs = heat_map(record), heat_map(expected)
    assert (mine is None) == (theirs is None)
    if mine is not None and theirs is not None:
        assert [row.scores for row in mine.rows] == [row.scores for row in theirs.rows]
    assert samples(record) == samples(expected)
    for number in samples(record):
        assert [one.feedback for one in record.examples[number]] == [one.feedback for one in expected.examples[number]]
    assert MLflowFeed(None, store.experiment, store.uri).read().optimization == record
    assert record.usage.flat() == pytest.approx(expected.usage.flat())
    assert [phase.name for phase in record.phases] == [phase.name for phase in expected.phases]
    for mine, theirs in zip(record.trials, expected.trials, strict=True):
        for part in ("number", "kind", "candidate", "parents", "score", "best", "size", "accepted", "reason", "phase"):
            assert getattr(mine, part) == getattr(theirs, part), (part, mine.number)
        assert mine.spent.cost == pytest.approx(theirs.spent.cost)
        assert f"trial {mine.number}, {mine.kind}: " in html


def untimed(example: Example) -> Example:
    """As a run has it: how long an example took is in its trace."""
    return dataclasses.replace(example, seconds=None)


def loaded(path: str) -> str | None:
    program = ColourFamily()
    program.load(path, allow_unsafe_lm_state=True)
    return program_id(program)


def test_the_candidate_table_names_the_runs(store: Store, tmp_path: Path) -> None:
    lm = scripted_lm()
    store.instrument()
    quietly(RUNS["MIPROv2"], lm)
    store.flush()
    runs = store.runs()
    top = next(run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags)
    table = store.artifact(top, "candidates.json", tmp_path)
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    key = top.data.tags["dspy.run.key"]
    assert [row["run_id"] for row in rows] == [runs[f"{key}/{row['number']}"].info.run_id for row in rows]
    winners = [
        run
        for run in runs.values()
        if "★" in run.info.run_name and run.data.tags["mlflow.parentRunId"] == top.info.run_id
    ]
    assert [run.info.run_id for run in winners] == [top.data.tags["dspy.winner.run_id"]]
    assert winners[0].data.tags["dspy.program.id"] == top.data.tags["dspy.program.id"]
    trials = [run for run in runs.values() if run.data.tags["dspy.run.kind"] == "trial"]
    assert all(run.info.run_name.split()[0] == run.data.tags["dspy.trial.number"] for run in trials)


def test_an_evaluation_of_its_own_is_a_run(store: Store, tmp_path: Path) -> None:
    scripted_lm()
    store.instrument()
    val = load_examples("val", 8)
    result = quietly(dspy.Evaluate(devset=val, metric=same_family_with_feedback, num_threads=2), ColourFamily())
    store.flush()
    (run,) = store.runs().values()
    assert (run.info.run_name, run.info.status) == ("Evaluate ColourFamily", "FINISHED")
    assert run.data.metrics["score"] == pytest.approx(result.score / 100)
    traces = [trace for trace in store.traces(run) if trace.info.assessments]
    (assessment,) = scores(traces[0])
    assert (len(traces), {scores(trace)[0].value for trace in traces}) == (8, {row[2].score for row in result.results})
    assert assessment.name == "same_family_with_feedback"
    assert assessment.rationale.startswith(("Right", "Wrong"))
    assert assessment.metadata["mlflow.assessment.sourceRunId"] == run.info.run_id
    expected = {
        one.metadata["dspy.example.index"]: (one.name, one.expectation.value)
        for trace in traces
        for one in trace.info.assessments
        if one.expectation is not None
    }
    assert expected == {str(index): ("family", example.family) for index, example in enumerate(val)}
    table = store.artifact(run, "evaluation_table.json", tmp_path)
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["inputs"] for row in rows] == [{"colour_name": example.colour_name} for example in val]
    assert [row["expected"] for row in rows] == [{"family": example.family} for example in val]
    assert [row["prediction"]["family"] for row in rows] == [row[1].family for row in result.results]
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["ColourFamily eval"]


def test_without_content_there_is_all_that_is_no_content(store: Store, tmp_path: Path) -> None:
    lm = scripted_lm()
    store.instrument(capture_content="no_content")
    quietly(RUNS["BootstrapFewShotWithRandomSearch"], lm)
    store.flush()
    runs = store.runs()
    top = next(run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags)
    assert store.artifacts(top) == {"candidates.json", "phases.json", "report.html"}
    assert top.data.tags["dspy.content"].startswith("off: ")
    assert top.data.metrics["best_score"] >= 0
    trial = runs[f"{top.data.tags['dspy.run.key']}/1"]
    assert store.artifacts(trial) == {"evaluation_table.json"}
    table = store.artifact(trial, "evaluation_table.json", tmp_path)
    assert table["columns"] == ["index", "id", "score", "trace_id"]
    assert len([trace for trace in store.traces(trial) if trace.info.assessments]) == 8
    everything = json.dumps([[run.data.tags, run.data.params] for run in runs.values()])
    html = Path(store.client.download_artifacts(top.info.run_id, "report.html", str(tmp_path))).read_text()
    for text in (everything, html):
        assert "colour" not in text.replace("ColourFamily", "").replace("colour-words", "")
    assert "CAPTURE_MESSAGE_CONTENT=span_only" in html
    with pytest.raises(LookupError, match="CAPTURE_MESSAGE_CONTENT"):
        load_best(ColourFamily(), experiment=store.experiment, tracking_uri=store.uri)


@pytest.mark.nightly
def test_every_one_of_a_thousand_scores_arrives(store: Store) -> None:
    scripted_lm()
    store.instrument(capture_content="no_content")
    rows = load_examples("train", 250) * 4
    result = quietly(
        dspy.Evaluate(devset=rows, metric=same_family, num_threads=4), dspy.Predict("colour_name -> family")
    )
    assert len(result.results) == 1000
    assert store.provider.force_flush(300_000)
    (run,) = store.runs().values()
    found, token = 0, None
    while True:
        page = store.client.search_traces(
            locations=[store.experiment_id], run_id=run.info.run_id, max_results=500, page_token=token
        )
        found += sum(len(scores(trace)) == 1 for trace in page)
        token = page.token
        if not token:
            break
    assert found == 1000


@pytest.mark.parametrize("uri", ["server", *at_night("sqlite")], indirect=True)
def test_parallel_compiles_do_not_mix(store: Store) -> None:
    lm = scripted_lm()
    store.instrument()
    threads = [
        threading.Thread(target=RUNS[name], args=(lm,)) for name in ("BootstrapFewShotWithRandomSearch", "COPRO")
    ]

    def both() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    quietly(both)
    store.flush()
    runs = store.runs()
    for span in store.named("example"):
        at = span.attributes
        run = runs[f"{at[semconv.OPTIMIZER_RUN_ID]}/{at[semconv.TRIAL_NUMBER]}"]
        assert run.data.tags[semconv.OPTIMIZER_RUN_ID] == at[semconv.OPTIMIZER_RUN_ID]
    for key, run in runs.items():
        mine = [
            s
            for s in store.named("example")
            if f"{s.attributes[semconv.OPTIMIZER_RUN_ID]}/{s.attributes[semconv.TRIAL_NUMBER]}" == key
        ]
        if "/" in key:
            assert {t.info.trace_id for t in store.traces(run)} == {f"tr-{s.context.trace_id:032x}" for s in mine}
    tops = [run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags]
    assert sorted(run.info.run_name.split()[0] for run in tops) == ["BootstrapFewShotWithRandomSearch", "COPRO"]


def test_who_reads_a_running_optimization_can_tell_the_time_left(store: Store) -> None:
    scripted_lm()
    store.instrument()
    scored, seen = 0, list[Any]()

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        nonlocal scored
        scored += 1
        if scored == 7:  # the first trial, of four examples, is over
            seen.append(wait_for(running, "the first trial", pause=0.2))
        return True

    def running() -> Any:
        if store.client.get_experiment_by_name(store.experiment) is None or not store.runs():
            return None
        found = read_optimization(experiment=store.experiment, tracking_uri=store.uri).optimization
        return found if found.planned and any(trial.ended for trial in found.trials) else None

    optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=metric, num_candidate_programs=1, num_threads=1)
    quietly(optimizer.compile, ColourFamily(), trainset=load_examples("train", 4), valset=load_examples("val", 4))
    store.flush()
    (found,) = seen
    (span,) = [one for one in store.named("compile") if one.name.endswith("RandomSearch")]
    assert found.planned == span.attributes["dspy.optimizer.trials.planned"] > len(found.trials)
    assert found.outcome == "running"
    assert (seconds_left(found) or 0) > 0


def test_a_run_is_there_while_it_runs_and_a_failure_has_its_reason(store: Store) -> None:
    scripted_lm()
    store.instrument()
    seen: dict[str, Any] = {}

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        if not seen:
            seen.update(wait_for(states, "the run", pause=0.2))
        raise ValueError("no verdict today")

    def states() -> dict[str, Any]:
        if store.client.get_experiment_by_name(store.experiment) is None or not (runs := store.runs()):
            return {}
        found = read_optimization(experiment=store.experiment, tracking_uri=store.uri)
        outcome = {"outcome": found.optimization.outcome}
        return {run.info.run_name: run.info.status for run in runs.values()} | outcome

    store.client.create_experiment("warm up the store " + store.experiment)  # importing MLflow is not what is timed
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=metric, num_candidate_programs=1, num_threads=1, max_errors=0
    )
    with pytest.raises(Exception):
        quietly(optimizer.compile, ColourFamily(), trainset=load_examples("train", 4), valset=load_examples("val", 4))
    store.flush()
    assert seen["BootstrapFewShotWithRandomSearch ColourFamily"] == "RUNNING"
    assert seen["outcome"] == "running"
    top = next(run for run in store.runs().values() if "mlflow.parentRunId" not in run.data.tags)
    assert top.info.status == "FAILED"
    note = top.data.tags["mlflow.note.content"]
    assert note.startswith("**FAILED**: ")
    assert "Example 0 failed: ValueError: no verdict today" in note
    assert "report.html" in store.artifacts(top)
    failed = read_optimization(top.info.run_id, tracking_uri=store.uri).optimization
    assert failed.outcome == "failed"
    assert failed.failure


def test_who_only_reads_makes_nothing(store: Store, tmp_path: Path) -> None:
    store.client.create_experiment(store.experiment)  # sqlite: there is a database
    with pytest.raises(ExportError, match="no experiment 'nowhere'"):
        read_optimization(experiment="nowhere", tracking_uri=store.uri)
    with pytest.raises(LookupError, match="no experiment 'nowhere'"):
        load_best(ColourFamily(), experiment="nowhere", tracking_uri=store.uri)
    assert store.client.get_experiment_by_name("nowhere") is None
    with pytest.raises(LookupError, match="no run"):
        read_optimization("0" * 32, tracking_uri=store.uri)
    with pytest.raises(ExportError, match="no database"):
        read_optimization(tracking_uri=f"sqlite:///{tmp_path / 'none.db'}")
    assert not (tmp_path / "none.db").exists()


def test_a_run_of_the_users_own_is_the_parent(store: Store) -> None:
    import mlflow

    scripted_lm()
    store.instrument()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.uri)
    try:
        mlflow.set_experiment(store.experiment)
        with mlflow.start_run(run_name="mine") as mine:
            quietly(dspy.Evaluate(devset=load_examples("val", 2), metric=same_family), ColourFamily())
        store.flush()
    finally:
        mlflow.set_tracking_uri(before)
    runs = store.client.search_runs([store.experiment_id])
    (ours,) = [run for run in runs if run.info.run_name != "mine"]
    assert ours.data.tags["mlflow.parentRunId"] == mine.info.run_id


PROGRAM = """
    import io, sys, time
    import dspy
    from tests.optimizers.common import RUNS, scripted_lm, ColourFamily, load_examples, same_family
    {setup}
    lm = scripted_lm()
    def metric(example, prediction, trace=None):
        {metric}
        return same_family(example, prediction)
    stdout, sys.stdout = sys.stdout, io.StringIO()  # the optimizer prints
    optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=metric, num_candidate_programs=2, num_threads=1)
    print("ready", file=stdout, flush=True)
    optimizer.compile(ColourFamily(), trainset=load_examples("train", 6), valset=load_examples("val", 6))
    print("done", file=stdout, flush=True)
"""


def start(tmp_path: Path, metric: str, environment: dict[str, str], setup: str = "", *command: str) -> Any:
    root = Path(__file__).parents[2]
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM).format(metric=metric, setup=setup))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "OTEL_"))}
    paths = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*(command or (sys.executable,)), str(script)],
        cwd=tmp_path,
        env={**inherited, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr.txt").open("w"),
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )


CONFIGURE = "import dspy_otel; dspy_otel.configure()"


def test_the_environment_alone_is_enough_and_an_interrupted_compile_is_killed(server_uri: str, tmp_path: Path) -> None:
    environment = {
        "MLFLOW_TRACKING_URI": server_uri,
        "MLFLOW_EXPERIMENT_NAME": "interrupted",
        "OTEL_TRACES_EXPORTER": "mlflow",
    }
    process = start(tmp_path, "time.sleep(2)", environment, CONFIGURE)
    assert process.stdout.readline() == "ready\n"
    store = Store(server_uri, "interrupted")

    def trial() -> bool:
        return store.client.get_experiment_by_name("interrupted") is not None and any(
            "/" in key for key in store.runs()
        )

    wait_for(trial, "the run of a trial", pause=0.2)
    process.send_signal(signal.SIGINT)
    wait_for_exit(process, "the program")
    assert "KeyboardInterrupt" in (tmp_path / "stderr.txt").read_text()
    runs = store.runs().values()
    assert {run.info.status for run in runs if "mlflow.parentRunId" not in run.data.tags} == {"KILLED"}
    assert "RUNNING" not in {run.info.status for run in runs}
    (top,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert "report.html" in store.artifacts(top)
    killed = read_optimization(top.info.run_id, tracking_uri=server_uri).optimization
    assert killed.outcome == "interrupted"
    assert killed.failure is not None
    store.provider.shutdown()


def test_a_server_that_restarts_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "server"
    directory.mkdir()
    with mlflow_server(directory) as first:
        port = int(first.rpartition(":")[2])
        store = Store(first, "restarted")
        store.instrument()
        lm = scripted_lm()
        quietly(RUNS["BootstrapFewShotWithRandomSearch"], lm)
    # The server is gone; what the second half makes has to wait.
    quietly(RUNS["BootstrapFewShotWithRandomSearch"], lm, seed=1)
    with mlflow_server(directory, port=port):
        assert store.provider.force_flush(240_000)
        runs = store.runs()
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        assert len([run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags]) == 2
        for key, run in runs.items():
            if "/" in key:
                traces = store.traces(run)
                assert (len(traces), {len(scores(trace)) for trace in traces}) == (8, {1}), key
        DSPyInstrumentor().uninstrument()
        store.provider.shutdown()


def test_a_dead_server_costs_the_program_a_line(tmp_path: Path) -> None:
    environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "mlflow"}
    process = start(tmp_path, "pass", environment, CONFIGURE)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "done\n"]
    assert wait_for_exit(process, "the program") == 0
    stderr = (tmp_path / "stderr.txt").read_text()
    assert stderr.count("cannot be reached") <= 2
    assert "not written: " in stderr
    assert "Traceback" not in stderr


def test_a_tracker_never_gets_in_the_way(
    uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails inside: the program's result is the same."""
    from dspy_otel.mlflow import pending

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(pending.PendingRuns, "start", broken)
    monkeypatch.setattr(pending.PendingRuns, "end", broken)
    store = Store(uri, "broken")
    store.instrument()
    scripted_lm()
    with caplog.at_level(logging.WARNING):
        result = quietly(dspy.Evaluate(devset=load_examples("val", 4), metric=same_family), ColourFamily())
        store.flush()
    assert len(result.results) == 4
    DSPyInstrumentor().uninstrument()
    store.provider.shutdown()
