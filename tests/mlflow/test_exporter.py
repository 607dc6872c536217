"""The exporter against a small HTTP server of our own: what it sends, and how it fails."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel import semconv, setup
from dspy_otel.mlflow import MLflowSpanExporter, processor, retry, target
from dspy_otel.mlflow.exporter import track_runs
from dspy_otel.mlflow.target import public_uri
from dspy_otel.mlflow.worker import EXIT_ATTEMPTS
from tests.mlflow.programs import wait
from tests.support.waiting import run

OK, FAILURE = SpanExportResult.SUCCESS, SpanExportResult.FAILURE


class FakeMLflow(ThreadingHTTPServer):
    """Answers as MLflow does; ``answers`` replaces (status, body) of a path, once or for good."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.version = "3.17.2"
        self.experiments = {"Default": "0"}
        self.answers: dict[str, list[tuple[int, Any]]] = {}

    def paths(self) -> list[str]:
        return [path.split("?")[0] for _, path, _, _ in self.seen]

    def batches(self) -> list[list[str]]:
        """Span names of each accepted or refused batch."""
        names = []
        for _, path, _, body in self.seen:
            if path.endswith("/v1/traces"):
                request = ExportTraceServiceRequest.FromString(body)
                names.append([s.name for r in request.resource_spans for c in r.scope_spans for s in c.spans])
        return names


class _Handler(BaseHTTPRequestHandler):
    server: FakeMLflow

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        status, content = self.decide(self.path, body)
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "https://user:secret@elsewhere/v1/traces")
        kind = "text/plain" if isinstance(content, str) else "application/json"
        if status == 200 and self.path == "/v1/traces":
            kind = "application/x-protobuf"  # as MLflow answers, with an empty ExportTraceServiceResponse
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def decide(self, path: str, body: bytes) -> tuple[int, Any]:
        path, _, query = path.partition("?")
        planned = self.server.answers.get(path)
        if planned:
            return planned.pop(0) if len(planned) > 1 else planned[0]
        known = self.server.experiments
        missing = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"})
        if path.endswith("/version"):
            return 200, self.server.version
        if path.endswith("experiments/create"):
            name = json.loads(body)["name"]
            known[name] = str(len(known))
            return 200, {"experiment_id": known[name]}
        if "/experiments/get" in path:
            wanted = query.partition("=")[2].replace("+", " ")
            found = known.get(wanted) if path.endswith("by-name") else (wanted if wanted in known.values() else None)
            return (200, {"experiment": {"experiment_id": found, "lifecycle_stage": "active"}}) if found else missing
        return (200, "") if path.endswith("/v1/traces") else (404, "what?")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[FakeMLflow]:
    with FakeMLflow() as fake_server:
        thread = threading.Thread(target=fake_server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield fake_server
        fake_server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def own_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No MLflow or OTLP settings of the machine, no waiting."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "OTEL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(processor, "WRITE_INTERVAL", 0.01)
    monkeypatch.setenv("OTEL_DSPY_SPOOL", str(tmp_path / "spool"))


@pytest.fixture
def spans() -> list[ReadableSpan]:
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    for name in "abcd":
        with provider.get_tracer(semconv.SCOPE_NAME).start_as_current_span(name):
            pass
    return list(memory.get_finished_spans())


Lines = Callable[[], list[str]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


# --- what is sent -------------------------------------------------------------------------------------------------


def test_a_batch_goes_to_the_experiment_named_in_the_environment(
    fake: FakeMLflow, spans: list[ReadableSpan], monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fake.url + "/")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "my programs")
    mlflow = MLflowSpanExporter()
    assert fake.seen == []
    assert [mlflow.export(spans), mlflow.export(spans[:1])] == [OK, OK]
    assert fake.batches() == [["a", "b", "c", "d"], ["a"]]
    headers = {key.lower(): value for key, value in fake.seen[-1][2].items()}
    assert headers["x-mlflow-experiment-id"] == fake.experiments["my programs"] == "1"
    assert headers["content-type"] == "application/x-protobuf"
    assert "authorization" not in headers
    assert fake.paths().count("/version") == 1
    assert lines() == []


@pytest.mark.parametrize(
    ("argument", "environment", "expected"),
    [
        (None, {}, "0"),
        (None, {"MLFLOW_EXPERIMENT_ID": "7", "MLFLOW_EXPERIMENT_NAME": "Default"}, "7"),
        ("seven", {"MLFLOW_EXPERIMENT_ID": "0"}, "7"),
        (7, {}, "7"),
        ("2024", {}, "2"),  # looks like an id, is none, so it is a new name
    ],
)
def test_which_experiment(
    fake: FakeMLflow,
    spans: list[ReadableSpan],
    monkeypatch: pytest.MonkeyPatch,
    argument: Any,
    environment: dict[str, str],
    expected: str,
) -> None:
    fake.experiments["seven"] = "7"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert MLflowSpanExporter(fake.url, experiment=argument).export(spans) is OK
    assert {k.lower(): v for k, v in fake.seen[-1][2].items()}["x-mlflow-experiment-id"] == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MLFLOW_TRACKING_TOKEN": "t0k"}, "Bearer t0k"),
        ({"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "pä"}, "Basic dTpww6Q="),
        (
            {"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p", "MLFLOW_TRACKING_TOKEN": "t"},
            "Basic dTpw",
        ),
        # Another backend's settings: neither followed nor handed over.
        ({"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer other,api-key=1"}, None),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_HEADERS": "authorization=x", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://[::1]:1"},
            None,
        ),
    ],
)
def test_credentials(
    fake: FakeMLflow,
    spans: list[ReadableSpan],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    expected: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert MLflowSpanExporter(fake.url).export(spans) is OK
    for _, _, headers, _ in fake.seen:
        assert headers.get("Authorization") == expected
        assert "api-key" not in headers


def test_credentials_from_mlflows_file(fake: FakeMLflow, spans: list[ReadableSpan], tmp_path: Path) -> None:
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = u\nmlflow_tracking_password = 5%\n"
    )
    assert MLflowSpanExporter(fake.url).export(spans) is OK
    assert fake.seen[-1][2]["Authorization"] == "Basic dTo1JQ=="


def test_netrc_does_not_replace_the_token(
    fake: FakeMLflow, spans: list[ReadableSpan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login x password y\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0k")
    assert MLflowSpanExporter(fake.url).export(spans) is OK
    assert fake.seen[-1][2]["Authorization"] == "Bearer t0k"


def test_too_large_a_batch_is_halved(fake: FakeMLflow, spans: list[ReadableSpan]) -> None:
    fake.answers["/v1/traces"] = [(413, "too large"), (200, "")]
    assert MLflowSpanExporter(fake.url).export(spans) is OK
    assert fake.batches() == [["a", "b", "c", "d"], ["a", "b"], ["c", "d"]]


def test_a_busy_server_is_asked_again(fake: FakeMLflow, spans: list[ReadableSpan], lines: Lines) -> None:
    fake.answers["/v1/traces"] = [(503, "busy"), (429, "busy"), (200, "")]
    assert MLflowSpanExporter(fake.url).export(spans) is OK
    assert len(fake.batches()) == 3
    assert lines() == []


# --- how it fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/v1/traces", (401, "no"), "MLFLOW_TRACKING_USERNAME"),
        ("/v1/traces", (403, "no"), "refused the credentials (403)"),
        ("/v1/traces", (404, "Not Found"), "MLflow 3.14 or newer with a SQL store"),
        ("/v1/traces", (501, {"detail": "not supported by FileStore"}), "not supported by FileStore"),
        ("/v1/traces", (422, {"detail": "cannot convert"}), "422"),
        ("/v1/traces", (503, "busy"), "cannot be reached (503 busy)"),
        (
            "/v1/traces",
            (400, {"error_code": "BAD_REQUEST", "message": "QueuePool limit of size 5 overflow 10 reached"}),
            "is busy: it has no free connection",
        ),
        ("/v1/traces", (302, ""), "redirects to https://elsewhere/v1/traces"),
        ("/api/2.0/mlflow/experiments/get", (200, "<html>"), "answers with a page (a login page of a proxy?)"),
        ("/v1/traces", (200, "<!doctype html>"), "answers with a page (a login page of a proxy?)"),
        ("/v1/traces", (200, "signed out"), "answers with '200 signed out', which is not MLflow's"),
        ("/api/2.0/mlflow/experiments/get", (404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}), "no experiment with id"),
        (
            "/api/2.0/mlflow/experiments/get",
            (200, {"experiment": {"experiment_id": "0", "lifecycle_stage": "deleted"}}),
            "is deleted",
        ),
    ],
)
def test_each_cause_is_said_once_and_nothing_is_lost(
    fake: FakeMLflow, spans: list[ReadableSpan], lines: Lines, path: str, answer: tuple[int, Any], said: str
) -> None:
    fake.answers[path] = [answer]
    mlflow = MLflowSpanExporter(fake.url)
    assert [mlflow.export(spans[n : n + 1]) for n in range(4)] == [OK] * 4
    mlflow.shutdown()
    first, last = lines()
    assert said in first
    assert "secret" not in first
    assert "lost" not in last
    assert "4 spans, 4 traces, set aside in" in last if answer[0] == 422 else "not written: 4 spans, kept in" in last


def test_a_server_that_comes_back_is_noticed(fake: FakeMLflow, spans: list[ReadableSpan], lines: Lines) -> None:
    fake.answers["/v1/traces"] = [(401, "x"), (200, "")]
    mlflow = MLflowSpanExporter(fake.url)
    assert mlflow.export(spans) is OK
    assert mlflow.force_flush()
    assert [line.split("(")[0] for line in lines()] == [
        f"MLflow at {fake.url} refused the credentials ",
        "MLflow works again.",
    ]


def test_an_experiment_deleted_meanwhile_is_made_again(fake: FakeMLflow, spans: list[ReadableSpan]) -> None:
    mlflow = MLflowSpanExporter(fake.url, experiment="x")
    assert mlflow.export(spans) is OK
    del fake.experiments["x"]
    fake.answers["/v1/traces"] = [(404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}), (200, "")]
    assert mlflow.export(spans) is OK
    assert mlflow.force_flush()
    assert "x" in fake.experiments


def test_nobody_listens(spans: list[ReadableSpan], lines: Lines) -> None:
    mlflow = MLflowSpanExporter("http://user:secret@127.0.0.1:9")
    assert [mlflow.export(spans), mlflow.export(spans)] == [OK, OK]
    mlflow.shutdown()
    said, last = lines()
    assert "MLflow at http://127.0.0.1:9 cannot be reached" in said
    assert "8 spans, kept in" in last
    assert "secret" not in said + last


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("file:///tmp/x", "file store (file:///tmp/x) cannot take"),
        ("mlruns", "file store (mlruns) cannot take"),
        ("databricks", "Databricks (databricks) takes traces by OTLP"),
        ("databricks://profile", "Databricks (databricks://profile) takes traces by OTLP"),
        ("databricks-uc", "OTEL_TRACES_EXPORTER=otlp"),
        ("ftp://user:secret@host/x", "ftp://host/x is not supported"),
    ],
)
def test_unusable_uris(spans: list[ReadableSpan], lines: Lines, uri: str, said: str) -> None:
    mlflow = MLflowSpanExporter(uri)
    assert [mlflow.export(spans), mlflow.export(spans)] == [FAILURE, FAILURE]
    assert len(lines()) == 1
    assert said in lines()[0]
    assert "secret" not in lines()[0]


@pytest.mark.parametrize(("version", "warned"), [("3.13.0", 1), ("3.14.0", 0), ("4.0.0rc1", 0), ("<html>", 0)])
def test_an_old_server_is_named(
    fake: FakeMLflow, spans: list[ReadableSpan], lines: Lines, version: str, warned: int
) -> None:
    fake.version = version
    mlflow = MLflowSpanExporter(fake.url)
    assert [mlflow.export(spans), mlflow.export(spans)] == [OK, OK]
    assert len(lines()) == warned
    assert all("has version 3.13.0, which is older than 3.14" in line for line in lines())


def test_shutdown_ends_waiting_and_refuses_later_spans(
    fake: FakeMLflow, spans: list[ReadableSpan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 60.0)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 60.0)
    monkeypatch.setenv("OTEL_DSPY_EXIT_SECONDS", "1")
    fake.answers["/v1/traces"] = [(503, "busy")]
    mlflow = MLflowSpanExporter(fake.url)
    assert mlflow.export(spans) is OK
    mlflow.shutdown()
    seen = len(fake.seen)
    mlflow.shutdown()
    assert len(fake.seen) == seen
    assert mlflow.export(spans) is FAILURE
    assert mlflow.force_flush() is True


def test_nothing_to_send(fake: FakeMLflow) -> None:
    assert MLflowSpanExporter(fake.url).export([]) is OK
    assert fake.seen == []


@pytest.mark.parametrize("kind", [BatchSpanProcessor, SimpleSpanProcessor])
def test_a_clock_that_goes_back_doubles_nothing(fake: FakeMLflow, kind: type[SpanProcessor]) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    mlflow = MLflowSpanExporter(fake.url)
    provider.add_span_processor(kind(mlflow))
    tracer = provider.get_tracer("mine")
    tracer.start_span("before").end()
    track_runs(provider)
    an_hour_ago = time.time_ns() - 3600 * 10**9
    for name in "ab":
        tracer.start_span(name, start_time=an_hour_ago).end(an_hour_ago + 1)
    tracer.start_span("after").end()
    provider.shutdown()
    assert sorted(name for batch in fake.batches() for name in batch) == ["a", "after", "b", "before"]
    assert mlflow.processor.worker.account.written["spans"] == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_uses_connections_of_its_own(fake: FakeMLflow, spans: list[ReadableSpan]) -> None:
    mlflow = MLflowSpanExporter(fake.url)
    assert mlflow.export(spans[:1]) is OK
    mlflow.processor._recording.acquire()  # as if another thread were writing at the moment of the fork
    child = os.fork()
    if child == 0:
        os._exit(0 if mlflow.export(spans[1:2]) is OK else 1)
    mlflow.processor._recording.release()
    assert wait(child) == 0
    assert mlflow.export(spans[2:3]) is OK
    assert sorted(name for batch in fake.batches() for name in batch) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("http://u:p@h:1/x", "http://h:1/x"),
        ("postgresql+psycopg2://u:p%40@h/db", "postgresql+psycopg2://h/db"),
        ("sqlite:///a@b.db", "sqlite:///a@b.db"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_log_lines_carry_no_password(uri: str, public: str) -> None:
    assert public_uri(uri) == public


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///m.db", "sqlite:////work/m.db"),
        ("sqlite+pysqlite:///m.db", "sqlite+pysqlite:////work/m.db"),
        ("sqlite:////other/m.db", "sqlite:////other/m.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://h/db", "postgresql://h/db"),
    ],
)
def test_relative_stores(uri: str, expected: str) -> None:
    assert target.absolute(uri, "/work") == expected


@pytest.mark.skipif(os.name != "posix", reason="a working directory can be removed")
@pytest.mark.parametrize("spool", [None, "relative"])
def test_a_working_directory_that_was_removed_does_no_harm(
    fake: FakeMLflow, spans: list[ReadableSpan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spool: str | None
) -> None:
    if spool is not None:
        monkeypatch.setenv("OTEL_DSPY_SPOOL", spool)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert setup._mlflow(fake.url, None)[0][1] == fake.url
    mlflow = MLflowSpanExporter(fake.url)
    assert mlflow.export(spans) is OK
    mlflow.shutdown()
    assert fake.batches() == [["a", "b", "c", "d"]]


def test_a_server_needs_no_mlflow_and_the_import_is_light(fake: FakeMLflow) -> None:
    program = """
        import sys
        sys.modules["mlflow"] = None  # as if not installed
        from dspy_otel.mlflow import MLflowSpanExporter, processor, retry, target
        exporter = MLflowSpanExporter()
        assert "requests" not in sys.modules and "dspy" not in sys.modules
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(exporter))
        provider.get_tracer("x").start_span("at exit").end()
    """
    result = run([sys.executable, "-c", textwrap.dedent(program)], env={**os.environ, "MLFLOW_TRACKING_URI": fake.url})
    assert result.returncode == 0, result.stderr
    assert fake.batches() == [["at exit"]]


def test_a_dead_server_does_not_hold_up_the_exit() -> None:
    program = """
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from dspy_otel.mlflow import MLflowSpanExporter, processor, retry, target
        import requests, time
        sent, send = [], requests.Session.send
        def counted(*args, **kwargs):
            sent.append(1)
            return send(*args, **kwargs)
        requests.Session.send = counted
        restart = retry.Backoff.restart
        def at_the_end(self):
            sent.clear()
            restart(self)
        retry.Backoff.restart = at_the_end
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(MLflowSpanExporter()))
        for i in range(1200):
            provider.get_tracer("x").start_span("s").end()
            if i % 400 == 0:
                time.sleep(0.05)
        provider.shutdown()
        print(len(sent))
    """
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    result = run([sys.executable, "-c", textwrap.dedent(program)], env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= EXIT_ATTEMPTS + 1  # one that was under way
    assert result.stderr.count("cannot be reached") == 1


def test_without_mlflow_a_store_is_refused_with_the_command_that_helps(
    spans: list[ReadableSpan], lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    mlflow = MLflowSpanExporter("sqlite:///x.db")
    assert [mlflow.export(spans), mlflow.export(spans)] == [FAILURE, FAILURE]
    assert len(lines()) == 1
    assert "pip install 'dspy-otel[mlflow]'" in lines()[0]


@pytest.mark.parametrize("place", ["resource", "resource's key", "scope", "version", "scope's attribute"])
def test_half_a_character_in_what_spans_share_costs_nothing_else(
    fake: FakeMLflow, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A service named after a host, or an instrumentation after a file, whose name is not UTF-8."""
    from dspy_otel.mlflow.translate import repair

    half, mended = "caf\udce9\0", "caf\ufffd\ufffd"
    shared = {half: "x"} if place == "resource's key" else {"host": half if place == "resource" else "cafe"}
    memory = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource(shared), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer(
        half if place == "scope" else "s",
        half if place == "version" else "1",
        attributes={"path": half if place == "scope's attribute" else "cafe"},
    )
    tracer.start_span("first").end()
    tracer.start_span("second").end()
    assert MLflowSpanExporter(fake.url).export(memory.get_finished_spans()) is OK
    assert fake.batches() == [["first", "second"]]
    assert "Traceback" not in caplog.text
    assert not caplog.records
    repaired = [repair(span) for span in memory.get_finished_spans()]
    found = [(span.resource.attributes, span.instrumentation_scope) for span in repaired]
    assert mended in str(found[0])
    assert found[0][1] is found[1][1]
    assert repaired[0].resource is repaired[1].resource


def test_half_a_character_in_a_span_of_the_users_own_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A span named after a file whose name is not UTF-8, beside others in one batch and in the spool."""
    from dspy_otel.mlflow.processor import MLflowProcessor
    from dspy_otel.mlflow.target import Target
    from dspy_otel.mlflow.translate import repair
    from dspy_otel.record.otlp import decode

    memory = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("batch")
    tracer.start_span("whole", attributes={"name": "café"}).end()
    with tracer.start_as_current_span("summarize caf\udce9.txt", attributes={"path": "caf\udce9.txt"}) as span:
        span.add_event("read caf\udce9.txt", {"path": "caf\udce9.txt"})
    spans = memory.get_finished_spans()
    assert repair(spans[0]) is spans[0]
    monkeypatch.setenv("OTEL_DSPY_SPOOL", str(tmp_path / "spool"))
    processor = MLflowProcessor(Target("http://127.0.0.1:9"))
    for span in spans:
        processor.on_end(span)
    processor.record()
    (segment,) = processor.journal.segments
    back = decode(segment.body())
    assert [one.name for one in back] == ["whole", "summarize caf\ufffd.txt"]
    assert (back[1].attributes or {})["path"] == "caf\ufffd.txt"
    assert [event.name for event in back[1].events] == ["read caf\ufffd.txt"]
