"""The directory that OpenTelemetry's operator for Kubernetes brings into a pod: no program is installed with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest
import yaml

from tests.support.otlp_receiver import OtlpReceiver
from tests.support.waiting import run
from tests.switching.process import ROOT, environment

pytestmark = [pytest.mark.integration, pytest.mark.nightly]

APP = """
import dspy
from dspy.utils import DummyLM

dspy.configure(lm=DummyLM([{"answer": "Paris"}]))
print(dspy.Predict("question -> answer")(question="where").answer)
"""


def installed(python: str, *arguments: str | Path) -> None:
    """Install packages with uv, or with pip, which virtual environments made by uv do not have."""
    uv = shutil.which("uv")
    install = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    done = run([*install, "-q", *arguments])
    assert done.returncode == 0, done.stderr[-4000:]


def resource() -> dict[str, Any]:
    """The Instrumentation of docs/deployment.md."""
    page = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    found = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    (one,) = [each for each in found if each["kind"] == "Instrumentation"]
    (pod,) = [each["spec"]["template"] for each in found if each["kind"] == "Deployment"]
    assert pod["metadata"]["annotations"]["instrumentation.opentelemetry.io/inject-python"] == one["metadata"]["name"]
    return one


def test_the_directory_of_the_operator_instruments_a_program_that_knows_nothing_of_it(tmp_path: Path) -> None:
    # The operator's image is made with one Python, programs run with any.
    find = [ROOT / "scripts/find-python", "3.13", "3.12", "3.14", "3.11", "3.10"]
    builder = subprocess.run(find, stdout=subprocess.PIPE, text=True, check=True).stdout.strip() or sys.executable
    packages = tmp_path / "otel-auto-instrumentation-python"
    # What the image has of these; the other instrumentations are not asked for here.
    installed(builder, "--target", packages, "opentelemetry-distro", "opentelemetry-exporter-otlp-proto-http")
    installed(builder, "--target", packages, "--no-deps", ROOT)
    subprocess.run(
        [sys.executable, "-m", "venv", *([] if not shutil.which("uv") else ["--without-pip"]), "app"],
        cwd=tmp_path,
        check=True,
    )
    python = str(tmp_path / "app/bin/python")
    installed(python, f"dspy=={dspy.__version__}")
    (tmp_path / "app.py").write_text(APP)
    with OtlpReceiver() as receiver:
        # As injectPythonSDKToContainer and getDefaultPythonEnvVars of the operator set them.
        variables = environment(
            PYTHONPATH=f"{packages}/opentelemetry/instrumentation/auto_instrumentation:{packages}",
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http,
            OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
            OTEL_TRACES_EXPORTER="otlp",
            OTEL_METRICS_EXPORTER="otlp",
            OTEL_LOGS_EXPORTER="otlp",
            OTEL_SERVICE_NAME="my-app",
            OTEL_PROPAGATORS=",".join(resource()["spec"]["propagators"]),
            **{each["name"]: each["value"] for each in resource()["spec"]["python"]["env"]},
        )
        without = run([python, "-c", "import dspy, opentelemetry"], env={**os.environ, "PYTHONPATH": ""}, cwd=tmp_path)
        assert "No module named 'opentelemetry'" in without.stderr
        done = run([python, "app.py"], env=variables, cwd=tmp_path)
        assert done.stdout == "Paris\n", done.stderr
        assert "dspy-otel" not in done.stderr
        assert receiver.span_names() == ["chat dummy", "invoke_workflow Predict"]
        (program,) = receiver.spans("invoke_workflow")
        assert program.resource["service.name"] == "my-app"
        assert program.attributes["output.value"] == '{"answer":"Paris"}'
        assert "gen_ai.client.operation.duration" in receiver.metric_names()
        assert {request.transport for request in receiver.received} == {"http"}
