"""docs/first-ten-minutes.md, typed exactly: each way ends in an open page."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mlflow_server import free_port
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.waiting import run, wait_for
from tests.switching.process import environment, installed

pytestmark = [pytest.mark.integration, installed]
pytest.importorskip("mlflow")

PAGE = Path(__file__).parents[2] / "docs/first-ten-minutes.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PROGRAM, IN_A_STACK, OPTIMIZATION = [text for kind, text in BLOCKS if kind == "python"]
BY_ENVIRONMENT, JAEGER, UI = [text for kind, text in BLOCKS if kind == "sh"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(PROGRAM)
    return tmp_path


def typed(lines: str, folder: Path) -> str:
    """What a shell prints for these lines; what is installed is here already."""
    settings = environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    script = "set -e\n" + "".join(line for line in lines.splitlines(True) if not line.startswith("pip install "))
    done = run(["bash", "-c", script], env=settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@contextmanager
def page(folder: Path) -> Iterator[str]:
    """The address that ``dspy-otel ui`` serves."""
    port = free_port()
    command = [sys.executable, "-m", "dspy_otel.cli", *UI.split()[1:], "--port", str(port)]
    settings = environment(MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    with open(folder / "ui.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=settings, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: "MLflow" in read(address), "the page", ignored=(OSError,))
        assert address in (folder / "ui.log").read_text()
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def read(address: str) -> str:
    with urllib.request.urlopen(address) as answer:
        return str(answer.read().decode())


def test_inside_a_stack(folder: Path) -> None:
    assert "jaegertracing" in JAEGER  # a container, which this test has a receiver in place of
    with OtlpReceiver() as receiver:
        (folder / "service.py").write_text(IN_A_STACK.replace("http://localhost:4317", receiver.grpc))
        typed("python service.py", folder)
        spans = {span.name: span for span in receiver.spans()}
    assert list(spans) == ["chat dummy", "invoke_workflow Predict", "handle request"]
    assert spans["invoke_workflow Predict"].parent == spans["handle request"].id
    assert {span.resource["service.name"] for span in spans.values()} == {"my-app"}


def test_by_environment_alone_and_an_optimization(folder: Path) -> None:
    commands, _, last = BY_ENVIRONMENT.rstrip().rpartition("\n")
    assert last == UI.strip() == "dspy-otel ui"
    assert typed(commands, folder).startswith("Paris\nRome\n")
    (folder / "optimize.py").write_text(OPTIMIZATION)
    shown = typed("python optimize.py", folder)
    assert "0.5" in shown
    assert "MLflow: " not in shown  # nothing to complain of
    typed("export MLFLOW_TRACKING_URI=sqlite:///mlflow.db; dspy-otel report --experiment optimized -o it.html", folder)
    assert "RandomSearch" in (folder / "it.html").read_text()

    import mlflow

    with page(folder) as address:
        client = mlflow.MlflowClient(address)
        first, optimized = (client.get_experiment_by_name(name).experiment_id for name in ("first", "optimized"))
        traces = client.search_traces(locations=[first])
        assert [trace.info.tags["mlflow.traceName"] for trace in traces] == ["invoke_workflow Predict"] * 2
        assert {span.name for trace in traces for span in trace.data.spans} >= {"chat dummy"}
        runs = client.search_runs([optimized])
        assert [run.data.tags["dspy.run.kind"] for run in runs].count("trial") == 5
        (top,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        assert "report.html" in [found.path for found in client.list_artifacts(top.info.run_id)]
