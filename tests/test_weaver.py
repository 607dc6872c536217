"""What OpenTelemetry's Weaver itself says of our registry, and of what a program sends, where there is a `weaver`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
import yaml

import dspy_otel
from tests.operations.test_content import run_everything
from tests.optimizers import common
from tests.support.mlflow_server import free_port
from tests.support.openai_server import OpenAIServer, Reply
from tests.support.registry import FOLDER, MANIFEST, UPSTREAM
from tests.support.waiting import run, wait_for, wait_for_exit

WEAVER = shutil.which(os.environ.get("WEAVER", "weaver"))
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(WEAVER is None, reason="no weaver on the PATH: github.com/open-telemetry/weaver/releases"),
]

EXAMPLES = {"string": "a", "int": 1, "double": 1.0, "boolean": True, "string[]": ["a"], "any": "a"}
# Names that are beginnings of longer ones, too: docs/semantic-conventions.md has them as departures.
ALSO_NAMESPACES = {
    "dspy.lm.cost",
    "dspy.optimizer.initial_program.state",
    "dspy.program.state",
    "dspy.trial.score",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our registry, with what it uses of others in files beside it: Weaver would get those from GitHub."""
    place = tmp_path_factory.mktemp("weaver")
    shutil.copytree(FOLDER, place / "ours")
    manifest = yaml.safe_load(MANIFEST.read_text("utf-8"))
    for number, dependency in enumerate(manifest["dependencies"]):
        dependency["registry_path"] = str(place / str(number))
        write_used(place / str(number), dependency["schema_url"])
    (place / "ours" / "manifest.yaml").write_text(yaml.safe_dump(manifest), "utf-8")
    return place / "ours"


def write_used(place: Path, schema_url: str) -> None:
    """What our registry uses of the one with that URL: of `gen_ai.*` or of all others."""
    genai = "/gen-ai" in schema_url
    place.mkdir()
    about = {"schema_url": schema_url, "description": "What is used of it.", "stability": "development"}
    (place / "manifest.yaml").write_text(yaml.safe_dump(about), "utf-8")
    common_fields = {"brief": "Not repeated here.", "stability": "development"}
    attributes = [
        {"key": key, "type": kind, "examples": [EXAMPLES[kind]], **common_fields}
        for key, kind in UPSTREAM.items()
        if key.startswith("gen_ai.") is genai
    ]
    signals: dict[str, list[dict[str, Any]]] = {"metrics": [], "events": []}
    for file in ("metrics", "events"):
        ours = yaml.safe_load((FOLDER / f"{file}.yaml").read_text("utf-8"))
        for each in ours[f"{file.removesuffix('s')}_refinements"]:
            if each["ref"].startswith("gen_ai.") is genai:
                kind = {key: each["annotations"][key] for key in ("instrument", "unit")} if file == "metrics" else {}
                used = {"name": each["ref"], "requirement_level": "recommended", "attributes": []}
                signals[file].append({**used, **kind, **common_fields})
    content = {"file_format": "definition/2", "attributes": attributes, **signals}
    (place / "used.yaml").write_text(yaml.safe_dump({key: value for key, value in content.items() if value}), "utf-8")


def test_weaver_accepts_the_registry(folder: Path) -> None:
    done = run([str(WEAVER), "registry", "check", "-r", str(folder), "--v2", "--diagnostic-format", "json"])
    assert done.returncode == 0, done.stderr[-4000:]
    said = f"{done.stdout}\n{done.stderr}"
    assert "definition/2" in said  # which is not stable yet: that is all it has to say
    assert "requirement_level" not in said
    assert "violation" not in said.replace("No `after_resolution` policy violation", "")


@pytest.fixture
def live_check(folder: Path, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """A Weaver that checks what is sent to it: where to, and a function that gives its findings."""
    port, admin = free_port(), free_port()
    command = [str(WEAVER), "registry", "live-check", "-r", str(folder), "--v2", "--include-unreferenced"]
    command += ["--otlp-grpc-address", "127.0.0.1", "--otlp-grpc-port", str(port), "--admin-port", str(admin)]
    command += ["--inactivity-timeout", "600", "--format", "json", "--no-stream", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def listens() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/health") as answer:
            return bool(answer.status == 200)

    def findings() -> Any:
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{admin}/stop", method="POST")):
            wait_for_exit(process, "Weaver")
        return json.loads((tmp_path / "live_check.json").read_text("utf-8"))

    try:
        wait_for(listens, "Weaver to listen", ignored=(OSError,))
        yield f"http://127.0.0.1:{port}", findings
    finally:
        process.kill()
        process.wait()


def test_weaver_finds_nothing_wrong_with_what_a_program_sends(
    live_check: tuple[str, Any], server: OpenAIServer
) -> None:
    logs_exporter = pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc._log_exporter")
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    address, findings = live_check
    nobodys = Resource.get_empty()  # What the SDK says of the process is not ours.
    tracers = TracerProvider(resource=nobodys, shutdown_on_exit=False)
    loggers = LoggerProvider(nobodys, shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(address, insecure=True), max_queue_size=100_000))
    exporter = logs_exporter.OTLPLogExporter(address, insecure=True)
    loggers.add_log_record_processor(BatchLogRecordProcessor(exporter, max_queue_size=100_000))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(address, insecure=True))
    meters = MeterProvider([reader], nobodys, shutdown_on_exit=False)
    dspy_otel.instrument(
        tracer_provider=tracers,
        meter_provider=meters,
        logger_provider=loggers,
        capture_content="span_and_event",
        adapter_spans=True,
        semconv_opt_in="gen_ai/dup",
        exception_signal_opt_in="logs/dup",
        event_signal_opt_in="logs/dup",
    )
    run_everything(server)
    server.replies += [Reply("busy", status=500, headers={"retry-after": "0"})] * 2
    server.lm(num_retries=3)("Hi")
    with dspy.context(lm=server.lm()), dspy_otel.budget(lm_calls=4):
        dspy.Predict("question -> answer")(question="x")
    common.quietly(common.RUNS["GEPA"], common.scripted_lm())
    for provider in (tracers, meters, loggers):
        provider.force_flush()
        provider.shutdown()

    report = findings()
    counted = report["statistics"]["total_entities_by_type"]
    assert min(counted[kind] for kind in ("span", "metric", "log", "span_event")) > 10
    found = list(violations(report))
    wrong = [advice for advice in found if advice["id"] != "illegal_namespace"]
    assert sorted({f"{advice['signal_name']}: {advice['message']}" for advice in wrong}) == []
    assert {advice["context"]["namespace"] for advice in found} <= ALSO_NAMESPACES


def violations(node: Any) -> Iterator[dict[str, Any]]:
    """What in a report is against the rules."""
    if isinstance(node, dict):
        for advice in (node.get("live_check_result") or {}).get("all_advice", ()):
            if advice["level"] == "violation":
                yield advice
        for value in node.values():
            yield from violations(value)
    elif isinstance(node, list):
        for item in node:
            yield from violations(item)
