"""The spool on disk and the queue before it, against a store in memory."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dspy_otel.mlflow.base import ExportError
from dspy_otel.mlflow.pace import Pace
from dspy_otel.mlflow.spool import Place, Spool, SpoolError, places, spool_directory
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from dspy_otel import semconv
from dspy_otel.mlflow import MLflowSpanExporter, delivery, tracker, writer
from dspy_otel.mlflow.replay import replay
from dspy_otel.record.otlp import decode, encode
from tests.mlflow.test_runs import Exporter, Memory, Program
from tests.support.fault_proxy import fault_proxy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "_LINGER", 0.01)
    monkeypatch.setattr(writer, "_BACKOFF", (0.01,))
    monkeypatch.setattr(delivery, "_LINGER", 0.01)
    monkeypatch.setattr(delivery, "_PAUSES", (0.01,))


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


def test_what_does_not_fit_in_memory_goes_to_disk_and_is_sent_in_order(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MAX_BYTES", 200 * delivery._SPAN_BYTES)
    monkeypatch.setattr(delivery, "_SPILL", 50)
    program = Program(store)
    program.exporter.down = True
    order: list[int] = []
    write = program.exporter.write

    def note(spans: Any) -> None:
        write(spans)
        order.extend(span.attributes["n"] for span in spans)

    monkeypatch.setattr(program.exporter.tracker._delivery, "_send", note)
    for number in range(700):
        program.tracer.start_span("chat", attributes={"n": number}).end()
        if number % 100 == 0:
            time.sleep(0.05)
    while program.exporter.tracker._delivery._spilling is not None:
        time.sleep(0.01)
    assert program.exporter.tracker._delivery.waiting == 700
    assert any(directory.rglob("*.pb"))
    program.exporter.down = False
    assert program.provider.force_flush()
    assert order == list(range(700))
    program.provider.shutdown()
    assert list(directory.iterdir()) == []


@pytest.fixture
def store() -> Memory:
    return Memory()


def test_a_full_spool_drops_traces_of_examples_and_keeps_trials(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, lost: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_DSPY_SPOOL_LIMIT", "20000")
    program = Program(store)
    program.exporter.down = True
    store.failure = ExportError("unreachable", "away")
    compile_ = program.compile()
    for number in range(10):
        program.trial(compile_, number, 50.0, examples=20)
    compile_.end()
    with caplog.at_level(logging.WARNING):
        program.provider.shutdown()
    (place,) = places(directory)
    kept = [span.name.split()[0] for path in place.files() for span in decode(path.read_bytes())]
    assert {name: kept.count(name) for name in ("compile", "trial", "evaluate")} == {
        "compile": 1,
        "trial": 10,
        "evaluate": 10,
    }
    assert lost() == {"spool_full": 221 - len(kept)}
    assert kept.count("example") < 200
    # Runs, and the scores of their trials, are whole.
    state = place.state()
    assert len(state["runs"]) == 11
    line = caplog.records[-1].message
    assert f"not written: {len(kept)} spans, 11 runs" in line
    assert f"not written: {221 - len(kept)} spans, lost." in line


def test_without_a_spool_what_is_above_the_limit_is_counted(
    store: Memory, monkeypatch: pytest.MonkeyPatch, lost: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_DSPY_SPOOL", "off")
    monkeypatch.setattr(delivery, "MAX_BYTES", 50 * delivery._SPAN_BYTES)
    program = Program(store)
    program.exporter.down = True
    compile_ = program.compile()
    for _ in range(200):
        program.start("example QA").end()
    program.trial(compile_, 1, 50.0)
    program.exporter.down = False
    assert program.provider.force_flush()
    found = lost()
    assert found["queue_full"] + found[None] == 201
    assert found["queue_full"] >= 50
    assert sum("Too many spans wait for MLflow" in record.message for record in caplog.records) == 1
    compile_.end()
    program.provider.shutdown()
    assert {run["status"] for run in store.runs.values()} == {"FINISHED"}


def leave(directory: Path, store: Memory) -> None:
    """A program that could write nothing."""
    program = Program(store)
    program.exporter.down = True
    store.failure = ExportError("unreachable", "away")
    compile_ = program.compile()
    for number in (1, 2):
        program.trial(compile_, number, 50.0 * number, examples=3)
    compile_.end()
    program.provider.shutdown()


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """Where a replay delivers to."""
    memory = Memory()
    monkeypatch.setattr(MLflowSpanExporter, "write", lambda self, spans: Exporter.write(_with(self, memory), spans))
    monkeypatch.setattr(MLflowSpanExporter, "open_runs", lambda self, stopped: memory)
    monkeypatch.setattr(MLflowSpanExporter, "alive", lambda self: True)
    return memory


def _with(exporter: Any, memory: Memory) -> Any:
    exporter.store, exporter.down = memory, memory.failure is not None
    return exporter


def test_a_replay_writes_what_the_program_would_have_written(
    directory: Path, store: Memory, other: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(directory, store)
    outcome = replay([directory])
    assert outcome.left == []
    assert outcome.sent == {"spans": 11, "runs": 3, "traces on runs": 7, "scores": 6}
    assert list(directory.iterdir()) == []
    direct = Memory()
    program = Program(direct)
    compile_ = program.compile()
    for number in (1, 2):
        program.trial(compile_, number, 50.0 * number, examples=3)
    compile_.end()
    program.provider.shutdown()
    assert set(other.runs) == set(direct.runs)
    for key, run in direct.runs.items():
        got = other.runs[key]
        points = [{(m.key, m.value, m.step) for m in one["metrics"]} for one in (got, run)]
        assert points[0] == points[1]
        assert (got["status"], got["tags"], got["params"], set(got["artifacts"])) == (
            run["status"],
            run["tags"],
            run["params"],
            set(run["artifacts"]),
        )


def test_a_killed_programs_spans_give_its_runs(directory: Path, store: Memory, other: Memory) -> None:
    leave(directory, store)
    (place,) = places(directory)
    (place.path / "runs.json").unlink()
    assert replay([directory]).left == []
    assert {run["status"] for run in other.runs.values()} == {"FINISHED"}
    assert len(other.runs) == 3
    assert len(other.scores) == 6
    assert list(directory.iterdir()) == []


def test_who_is_at_it_is_left_alone(directory: Path, store: Memory, other: Memory) -> None:
    leave(directory, store)
    (place,) = places(directory)
    assert place.acquire()
    outcome = replay([directory])
    assert not outcome.sent
    assert "in use" in outcome.left[0]
    place.release()
    assert replay([directory]).sent["spans"] == 11


def test_what_cannot_be_read_is_named_and_stays(directory: Path, store: Memory, other: Memory) -> None:
    leave(directory, store)
    (place,) = places(directory)
    (file,) = place.files()
    file.write_bytes(b"\xff\xff")
    outcome = replay([directory])
    assert "no OTLP request" in outcome.left[0]
    assert file.exists()
    (place.path / "runs.json").write_text("{}")
    assert "another version" in replay([directory]).left[0]


def test_a_spool_that_cannot_be_written_costs_one_line(
    tmp_path: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OTEL_DSPY_SPOOL", str(tmp_path / "file" / "spool"))  # also for root
    with caplog.at_level(logging.WARNING):
        leave(tmp_path, store)
    said = [record.message for record in caplog.records if "cannot be kept" in record.message]
    assert len(said) == 2  # spans, and runs
    assert "Not a directory" in said[0]
    assert caplog.records[-1].message.endswith("not written: 11 spans, 3 runs, lost.")


FULL = """
    import resource, signal, sys
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from dspy_otel.mlflow import MLflowSpanExporter, delivery
    from dspy_otel.mlflow.tracker import track_runs
    if {limit}:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # of each file
    delivery.MAX_BYTES = 300_000
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
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(FULL).format(limit=kind == "limit")],
            env={**os.environ, "OTEL_DSPY_SPOOL": str(mounted / "spool"), "OTEL_DSPY_EXIT_SECONDS": "2"},
            capture_output=True,
            text=True,
            timeout=120,
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


def test_a_limit_that_is_none_is_named_once(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_DSPY_SPOOL_LIMIT", "1 GB")
    monkeypatch.setenv("OTEL_DSPY_EXIT_SECONDS", "soon")
    leave(directory, store)
    said = [record.message for record in caplog.records]
    assert sum("OTEL_DSPY_SPOOL_LIMIT: use a whole number" in line for line in said) == 1
    assert sum("OTEL_DSPY_EXIT_SECONDS: use a number" in line for line in said) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_writes_to_a_place_of_its_own(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 10**6, dict)
    spool.put(some_spans(), lambda _: True)
    child = os.fork()
    if child == 0:
        spool.after_fork()
        spool.put(some_spans(), lambda _: True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    taken = {place.path: place.acquire() for place in places(tmp_path)}
    assert sorted(taken.values()) == [False, True]  # the parent's is still in use
    assert taken[spool.place.path] is False
    spool.close()
    assert Place(next(path for path, ours in taken.items() if not ours)).acquire()


def test_the_limit_counts_what_others_left(tmp_path: Path) -> None:
    size = len(encode(some_spans()))
    first = Spool(tmp_path, 3 * size, dict)
    assert first.put(some_spans(), lambda _: False) == 0
    second = Spool(tmp_path, 3 * size, dict)
    assert second.put(some_spans(), lambda _: False) == 0
    assert second.put(some_spans(), lambda _: False) == 2
    with pytest.raises(SpoolError):
        [second.set_aside(some_spans()) for _ in range(2)]
    first.close()
    second.close()


def test_files_are_what_any_otlp_receiver_takes(directory: Path, store: Memory) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    leave(directory, store)
    (place,) = places(directory)
    (file,) = place.files()
    request = ExportTraceServiceRequest.FromString(file.read_bytes())
    assert request.resource_spans[0].scope_spans[0].scope.name == semconv.SCOPE_NAME
    assert json.loads((place.path / "about.json").read_text())["tracking_uri"] == "sqlite:////" + os.path.join(
        os.getcwd(), "never-opened.db"
    ).lstrip("/")


# --- the end of the program -----------------------------------------------------------------------------------------


def one_span_to(uri: str) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(MLflowSpanExporter(uri)))
    tracker.track_runs(provider)
    provider.get_tracer(semconv.SCOPE_NAME).start_span("chat").end()
    return provider


def left_in(directory: Path) -> list[str]:
    return [span.name for place in places(directory) for path in place.files() for span in place.read(path)]


def test_a_server_that_never_answers_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "_HANGS_AFTER", 0.5)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        provider = one_span_to(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        time.sleep(0.1)
        began = time.monotonic()
        provider.shutdown()
        assert time.monotonic() - began < 10
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


def test_ctrl_c_ends_the_wait_and_leaves_everything_in_the_spool(
    directory: Path, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    program = Program(store)
    program.exporter.down = True
    store.failure = ExportError("unreachable", "away")
    program.compile().end()
    monkeypatch.setattr(program.exporter.tracker._delivery, "stop", interrupt)
    with pytest.raises(KeyboardInterrupt):
        program.provider.shutdown()
    assert left_in(directory) == ["compile Best"]
    assert len(places(directory)[0].state()["runs"]) == 1


# --- a busy program -------------------------------------------------------------------------------------------------


def test_exporting_rests_while_the_program_computes_and_not_when_somebody_waits() -> None:
    import threading

    urgent = threading.Event()
    pace = Pace(urgent)

    def rest(busy: bool, filled: float = 0.0) -> float:
        pace.load()
        time.sleep(0.11)
        pace._load, pace._mark = (1.0 if busy else 0.0), (time.monotonic(), time.process_time(), pace._ours)
        began = time.monotonic()
        pace.rest(0.01, filled, most=0.3)
        return time.monotonic() - began

    assert rest(busy=False) < 0.05
    assert 0.1 < rest(busy=True) < 0.5
    assert rest(busy=True, filled=0.9) < 0.05  # before anything is lost, the program is slowed down
    urgent.set()
    assert rest(busy=True) < 0.05


# --- spending -------------------------------------------------------------------------------------------------------


def usage(calls: int, **roles: int) -> dict[str, Any]:
    found: dict[str, Any] = {"dspy.usage.lm_calls": calls, "dspy.usage.cost": calls * 0.5}
    for role, number in roles.items():
        found[f"dspy.usage.{role}.lm_calls"] = number
    return found
