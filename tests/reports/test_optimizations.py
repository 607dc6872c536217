"""Reports of real optimizations: what they tell is what the spans and DSPy say."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from dspy_otel import cli, program_id, semconv
from dspy_otel.record.history import optimizations
from dspy_otel.record.model import Optimization
from dspy_otel.record.otlp import decode_lines
from dspy_otel.reports import render
from dspy_otel.reports.examples import compared
from tests.optimizers.common import RUNS, compile_span, quietly, scripted_lm, trials

OPTIMIZERS = ["MIPROv2", "GEPA", "SIMBA", "COPRO", "BootstrapFewShotWithRandomSearch", "BetterTogether"]


def optimize(telemetry: Any, optimizer: str, **options: Any) -> tuple[Any, Optimization]:
    lm = scripted_lm()
    telemetry.instrument(**{"capture_content": "span_only", **options})
    program, _ = quietly(RUNS[optimizer], lm)
    found = optimizations(telemetry.exporter.get_finished_spans())
    return program, next(report for report in found if report.optimizer == optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_tells_what_the_spans_say(telemetry: Any, optimizer: str) -> None:
    program, report = optimize(telemetry, optimizer)
    said, scored = compile_span(telemetry, optimizer).attributes, trials(telemetry, optimizer)
    assert [trial.score for trial in report.trials] == [trial.get("trial.score") for trial in scored]
    assert [trial.candidate for trial in report.trials] == [trial.get("candidate.id") for trial in scored]
    assert (report.baseline, report.best) == (
        said[semconv.OPTIMIZER_BASELINE_SCORE],
        said[semconv.OPTIMIZER_BEST_SCORE],
    )
    assert report.returned_id == program_id(program)
    assert report.winning is not None
    assert report.winning.candidate == report.returned_id

    # Usage: the phases together are the whole, role by role, and nothing is counted twice.
    for name, value in report.usage.flat().items():
        assert sum(phase.usage.flat().get(name, 0) for phase in report.phases) == pytest.approx(value), name
    assert max(trial.spent.cost for trial in report.trials) <= report.usage.cost + 1e-9

    # Programs: the returned one as it is.
    best = report.candidates[report.returned_id].predictors
    assert {name: one.instructions for name, one in best.items()} == {
        name: predictor.signature.instructions for name, predictor in program.named_predictors()
    }
    # Examples: those of the baseline and the winner, and their mean difference is the gain.
    if examples := compared(report):
        mean = sum(one.gain for one in examples) / len(examples)
        assert mean == pytest.approx(report.best - report.baseline, abs=1e-4)
    else:
        assert report.winning.candidate == report.initial_id
    assert render(report).count("<svg") >= 2


def test_without_traces_of_examples_it_tells_all_that_is_not_about_them(telemetry: Any) -> None:
    _, report = optimize(telemetry, "MIPROv2", optimization_traces="none", capture_content="no_content")
    assert compared(report) == []
    assert report.candidates == {}
    assert not report.content
    assert sum(phase.usage.lm_calls or 0 for phase in report.phases) == report.usage.lm_calls > 0
    assert report.trials[-1].spent.lm_calls == report.usage.lm_calls
    assert "no content" not in render(report)
    assert "CAPTURE_MESSAGE_CONTENT=span_only" in render(report)


def otlp_json(spans: Iterable[Any]) -> str:
    """As the Collector's file exporter writes it: ids in hexadecimal, where protobuf's JSON has base64."""
    from google.protobuf.json_format import MessageToDict
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    def with_hex(value: Any) -> Any:
        if isinstance(value, list):
            return [with_hex(one) for one in value]
        if isinstance(value, dict):
            return {
                key: base64.b64decode(part).hex() if key in ("traceId", "spanId", "parentSpanId") else with_hex(part)
                for key, part in value.items()
            }
        return value

    lines = [with_hex(MessageToDict(encode_spans([span]))) for span in spans]
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_a_file_of_spans_gives_the_same_report(telemetry: Any, tmp_path: Path, capsys: Any) -> None:
    _, report = optimize(telemetry, "MIPROv2")
    path = tmp_path / "spans.json"
    path.write_text(otlp_json(telemetry.exporter.get_finished_spans()))
    with path.open() as lines:
        (again,) = optimizations(span for spans in decode_lines(lines) for span in spans)
    assert again == report
    output = tmp_path / "out.html"
    assert cli.main(["report", "--spans", str(path), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert output.read_text() == render(report)


def test_a_file_that_is_none_gives_one_clear_line(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "spans.json"
    wrong = (("{}", "no finished optimization"), ("nonsense", "is no file of OTLP JSON"), (None, "that exists"))
    for text, said in wrong:
        if text is not None:
            path.write_text(text)
        else:
            path.unlink()
        assert cli.main(["report", "--spans", str(path)]) in (1, 2)
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
