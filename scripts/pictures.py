"""The pictures in docs/images of the report and of MLflow's pages, from the demo's store, as a browser shows them.

    make pictures                                        # the demo, then each page 1280 and 1600 pixels wide
    make pictures ARGS="--store sqlite:///mlflow.db"     # of another store that the demo has written to

A page that is 1280 pixels wide is `report.png` or `mlflow-<page>.png`, one of 1600 is in `wide/`. `before/` has
MLflow's pages as they were at commit a0d1a8c: the same script, of the store that the demo of that commit writes. The
browser is the Chromium of this machine, or else Playwright's own (`playwright install chromium`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from mlflow import MlflowClient

ROOT = Path(__file__).parent.parent
WIDTHS = (1280, 1600)
HEIGHT = 860
HEIGHT_OF_REPORT = 1700
EXPERIMENT = "dspy-otel demo"
LOADING, DRAWING = 120_000, 6_000  # milliseconds


def main() -> None:
    """Take every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="where the demo has written to already; default: it is run")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images", help="folder of the pictures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = options.store or demo(Path(folder))
        with server(store, Path(folder)) as address, sync_playwright() as playwright:
            found = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
            for width in WIDTHS:
                out = options.out if width == WIDTHS[0] else options.out / "wide"
                out.mkdir(parents=True, exist_ok=True)
                take(browser, address, width, out)
                report(browser, store, Path(folder), width, out)


def demo(folder: Path) -> str:
    """Run the demo in a folder; gives its store."""
    subprocess.run([sys.executable, "-m", "dspy_otel.cli", "demo"], cwd=folder, check=True)
    return f"sqlite:///{folder / 'demo-mlflow/mlflow.db'}"


def report(browser: Browser, store: str, folder: Path, width: int, out: Path) -> None:
    """Take the report of the newest optimization in one width."""
    path = folder / "report.html"
    command = [sys.executable, "-m", "dspy_otel.cli", "report", "--experiment", EXPERIMENT, "--tracking-uri", store]
    subprocess.run([*command, "-o", str(path)], check=True)
    page = browser.new_page(viewport={"width": width, "height": HEIGHT_OF_REPORT})
    page.goto(path.as_uri())
    page.screenshot(path=out / "report.png")
    page.close()
    print(out / "report.png")


@contextmanager
def server(store: str, folder: Path) -> Iterator[str]:
    """MLflow's pages of a store, for as long as the block lasts; gives their address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": store, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def take(browser: Browser, address: str, width: int, out: Path) -> None:
    """Take each page in one width."""
    client = MlflowClient(address)
    runs = [
        (experiment.experiment_id, run)
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id])
    ]
    experiment, parent = next(
        (experiment, run)
        for experiment, run in runs
        if run.data.tags.get("dspy.run.kind") == "compile" and run.info.run_name.startswith("GEPA")
    )
    children = [run for _, run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    winner = next(run for run in children if run.data.tags.get("dspy.winner"))
    (trace, *_) = client.search_traces(locations=[experiment], run_id=winner.info.run_id, max_results=1)
    chat = next(span for span in trace.data.spans if span.name.startswith("chat"))
    top = f"{address}/#/experiments/{experiment}"
    pages = {
        "runs": (f"{top}/runs", parent.info.run_name, None),
        "evaluation-runs": (f"{top}/evaluation-runs", parent.info.run_name, None),
        "parent": (f"{top}/runs/{parent.info.run_id}", parent.info.run_name, None),
        "traces": (f"{top}/runs/{winner.info.run_id}/traces", trace.info.trace_id[:10], None),
        "report": (f"{top}/runs/{parent.info.run_id}/artifacts/report.html", "best_model.json", None),
        "chat": (f"{top}/traces?selectedEvaluationId={trace.info.trace_id}", chat.name, chat.name),
    }
    page = browser.new_page(viewport={"width": width, "height": HEIGHT})
    page.goto(f"{top}/runs")
    page.get_by_text(parent.info.run_name).first.wait_for(timeout=LOADING)
    page.wait_for_timeout(1_000)
    page.mouse.click(width - 36, 36)  # closes MLflow's assistant, for good: that button has no name
    for name, (url, shown, clicked) in pages.items():
        page.goto(url)
        page.get_by_text(shown).first.wait_for(timeout=LOADING)
        if clicked is not None:
            page.get_by_text(clicked).last.click()
        if name == "runs" and (box := page.get_by_text(shown).first.bounding_box()) is not None:
            page.mouse.click(box["x"] - 33, box["y"] + box["height"] / 2)  # the plus before a name, which has none
        page.mouse.move(width / 2, 60)  # a row below the mouse shows a button over its name
        page.wait_for_timeout(DRAWING)  # MLflow's pages ask their server without an end, so that none is ever idle
        page.screenshot(path=out / f"mlflow-{name}.png")
        print(out / f"mlflow-{name}.png")
    page.close()


if __name__ == "__main__":
    main()
