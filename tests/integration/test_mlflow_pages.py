"""MLflow's own pages in a real Chromium: with 30 trials, every name tells its trial."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from dspy_otel import semconv
from dspy_otel.mlflow import MLflowSpanExporter
from dspy_otel.mlflow.exporter import track_runs
from tests.mlflow.memory import Program
from tests.support.mlflow_server import mlflow_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: --group browser")
mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.integration

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
TRIALS = 30
VISIBLE = """cell => {
  const range = document.createRange(), text = cell.firstChild, whole = text.data.length
  const room = cell.getBoundingClientRect()
  let shown = whole
  for (; shown > 0; shown--) {
    range.setStart(text, 0)
    range.setEnd(text, shown)
    const ellipsis = shown < whole ? 1.0 * parseFloat(getComputedStyle(cell).fontSize) : 0
    if (range.getBoundingClientRect().width + ellipsis <= room.width + 0.5) break
  }
  return [text.data, text.data.slice(0, shown)]
}"""
"""The text of a cell, and what is shown of it before the ellipsis, which is at most as wide as a letter is high."""


@contextmanager
def pages(server: str, width: int) -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 2000})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_every_name_tells_its_trial(tmp_path: Path) -> None:
    program = Program.__new__(Program)
    with mlflow_server(tmp_path) as server:
        exporter = MLflowSpanExporter(server, experiment="thirty")
        program.provider = TracerProvider(shutdown_on_exit=False)
        program.provider.add_span_processor(BatchSpanProcessor(exporter))
        track_runs(program.provider)
        program.tracer = program.provider.get_tracer(semconv.SCOPE_NAME)
        top = program.compile()
        for number in range(1, TRIALS + 1):
            program.trial(top, number, number / 100, lm_calls=4, cost=0.01, input_tokens=90)
        top.set_attributes({f"dspy.usage.{role}lm_calls": 120 for role in ("", "task.", "proposer.")})
        top.set_attributes({"dspy.optimizer.best_score": 0.3, "dspy.optimizer.baseline_score": 0.01})
        top.set_attributes({"dspy.optimizer.gain": 0.29, "dspy.usage.cost": 0.3})
        top.end()
        assert program.provider.force_flush()
        program.provider.shutdown()
        experiment = mlflow.MlflowClient(server).get_experiment_by_name("thirty").experiment_id
        for width in (1280, 1600):
            with pages(server, width) as page:
                page.goto(f"{server}/#/experiments/{experiment}/evaluation-runs")
                page.locator("#run-name-cell").nth(TRIALS).wait_for()
                page.wait_for_timeout(1_000)
                page.mouse.click(width - 36, 36)  # closes MLflow's assistant: that button has no name
                page.wait_for_timeout(1_000)
                found = [cell.evaluate(VISIBLE) for cell in page.locator("#run-name-cell").all()]
                trials = {text.split()[0]: shown for text, shown in found if not text.startswith("Best")}
                assert len(trials) == TRIALS
                for number, shown in trials.items():
                    assert shown.split()[0] == number, (width, found)
