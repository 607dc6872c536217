"""A GEPA run that is killed and started again is one run."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from dspy_otel.optimizers.resume import FILE
from tests.optimizers.common import compile_span, quietly, run_gepa_digits, trials
from tests.support.waiting import run

ROOT = Path(__file__).parent.parent.parent
PREFIX = "dspy.optimizer."


def start(folder: Path, lines: Path, kill_after: int, around: bool = False) -> None:
    process = run(
        [sys.executable, "-m", "tests.optimizers.killed", str(folder), str(lines), str(kill_after), "around" * around],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
    )
    assert process.returncode == (-signal.SIGKILL if kill_after else 0), process.stderr[-2000:]


def spans_of(lines: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def with_name(spans: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    return [span for span in spans if span["name"].startswith(prefix)]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("around", [False, True])
def test_a_killed_run_goes_on(tmp_path: Path, around: bool) -> None:
    folder, lines = tmp_path / "gepa", tmp_path / "spans"
    start(folder, lines, 60, around)
    killed = spans_of(lines)
    assert with_name(killed, "trial")
    assert not with_name(killed, "compile")
    noted = json.loads((folder / FILE).read_text(encoding="utf-8"))
    assert noted["outcome"] == "running"

    start(folder, lines, 0, around)
    spans = spans_of(lines)
    first, second = with_name(spans, "compile GEPA")
    assert {span["attributes"].get(PREFIX + "run.id") for span in with_name(spans, "trial")} == {noted["run_id"]}

    # The second process speaks for the first one, in the place where its trials already look for their parent.
    said = first["attributes"]
    assert said[PREFIX + "run.id"] == noted["run_id"]
    assert said[PREFIX + "attempt"] == 1
    assert said[PREFIX + "outcome"] == "interrupted"
    assert said[PREFIX + "params.max_metric_calls"] == 150
    assert said[PREFIX + "trials.done"] == len(with_name(killed, "trial"))
    assert first["status"]["status_code"] == "ERROR"
    top = [span for span in with_name(killed, "trial") if span["parent_id"] == first["context"]["span_id"]]
    assert top
    assert all(span["context"]["trace_id"] == first["context"]["trace_id"] for span in top)
    assert (first["parent_id"] is not None) == around
    assert first["start_time"] <= min(span["start_time"] for span in killed)
    assert max(span["end_time"] for span in with_name(killed, "trial")) <= first["end_time"] < second["start_time"]

    said = second["attributes"]
    assert said[PREFIX + "run.id"] == noted["run_id"]
    assert said[PREFIX + "attempt"] == 2
    assert said[PREFIX + "resumed"] is True
    assert said[PREFIX + "previous_outcome"] == "interrupted"
    assert said[PREFIX + "outcome"] == "finished"
    assert second["links"][0]["context"]["span_id"] == first["context"]["span_id"]

    numbers = [span["attributes"]["dspy.trial.number"] for span in with_name(spans, "trial")]
    assert len(numbers) == len(set(numbers)) == said[PREFIX + "trials.done"]
    before, after = with_name(killed, "trial"), with_name(spans[len(killed) :], "trial")
    assert max(s["attributes"]["dspy.trial.number"] for s in before) < min(
        s["attributes"]["dspy.trial.number"] for s in after
    )
    full = [s["attributes"] for s in with_name(spans, "trial") if s["attributes"]["dspy.trial.kind"] != "minibatch"]
    best = max(trial["dspy.trial.score"] for trial in full if trial["dspy.trial.kind"] != "sample")
    assert said[PREFIX + "best_score"] == best
    assert said[PREFIX + "winner.trial"] in numbers
    assert said[PREFIX + "examples.evaluated"] == sum(trial["dspy.trial.size"] for trial in full) + sum(
        span["attributes"]["dspy.trial.size"]
        for span in with_name(spans, "trial")
        if span["attributes"]["dspy.trial.kind"] == "minibatch"
    )
    # Candidates of the first attempt are known as parents in the second.
    known = {span["attributes"]["dspy.program.id"] for span in with_name(spans, "trial")}
    for span in after:
        assert set(span["attributes"].get("dspy.candidate.parent_ids", ())) <= known
        if span["attributes"]["dspy.trial.kind"] == "sample":
            assert "dspy.trial.params.candidate_index" in span["attributes"]

    # Usage: what the killed process had written down, and all of the second one's.
    for name in ("lm_calls", "input_tokens", "task.lm_calls", "reflection.lm_calls"):
        usage = noted["usage"].get(f"dspy.usage.{name}", 0) + said.get(f"dspy.usage.{name}", 0)
        assert said[f"{PREFIX}all_attempts.usage.{name}"] == usage > 0
    assert 0 <= len(with_name(killed, "chat")) - noted["usage"]["dspy.usage.lm_calls"] <= 2 * 8  # of one trial at most
    assert json.loads((folder / FILE).read_text(encoding="utf-8"))["outcome"] == "finished"
    assert [name for name in os.listdir(folder) if name.endswith(".tmp")] == []


def test_each_of_several_killed_attempts_keeps_its_link_and_its_sums(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument()
    for calls in (30, 50, 70):
        quietly(run_gepa_digits, calls=calls, log_dir=str(tmp_path))
        noted = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
        # As if it had been killed just before its end: nothing but the file is left of it.
        (tmp_path / FILE).write_text(json.dumps({**noted, "outcome": "running"}), encoding="utf-8")
    told: dict[int, list[Any]] = {}
    for span in telemetry.named("compile GEPA"):
        told.setdefault(span.attributes[PREFIX + "attempt"], []).append(span)
    assert {number: len(spans) for number, spans in told.items()} == {1: 2, 2: 2, 3: 1}
    first, second, (third,) = told[1], told[2], told[3]
    for spans in (first, second):
        assert len({span.context.span_id for span in spans}) == 1
    for span in second:
        assert [link.context.span_id for link in span.links] == [first[0].context.span_id]
    assert [link.context.span_id for link in third.links] == [second[0].context.span_id]
    by_itself, in_its_place = sorted(second, key=lambda span: span.attributes[PREFIX + "outcome"])
    assert by_itself.attributes[PREFIX + "outcome"] == "finished"
    everything = PREFIX + "all_attempts.usage.lm_calls"
    assert in_its_place.attributes[everything] == by_itself.attributes[everything]


def test_a_run_in_a_new_folder_is_the_first_attempt(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument()
    quietly(run_gepa_digits, log_dir=str(tmp_path))
    said = compile_span(telemetry, "GEPA").attributes
    assert said[PREFIX + "attempt"] == 1
    assert PREFIX + "resumed" not in said
    assert not any("all_attempts" in key for key in said)
    assert trials(telemetry, "GEPA")[0]["trial.number"] == 1


def test_gepa_goes_on_from_the_same_state_with_and_without_us(telemetry: Any, tmp_path: Path) -> None:
    def left(name: str) -> Any:
        folder = str(tmp_path / name)
        quietly(run_gepa_digits, calls=60, log_dir=folder)
        program, _ = quietly(run_gepa_digits, calls=120, log_dir=folder)
        results = program.detailed_results
        files = sorted(path.name for path in Path(folder).rglob("*") if path.name != FILE)
        return files, results.val_aggregate_scores, results.parents, results.discovery_eval_counts

    bare = left("bare")
    telemetry.instrument(optimization_traces="failed_and_best")
    assert left("watched") == bare
    assert [span.attributes[PREFIX + "attempt"] for span in telemetry.named("compile GEPA")] == [1, 2]


def test_without_log_dir_there_is_no_attempt_and_no_file(telemetry: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    telemetry.instrument()
    quietly(run_gepa_digits, calls=30)
    assert PREFIX + "attempt" not in compile_span(telemetry, "GEPA").attributes
    assert not list(tmp_path.rglob(FILE))


def test_an_exception_is_an_outcome_of_its_own(telemetry: Any, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(state: Any) -> bool:
        if state.total_num_evals > 40:
            raise Stop
        return False

    telemetry.instrument()
    with pytest.raises(Stop):
        quietly(run_gepa_digits, log_dir=str(tmp_path), gepa_kwargs={"stop_callbacks": [stop]})
    quietly(run_gepa_digits, log_dir=str(tmp_path))
    first, second = telemetry.named("compile GEPA")
    assert first.attributes[PREFIX + "outcome"] == "failed"
    assert second.attributes[PREFIX + "previous_outcome"] == "failed"
    assert second.attributes[PREFIX + "run.id"] == first.attributes[PREFIX + "run.id"]
    assert second.links[0].context.span_id == first.context.span_id
    assert len(trials(telemetry, "GEPA")) == second.attributes[PREFIX + "trials.done"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 1, "optimizer": "GEPA", "run_id": 3}', "\x00"])
def test_a_file_that_is_not_ours_is_no_attempt(telemetry: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    telemetry.instrument()
    quietly(run_gepa_digits, calls=30, log_dir=str(tmp_path))
    assert compile_span(telemetry, "GEPA").attributes[PREFIX + "attempt"] == 1
    assert json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["outcome"] == "finished"


def test_trials_that_make_no_sense_cost_the_resumption_only(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument()
    quietly(run_gepa_digits, calls=30, log_dir=str(tmp_path))
    state = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    (tmp_path / FILE).write_text(json.dumps({**state, "run": {**state["run"], "trials": [[1, 2]]}}), encoding="utf-8")
    program, _ = quietly(run_gepa_digits, calls=60, log_dir=str(tmp_path))
    assert program.detailed_results.total_metric_calls >= 60
    first, second = telemetry.named("compile GEPA")
    assert first.attributes[PREFIX + "run.id"] != second.attributes[PREFIX + "run.id"]
