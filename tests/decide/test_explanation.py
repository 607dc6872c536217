"""`dspy_otel.why` and `dspy-otel show --why`, of real optimizations."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_otel
from dspy_otel import cli, program_id
from dspy_otel.decide import CannotCompareError
from dspy_otel.record.history import optimizations
from dspy_otel.record.model import Origin
from dspy_otel.reports import render
from dspy_otel.reports.why import NO_TEXTS, sentences_of
from tests.decide.test_compare import write
from tests.optimizers.common import RUNS, quietly, scripted_lm

pytest.importorskip("scipy")

ONE_STEP = {"MIPROv2", "COPRO", "BootstrapFewShotWithRandomSearch"}
"""Optimizers that make every candidate from the initial program."""


def optimize(telemetry: Any, optimizer: str, **options: Any) -> Any:
    lm = scripted_lm()
    telemetry.instrument(**{"capture_content": "span_only", **options})
    program, _ = quietly(RUNS[optimizer], lm)
    return program


@pytest.mark.parametrize(
    "optimizer", ["MIPROv2", "GEPA", "COPRO", "SIMBA", "BootstrapFewShotWithRandomSearch", "BetterTogether"]
)
def test_what_the_program_says_comes_from_steps_of_its_optimization(telemetry: Any, optimizer: str) -> None:
    program = optimize(telemetry, optimizer)
    found = dspy_otel.why(telemetry.exporter.get_finished_spans())
    assert (found.optimizer, found.winner) == (optimizer, program_id(program))
    expected = [
        (name, text)
        for name, predictor in program.named_predictors()
        for text in sentences_of(predictor.signature.instructions)
    ]
    assert [(one.predictor, one.text) for one in found.sentences] == expected
    assert len(found.demos) == sum(len(predictor.demos) for predictor in program.predictors())
    # A step is a trial of that optimization, with the scores that this has.
    record = found.record
    by_number = {trial.number: trial for trial in record.trials}
    for step in found.steps:
        assert step.trial is not None
        assert by_number[step.trial].candidate == step.candidate
        assert optimizer not in ONE_STEP or step.parents == (found.initial,)
        whole = [
            one.score for one in record.trials if one.candidate == step.candidate and one.size == record.trials[0].size
        ]
        assert step.after is None or step.after in whole
    new = {one.text for one in found.sentences if one.step is not None}
    start = {text for one in dspy.Predict("a -> b").predictors() for text in sentences_of(one.signature.instructions)}
    assert not new & start
    if optimizer in ONE_STEP:
        assert found.steps[-1].gain == pytest.approx((record.best or 0) - (record.baseline or 0), abs=1e-9)
    assert found.unit == "USD"
    assert sum(one.gained for one in found.spending) == pytest.approx((record.best or 0) - (record.baseline or 0))
    # It is on the page, in a notebook, in a terminal and in JSON.
    assert "Why it got better" in render(record)
    HTMLParser().feed(found._repr_html_())
    assert "Why it got better" in found._repr_html_()
    assert [line for line in str(found).splitlines() if len(line) > 80] == []
    loaded = json.loads(json.dumps(found.to_dict()))
    assert [one["text"] for one in loaded["sentences"]] == [text for _, text in expected]


def test_demos_of_a_bootstrap_are_those_of_its_trial(telemetry: Any) -> None:
    optimize(telemetry, "BootstrapFewShotWithRandomSearch")
    found = dspy_otel.why(telemetry.exporter.get_finished_spans())
    (step,) = found.steps
    assert step.choices is not None
    assert step.choices["strategy"] == "bootstrap_shuffled"
    assert {one.step for one in found.demos} == {step.candidate}
    assert {one.bootstrapped for one in found.demos} == {True, False}
    assert f"trial {step.trial}" in str(found)


def test_gepa_scores_training_and_validation(telemetry: Any) -> None:
    optimize(telemetry, "GEPA")
    found = dspy_otel.why(telemetry.exporter.get_finished_spans())
    both = found.train_and_validation
    assert both is not None
    assert both.validation_size == 8
    trials = found.record.trials
    assert both.validation_before == trials[0].score
    seed = [one for one in trials if one.kind == "sample" and one.candidate == found.initial]
    assert both.train_before == pytest.approx(sum(one.score for one in seed) / len(seed))
    assert all(one.part_before is not None for one in found.steps if len(one.parents) == 1)


def test_show_says_why(telemetry: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimize(telemetry, "GEPA")
    spans = telemetry.exporter.get_finished_spans()
    path = write(tmp_path / "spans.jsonl", spans)
    (record,) = optimizations(spans)
    for name in (path, f"{path}#{record.id}"):
        assert dspy_otel.why(name) == dspy_otel.why(spans)
        assert cli.main(["show", name, "--why"]) == 0
        text = capsys.readouterr().out
        assert "Baseline (A) against winner (B)" in text
        assert text.endswith(str(dspy_otel.why(spans)))
    assert cli.main(["show", path]) == 0
    assert "Why it got better" not in capsys.readouterr().out
    assert cli.main(["show", path, "--why", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["why"]["optimization"] == record.id


def test_without_content_it_says_how_to_have_it(telemetry: Any) -> None:
    optimize(telemetry, "GEPA", capture_content="no_content")
    found = dspy_otel.why(telemetry.exporter.get_finished_spans())
    assert (found.sentences, found.demos, found.missing) == ((), (), (NO_TEXTS,))
    assert [step.trial for step in found.steps]
    assert found.spending
    assert "span_only" in str(found)
    assert "+" in str(found)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("{tmp}/nothing.jsonl", "There is no file"),
        ("{tmp}/empty.jsonl", "there is no such optimization; there are none."),
        ("{tmp}/empty.jsonl#x", "there is no such optimization; there are none."),
        ([], "spans: there is no such optimization"),
        (Origin("run", "GEPA", "0" * 16, 1, 0.5, True), "The optimization run is not in MLflow"),
    ],
)
def test_what_is_not_there_is_one_sentence(tmp_path: Path, reference: Any, reason: str) -> None:
    (tmp_path / "empty.jsonl").write_text("{}\n")
    if isinstance(reference, str):
        reference = reference.replace("{tmp}", str(tmp_path))
    with pytest.raises(CannotCompareError, match=reason):
        dspy_otel.why(reference)
