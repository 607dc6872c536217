"""The journal on disk, and what replay makes of it, against a backend in memory."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from dspy_otel import semconv
from dspy_otel.mlflow import MLflowSpanExporter, journal, processor, retry
from dspy_otel.mlflow import replay as replaying
from dspy_otel.mlflow.exporter import exporters_of, track_runs
from dspy_otel.mlflow.journal import Journal, JournalDirectory, journal_directories, spool_directory
from dspy_otel.mlflow.replay import replay
from dspy_otel.mlflow.worker import Worker
from dspy_otel.record.otlp import decode, encode
from tests.mlflow.fake_server import Fault, fake_mlflow
from tests.mlflow.memory import AWAY, Memory, Program
from tests.support.fault_proxy import fault_proxy
from tests.support.waiting import run as run_program
from tests.support.waiting import wait_for


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "WRITE_INTERVAL", 0.01)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OTEL_DSPY_SPOOL", str(tmp_path / "spool"))
    return tmp_path / "spool"


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str | None, int]]:
    """What the metric says became of spans: how many, by error.type."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter", lambda *args, **kwargs: provider.get_meter("test"))

    def read() -> dict[str | None, int]:
        data = reader.get_metrics_data()
        assert data is not None
        (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
        assert metric.name == "otel.sdk.exporter.span.exported"
        return {point.attributes.get("error.type"): point.value for point in metric.data.data_points}

    return read


def some_spans() -> list[ReadableSpan]:
    """With everything that a span can have."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer(semconv.SCOPE_NAME, "1.2", schema_url="https://example.org/1", attributes={"a": 1})
    with tracer.start_as_current_span("parent") as parent:
        with tracer.start_as_current_span(
            "child Größe",
            kind=SpanKind.CLIENT,
            attributes={"text": "é\n", "int": -3, "float": 0.5, "bool": True, "list": ["a", "b"], "ints": [1, 2]},
            links=[Link(parent.get_span_context(), {"why": "because"})],
        ) as span:
            span.add_event("happened", {"n": 1})
            span.set_status(Status(StatusCode.ERROR, "it failed"))
    return list(memory.get_finished_spans())


def test_spans_survive_a_file() -> None:
    spans = some_spans()
    again = decode(encode(spans))
    assert encode(again) == encode(spans)
    assert [span.to_json() for span in again] == [span.to_json() for span in spans]
    with pytest.raises(ValueError):
        decode(b"\xff\xff no protobuf")


def test_where_the_spool_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OTEL_DSPY_SPOOL", "here")
    assert spool_directory() == tmp_path / "here"
    monkeypatch.setenv("OTEL_DSPY_SPOOL", "off")
    assert spool_directory() is None
    if sys.platform == "linux":
        monkeypatch.delenv("OTEL_DSPY_SPOOL")
        monkeypatch.setenv("XDG_STATE_HOME", "/state")
        assert spool_directory() == Path("/state/dspy-otel/spool")


@pytest.mark.skipif(sys.platform != "linux", reason="users without a home")
@pytest.mark.parametrize("raises", [True, False])
def test_a_user_without_a_home_has_a_spool_and_locks(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raises: bool
) -> None:
    def without_home(*_: object, **__: object) -> str:
        if raises:
            raise RuntimeError("could not determine the home directory")  # platformdirs 4.14
        return "~/.local/state/dspy-otel"

    monkeypatch.setattr("platformdirs.user_state_dir", without_home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("OTEL_DSPY_SPOOL")
    assert spool_directory() == tmp_path / f"dspy-otel-{os.getuid()}" / "spool"
    leave(directory, store)
    assert left_in(tmp_path / f"dspy-otel-{os.getuid()}" / "spool")
    assert not Path("~").exists()


def test_while_mlflow_is_away_spans_are_on_disk_and_are_sent_in_order(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_CACHED_SPANS", 100)
    program = Program(store)
    store.failure = AWAY
    for number in range(1700):
        program.tracer.start_span("chat", attributes={"n": number}).end()
    assert not program.provider.force_flush(200)
    program.exporter.processor.record()  # however slow the disk is
    on_disk = [span for path in directory.rglob("*.pb") for span in decode(path.read_bytes())]
    assert sorted(span.attributes["n"] for span in on_disk) == list(range(1700))
    assert len(list(directory.rglob("*.pb"))) <= 20
    store.failure = None
    assert program.provider.force_flush()
    assert [span.attributes["n"] for span in store.spans.values()] == list(range(1700))
    program.provider.shutdown()
    assert journal_directories(directory) == []


@pytest.fixture
def store() -> Memory:
    return Memory()


def test_a_full_spool_drops_traces_of_examples_and_keeps_trials(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, lost: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_DSPY_SPOOL_LIMIT", "60000")
    monkeypatch.setattr(journal, "MEMORY_BYTES", 100)
    program = Program(store)
    store.failure = AWAY
    compile_ = program.compile()
    for number in range(10):
        program.trial(compile_, number, 50.0, examples=20)
        program.exporter.processor.record()
    compile_.end()
    with caplog.at_level(logging.WARNING):
        program.provider.shutdown()
    (place,) = journal_directories(directory)
    kept = [span.name.split()[0] for path in place.files() for span in decode(path.read_bytes())]
    assert {name: kept.count(name) for name in ("compile", "trial", "evaluate")} == {
        "compile": 1,
        "trial": 10,
        "evaluate": 10,
    }
    assert lost() == {"spool_full": 221 - len(kept)}
    assert 0 < kept.count("example") < 200
    account = program.worker.account
    assert account.produced["spans"] == len(kept) + account.dropped["spans"] == 221
    line = caplog.records[-1].message
    assert f"not written: {len(kept)} spans, 11 runs" in line
    assert f"not written: {221 - len(kept)} spans, " in line


def test_a_full_spool_costs_nothing_while_mlflow_is_there(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, lost: Any
) -> None:
    """What other programs have left, for an MLflow that is gone, fills it."""
    monkeypatch.setenv("OTEL_DSPY_SPOOL_LIMIT", "1000")
    program = Program(store)
    work(program)
    program.provider.shutdown()
    assert lost() == {None: 11}
    assert len(store.spans) == 11
    assert {run["status"] for run in store.runs.values()} == {"FINISHED"}


def test_a_segment_that_cannot_be_read_for_a_moment_is_delivered_later(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, lost: Any
) -> None:
    """Too many files are open."""
    monkeypatch.setattr(processor, "_CACHED_SPANS", 0)
    program = Program(store)
    store.failure = AWAY
    work(program)
    assert not program.provider.force_flush(200)
    program.exporter.processor.record()
    store.failure = None
    fails = iter([OSError(errno.EMFILE, "Too many open files")] * 3)
    open_ = os.open

    def busy(path: Any, flags: int, *more: Any) -> int:
        if str(path).endswith(".pb") and not flags & os.O_WRONLY and (error := next(fails, None)) is not None:
            raise error
        return open_(path, flags, *more)

    monkeypatch.setattr(os, "open", busy)
    assert program.provider.force_flush()
    program.provider.shutdown()
    assert next(fails, None) is None
    assert lost() == {None: 11}
    assert {run["status"] for run in store.runs.values()} == {"FINISHED"}


def test_a_program_that_shuts_nothing_down_leaves_what_it_has_just_recorded(directory: Path) -> None:
    """As after a second Ctrl-C, which interrupts the shutdown of the provider."""
    program = """
        from opentelemetry.sdk.trace import TracerProvider
        from dspy_otel.mlflow.processor import MLflowProcessor
        from dspy_otel.mlflow.target import Target
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(MLflowProcessor(Target("http://127.0.0.1:9")))
        provider.get_tracer("x").start_span("the last").end()
    """
    run_program([sys.executable, "-c", textwrap.dedent(program)], env=dict(os.environ))
    (place,) = journal_directories(directory)
    assert [span.name for path in place.files() for span in decode(path.read_bytes())] == ["the last"]


def test_a_journal_that_is_being_removed_is_gone_for_others(
    directory: Path, store: Memory, other: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(directory, store)
    unlink, seen = Path.unlink, []

    def look(path: Path, missing_ok: bool = False) -> None:
        seen.append((path.name, journal_directories(directory)))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", look)
    assert replay([directory]).left == []
    assert all(found == [] for name, found in seen if name in ("about.json", "lock"))
    assert {"about.json", "lock"} <= {name for name, _ in seen}
    assert list(directory.iterdir()) == []


def test_a_segment_that_cannot_be_read_is_tried_with_pauses(
    tmp_path: Path, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    mine = one(tmp_path, 10**6)
    assert put(mine)
    worker = Worker(mine, lambda: store, clock=lambda: now)
    (segment,) = mine.segments
    segment.spans, body, reads = None, segment.body(), 0

    def read(_: journal.Segment) -> bytes:
        nonlocal reads
        reads += 1
        if reads < 3:
            raise journal.JournalError("000001.pb cannot be read (Input/output error)", passing=True)
        return body

    monkeypatch.setattr(journal.Segment, "body", read)
    for attempt in (1, 2):
        worker.round()
        worker.round()  # at once: nothing is read
        assert reads == attempt
        assert worker.wait_seconds() > 0
        now += 60
    worker.round()
    assert worker.done
    assert len(store.spans) == len(some_spans())


def test_without_a_disk_what_is_above_the_limit_is_counted(
    store: Memory, monkeypatch: pytest.MonkeyPatch, lost: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_DSPY_SPOOL", "off")
    monkeypatch.setattr(journal, "MEMORY_BYTES", 10_000)
    program = Program(store)
    store.failure = AWAY
    compile_ = program.compile()
    for _ in range(20):
        for _ in range(10):
            program.start("example QA").end()
        program.exporter.processor.record()
    program.trial(compile_, 1, 50.0)
    store.failure = None
    assert program.provider.force_flush()
    found = lost()
    assert found["queue_full"] + found[None] == 201
    assert found["queue_full"] >= 50
    assert sum("Too many spans wait for MLflow" in record.message for record in caplog.records) == 1
    assert sum("OTEL_DSPY_SPOOL=off: spans wait in memory" in record.message for record in caplog.records) == 1
    compile_.end()
    program.provider.shutdown()
    assert {run["status"] for run in store.runs.values()} == {"FINISHED"}


def leave(directory: Path, store: Memory) -> None:
    """A program that could write nothing."""
    program = Program(store)
    store.failure = AWAY
    work(program)
    program.provider.shutdown()


def work(program: Program) -> None:
    compile_ = program.compile()
    for number in (1, 2):
        program.trial(compile_, number, 50.0 * number, examples=3)
    compile_.end()


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Where a replay delivers to."""
    memory = Memory()
    monkeypatch.setattr(replaying, "open_backend", lambda target: memory)
    return memory


def assert_same(got: Memory, expected: Memory) -> None:
    assert {span.name for span in got.spans.values()} == {span.name for span in expected.spans.values()}
    assert set(got.runs) == set(expected.runs)
    for key, run in expected.runs.items():
        mine = got.runs[key]
        assert points(mine) == points(run)
        assert (mine["status"], mine["tags"], mine["params"], set(mine["artifacts"]), mine["datasets"]) == (
            run["status"],
            run["tags"],
            run["params"],
            set(run["artifacts"]),
            run["datasets"],
        )
        assert len(got.links[key]) == len(expected.links[key])
    assert sorted(value for _, value, _ in got.scores) == sorted(value for _, value, _ in expected.scores)


def points(run: dict[str, Any]) -> set[tuple[str, float, int]]:
    """Of all metrics."""
    return {(point.key, point.value, point.step) for point in run["metrics"]}


def test_a_replay_writes_what_the_program_would_have_written(directory: Path, store: Memory, other: Memory) -> None:
    leave(directory, store)
    outcome = replay([directory])
    assert outcome.left == []
    assert outcome.sent == {"spans": 11, "traces": 7, "runs": 3, "scores": 6, "artifacts": 5}
    assert journal_directories(directory) == []
    direct = Memory()
    program = Program(direct)
    work(program)
    program.provider.shutdown()
    assert_same(other, direct)


def test_a_file_that_has_a_batch_twice(directory: Path, store: Memory, other: Memory, tmp_path: Path) -> None:
    """The Collector has exported it again, because it did not see the answer."""
    leave(directory, store)
    (place,) = journal_directories(directory)
    file = tmp_path / "spans.pb"
    file.write_bytes(2 * b"".join(path.read_bytes() for path in place.files()))
    assert replay([file], to="sqlite:///x.db").left == []
    assert replay([directory]).left == []
    assert sorted(len(traces) for traces in other.links.values()) == [1, 3, 3]
    assert len(other.scores) == 6


def test_a_killed_program_loses_no_span_and_its_runs_are_ended(directory: Path, store: Memory, other: Memory) -> None:
    """It has written some of it: what its runs need is still there."""
    program = Program(store)
    compile_ = program.compile()
    program.trial(compile_, 1, 50.0, examples=3)
    assert program.provider.force_flush()
    assert {run.get("status") for run in store.runs.values()} == {None, "FINISHED"}
    store.failure = AWAY
    trial = program.start("trial", compile_, optimizer_run_id="r1", trial_number=2)
    program.start("chat").end()
    program.exporter.processor.record()
    program.journal.place.release()  # as if killed
    other.runs.update({key: {**run, "metrics": [*run["metrics"]]} for key, run in store.runs.items()})
    assert replay([directory]).left == []
    assert {key: run["status"] for key, run in other.runs.items()} == {
        "id of r1": "KILLED",
        "id of r1/1": "FINISHED",
        "id of r1/2": "KILLED",
    }
    assert "evaluation_table.json" in other.runs["id of r1/1"]["artifacts"]
    assert "report.html" in other.runs["id of r1"]["artifacts"]
    assert [span.name for span in other.spans.values()] == ["chat"]
    assert journal_directories(directory) == []
    trial.end()


class Killed(BaseException):
    """The process ends here."""


def test_a_replay_that_is_killed_while_it_removes_what_it_delivered_leaves_nothing_to_misread(
    directory: Path, store: Memory, other: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(store)
    store.failure = AWAY
    compile_ = program.compile()
    program.exporter.processor.record()  # its start is on disk
    program.trial(compile_, 1, 50.0, examples=3)
    compile_.end()
    program.exporter.processor.record()
    program.journal.place.release()  # as if killed
    unlink = Path.unlink

    def remove_one(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path.suffix == ".pb":
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", remove_one)
        replay([directory])
    assert replay([directory]).left == []
    assert [run["status"] for run in other.runs.values()] == ["FINISHED"] * 2


def test_a_last_piece_that_was_cut_off_does_no_harm(directory: Path, store: Memory, other: Memory) -> None:
    leave(directory, store)
    (place,) = journal_directories(directory)
    (file,) = place.files()
    body = encode(some_spans())
    with file.open("ab") as end:
        end.write(body[: len(body) // 2])
    assert replay([directory]).left == []
    assert len(other.spans) == 11


def test_who_is_at_it_is_left_alone(directory: Path, store: Memory, other: Memory) -> None:
    leave(directory, store)
    (place,) = journal_directories(directory)
    assert place.acquire()
    outcome = replay([directory])
    assert not outcome.sent
    assert "in use" in outcome.left[0]
    place.release()
    assert replay([directory]).sent["spans"] == 11


def test_what_cannot_be_read_is_named_and_stays(directory: Path, store: Memory, other: Memory) -> None:
    leave(directory, store)
    leave(directory, store)
    first, _ = journal_directories(directory)
    (file,) = first.files()
    file.write_bytes(b"\xff\xff")
    (line,) = replay([directory]).left
    assert "no OTLP request" in line
    assert [place.path for place in journal_directories(directory)] == [first.path]
    (first.path / "about.json").write_text("{}")
    assert "does not say where" in replay([directory]).left[0]


@pytest.mark.parametrize("broken", ["starts.pb", "000009.pb"])
def test_a_file_that_a_power_failure_left_broken_holds_up_no_other(
    directory: Path, store: Memory, other: Memory, broken: str
) -> None:
    leave(directory, store)
    (place,) = journal_directories(directory)
    (place.path / broken).write_bytes(bytes(100))
    for sent in (11, 0):  # the second time, what was delivered is not there any more
        outcome = replay([directory])
        assert outcome.sent["spans"] == sent
        assert outcome.left == [f"{place.path / broken}: no OTLP request"]
        assert {run["status"] for run in other.runs.values()} == {"FINISHED"}
    assert [path.name for path in place.path.glob("*.pb")] == [broken]


@pytest.mark.skipif(os.name != "posix", reason="owners and modes")
def test_a_strangers_directory_is_named_and_not_read(directory: Path, store: Memory, other: Memory) -> None:
    leave(directory, store)
    leave(directory, store)
    stranger, _ = journal_directories(directory)
    stranger.path.chmod(0o755)
    (directory / "zz-link").symlink_to(stranger.path)
    outcome = replay([directory])
    assert outcome.sent["spans"] == 11
    assert ["can be reached by other users" in outcome.left[0], "is a link" in outcome.left[1]] == [True, True]
    assert stranger.files()


@pytest.mark.skipif(os.name != "posix", reason="pipes and modes")
@pytest.mark.parametrize("kind", ["deep", "pipe"])
def test_one_broken_directory_does_not_stop_the_others(
    directory: Path, store: Memory, other: Memory, kind: str
) -> None:
    leave(directory, store)
    leave(directory, store)
    broken, _ = journal_directories(directory)
    about = broken.path / "about.json"
    about.unlink()
    if kind == "deep":
        about.write_text("[" * 200_000)
        about.chmod(0o600)
    else:
        os.mkfifo(about, 0o600)
    outcome = replay([directory])
    assert outcome.sent["spans"] == 11
    assert "about.json" in outcome.left[0]


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_nothing_is_written_to_a_file_that_others_can_open(tmp_path: Path) -> None:
    planted = tmp_path / "000001.pb"
    planted.touch(mode=0o644)
    with pytest.raises(PermissionError, match="own file"):
        journal._append(planted, b"private")
    assert planted.read_bytes() == b""


def test_a_disk_that_hangs_does_not_block_the_end(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(journal.Journal, "save", lambda _: [][: hangs.wait()])
    monkeypatch.setattr(processor, "_LONGEST_CLOSE_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING):
        leave(directory, store)
    assert "the disk does not answer" in caplog.text
    hangs.set()


def test_a_lock_that_is_a_link_makes_no_file(directory: Path, tmp_path: Path, store: Memory, other: Memory) -> None:
    leave(directory, store)
    (place,) = journal_directories(directory)
    (place.path / "lock").unlink()
    (place.path / "lock").symlink_to(tmp_path / "made")
    assert replay([directory]).left
    assert not (tmp_path / "made").exists()


def test_spans_that_mlflow_refuses_stay_for_another_place(
    directory: Path, store: Memory, other: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leave(directory, store)
    send = other.send

    def refuse(body: bytes) -> None:
        if b"evaluate QA" in body:
            raise retry.ExportError("status 413", "too large", retry.Verdict.SPLIT)
        send(body)

    monkeypatch.setattr(other, "send", refuse)
    (line,) = replay([directory]).left
    assert "2 spans that MLflow refuses" in line
    assert "It stays in the file." in caplog.text
    assert len(other.spans) == 9
    monkeypatch.setattr(other, "send", send)
    assert replay([directory]).left == []
    assert len(other.spans) == 11
    assert journal_directories(directory) == []


def test_a_spool_that_cannot_be_written_costs_one_line(
    tmp_path: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OTEL_DSPY_SPOOL", str(tmp_path / "file" / "spool"))  # also for root
    with caplog.at_level(logging.WARNING):
        leave(tmp_path, store)
    (said,) = [record.message for record in caplog.records if "cannot be written" in record.message]
    assert "Not a directory" in said
    assert "11 spans" in caplog.records[-1].message
    assert caplog.records[-1].message.endswith("lost.")


FULL = """
    import resource, signal, sys
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from dspy_otel.mlflow import MLflowSpanExporter
    from dspy_otel.mlflow.exporter import exporters_of, track_runs
    if {limit}:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # of each file
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(MLflowSpanExporter("http://127.0.0.1:9")))
    track_runs(provider)
    tracer = provider.get_tracer("dspy_otel")
    for number in range(2000):
        tracer.start_span("chat", attributes={{"n": number}}).end()
    print("done", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs and RLIMIT_FSIZE")
@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_a_full_disk_does_no_harm(tmp_path: Path, kind: str) -> None:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(mounted)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount")
    try:
        result = run_program(
            [sys.executable, "-c", textwrap.dedent(FULL).format(limit=kind == "limit")],
            env={**os.environ, "OTEL_DSPY_SPOOL": str(mounted / "spool"), "OTEL_DSPY_EXIT_SECONDS": "2"},
        )
        left = [path.stat().st_size for path in mounted.rglob("*.pb")]
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", str(mounted)], check=True)
    assert (result.returncode, result.stdout) == (0, "done\n")
    assert "Traceback" not in result.stderr
    full = "No space left on device" if kind == "tmpfs" else "File too large"
    assert result.stderr.count(full) == 1
    assert "lost" in result.stderr.splitlines()[-1]
    assert 0 not in left  # no half of a file


def test_a_spool_that_was_removed_is_made_again(directory: Path, store: Memory, other: Memory) -> None:
    program = Program(store)
    program.worker.busy.acquire()  # it does not close the segment
    program.start("before").end()
    program.exporter.processor.record()
    shutil.rmtree(directory)
    program.start("after").end()
    program.exporter.processor.record()
    program.journal.place.release()  # as if killed
    assert left_in(directory) == ["after"]
    assert replay([directory]).sent["spans"] == 1
    program.worker.busy.release()


@contextlib.contextmanager
def without_rights(directory: Path) -> Iterator[None]:
    """This process may not look into a directory."""
    mode, user = directory.stat().st_mode, os.geteuid()
    directory.chmod(0)
    if user == 0:
        os.seteuid(65534)  # whom root's rights do not help
    try:
        yield
    finally:
        os.seteuid(user)
        directory.chmod(mode)


@pytest.mark.skipif(os.name != "posix", reason="rights are those of POSIX")
def test_a_spool_that_may_not_be_looked_into_for_a_while_loses_nothing(directory: Path, store: Memory) -> None:
    program = Program(store)
    store.failure = AWAY
    for name in ("before", "meanwhile", "after"):
        with without_rights(directory) if name == "meanwhile" else contextlib.nullcontext():
            program.start(name).end()
            program.exporter.processor.record()
    (journal,) = journal_directories(directory)  # not a second one
    assert journal.path == program.journal.place.path
    store.failure = None
    assert program.exporter.force_flush()
    assert sorted(span.name for span in store.spans.values()) == ["after", "before", "meanwhile"]


def test_a_limit_that_is_none_is_named_once(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_DSPY_SPOOL_LIMIT", "1 GB")
    monkeypatch.setenv("OTEL_DSPY_EXIT_SECONDS", "soon")
    leave(directory, store)
    said = [record.message for record in caplog.records]
    assert sum("OTEL_DSPY_SPOOL_LIMIT: use a whole number" in line for line in said) == 1
    assert sum("OTEL_DSPY_EXIT_SECONDS: use a number" in line for line in said) == 1


def one(directory: Path, limit: int) -> Journal:
    return Journal(directory, limit, lambda: {"tracking_uri": "x"}, lambda *_: None)


def put(journal: Journal, *, needed: bool = False) -> bool:
    spans = some_spans()
    return journal.append(encode(spans), spans, set(), 1, needed=needed) is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_writes_to_a_place_of_its_own(tmp_path: Path) -> None:
    mine = one(tmp_path, 10**6)
    put(mine)
    child = os.fork()
    if child == 0:
        mine.after_fork()
        put(mine)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    taken = {place.path: place.acquire() for place in journal_directories(tmp_path)}
    assert sorted(taken.values()) == [False, True]  # the parent's is still in use
    assert taken[mine.place.path] is False
    mine.close(False)
    assert JournalDirectory(next(path for path, ours in taken.items() if not ours)).acquire()


def test_the_limit_is_for_all_processes_together(tmp_path: Path) -> None:
    size = len(encode(some_spans()))
    first, second = one(tmp_path, 4 * size), one(tmp_path, 4 * size)
    assert [put(first), put(second), put(first)] == [True, True, True]
    assert [put(second), put(first)] == [False, False]  # the rest is reserved
    assert put(second, needed=True)
    assert not put(first, needed=True)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.pb")) == 4 * size
    first.close(False)
    second.close(False)


def test_files_are_what_any_otlp_receiver_takes(directory: Path, store: Memory) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    leave(directory, store)
    (place,) = journal_directories(directory)
    (file,) = place.files()
    request = ExportTraceServiceRequest.FromString(file.read_bytes())
    assert request.resource_spans[0].scope_spans[0].scope.name == semconv.SCOPE_NAME
    assert json.loads((place.path / "about.json").read_text())["tracking_uri"] == "sqlite:////" + os.path.join(
        os.getcwd(), "never-opened.db"
    ).lstrip("/")


# --- the end of the program -----------------------------------------------------------------------------------------


def one_span_to(uri: str, timeout: float | None = None) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(MLflowSpanExporter(uri, timeout=timeout)))
    track_runs(provider)
    provider.get_tracer(semconv.SCOPE_NAME).start_span("chat").end()
    return provider


def left_in(directory: Path) -> list[str]:
    return [
        span.name
        for place in journal_directories(directory)
        for path in place.files()
        for span in decode(path.read_bytes())
    ]


def test_a_server_that_never_answers_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "HANGS_AFTER", 0.5)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        provider = one_span_to(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout=3600)
        wait_for(lambda: select.select([deaf], [], [], 0)[0], "the first request")
        provider.shutdown()
        (exporter,) = exporters_of(provider)
        assert exporter.processor.worker.backoff.failures == 0  # no request has reached its timeout
    assert left_in(directory) == ["chat"]


@pytest.mark.parametrize(("status", "said"), [(401, "refused the credentials (401)"), (503, "cannot be reached (503")])
def test_a_server_that_refuses_costs_one_line_and_nothing_is_lost(
    directory: Path, caplog: pytest.LogCaptureFixture, status: int, said: str
) -> None:
    with fault_proxy("http://127.0.0.1:9") as proxy, caplog.at_level(logging.WARNING):
        proxy.status = status
        one_span_to(proxy.url).shutdown()
    assert [said in record.message for record in caplog.records] == [True, False]
    assert "1 spans, kept in" in caplog.records[-1].message
    assert left_in(directory) == ["chat"]


def test_a_server_that_asks_for_more_time_than_a_person_waits_is_not_waited_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_DSPY_EXIT_SECONDS", "200")
    with fake_mlflow() as server:
        server.faults.outage = Fault("status", 503, retry_after="100")
        before = time.monotonic()
        one_span_to(server.url).shutdown()
        assert time.monotonic() - before < 100
    assert left_in(directory) == ["chat"]


@pytest.mark.parametrize("endpoint", ["spans", "create", "log", "end"])
def test_a_server_that_answers_all_but_one_request_is_given_up(
    directory: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr(processor, "HANGS_AFTER", 0.5)
    monkeypatch.setenv("OTEL_DSPY_EXIT_SECONDS", "100")
    with fake_mlflow() as server:
        server.faults.once[endpoint] = deque([Fault("status", 500)] * 10_000)
        provider = one_span_to(server.url)
        tracer, at = (
            provider.get_tracer(semconv.SCOPE_NAME),
            {semconv.OPTIMIZER_RUN_ID: "r1", f"{semconv.OPTIMIZER_PARAMS_PREFIX}n": 3},
        )
        tracer.start_span("compile Best", attributes=at).end()
        before = time.monotonic()
        provider.shutdown()
        assert time.monotonic() - before < 50
        assert server.requests[endpoint] == 0
        server.faults.mend()
        assert replay([directory]).left == []
        assert [run["status"] for run in server.runs.values()] == ["FINISHED"]
        assert len(server.spans) == 2


def test_spans_that_are_all_refused_do_not_show_that_mlflow_works(directory: Path) -> None:
    with fake_mlflow() as server:
        server.faults.once["spans"] = deque([Fault("status", 422)])
        provider = one_span_to(server.url)
        (exporter,) = exporters_of(provider)
        provider.shutdown()
        assert exporter.processor.worker.account.refused["spans"] == 1
        assert exporter.processor.worker.progress == 0


def test_ctrl_c_ends_the_wait_and_leaves_everything_in_the_journal(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    program = Program(store)
    store.failure = AWAY
    program.compile().end()
    program.exporter.processor.record()
    monkeypatch.setattr(program.exporter.processor, "_join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        program.provider.shutdown()
    assert left_in(directory) == ["compile Best"]
