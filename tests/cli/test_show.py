"""Trees and tables, from spans of the real SDK."""

from __future__ import annotations

import io
import json

import pytest

pytest.importorskip("rich")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Status, StatusCode
from rich.console import Console

from dspy_otel import semconv
from dspy_otel.cli.demo import run, show
from dspy_otel.cli.demo.telemetry import Recorder
from dspy_otel.cli.demo.trials import trial_tables
from dspy_otel.record.model import Candidate, Optimization, Trial


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
        [row[1:-1] for row in printed(table) if len(row) > 5] for table in trial_tables(recorder.trials("GEPA"))
    )
    assert outer == [
        ["1", "baseline", "8", "0.375", "0.375", "", ""],
        ["2", "minibatch", "", "1", "0.375", "no", "components=a,b"],
    ]
    assert inner == [["3", "minibatch", "", "", "", "yes", "minibatch_ids=123456,123456,123456,12…"]]


def test_progress_counts_only_full_evaluations_as_best(recorder):
    assert show.progress_line(recorder, "GEPA") == "0 LM calls, 4 evaluations, best score 0.60"


def test_five_trials_that_matter():
    def trial(number: int, kind: str, score: float | None, **more) -> Trial:
        return Trial(optimization="o", optimizer="GEPA", number=number, kind=kind, score=score, **more)

    trials = [
        trial(1, "baseline", 0.4, is_best=True),
        trial(2, "sample", 0.1),
        trial(3, "minibatch", 0.2, accepted=False),
        trial(4, "full", 0.6, is_best=True),
        trial(5, "full", 0.3),
        trial(6, "full", 0.5),
        trial(7, "full", 0.8, is_best=True),
        trial(8, "full", None),
    ]
    assert [one.number for one in show.trials_that_matter(trials)] == [1, 3, 4, 5, 7]


def test_what_the_winner_changed():
    def state(instructions: str, demos: int) -> str:
        return json.dumps({"say": {"signature": {"instructions": instructions}, "demos": [{}] * demos}})

    before, after = Candidate("a", state("Short.", 0)), Candidate("b", state("long " * 200, 2))
    texts = [line.plain for line in show.changes(Optimization(optimizer="GEPA", initial=before, returned=after))]
    assert texts[:2] == ["What GEPA changed", "- say: Short."]
    assert texts[2].startswith("+ say: long long")
    assert len(texts[2]) < 320
    assert texts[3:] == ["+ say: 2 demos"]
    same = [line.plain for line in show.changes(Optimization(optimizer="GEPA", initial=before, returned=before))]
    assert same[1:] == ["Nothing: the program was best as it was."]
    unknown = show.changes(Optimization(optimizer="GEPA", initial=Candidate("a"), returned=Candidate("b")))
    assert "not recorded" in unknown[1].plain


def test_the_command_that_opens_the_ui():
    assert run.where_to_look("http://me:hidden@127.0.0.1:5000") == "http://127.0.0.1:5000"


def test_the_command_has_its_path_where_no_shell_would_find_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in (".venv/bin", "my programs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "dspy-otel").touch(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.where_to_look("sqlite:///m.db") == ".venv/bin/dspy-otel ui --tracking-uri sqlite:///m.db"
    monkeypatch.chdir(tmp_path / "my programs")
    assert run.where_to_look("sqlite:///m.db").split(" ui ")[0] == str(tmp_path / ".venv/bin/dspy-otel")
    monkeypatch.setattr("sys.executable", str(tmp_path / "my programs/python"))
    assert run.where_to_look("sqlite:///m.db").split(" ui ")[0] == f"'{tmp_path}/my programs/dspy-otel'"
    monkeypatch.setenv("PATH", str(tmp_path / ".venv/bin"))
    assert run.where_to_look("sqlite:///m.db").split(" ui ")[0] == "dspy-otel"


@pytest.mark.parametrize(
    ("trial", "text"),
    [
        (Trial(optimization="o", number=1, kind="baseline"), "the program as it is"),
        (Trial(optimization="o", number=2, changes='{"describe": {}, "choose": {}}'), "describe, choose"),
        (Trial(optimization="o", number=3, params={"iteration": 2}), "iteration=2"),
    ],
)
def test_what_a_trial_changed(trial, text):
    assert show.changed(trial) == text
