"""The commands and the Python of the README and the documentation, run as they stand: only placeholders are filled.

A real MLflow server, a real OTLP receiver, files of OTLP and what a killed program leaves are there before. What is not
run here stands in a list with the reason, and that list may name nothing that is in no page any more.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.mlflow_server import free_port, mlflow_server
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.waiting import run, wait_for
from tests.switching.process import ROOT, environment, installed

pytestmark = [pytest.mark.integration, installed]
pytest.importorskip("mlflow")
pytest.importorskip("scipy")
pytest.importorskip("starlette")
pytest.importorskip("opentelemetry.distro")

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"(?:[A-Z][A-Z_]*=\S+ )*(?:(?:dspy-otel|opentelemetry-instrument|mlflow|curl|docker|kubectl) |python examples/).+"
)

NOT_RUN = {
    "docker compose -f collector/compose.yaml up": "Docker",
    "docker run --rm -d -p 16686:16686 -p 4317:4317 jaegertracing/jaeger:latest": "Docker",
    "opentelemetry-instrument uvicorn service:app": "a service of the reader's: tests/switching/test_web.py serves one",
    "opentelemetry-instrument gunicorn service:app": "likewise",
    "dspy-otel demo": "tests/cli/test_demo.py",
    "python examples/production_loop.py": "tests/integration/test_production_loop.py",
    "mlflow server": "runs for all of these tests, with a port and a store",
    "dspy-otel compare": "the name of a command",
    "dspy-otel promote": "the name of a command",
    "dspy-otel replay --to": "the name of an option",
}
PYTHON_NOT_RUN = {
    ("backends.md", 0): "a workspace of Databricks: tests/switching/test_command.py has what is sent there",
    ("deployment.md", 0): "a function of the reader's: tests/switching/test_lambda.py",
    ("first-ten-minutes.md", 0): "tests/integration/test_first_ten_minutes.py",
    ("first-ten-minutes.md", 1): "tests/integration/test_first_ten_minutes.py",
    ("first-ten-minutes.md", 2): "tests/integration/test_first_ten_minutes.py",
    ("gepa.md", 0): "a hosted model's key: tests/optimizers/test_doors.py",
    ("web.md", 0): "a service of the reader's: tests/switching/test_web.py",
    ("web.md", 1): "a service of the reader's: tests/switching/test_web.py",
    ("web.md", 2): "gunicorn's settings: tests/switching/test_web.py",
    ("why.md", 0): "of an optimization whose winner has four sentences and a gain: tests/decide/test_explanation.py",
    ("workers.md", 1): "a cluster of Ray: tests/switching/test_workers.py",
    ("workers.md", 2): "a cluster of Ray: tests/switching/test_workers.py",
    ("workers.md", 3): "Celery with a broker: tests/switching/test_workers.py",
    ("workers.md", 4): "a cluster of Dask: tests/switching/test_workers.py",
}
SERVES = ("dspy-otel watch",)
"""Commands that go on until Ctrl-C: they are there when their page is."""

MINE = """
import dspy
from dspy.utils import DummyLM

lm = DummyLM([{"answer": "Paris"}, {"answer": "Rome"}] * 500)
dspy.configure(lm=lm)


class MyProgram(dspy.Module):
    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question):
        return self.answer(question=question)


class Support(MyProgram):
    pass


rows = [dspy.Example(question=f"Question {n}?", answer="Paris").with_inputs("question") for n in range(12)]


def exact(example, prediction, trace=None):
    return float(example.answer == prediction.answer)


def optimized():
    optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=exact, num_candidate_programs=1, num_threads=1)
    return optimizer.compile(MyProgram(), trainset=rows[:4], valset=rows[4:])
"""
PREPARE = """
import json, sys
from pathlib import Path
from mine import *
import dspy_otel
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.reports.test_optimizations import otlp_json

server, memory = sys.argv[1], InMemorySpanExporter()


def kept(experiment, *paths):
    dspy_otel.configure(mlflow=server, experiment=experiment, capture_content="span_only")
    if not kept.__dict__:
        trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(memory))
        kept.on = True
    memory.clear()
    yield
    trace.get_tracer_provider().force_flush()
    for path in paths:
        Path(path).write_text(otlp_json(memory.get_finished_spans()))


for experiment, path in (("base", "base.jsonl"), ("change", "change.jsonl")):
    for _ in kept(experiment, path):
        dspy.Evaluate(devset=rows, metric=exact, num_threads=1, display_progress=False)(MyProgram())
for experiment in ("my-experiment", "my-optimization"):
    for _ in kept(experiment, "spans.json", "spans.jsonl"):
        for row in rows:
            Support()(question=row.question)
        best = optimized()
        answer = next(span for span in memory.get_finished_spans() if span.name == "invoke_workflow Support")
found = dspy_otel.optimization(best)
print(json.dumps([found.mlflow_run_id, found.run_id, f"tr-{answer.context.trace_id:032x}"]))
"""

BEFORE = (
    "from mine import *\nimport os, subprocess, sys, webbrowser\nimport dspy_otel\nwebbrowser.open = lambda *_: True\n"
)
PYTHON = {
    "budget.md": [
        """
from tests.optimizers.common import ColourFamily, load_examples, same_family, scripted_lm
scripted_lm()  # it has a price
optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=same_family, num_candidate_programs=1, num_threads=1)
student, rows = ColourFamily(), load_examples("train", 4)
""",
        "post_to_chat = print\n",
    ],
    "dataset.md": [
        "optimizer = dspy.BootstrapFewShotWithRandomSearch(metric=exact, num_candidate_programs=1, num_threads=1)\n",
        'subprocess.run("dspy-otel dataset my-experiment -o train.jsonl --split 0.8".split(), check=True)\n',
        "",
    ],
    "compare.md": [
        """
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporters = []
for _ in range(2):
    exporters.append(InMemorySpanExporter())
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporters[-1]))
    dspy_otel.instrument(tracer_provider=provider)
    dspy.Evaluate(devset=rows, metric=exact, num_threads=1, display_progress=False)(MyProgram())
    dspy_otel.uninstrument()
exporter_a, exporter_b = exporters
"""
    ],
    "configuration.md": [
        """
from concurrent.futures import ThreadPoolExecutor
pool, program, work = ThreadPoolExecutor(), MyProgram(), MyProgram()
"""
    ],
    "from-autolog.md": [""],
    "from-openinference.md": ["from opentelemetry.sdk.trace import TracerProvider\nprovider = TracerProvider()\n"],
    "mlflow.md": [
        """
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from dspy_otel.mlflow import MLflowSpanExporter
provider = TracerProvider()
""",
        "",
        "import mlflow\nprogram, run_id = MyProgram(), RUN_ID\n",
        "",
        "",
    ],
    "notebook.md": ["", "best = optimized()\n"],
    "web.md": [None, None, None, "", "program, question = MyProgram(), 'one'\n"],
    "workers.md": ["program, questions = MyProgram(), ['one', 'two', 'three']\n", None, None, None, None],
}
"""What the reader has before each block of a page; None for those that are not run."""


@dataclass(frozen=True)
class Place:
    """Where it is run.

    Attributes:
        folder: with programs and files.
        server: MLflow's address.
        run_id: of an optimization in MLflow.
        id: of the same one in a file.
        answer: a trace of a program.
        receiver: of OTLP.
    """

    folder: Path
    server: str
    run_id: str
    id: str
    answer: str
    receiver: OtlpReceiver

    def filled(self, text: str) -> str:
        """A command or a program with what its placeholders stand for."""
        for placeholder, value in (
            (r"http://localhost:5000", self.server),
            (r"http://localhost:4317", self.receiver.grpc),
            (r"#ID\b", f"#{self.id}"),
            (r"\bRUN(_ID)?\b", self.run_id),
            (r"\bA B\b", "base.jsonl change.jsonl"),
            (r"\bOTHER\b", "other"),
            (r"\bDIRECTORY\b", "left"),
            (r"\bURI\b", self.server),
            (r"tr-4f0c\.\.\.", self.answer),
            (r"--alias \.\.\.", "--alias staging"),
        ):
            text = re.sub(placeholder, value, text)
        return text

    def environment(self, **own: str) -> dict[str, str]:
        """Variables of a shell in which MLflow is set up, as docs/mlflow.md does."""
        return environment(
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            PYTHONPATH=f"{self.folder}{os.pathsep}{ROOT}",
            MLFLOW_TRACKING_URI=self.server,
            MLFLOW_EXPERIMENT_NAME="my-optimization",
            XDG_STATE_HOME=str(self.folder / "state"),
            OTEL_METRICS_EXPORTER="none",
            OTEL_LOGS_EXPORTER="none",
            LITELLM_LOCAL_MODEL_COST_MAP="True",
            **own,
        )


def commands() -> list[str]:
    """The commands of all pages, each once."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = "\n".join(block for kind, block in FENCE.findall(text) if kind in ("", "sh"))
        lines = [line.partition(" #")[0] for line in blocks.replace("\\\n", "").splitlines()]
        for command in (*lines, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))):
            if COMMAND.fullmatch(command.strip()):
                found.setdefault(re.sub(r" +", " ", command.strip()))
    return list(found)


def blocks(page: Path) -> list[str]:
    return [block for kind, block in FENCE.findall(page.read_text(encoding="utf-8")) if kind == "python"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("reader")
    program = blocks(ROOT / "docs/first-ten-minutes.md")[0]
    for name, text in (("app.py", program), ("mine.py", MINE), ("prepare.py", PREPARE)):
        (folder / name).write_text(text)
    (folder / "examples").symlink_to(ROOT / "examples")
    with mlflow_server(tmp_path_factory.mktemp("server")) as server, OtlpReceiver() as receiver:
        place = Place(folder, server, "", "", "", receiver)
        done = run([sys.executable, "prepare.py", server], cwd=folder, env=place.environment())
        assert done.returncode == 0, done.stderr
        run_id, id_, answer = json.loads(done.stdout.splitlines()[-1])
        # The program cannot reach MLflow, and leaves a journal, in which the address is mended.
        nobody = f"http://127.0.0.1:{free_port()}"
        away = {"OTEL_TRACES_EXPORTER": "mlflow", "OTEL_DSPY_EXIT_SECONDS": "0"}
        alone = place.environment(**away) | {"MLFLOW_TRACKING_URI": nobody}
        assert run(["opentelemetry-instrument", "python", "app.py"], cwd=folder, env=alone).returncode == 0
        (left,) = (folder / "state/dspy-otel/spool").glob("*-*")
        about = (left / "about.json").read_text()
        assert nobody in about
        (left / "about.json").write_text(about.replace(nobody, server))
        shutil.copytree(left, folder / "left")
        yield Place(folder, server, run_id, id_, answer, receiver)


@pytest.mark.parametrize("command", [one for one in commands() if one not in NOT_RUN])
def test_a_command_does_what_it_says(command: str, place: Place) -> None:
    own = {} if command.startswith("OTEL_") else {"OTEL_TRACES_EXPORTER": "mlflow"}
    script = ["bash", "-c", place.filled(command)]
    if command.startswith(SERVES):
        serve(script, place)
        return
    done = run(script, cwd=place.folder, env=place.environment(**own))
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "4317" in command:
        assert "invoke_workflow Predict" in place.receiver.span_names()


def serve(script: list[str], place: Place) -> None:
    server = subprocess.Popen(
        script, cwd=place.folder, env=place.environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        lines: list[str] = []
        threading.Thread(target=lambda: lines.append(server.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
        wait_for(lambda: lines, "an address")
        with urllib.request.urlopen(lines[0].split()[0]) as page:
            assert b"RandomSearch" in page.read()
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.communicate()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in PYTHON], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, place: Place) -> None:
    if "production" in page.read_text(encoding="utf-8"):
        promoted = place.filled("dspy-otel promote RUN --alias production")
        assert run(["bash", "-c", promoted], cwd=place.folder, env=place.environment()).returncode == 0
    parts = [BEFORE]
    for before, block in zip(PYTHON[page.name], blocks(page), strict=True):
        if before is not None:
            parts.append(before.replace("RUN_ID", repr(place.run_id)))
            parts.append(place.filled(block.replace("[...]", '[sys.executable, "-c", "pass"]')))
    script = place.folder / f"{page.stem.replace('-', '_')}_page.py"
    script.write_text("\n".join(parts))
    done = run([sys.executable, script.name], cwd=place.folder, env=place.environment())
    assert done.returncode == 0, done.stderr


def test_nothing_is_left_out_without_a_reason() -> None:
    assert {command for command in NOT_RUN if command not in commands()} == set()
    there = {(page.name, number) for page in PAGES for number in range(len(blocks(page)))}
    run_here = {
        (name, number) for name, parts in PYTHON.items() for number, before in enumerate(parts) if before is not None
    }
    assert run_here | PYTHON_NOT_RUN.keys() == there
    assert not run_here & PYTHON_NOT_RUN.keys()
    for reason in PYTHON_NOT_RUN.values():
        (named,) = re.findall(r"tests/[\w/]+\.py", reason)
        assert (ROOT / named).exists()
