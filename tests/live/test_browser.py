"""The live page in a real Chromium: trials appear, what was opened stays open, and an end of any kind is told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_otel.live.feeds import FileFeed
from tests.live.spans import Program

pytest.importorskip("starlette", reason="the live page needs the extra `watch`")
pytest.importorskip("uvicorn", reason="the live page needs the extra `watch`")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: --group browser")

from dspy_otel.live.server import LiveServer  # noqa: E402

pytestmark = pytest.mark.integration
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page()
    page.set_default_timeout(60_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)
    page.on("request", lambda request: problems.append(request.url) if "127.0.0.1" not in request.url else None)
    yield page
    page.close()
    assert problems == []


def test_a_file_grows_in_the_browser(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    program = Program(content="Say")
    program.start()
    server = LiveServer(FileFeed(path), interval=0.0)
    server.start()
    try:
        page.goto(server.url)
        page.wait_for_selector("text=cannot be read")
        for number, score in ((1, 0.25), (2, 0.5), (3, 0.75)):
            program.trial(number, score)
        whole = program.lines()
        with path.open("w") as file:
            file.write(whole[:-30])  # the last record is cut in its middle
            file.flush()
            page.wait_for_selector("#state:has-text('2 trials')")
            file.write(whole[-30:])
        page.wait_for_selector("#state:has-text('3 trials')")
        page.locator("summary:has-text('Other candidates (1)')").click()
        program.trial(4, 1.0)
        program.end()
        path.write_text(program.lines())
        page.wait_for_selector(".badge:has-text('finished')")
        assert page.locator("details[open] > summary:has-text('Other candidates (2)')").count() == 1
        assert page.title() == "Searcher on Capitals"
    finally:
        server.close()
    page.wait_for_selector("#connection:has-text('does not answer')")
    assert page.locator(".badge").text_content() == "finished"


@pytest.mark.parametrize("end", ["fail", "wait"])
def test_an_optimization_that_dies_is_told(page: Any, end: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.live.slow_program", end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        page.goto(process.stdout.readline().strip())
        page.wait_for_selector("text=No optimization has started yet.")
        process.stdin.write("go\n")
        process.stdin.flush()
        if end == "fail":
            page.wait_for_selector(".badge:has-text('interrupted')")
            page.wait_for_selector("text=KeyboardInterrupt")
        else:
            page.wait_for_selector("#state:text-matches('[23] (of [0-9]+ )?trials')")
            assert page.locator(".badge").text_content() == "running"
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.wait_for_selector("#connection:has-text('has ended')")
        assert page.locator("h1").text_content().startswith("BootstrapFewShotWithRandomSearch on ColourFamily")
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
