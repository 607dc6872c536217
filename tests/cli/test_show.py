"""Trees and tables, from spans of the real SDK."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("rich")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Status, StatusCode
from rich.console import Console

from dspy_otel import semconv
from dspy_otel.cli.demo import run, show
from dspy_otel.cli.demo.telemetry import Recorder


@pytest.fixture
def recorder():
    recorder = Recorder()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(recorder)
    tracer = provider.get_tracer("test")
    recorder.part = "evaluate"
    with tracer.start_as_current_span("example P") as example:
        example.set_attribute(semconv.EVALUATION_ID, "e")
        example.set_attribute(semconv.EXAMPLE_SCORE, 0.5)
        for hit in (False, True):
            with tracer.start_as_current_span("chat m") as call:
                call.set_attribute(semconv.GEN_AI_OPERATION_NAME, semconv.OPERATION_CHAT)
                call.set_attribute(semconv.LM_CACHE_HIT, hit)
                if not hit:
                    call.set_attribute(semconv.GEN_AI_USAGE_INPUT_TOKENS, 12)
                    call.set_attribute(semconv.GEN_AI_USAGE_OUTPUT_TOKENS, 3)
        with tracer.start_as_current_span("execute_tool t") as tool:
            tool.set_attribute(semconv.ERROR_TYPE, "ValueError")
            tool.set_status(Status(StatusCode.ERROR))
    recorder.part = "GEPA"
    for size, score in [(20, 0.4), (3, 1.0), (20, 0.35), (20, 0.6), (20, None)]:
        with tracer.start_as_current_span("evaluate P") as evaluation:
            evaluation.set_attribute(semconv.EVALUATION_ID, "e")
            evaluation.set_attribute(semconv.EVALUATION_SIZE, size)
            if score is not None:
                evaluation.set_attribute(semconv.EVALUATION_SCORE, score)
    return recorder


def printed(what) -> list[list[str]]:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(what)
    return [[cell.strip() for cell in line.split("│")] for line in console.export_text().splitlines()]


def test_totals_by_part(recorder):
    totals = recorder.totals("evaluate")
    assert dict(totals) == {
        "spans": 4,
        "traces": 1,
        "lm_calls": 2,
        "cache_hits": 1,
        "input_tokens": 12,
        "output_tokens": 3,
    }
    assert recorder.totals()["spans"] == 9
    assert recorder.totals()["traces"] == 6


def test_tree_shows_scores_tokens_cache_and_errors(recorder):
    text = "\n".join("│".join(line) for line in printed(show.trace_tree(recorder.of("evaluate"))))
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 5
    assert "score 0.5" in lines[1]
    assert "12 > 3 tokens" in lines[2]
    assert "from cache" in lines[3]
    assert "tokens" not in lines[3]
    assert "ValueError" in lines[4]
    assert show.trace_tree(recorder.of("GEPA")) is None


def test_optimizer_table_counts_only_full_evaluations_as_best(recorder):
    rows = [row[1:-1] for row in printed(show.optimizer_tables(recorder, "GEPA")[0]) if len(row) > 5]
    assert rows == [
        ["1", "full", "20", "0.40", "0.40"],
        ["2", "minibatch", "3", "1.00", ""],
        ["3", "full", "20", "0.35", ""],
        ["4", "full", "20", "0.60", "0.60"],
    ]


def test_trials_are_shown_as_the_optimizer_counts_them():
    recorder = Recorder()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(recorder)
    recorder.part = "GEPA"
    trials = [
        (
            2,
            {
                "kind": "minibatch",
                "score": 1.0,
                "best_score": 0.375,
                "accepted": False,
                "params.components": ["a", "b"],
            },
        ),
        (1, {"kind": "baseline", "score": 0.375, "best_score": 0.375, "is_best": True, "size": 8}),
        (3, {"kind": "minibatch", "accepted": True, "params.minibatch_ids": ["123456"] * 6}),
    ]
    for number, said in trials:
        with provider.get_tracer("test").start_as_current_span("trial") as span:
            span.set_attribute(semconv.OPTIMIZER_NAME, "GEPA")
            span.set_attribute(semconv.OPTIMIZER_RUN_ID, "outer" if number < 3 else "inner")
            span.set_attribute(semconv.TRIAL_NUMBER, number)
            for key, value in said.items():
                span.set_attribute(f"dspy.trial.{key}", value)
    outer, inner = (
        [row[1:-1] for row in printed(table) if len(row) > 5] for table in show.optimizer_tables(recorder, "GEPA")
    )
    assert outer == [
        ["1", "baseline", "8", "0.375", "0.375", "", ""],
        ["2", "minibatch", "", "1", "0.375", "no", "components=a,b"],
    ]
    assert inner == [["3", "minibatch", "", "", "", "yes", "minibatch_ids=123456,123456,123456,12…"]]


def test_parts_table_and_progress(recorder):
    rows = {row[1]: row[2:-1] for row in printed(show.parts_table(recorder, ["evaluate", "GEPA"])) if len(row) > 5}
    assert rows["evaluate"] == ["1", "2", "1", "12", "3", "0", ""]
    assert rows["GEPA"] == ["5", "0", "0", "0", "0", "4", "0.60"]
    assert rows["all"][:3] == ["6", "2", "1"]
    assert show.progress_line(recorder, "GEPA") == "0 LM calls, 4 evaluations, best score 0.60"


def test_the_command_that_opens_the_ui(monkeypatch):
    assert run._ui_command("http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    assert run._ui_command("sqlite:///demo-mlflow/mlflow.db").endswith(
        "ui --backend-store-uri sqlite:///demo-mlflow/mlflow.db --workers 1 --port 5000"
    )
