"""A real MLflow server that is slow, broken or away: nothing gets lost or stored twice, and no program is held up."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from dspy_otel import DSPyInstrumentor, semconv
from dspy_otel.cli import main
from dspy_otel.mlflow import retry
from dspy_otel.mlflow.replay import replay
from dspy_otel.record.otlp import encode
from tests.integration.test_mlflow_runs import CONFIGURE, start
from tests.optimizers.common import RUNS, quietly, scripted_lm
from tests.support.fault_proxy import FaultProxy
from tests.support.mlflow_server import free_port, mlflow_server
from tests.support.mlflow_store import Store
from tests.support.nightly import at_night
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.waiting import run as run_program
from tests.support.waiting import wait_for, wait_for_exit

pytest.importorskip("mlflow")
pytestmark = pytest.mark.integration
RANDOM_SEARCH = "BootstrapFewShotWithRandomSearch"


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OTEL_DSPY_SPOOL", str(tmp_path / "spool"))
    return tmp_path / "spool"


@pytest.fixture
def store(proxy: FaultProxy, spool: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    store = Store(proxy.upstream, request.node.name, through=proxy.url)
    yield store
    if DSPyInstrumentor().is_instrumented_by_opentelemetry:
        DSPyInstrumentor().uninstrument()
    store.provider.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with shorter pauses between attempts."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.2)


def broken(proxy: FaultProxy) -> None:
    proxy.status = 500


def unavailable(proxy: FaultProxy) -> None:
    proxy.status = 503


def refused(proxy: FaultProxy) -> None:
    proxy.down()


def deaf(proxy: FaultProxy) -> None:
    proxy.lose_answers = 1 << 30


def well(proxy: FaultProxy) -> None:
    proxy.status = proxy.lose_answers = 0
    proxy.delay = 0
    proxy.down()
    proxy.up()


@pytest.mark.parametrize("fault", [broken, *at_night(unavailable, refused, deaf)])
def test_a_fault_in_the_middle_of_a_compile_loses_nothing_and_stores_nothing_twice(
    store: Store, proxy: FaultProxy, fault: Callable[[FaultProxy], None]
) -> None:
    lm = scripted_lm()
    store.instrument()
    examples = 0

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        nonlocal examples
        examples += 1
        if examples == 10:
            fault(proxy)
        return float(len(example.colour_name) % 3 > 0)

    import dspy

    from dspy_otel.cli.demo.task import ColourFamily, load_examples

    optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=metric, num_candidate_programs=2, num_threads=2)
    quietly(optimizer.compile, ColourFamily(), trainset=load_examples("train", 8), valset=load_examples("val", 8))
    assert lm is dspy.settings.lm
    assert not store.provider.force_flush(4000)  # more than twelve attempts at what is waiting
    well(proxy)
    store.flush()
    store.check()


@pytest.mark.nightly
def test_a_server_that_comes_back_with_an_empty_database_gets_the_whole_optimization(
    tmp_path: Path, spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import dspy

    from dspy_otel.cli.demo.task import ColourFamily, load_examples

    scripted_lm()
    port = free_port()
    half, replaced = threading.Event(), threading.Event()
    examples = 0

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        nonlocal examples
        examples += 1
        if examples == 20:
            half.set()
            replaced.wait()
        return float(len(example.colour_name) % 3 > 0)

    def compile_() -> None:
        optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=metric, num_candidate_programs=2, num_threads=1)
        optimizer.compile(ColourFamily(), trainset=load_examples("train", 8), valset=load_examples("val", 8))

    settings = dspy.settings.config

    def with_settings() -> None:
        with dspy.context(**settings):
            quietly(compile_)

    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with mlflow_server(tmp_path / "first", port=port) as uri:
        store = Store(uri, "replaced")
        store.instrument()
        thread = threading.Thread(target=with_settings)
        thread.start()
        half.wait()
        store.flush()
        assert store.runs()
    with mlflow_server(tmp_path / "second", port=port):
        replaced.set()
        thread.join()
        with caplog.at_level(logging.WARNING):
            store.provider.shutdown()
        DSPyInstrumentor().uninstrument()
        assert sum("was its database replaced" in record.message for record in caplog.records) == 1
        outcome = replay([spool])
        assert outcome.left == []
        store.check()


def test_a_slow_server_holds_up_no_program(store: Store, proxy: FaultProxy) -> None:
    lm = scripted_lm()
    proxy.delay = 3600  # a program that waits for an answer does not end
    store.instrument()
    quietly(RUNS[RANDOM_SEARCH], lm)
    well(proxy)
    proxy.delay = 0.05
    store.flush()
    store.check()
    assert len(proxy.requests) > 20


@pytest.mark.nightly
def test_two_compiles_at_once_through_an_outage(store: Store, proxy: FaultProxy) -> None:
    lm = scripted_lm()
    store.instrument()
    threads = [threading.Thread(target=RUNS[name], args=(lm,)) for name in (RANDOM_SEARCH, "COPRO")]
    for thread in threads:
        quietly(thread.start)
    time.sleep(0.3)
    proxy.down()
    for thread in threads:
        quietly(thread.join)
    time.sleep(1)
    proxy.up()
    store.flush()
    store.check()


# --- the spool ------------------------------------------------------------------------------------------------------


def test_what_is_left_at_the_end_is_delivered_later_and_only_once(
    store: Store, proxy: FaultProxy, spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Part of a compile was written before, and its last answer got lost."""
    lm = scripted_lm()
    store.instrument()
    quietly(RUNS[RANDOM_SEARCH], lm)
    store.flush()
    proxy.lose_answers = 3
    quietly(RUNS[RANDOM_SEARCH], lm, seed=1)
    wait_for(lambda: not proxy.lose_answers, "the lost answers")
    proxy.down()
    quietly(RUNS[RANDOM_SEARCH], lm, seed=2)
    with caplog.at_level(logging.WARNING):
        store.provider.shutdown()
    (line,) = [record.message for record in caplog.records if "not written" in record.message]
    assert "dspy-otel replay" in line
    assert str(spool) in line
    files = [path for path in spool.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (spool, *spool.iterdir())} == {0o700}
    assert any(path.suffix == ".pb" for path in files)

    assert replay([spool]).left  # it is still away
    assert {path for path in spool.rglob("*") if path.is_file()} >= set(files)
    proxy.up()
    outcomes: list[Any] = []
    twice = [threading.Thread(target=lambda: outcomes.append(replay([spool]))) for _ in range(2)]
    for thread in twice:
        thread.start()
    for thread in twice:
        thread.join()
    # The other one has found it in use, or gone.
    assert sum(bool(outcome.sent["spans"]) for outcome in outcomes) == 1
    assert list(spool.iterdir()) == []
    store.check()


@pytest.mark.parametrize("form", ["pb", *at_night("jsonl")])
def test_spans_from_a_file_give_the_same_runs(
    server_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    live = Store(server_uri, f"live {form}")
    live.instrument()
    quietly(RUNS["MIPROv2"], scripted_lm())
    live.flush()
    DSPyInstrumentor().uninstrument()
    live.provider.shutdown()
    spans = live.spans.get_finished_spans()
    file = tmp_path / f"spans.{form}"
    if form == "pb":
        file.write_bytes(encode(spans))
    else:
        batches = [spans[start : start + 100] for start in range(0, len(spans), 100)]
        file.write_text("\n".join(as_collector_writes(encode(batch)) for batch in batches))

    monkeypatch.chdir(tmp_path)
    again = Store(f"sqlite:///{tmp_path / 'mlflow.db'}", "replayed", spans=live.spans)
    for _ in range(2):  # the second time, all of it is there
        assert main(["replay", str(file), "--to", again.uri, "--experiment", "replayed"]) == 0
    again.check()
    again.provider.shutdown()
    runs, replayed = live.runs(), again.runs()
    for key, run in runs.items():
        other = replayed[key]
        assert other.info.run_name == run.info.run_name
        assert other.data.params == run.data.params
        # Who ran it is not in the spans, and MLflow gives ids.
        own = (
            "dspy.model.id",
            "mlflow.parentRunId",
            "dspy.winner.run_id",
            "mlflow.source",
            "mlflow.user",
            "mlflow.artifactLocation",
        )
        assert {k: v for k, v in other.data.tags.items() if not k.startswith(own)} == {
            k: v for k, v in run.data.tags.items() if not k.startswith(own)
        }
        assert set(other.data.metrics) == set(run.data.metrics)
        for name in run.data.metrics:
            histories = [
                sorted(
                    (point.step, round(point.value, 9)) for point in of.client.get_metric_history(one.info.run_id, name)
                )
                for of, one in ((live, run), (again, other))
            ]
            assert histories[0] == histories[1], (key, name)
        assert again.artifacts(other) == live.artifacts(run)
        for path in live.artifacts(run) - {"candidates.json", "report.html"}:  # names other runs; is no JSON
            assert again.artifact(other, path, tmp_path) == live.artifact(run, path, tmp_path)


def as_collector_writes(body: bytes) -> str:
    """An OTLP request as JSON with hexadecimal ids, in one line."""

    def with_hex(value: Any) -> Any:
        import base64

        if isinstance(value, list):
            return [with_hex(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: base64.b64decode(item).hex() if key in ("traceId", "spanId", "parentSpanId") else with_hex(item)
            for key, item in value.items()
        }

    return json.dumps(with_hex(json_format.MessageToDict(ExportTraceServiceRequest.FromString(body))))


def test_ctrl_c_while_mlflow_is_away(server_uri: str, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.down()
    environment = {
        "MLFLOW_TRACKING_URI": proxy.url,
        "MLFLOW_EXPERIMENT_NAME": "interrupted while away",
        "OTEL_TRACES_EXPORTER": "mlflow",
        "OTEL_DSPY_SPOOL": str(tmp_path / "spool"),
    }
    process = start(tmp_path, "time.sleep(2)", environment, CONFIGURE)
    assert process.stdout.readline() == "ready\n"
    wait_for(lambda: any(b"example " in path.read_bytes() for path in tmp_path.rglob("0*.pb")), "an example on disk")
    process.send_signal(signal.SIGINT)
    assert wait_for_exit(process, "the program") != 0
    stderr = (tmp_path / "stderr.txt").read_text()
    assert "KeyboardInterrupt" in stderr
    assert stderr.count("dspy-otel replay") == 1
    proxy.up()
    command = [sys.executable, "-m", "dspy_otel.cli", "replay"]
    done = run_program(command, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Delivered: ")
    store = Store(server_uri, "interrupted while away")
    runs = store.runs()
    assert {run.info.status for run in runs.values() if "mlflow.parentRunId" not in run.data.tags} == {"KILLED"}
    assert "RUNNING" not in {run.info.status for run in runs.values()}
    assert any(store.traces(run) for run in runs.values())
    store.provider.shutdown()


# --- beside another exporter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", ["mlflow", "otlp", "none"])
def test_mlflow_and_otlp_at_once_and_neither_starves_the_other(server_uri: str, tmp_path: Path, dead: str) -> None:
    with OtlpReceiver() as receiver:
        environment = {
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:9" if dead == "mlflow" else server_uri,
            "MLFLOW_EXPERIMENT_NAME": f"both {dead}",
            "OTEL_TRACES_EXPORTER": "otlp,mlflow",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9" if dead == "otlp" else receiver.http,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2",
            "OTEL_DSPY_SPOOL": str(tmp_path / "spool"),
        }
        process = start(tmp_path, "pass", environment, CONFIGURE)
        assert wait_for_exit(process, "the program") == 0
        names = receiver.span_names()
    expected = 5  # trials
    assert names.count("trial") == (0 if dead == "otlp" else expected)
    if dead != "mlflow":
        store = Store(server_uri, f"both {dead}")
        assert sum("/" in key for key in store.runs()) == expected
        store.provider.shutdown()


def test_an_old_server_is_told_from_a_new_one_in_plain_words(
    server_uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspy_otel.mlflow.backends import rest

    monkeypatch.setattr(rest, "OLDEST_MLFLOW", "99.0")
    store = Store(server_uri, "an old server")
    store.instrument()
    with caplog.at_level(logging.WARNING):
        store.provider.get_tracer(semconv.SCOPE_NAME).start_span("chat m").end()
        store.provider.force_flush()
    assert any("older than 99.0" in record.message for record in caplog.records)
    DSPyInstrumentor().uninstrument()
    store.provider.shutdown()
