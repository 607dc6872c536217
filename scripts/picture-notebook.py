"""Pictures of the example notebook in JupyterLab, for docs/images: while it optimizes, and at the end.

    pip install -e '.[demo]' jupyterlab ipywidgets playwright
    python scripts/picture-notebook.py            # CHROMIUM: the browser, where `chromium` is not on the path

It runs the notebook in a browser, as a person does: Run All, and wait.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
WAIT = 240_000  # milliseconds
SHOWN = {"x": 0, "y": 90, "width": 1150, "height": 560}


def main() -> None:
    """Take both pictures."""
    browser_path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as place:
        text = (ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8")
        # Long enough to be seen.
        Path(place, "notebook.ipynb").write_text(text.replace("num_trials=5", "num_trials=30"), encoding="utf-8")
        port = free_port()
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "MLFLOW_"))}
        environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OTEL_DSPY_SPOOL": f"{place}/spool"}
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            f"--port={port}",
            f"--ServerApp.root_dir={place}",
        ]
        # On loopback, for as long as this takes, with a directory that is thrown away.
        command += ["--IdentityProvider.token=", "--ServerApp.password=", "--allow-root"]
        server = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(f"{address}/api")
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 1200, "height": 1000})
                page.set_default_timeout(WAIT)
                page.goto(f"{address}/lab/tree/notebook.ipynb")
                take(page)
                browser.close()
        finally:
            server.terminate()
            server.wait(30)


def take(page: Page) -> None:
    """Run the notebook, and take a picture while it optimizes and one at its end."""
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_timeout(4000)
    for name in ("Close", "No"):  # a question about news
        button = page.locator(f".jp-toast-button:has-text('{name}')")
        if button.count():
            button.first.click()
    page.keyboard.press("Control+b")  # the file browser away
    page.click("text=Run >> nth=0")
    page.click("text=Run All Cells")
    page.wait_for_selector("td:has-text('search')")
    page.wait_for_timeout(1500)
    for _ in range(2):  # what the program writes moves it
        scroll_to(page, ".jp-OutputArea b", "MIPROv2")
        page.wait_for_timeout(100)
    page.screenshot(path=IMAGES / "notebook-running.png", clip=SHOWN)
    page.wait_for_selector("iframe[title='dspy-otel report']")
    page.wait_for_timeout(5000)
    scroll_to(page, "pre, .cm-content", "dspy_otel.optimization(best)")
    page.wait_for_timeout(1000)
    page.screenshot(path=IMAGES / "notebook-report.png", clip=SHOWN)


def scroll_to(page: Page, selector: str, text: str) -> None:
    """Put the output of a cell at the top; an output is replaced with each update, so it is looked up in the page."""
    page.evaluate(
        """([selector, text]) => [...document.querySelectorAll(selector)]
            .find(item => item.textContent.includes(text))
            .closest('.jp-OutputArea, .jp-Cell').scrollIntoView({block: 'start'})""",
        [selector, text],
    )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(address: str, seconds: float = 60) -> None:
    """Wait until a server answers."""
    until = time.monotonic() + seconds
    while True:
        try:
            urlopen(address, timeout=5).close()
            return
        except (URLError, OSError):
            if time.monotonic() > until:
                raise
            time.sleep(0.3)


if __name__ == "__main__":
    main()
