"""Runs while they happen, against a store in memory: what is written, what waits, and what never gets in the way."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

from dspy_otel import semconv
from dspy_otel.mlflow import processor, retry, runs
from dspy_otel.mlflow.exporter import exporters_of, track_runs
from dspy_otel.mlflow.retry import ExportError, Verdict
from dspy_otel.mlflow.runs import Score, runs_of, safe_key
from dspy_otel.mlflow.target import ui_command
from dspy_otel.mlflow.worker import EXIT_ATTEMPTS
from dspy_otel.record.addresses import Address, address_of, mark_shown
from dspy_otel.record.history import History
from dspy_otel.record.model import Candidate
from dspy_otel.record.otlp import decode
from dspy_otel.record.stored import program_params
from tests.mlflow.memory import AWAY, Exporter, Memory, Program


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "WRITE_INTERVAL", 0.01)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def store() -> Memory:
    return Memory()


@pytest.fixture
def program(store: Memory) -> Iterator[Program]:
    program = Program(store)
    yield program
    store.failure = None
    program.provider.shutdown()


def test_a_run_is_there_before_its_span_ends(program: Program, store: Memory) -> None:
    span = program.compile()
    span.set_attribute("dspy.optimizer.params.num_trials", 7)  # comes after the start
    assert program.provider.force_flush()
    (run,) = store.runs.values()
    assert run["tags"]["mlflow.runName"] == "Best QA"
    assert "status" not in run
    span.end()
    assert program.provider.force_flush()
    assert run["status"] == "FINISHED"
    assert run["params"] == {"num_trials": "7"}


def test_where_a_run_is_shown_is_logged_and_kept(
    program: Program, store: Memory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "dspy_otel.mlflow")
    span = program.compile("first")
    assert program.provider.force_flush()
    assert [record.getMessage() for record in caplog.records] == ["Best QA: memory/id of first"]
    assert address_of("first") == Address("id of first", "memory/id of first")
    span.end()
    assert program.provider.force_flush()
    assert "Best QA: finished: memory/id of first" in [record.getMessage() for record in caplog.records]
    monkeypatch.setattr(Memory, "url", lambda *_: None)
    program.compile("second").end()
    assert program.provider.force_flush()
    assert f"run id of second; to look at it: {ui_command('memory')}" in caplog.records[-1].getMessage()
    assert address_of("second") == Address("id of second", None, ui_command("memory"))


def test_where_a_run_is_shown_is_written_to_a_terminal_where_nobody_has_set_up_logging(
    program: Program, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda _: False)
    program.compile("plain").end()
    assert program.provider.force_flush()
    where = "memory/id of plain"
    assert screen.getvalue() == f"Best QA: {where}\nBest QA: finished: {where}\n"
    mark_shown("displayed")  # the progress display has the link in its last line
    program.compile("displayed").end()
    assert program.provider.force_flush()
    assert "displayed" not in screen.getvalue()
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda _: True)
    program.compile("logged").end()
    assert program.provider.force_flush()
    assert "logged" not in screen.getvalue()


def test_values_of_runs_are_written_one_after_the_other(
    program: Program, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several programs with several such calls each take all of a server's connections, and wait for each other."""
    log, writing = store.log, threading.Lock()
    together = 0

    def slow(*args: Any) -> None:
        nonlocal together
        if not writing.acquire(blocking=False):
            together += 1
            return
        time.sleep(0.05)
        log(*args)
        writing.release()

    monkeypatch.setattr(store, "log", slow)
    store.failure = AWAY
    span = program.compile()
    for number in range(4):
        program.trial(span, number, 1.0)
    span.end()
    program.provider.force_flush(100)
    store.failure = None
    assert program.provider.force_flush()
    assert [run["status"] for run in store.runs.values()] == ["FINISHED"] * 5
    assert not together


def test_scores_are_curves_over_trials_and_examples_have_theirs(program: Program, store: Memory) -> None:
    span = program.compile()
    for number, score in ((1, 50.0), (2, 75.0)):
        program.trial(span, number, score, examples=3)
    span.end()
    assert program.provider.force_flush()
    points = {(m.key, m.step, m.value) for m in store.runs["id of r1"]["metrics"] if m.key == "score"}
    assert points == {("score", 1, 50.0), ("score", 2, 75.0)}
    assert {run_id for _, _, run_id in store.scores} == {"id of r1/1", "id of r1/2"}
    assert len(store.scores) == 6
    assert {run_id: len(ids) for run_id, ids in store.links.items()} == {
        "id of r1": 1,
        "id of r1/1": 3,
        "id of r1/2": 3,
    }
    assert store.runs["id of r1/2"]["tags"]["mlflow.parentRunId"] == "id of r1"


def test_what_fails_waits_and_nothing_is_written_twice(
    program: Program, store: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    store.failure = AWAY
    with caplog.at_level(logging.WARNING):
        span = program.compile()
        program.trial(span, 1, 50.0, examples=200)
        span.end()
        assert not program.provider.force_flush(300)
        assert store.runs == {}
        store.failure = None
        assert program.provider.force_flush()
    assert {key: run["status"] for key, run in store.runs.items()} == {"id of r1": "FINISHED", "id of r1/1": "FINISHED"}
    assert len(store.scores) == len({trace_id for trace_id, _, _ in store.scores}) == 200
    assert len(store.links["id of r1/1"]) == 200
    assert [record.message for record in caplog.records].count(
        "MLflow is away. Spans, runs and scores wait until it works."
    ) == 1


def test_a_run_whose_creation_got_no_answer_is_not_made_twice(program: Program, store: Memory) -> None:
    store.lose_answers = 1
    program.compile().end()
    assert program.provider.force_flush()
    assert list(store.runs) == ["id of r1"]
    assert store.runs["id of r1"]["status"] == "FINISHED"


def test_what_mlflow_never_takes_does_not_hold_up_the_rest(
    program: Program, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Any, path: str, text: str) -> None:
        raise ExportError("artifacts", "no room for artifacts", Verdict.REFUSED)

    monkeypatch.setattr(store, "put_artifact", refuse)
    span = program.compile()
    program.trial(span, 1, 50.0, examples=2)
    span.end()
    assert program.provider.force_flush()
    assert {run["status"] for run in store.runs.values()} == {"FINISHED"}
    assert len(store.scores) == 2


def test_what_waits_for_a_run_that_cannot_be_created_is_no_busy_loop(
    store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ExportError("status 500", "database is locked", Verdict.LATER)

    create = store.create_run
    monkeypatch.setattr(store, "create_run", fail)
    program = Program(store)
    program.exporter.processor._no_threads = True
    span = program.compile()
    program.trial(span, 1, 50.0, examples=2)
    program.provider.force_flush(1)
    program.worker.round()
    assert any(segment.delivered and segment.scores for segment in program.journal.segments)
    assert program.worker.wait_seconds() > 0
    monkeypatch.setattr(store, "create_run", create)
    span.end()
    program.provider.shutdown()
    assert len(store.scores) == 2


def test_a_value_that_the_database_never_takes_does_not_hold_up_the_others(
    program: Program, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = store.log

    def log_or_fail(run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        if any(name.endswith("too_long") for name in params):
            raise ExportError("status 400", "Data too long for column", Verdict.LATER)
        log(run_id, metrics, params, tags)

    monkeypatch.setattr(store, "log", log_or_fail)
    span = program.compile()
    program.trial(span, 1, 50.0, examples=2)
    span.set_attribute("dspy.optimizer.params.too_long", 1)
    span.set_attribute("dspy.optimizer.params.num_trials", 7)
    span.end()
    assert program.provider.force_flush()
    run = store.runs["id of r1"]
    assert run["status"] == "FINISHED"
    assert [name for name in run["params"] if name.endswith(("too_long", "num_trials"))] == ["num_trials"]


def test_compiles_in_two_threads_do_not_mix(program: Program, store: Memory) -> None:
    def compile_(run_id: str) -> None:
        span = program.compile(run_id)
        for number in range(1, 6):
            program.trial(span, number, float(number), run_id, examples=4)
        span.end()

    threads = [threading.Thread(target=compile_, args=(f"r{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert program.provider.force_flush()
    assert len(store.runs) == 4 * 6
    for key, run in store.runs.items():
        if "/" in key:
            assert run["tags"]["mlflow.parentRunId"] == key.split("/")[0]
            assert len(store.links[key]) == 4
    curve = [(m.step, m.value) for m in store.runs["id of r3"]["metrics"] if m.key == "score"]
    assert curve == [(n, float(n)) for n in range(1, 6)]


def test_the_end_of_the_program_kills_what_still_runs(store: Memory, caplog: pytest.LogCaptureFixture) -> None:
    program = Program(store)
    span = program.compile()
    program.trial(span, 1, 50.0)
    program.provider.shutdown()
    assert store.runs["id of r1"]["status"] == "KILLED"
    assert store.runs["id of r1/1"]["status"] == "FINISHED"
    assert "The program ended before it did" in store.runs["id of r1"]["tags"]["mlflow.note.content"]


def test_at_the_end_one_line_says_what_was_not_written(
    store: Memory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(store)
    store.failure = AWAY
    with caplog.at_level(logging.WARNING):
        span = program.compile()
        program.trial(span, 1, 50.0, examples=5)
        span.end()
        backoff = program.exporter.processor.worker.backoff
        restart = backoff.restart

        def at_the_end() -> None:
            store.asked = 0
            restart()

        monkeypatch.setattr(backoff, "restart", at_the_end)
        program.provider.shutdown()
    assert store.asked <= EXIT_ATTEMPTS + 1  # one that was under way
    (line,) = [record.message for record in caplog.records if "not written" in record.message]
    assert "2 runs" in line
    assert "5 scores" in line


@pytest.mark.parametrize(
    ("error", "status"), [("builtins.ValueError", "FAILED"), ("KeyboardInterrupt", "KILLED"), (None, "FINISHED")]
)
def test_status_of_a_trial(program: Program, store: Memory, error: str | None, status: str) -> None:
    span = program.compile()
    trial = program.start("trial", span, optimizer_run_id="r1", trial_number=1)
    if error is not None:
        trial.set_attribute(semconv.ERROR_TYPE, error)
        trial.set_status(trace.Status(trace.StatusCode.ERROR))
    trial.end()
    span.end()
    assert program.provider.force_flush()
    assert store.runs["id of r1/1"]["status"] == status


def test_a_burst_is_not_dropped(program: Program, store: Memory) -> None:
    """The SDK's batch processor holds 2,048 spans."""
    span = program.start("evaluate QA", evaluation_id="e")
    for index in range(5000):
        program.start("example QA", evaluation_id="e", example_index=index, example_score=1.0).end()
    span.end()
    assert program.provider.force_flush(60_000)
    assert len(store.scores) == 5000
    assert len(store.links["id of evaluation/e"]) == 5001


def test_spans_of_others_go_along_and_spans_from_before_too(store: Memory) -> None:
    exporter = Exporter(store)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    other = provider.get_tracer("somebody else")
    before = other.start_span("before")
    before.end()
    track_runs(provider)
    after = other.start_span("after")
    after.end()
    assert provider.force_flush()
    assert store.delivered == {f"tr-{span.context.trace_id:032x}" for span in (before, after)}
    assert store.runs == {}
    provider.shutdown()


def test_one_processor_for_each_exporter_and_runs_for_those_that_want_them(store: Memory) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    exporter, without = Exporter(store), Exporter(Memory(), runs=False)
    for one in (exporter, without):
        provider.add_span_processor(BatchSpanProcessor(one))
    track_runs(provider)
    track_runs(provider)
    assert set(exporters_of(provider)) == {exporter, without}
    span = provider.get_tracer(semconv.SCOPE_NAME).start_span("evaluate QA", attributes={semconv.EVALUATION_ID: "e"})
    span.end()
    assert provider.force_flush()
    assert [len(one.store.delivered) for one in (exporter, without)] == [1, 1]
    assert [list(one.store.runs) for one in (exporter, without)] == [["id of evaluation/e"], []]
    track_runs(trace.NoOpTracerProvider())
    provider.shutdown()


def test_params_of_a_program_are_instructions_and_demos() -> None:
    state = """{"qa": {"signature": {"instructions": "Answer.", "fields": []}, "demos": [{"q": "1+1", "a": "2"}],
               "traces": [], "train": [], "lm": null}, "metadata": {"dependency_versions": {}}}"""
    assert program_params(Candidate("c", state)) == {
        "qa.instructions": "Answer.",
        "qa.demos": 1,
        "qa.demos.0": {"q": "1+1", "a": "2"},
    }


@pytest.mark.parametrize(
    ("state", "complete", "whole"),
    [('{"qa": {}}', None, True), ('{"qa": {}}', False, False), ('{"qa": {"signature": {"instr', None, False)],
    ids=["whole", "we cut it", "the SDK cut it"],
)
def test_only_a_whole_program_is_named_as_one(state: str, complete: bool | None, whole: bool) -> None:
    program = Program(Memory())
    span = program.start("trial", optimizer_run_id="r1", trial_number=1, candidate_id="c", program_state=state)
    if complete is not None:
        span.set_attribute(f"{semconv.PROGRAM_STATE}.complete", complete)
    history = History()
    history.start(span)
    span.end()
    (run,) = (run for record in history.end(span) for run in runs_of(record, {}))
    assert run.artifacts == {"model.json" if whole else "model.incomplete.json": state}
    program.provider.shutdown()


def test_keys_are_those_that_mlflow_takes() -> None:
    assert safe_key("describe[0].instructions é") == "describe_0_.instructions _"


@pytest.mark.parametrize("spool", ["on", "off"])
def test_a_span_that_breaks_mlflow_is_set_aside_once_others_got_through(
    store: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, spool: str
) -> None:
    monkeypatch.setenv("OTEL_DSPY_SPOOL", str(tmp_path) if spool == "on" else "off")
    program = Program(store)
    send = store.send

    def break_on_poison(body: bytes) -> None:
        if b"poison" in body:
            raise ExportError("status 500", "MLflow refused: 500.")
        send(body)

    monkeypatch.setattr(store, "send", break_on_poison)
    program.start("poison").end()
    assert not program.provider.force_flush(300)  # it may be MLflow that is broken
    assert program.worker.account.refused == {}
    program.compile().end()
    assert program.provider.force_flush()
    assert store.links == {"id of r1": [next(iter(store.delivered))]}
    program.provider.shutdown()
    line = caplog.records[-1].message
    if spool == "on":
        assert "refused: 1 spans, 1 traces, set aside in" in line
        (file,) = tmp_path.glob("*/*.refused.pb")
        assert [span.name for span in decode(file.read_bytes())] == ["poison"]
    else:
        assert line.endswith("not written: 1 spans, 1 traces, lost.")


def test_in_a_nested_trace_the_score_is_on_the_span_of_the_example(program: Program, store: Memory) -> None:
    span = program.start("evaluate QA", evaluation_id="e")
    example = program.start("example QA", span, evaluation_id="e", example_index=0, example_score=0.5)
    example.end()
    span.end()
    seen: list[Score] = []
    assess = store.assess
    store.assess = lambda score, run_id: seen.append(score) or assess(score, run_id)  # type: ignore[method-assign]
    assert program.provider.force_flush()
    assert [(score.span_id, score.value) for score in seen] == [(f"{example.get_span_context().span_id:016x}", 0.5)]


def test_at_exit_no_thread_can_be_started_and_all_is_written(store: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on, an interpreter that goes down starts no more threads."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    program = Program(store)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    span = program.compile()
    program.trial(span, 1, 50.0, examples=3)
    span.end()
    program.provider.shutdown()
    assert {run["status"] for run in store.runs.values()} == {"FINISHED"}
    assert len(store.scores) == 3


def test_two_calls_never_bring_the_same_dataset_at_once(
    program: Program, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own check and insert are apart: the second of two such calls fails."""
    busy = threading.Lock()
    datasets = store.add_datasets

    def slow(run_id: str, new: Sequence[Any]) -> None:
        assert busy.acquire(blocking=False), "two at once"
        time.sleep(0.02)
        busy.release()
        datasets(run_id, new)

    monkeypatch.setattr(store, "add_datasets", slow)
    for number in range(6):
        span = program.start(f"evaluate QA{number}", evaluation_id=f"e{number}")
        program.start(
            "example QA", evaluation_id=f"e{number}", example_index=0, example_id="1", example_score=1.0
        ).end()
        span.end()
    assert program.provider.force_flush()
    assert [len(run["datasets"]) for run in store.runs.values()] == [1] * 6


def test_a_dataset_that_another_program_brought_at_the_same_time_is_tried_again(
    program: Program, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = store.add_datasets
    refusals = [ExportError("datasets", "UNIQUE constraint failed")]

    def refuse_once(run_id: str, new: Sequence[Any]) -> None:
        if refusals:
            raise refusals.pop()
        datasets(run_id, new)

    monkeypatch.setattr(store, "add_datasets", refuse_once)
    span = program.start("evaluate QA", evaluation_id="e")
    program.start("example QA", evaluation_id="e", example_index=0, example_id="1", example_score=1.0).end()
    span.end()
    assert program.provider.force_flush()
    (run,) = store.runs.values()
    assert len(run["datasets"]) == 1


def test_no_number_and_no_text_holds_anything_up(program: Program, store: Memory) -> None:
    """A server refuses NaN and half a character, and with them all that is in the same call."""
    span = program.compile()
    span.set_attribute("dspy.optimizer.params.x", "half \ud800")
    trial = program.start("trial", span, optimizer_run_id="r1", trial_number=1, trial_kind="full")
    evaluation = {"optimizer_run_id": "r1", "trial_number": 1, "evaluation_id": "e"}
    inner = program.start("evaluate QA", trial, **evaluation)
    program.start("example QA", example_index=0, example_score=float("nan"), **evaluation).end()
    inner.end()
    trial.set_attribute(semconv.TRIAL_SCORE, float("nan"))
    trial.end()
    span.set_attribute(semconv.OPTIMIZER_BEST_SCORE, float("inf"))
    span.end()
    assert program.provider.force_flush()
    run, child = store.runs["id of r1"], store.runs["id of r1/1"]
    assert (run["status"], child["status"]) == ("FINISHED", "FINISHED")
    for stored in (run, child):
        assert "score" not in {metric.key for metric in stored["metrics"]}
        values = [metric.value for metric in stored["metrics"]]
        json.dumps([values, stored["params"], stored["tags"]], allow_nan=False, ensure_ascii=False).encode()
        for path, text in stored["artifacts"].items():
            if path.endswith(".json"):
                json.loads(text, parse_constant=pytest.fail)
    assert [value for _, value, _ in store.scores] == [None]
    assert "report.html" in run["artifacts"]


class Raising(logging.Handler):
    """A handler of the user's that cannot take anything."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("no disk")


def test_a_logging_handler_that_raises_stops_no_thread(program: Program, store: Memory) -> None:
    handler = Raising()
    logging.getLogger("dspy_otel").addHandler(handler)
    try:
        store.failure = AWAY
        span = program.compile()
        program.trial(span, 1, 50.0, examples=2)
        span.end()
        assert not program.provider.force_flush(300)
        store.failure = None
        assert program.provider.force_flush()
    finally:
        logging.getLogger("dspy_otel").removeHandler(handler)
    assert store.runs["id of r1"]["status"] == "FINISHED"


def test_a_report_that_fails_holds_nothing_up(
    program: Program, store: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError("secret")

    monkeypatch.setattr(runs, "render", broken)
    span = program.compile()
    program.trial(span, 1, 50.0, examples=2)
    span.end()
    assert program.provider.force_flush()
    run = store.runs["id of r1"]
    assert run["status"] == "FINISHED"
    assert set(run["artifacts"]) == {"candidates.json", "phases.json"}
    assert [record.message for record in caplog.records] == ["The report of Best QA could not be made (RuntimeError)."]


def test_spending_on_a_run_needs_no_traces(program: Program, store: Memory) -> None:
    """Totals are on the spans of trials, phases and steps: LM calls need not be recorded."""
    span = program.compile()
    for number in (1, 2):
        trial = program.start("trial", span, optimizer_run_id="r1", trial_number=number, trial_kind="full")
        trial.set_attributes({"dspy.usage.lm_calls": 3, "dspy.usage.cost": 0.3, "dspy.usage.task.lm_calls": 3})
        trial.end()
        if number == 2:
            assert program.provider.force_flush()
            numbers = json.loads(store.runs["id of r1"]["tags"]["dspy.numbers"])
            assert (numbers["lm_calls"], numbers["proposer.lm_calls"]) == (8, 2)
        phase = program.start("propose", span, optimizer_run_id="r1", optimizer_phase="propose")
        phase.set_attributes({"dspy.usage.lm_calls": 2, "dspy.usage.proposer.lm_calls": 2, "dspy.usage.cost": 0.2})
        phase.end()
    span.set_attributes({"dspy.usage.lm_calls": 10, "dspy.usage.cost": 1.0})
    span.end()
    assert program.provider.force_flush()
    assert [m.value for m in store.runs["id of r1"]["metrics"] if m.key == "cost"] == pytest.approx([0.3, 0.8, 1.0])
    assert json.loads(store.runs["id of r1"]["tags"]["dspy.numbers"])["lm_calls"] == 10
    table = json.loads(store.runs["id of r1"]["artifacts"]["phases.json"])
    assert [row[:2] + row[3:4] for row in table["data"]] == [["trials", 0, 6.0], ["propose", 2, 4.0]]
