"""With content off no canary is exported; with it on only content is, and never a key."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.privacy import scenario
from tests.support.canaries import Canaries
from tests.support.nightly import at_night
from tests.support.openai_server import openai_server
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.waiting import run
from tests.switching.process import ROOT, environment

PLACES = scenario.PLACES
ON_EVENTS = {
    *("prompt", "instructions", "field description", "demo", "completion", "reasoning", "unparsable completion"),
    *("candidate instruction", "dataset input", "metric feedback"),
}
"""What log events tell: LM messages, and a metric's feedback."""


@pytest.fixture
def answers() -> Iterator[Any]:
    with openai_server() as server:
        server.__class__ = scenario.Answers
        yield server


def assert_private(found: dict[str, list[str]], content: str) -> None:
    """Only what may be there is there; and all that may be is, or nothing was proved."""
    leaked = {place: found[place][:5] for place in found.keys() & (scenario.SECRET | scenario.BINARY)}
    assert not leaked, "secrets"
    assert found.keys() >= scenario.NAMES
    told = found.keys() & scenario.CONTENT
    if content == "no_content":
        assert not {place: found[place][:5] for place in told}, "content"
    elif content == "event_only":
        assert told - {"candidate instruction"} == ON_EVENTS - {"candidate instruction"}
    else:
        assert told == scenario.expected_content()


@pytest.mark.parametrize("content", ["no_content", "event_only", "span_and_event"])
def test_a_program_and_its_evaluation(
    content: str, telemetry: Any, answers: Any, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in scenario.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG, "dspy_otel")
    telemetry.instrument(capture_content=content, adapter_spans=True)
    scenario.run(answers, tmp_path / "program", optimize=False)
    said = "\n".join(
        caplog.handler.format(record) for record in caplog.records if record.name.startswith(scenario.LOGS)
    )
    everything = telemetry.everything() + said
    assert_private(PLACES.found_in(everything), content)
    # A row can be read back from its plain digest: only where the row itself may stand beside it.
    assert any(guess in everything for guess in scenario.guesses()) is (content == "span_and_event")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("content", "protocol"),
    [
        ("no_content", "grpc"),
        ("span_and_event", "http/protobuf"),
        *at_night(("no_content", "http/protobuf"), ("span_and_event", "grpc")),
    ],
)
def test_everything_that_leaves_the_process(content: str, protocol: str, tmp_path: Path) -> None:
    """With MIPROv2 and GEPA, to an OTLP receiver and to MLflow in sqlite, from a process of its own."""
    pytest.importorskip("mlflow")
    pytest.importorskip("gepa")
    work = tmp_path / "work"
    work.mkdir()
    with OtlpReceiver() as receiver:
        settings = {
            **scenario.ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
            "OTEL_TRACES_EXPORTER": "otlp,mlflow",
            "OTEL_METRICS_EXPORTER": "otlp",
            "OTEL_LOGS_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc if protocol == "grpc" else receiver.http,
            "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": content,
            "MLFLOW_TRACKING_URI": f"sqlite:///{work}/mlflow.db",
            "MLFLOW_TRACKING_PASSWORD": scenario.key("MLflow password"),
        }
        command = [sys.executable, "-m", "tests.privacy.scenario", str(tmp_path / "program"), str(work / "ours.log")]
        done = run(command, cwd=work, env=environment(**settings))
        assert done.returncode == 0, done.stderr[-4000:]
        sent = [request.message.SerializeToString() for request in receiver.received]
        names = receiver.span_names()
    assert {name.split(" ")[0] for name in names} >= {
        "compile",
        "trial",
        "evaluate",
        "example",
        "invoke_workflow",
        "chat",
    }
    assert names.count("compile MIPROv2") == names.count("compile GEPA") == 1
    assert (work / "ours.log").exists()
    assert_private(PLACES.found_in(b"\n".join(sent)), content)
    assert any(guess.encode() in each for each in sent for guess in scenario.guesses()) is (content != "no_content")
    # Everything MLflow has on disk: its store, the artifacts of the runs, and what we logged.
    with sqlite3.connect(work / "mlflow.db") as store:
        assert store.execute("SELECT count(*) FROM runs").fetchone()[0] > 5
        assert store.execute("SELECT count(*) FROM trace_info").fetchone()[0] > 20
    artifacts = [path for path in work.rglob("*") if path.is_file() and "artifacts" in path.parts]
    assert artifacts
    found = PLACES.found_in(work)
    assert_private(found, content)
    if content != "no_content":
        kept = {place for place, where in found.items() if any("artifacts" in name for name in where)}
        assert kept >= {"instructions", "demo", "dataset input", "dataset label", "candidate instruction"}


# --- the search itself ----------------------------------------------------------------------------------------------


def test_the_search_sees_through_encodings(tmp_path: Path) -> None:
    import base64
    import gzip
    import zipfile

    planted = Canaries()
    word, secret = planted.text("a place"), planted.key("a key")
    for before in ("", "x", "xy"):
        assert planted.found_in(base64.b64encode(f"{before}{word}".encode()).decode()).keys() == {"a place"}
    assert planted.found_in(json.dumps({"é\n": f'"{word}"'})).keys() == {"a place"}
    assert planted.found_in(gzip.compress(secret.encode())).keys() == {"a key"}
    (tmp_path / "deep").mkdir()
    with zipfile.ZipFile(tmp_path / "deep" / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", word * 100)
    with sqlite3.connect(tmp_path / "store.db") as store:
        store.execute("CREATE TABLE t (cell TEXT)")
        store.execute("INSERT INTO t VALUES (?)", ("x" * 4000 + secret + "y" * 9000,))
    store.close()
    (tmp_path / word).touch()
    found = planted.found_in(tmp_path)
    assert sorted(found["a place"]) == ["deep/a.zip:inside", f"name of {word}"]
    assert "store.db:t" in found["a key"]
    assert not Canaries().found_in(tmp_path)
