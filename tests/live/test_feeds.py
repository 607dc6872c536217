"""What a live page is made of: spans of this process, and a file that grows, is cut, or is not there."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from dspy_otel import semconv
from dspy_otel.live import feeds
from dspy_otel.live.feeds import FileFeed, SpanFeed, View, seconds_left
from dspy_otel.live.page import content, page
from dspy_otel.record.history import optimizations
from dspy_otel.record.model import Optimization, Trial
from dspy_otel.reports.markup import tag
from tests.live.spans import Program
from tests.reports.test_optimizations import otlp_json
from tests.reports.test_page import HOSTILE, SOURCE, Page, hostile


def test_trials_of_this_process_appear_as_they_are_scored() -> None:
    feed = SpanFeed()
    assert feed.read() == View(waiting="No optimization has started yet.")
    program = Program(feed)
    program.start()
    view = feed.read()
    assert view.optimization is not None
    assert (view.optimization.outcome, view.phase, view.optimization.planned) == ("running", "search", 4)
    for number, score in ((1, 0.25), (2, 0.5)):
        program.trial(number, score)
        view = feed.read()
        assert view.optimization is not None
        assert [trial.number for trial in view.optimization.trials] == [*range(1, number + 1)]
        assert (view.optimization.baseline, view.optimization.best) == (0.25, score)
        assert view.optimization.spent.cost == 0.5 * number
    program.end()
    view = feed.read()
    assert view.optimization is not None
    assert (view.optimization.outcome, view.optimization.gain) == ("finished", 0.75)


def test_a_live_page_knows_the_models_that_a_report_knows(tmp_path: Path) -> None:
    feed = SpanFeed()
    program = Program(feed)
    program.start()
    program.trial(1, 0.25)
    for operation in ("chat", "embeddings"):
        about = {"gen_ai.operation.name": operation, "gen_ai.request.model": f"{operation}-model"}
        program.provider.get_tracer(semconv.SCOPE_NAME).start_span(
            f"{operation} m", attributes={**about, semconv.OPTIMIZER_RUN_ID: "r1"}
        ).end()
    program.end()
    spans = program.memory.get_finished_spans()
    (expected,) = optimizations(spans)
    assert expected.models == {"task": ("chat-model", "embeddings-model")}
    file = tmp_path / "spans.jsonl"
    file.write_text(otlp_json(spans))
    for view in (feed.read(), FileFeed(file).read()):
        assert view.optimization is not None
        assert view.optimization.models == expected.models


def test_a_page_that_is_closed_follows_nothing_any_more() -> None:
    feed = SpanFeed()
    program = Program(feed)
    feed.shutdown()
    program.start()
    program.trial(1, 0.25)
    assert feed.read().optimization is None


def test_the_optimization_that_runs_comes_before_those_that_are_over() -> None:
    feed = SpanFeed()
    program = Program(feed)
    for id_ in ("r1", "r2"):
        program.start(id_)
        program.trial(1, 0.25)
        program.end()
    program.start("r3")
    view = feed.read()
    assert view.optimization is not None
    assert view.optimization.id == "r3"


def test_what_is_over_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MAX_OVER", 2)
    feed = SpanFeed()
    program = Program(feed)
    for number in range(5):
        program.start(f"r{number}")
        program.end()
    assert [*feed._over] == ["r3", "r4"]


@pytest.mark.injects_faults
def test_a_fault_of_the_page_is_none_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "kind_of", lambda span: 1 / 0)
    program = Program(SpanFeed())
    program.start()
    program.trial(1, 0.5)
    program.end()
    assert len(list(program.ended())) == 3


def test_a_file_grows_and_may_be_cut_in_the_middle_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    feed = FileFeed(path)
    assert feed.read() == View(waiting=f"{path} cannot be read: No such file or directory.")
    path.touch()
    assert feed.read().optimization is None
    program = Program()
    program.start()
    program.trial(1, 0.25)
    program.trial(2, 0.5)
    text = program.lines().encode()
    first = text.index(b"\n") + 1
    for cut, trials in ((first - 1, 0), (first, 1), (len(text) - 20, 1), (len(text), 2)):
        with path.open("ab") as file:
            file.write(text[path.stat().st_size : cut])
        optimization = feed.read().optimization
        assert (0 if optimization is None else len(optimization.trials)) == trials
    assert optimization is not None
    assert (optimization.outcome, optimization.optimizer, optimization.best) == ("running", "Searcher", 0.5)
    assert optimization.initial_id == "p1"
    program.end()
    path.write_bytes(program.lines().encode())
    optimization = feed.read().optimization
    assert optimization is not None
    assert optimization.outcome == "finished"


@pytest.mark.skipif(os.name != "posix", reason="whether there is a process cannot be asked")
@pytest.mark.parametrize(("host", "known"), [(socket.gethostname(), True), ("another machine", False)])
def test_a_program_of_this_machine_that_was_killed_is_noticed_at_once(tmp_path: Path, host: str, known: bool) -> None:
    path = tmp_path / "spans.jsonl"
    with subprocess.Popen(["sleep", "100"]) as process:
        program = Program(resource={"process.pid": process.pid, "host.name": host})
        program.start()
        program.trial(1, 0.25)
        path.write_text(program.lines())
        feed = FileFeed(path)
        assert feed.read().waiting is None
        process.kill()
    waiting = f"The program (process {process.pid}) has ended, without an end of the optimization so far."
    for _ in range(2):
        view = feed.read()
        assert (view.waiting, view.optimization is None) == (waiting if known else None, False)
    program.end()  # it was on its way
    path.write_text(program.lines())
    assert feed.read().waiting is None


def test_a_file_that_is_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    path, other = tmp_path / "spans.jsonl", tmp_path / "rotated.jsonl"
    feed = FileFeed(path)
    for id_ in ("r1", "r2"):
        program = Program()
        program.start(id_)
        program.trial(1, 0.25)
        other.write_text(program.lines())
        os.replace(other, path)
        optimization = feed.read().optimization
        assert optimization is not None
        assert optimization.id == id_


def test_lines_that_are_no_spans_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    program = Program()
    program.start()
    program.trial(1, 0.25)
    path.write_text('nonsense\n\n{"resourceLogs": []}\n{"resourceMetrics": []}\n' + program.lines())
    view = FileFeed(path).read()
    assert view.optimization is not None
    assert view.waiting == "1 lines of the file are no OTLP JSON, and are left out."


def test_time_left_follows_from_trials_or_from_the_budget() -> None:
    trials = tuple(Trial(number, size=10) for number in (1, 2))
    running = Optimization(trials=trials, planned=8, started=1_000_000_000_000)
    assert seconds_left(running, 1010.0) == 30.0
    budget = Optimization(trials=trials, params={"max_metric_calls": 50}, started=1_000_000_000_000)
    assert seconds_left(budget, 1010.0) == 15.0
    assert seconds_left(Optimization(trials=trials, started=0)) is None
    assert seconds_left(Optimization(planned=3, started=0)) is None


def test_the_page_has_one_script_and_nothing_becomes_another() -> None:
    text = page(View(hostile(), SOURCE, HOSTILE, HOSTILE), HOSTILE, silent=300)
    names = [name for name, _ in Page(text).elements]
    assert names.count("script") == 1
    assert not {"img", "iframe", "link", "object"} & {*names}


def test_a_long_silence_is_told_of_what_runs_alone() -> None:
    for outcome, count in (("running", 1), ("finished", 0)):
        element = tag("main", content(View(Optimization(outcome=outcome)), "x", silent=180))
        texts = [part for part in element.itertext() if part.startswith("Nothing new for 3 min")]
        assert len(texts) == count
