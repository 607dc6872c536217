"""`dspy-otel runs` and `dspy-otel show`: groups of what can be compared, and the examples that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_otel import cli, program_id
from dspy_otel.decide import list_runs
from dspy_otel.decide.overview import EVALUATION, OPTIMIZATION
from dspy_otel.record.history import optimizations
from tests.decide.test_compare import Asking, Failing, evaluate, length, write
from tests.optimizers.common import RUNS, quietly, scripted_lm

pytest.importorskip("scipy")

OTHERS = [dspy.Example(question=f"other {place}", answer="right").with_inputs("question") for place in range(6)]


@pytest.fixture
def evaluations(telemetry: Any, tmp_path: Path) -> str:
    """Two programs on one dataset, another metric on it, and another dataset."""
    telemetry.instrument(capture_content="span_only")
    spans = [
        *evaluate(telemetry, ["wrong"] * 3 + ["right"] * 9),
        *evaluate(telemetry, ["wrong"] * 2 + ["right"] * 10, Failing("Answer in a word.")),
        *evaluate(telemetry, ["right"] * 12, metric=length),
        *evaluate(telemetry, ["right"] * 6, rows=OTHERS),
    ]
    return write(tmp_path / "spans.jsonl", spans)


def test_only_what_can_be_compared_stands_together(evaluations: str) -> None:
    groups = list_runs(evaluations)
    assert [(group.metric, group.size, len(group.runs)) for group in groups] == [
        ("exact", 6, 1),
        ("length", 12, 1),
        ("exact", 12, 2),
    ]
    assert len({group.digest for group in groups}) == 2
    assert None not in {group.digest for group in groups}
    run = groups[2].runs[-1]
    assert (run.kind, run.title, run.outcome) == (EVALUATION, "evaluation of Asking", "finished")
    assert (run.program, run.usage.lm_calls, run.models) == (program_id(Asking()), 12, {"task": ("dummy",)})


def test_examples_that_always_fail_and_those_that_flip(evaluations: str, capsys: pytest.CaptureFixture[str]) -> None:
    group = list_runs(evaluations, examples=True)[2]
    found = group.examples
    assert found is not None
    assert [run.id for run in found.runs] == [run.id for run in reversed(group.runs)]
    # The first three fail with the first program. With the second, "1", "2" and "11" raise, and the model is wrong
    # in its first two answers, to "0" and "3".
    assert [one.example.index for one in found.failing] == [0, 1, 2]
    assert [(one.example.index, one.scores) for one in found.flipping] == [(3, (1.0, 0.0)), (11, (1.0, 0.0))]
    assert cli.main(["runs", evaluations, "--examples"]) == 0
    text = capsys.readouterr().out
    assert "3 fail in every run" in text
    assert "    +-  #11  question 11" in text
    # Which column is which run, and its model.
    columns = [line for line in text.splitlines() if line.startswith(("    ^ ", "    .^ "))]
    assert [line.split("  ")[-1] for line in columns] == ["evaluation of Asking, dummy", "evaluation of Failing, dummy"]
    assert "Examples are recorded of 1 of these runs: two are needed." in text
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_an_optimization_and_whether_it_gained_anything(
    telemetry: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = scripted_lm()
    telemetry.instrument(capture_content="span_only")
    quietly(RUNS["MIPROv2"], lm)
    spans = telemetry.exporter.get_finished_spans()
    (record,) = optimizations(spans)
    path = write(tmp_path / "spans.jsonl", spans)
    (group,) = list_runs(path)
    (run,) = group.runs
    assert (run.kind, run.digest, run.size) == (OPTIMIZATION, record.val.digest, 8)  # type: ignore[union-attr]
    assert (run.baseline, run.best, run.trials) == (record.baseline, record.best, len(record.trials))
    for name in (path, f"{path}#{record.id}"):
        assert cli.main(["show", name]) == 0
        text = capsys.readouterr().out
        assert text.startswith("MIPROv2 ColourFamily, finished\n")
        assert "Baseline (A) against winner (B)" in text
        assert "exact McNemar" in text
        assert "proposer calls" in text
        assert [line for line in text.splitlines() if len(line) > 80] == []
    assert cli.main(["show", path, "--format", "json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert (loaded["id"], loaded["best"]) == (record.id, record.best)
    assert loaded["comparison"]["verdict"] == "no difference shown"
    assert cli.main(["runs", path, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["runs"][0]["id"] == record.id


def test_without_recorded_examples_there_is_a_reason(
    telemetry: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = scripted_lm()
    telemetry.instrument(optimization_traces="none")
    quietly(RUNS["MIPROv2"], lm)
    path = write(tmp_path / "spans.jsonl", telemetry.exporter.get_finished_spans())
    assert cli.main(["show", path]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Baseline and winner:" in text
    assert "were not recorded (OTEL_DSPY_OPTIMIZATION_TRACES)" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["runs", "{tmp}/empty.jsonl"], "empty.jsonl has no finished optimization and no evaluation."),
        (["runs", "{tmp}/nothing.jsonl"], "nothing.jsonl: name a file that exists"),
        (["show", "{tmp}/empty.jsonl"], "there is no such part; there are none."),
    ],
)
def test_nothing_is_one_sentence(
    tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("{}\n")
    assert cli.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
