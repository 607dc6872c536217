"""The progress display, on a pseudo-terminal and without one."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dspy_otel.optimizers import progress
from tests.optimizers import common
from tests.optimizers.common import quietly, scripted_lm
from tests.support.waiting import finish

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import logging, sys
from tests.optimizers import common
import dspy_otel
dspy_otel.instrument()
lm = common.scripted_lm()
print("to stdout")
common.RUNS[sys.argv[1]](lm)
print("done")
"""


def run(name: str, *, terminal: bool, **environment: str) -> tuple[str, str]:
    """What a program that optimizes writes to stdout, a pipe, and to stderr."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    ours, theirs = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, name],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "TERM": "xterm",
            "COLUMNS": "200",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # a pseudo-terminal that nobody writes to any more
            break
        if not part:
            break
        written += part
    stdout = finish(process).stdout
    assert process.returncode == 0, written.decode()[-2000:]
    os.close(ours)
    return stdout, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("MIPROv2", r"MIPROv2 +9/9 trials +best \d[\d.]* +task \d+ calls \$0\.\d+, .*proposer \d+ calls .* 0:\d\d"),
        ("GEPA", r"GEPA +\d+ trials, (9|1\d)\d/90 examples +best 0\.\d+ +task \d+ calls .*reflection \d+ call"),
    ],
)
def test_a_terminal_shows_the_run(name: str, last: str) -> None:
    pytest.importorskip("rich")
    stdout, stderr = run(name, terminal=True, OTEL_DSPY_PROGRESS="true")
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.startswith(name)]
    assert re.match(last, lines[-1]), lines[-1]
    assert "left" not in lines[-1]
    assert stdout.startswith("to stdout\n")  # a pipe gets all of it
    assert stdout.endswith("done\n")


@pytest.mark.parametrize(("terminal", "setting"), [(True, "false"), (False, "true")])
def test_it_is_quiet_when_off_and_in_a_log(terminal: bool, setting: str) -> None:
    _, stderr = run("COPRO", terminal=terminal, OTEL_DSPY_PROGRESS=setting)
    assert not re.search(r"\d+ trials", stderr)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_rich_there_is_one_warning(telemetry: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    lm = scripted_lm()
    telemetry.instrument(progress=True)
    with caplog.at_level(logging.WARNING, "dspy_otel"):
        for _ in range(2):
            program, _ = common.run_better_together(lm)
    assert program.candidate_programs
    assert [record.message for record in caplog.records if "rich" in record.message] == [
        "dspy-otel: the progress display needs rich; install it with: pip install 'dspy-otel[progress]'"
    ]


@pytest.mark.injects_faults
def test_a_display_that_fails_costs_itself_only(telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")

    def broken(run: Any) -> str:
        raise RuntimeError("broken")

    monkeypatch.setattr(progress, "spending", broken)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    before = sys.stdout
    lm = scripted_lm()
    telemetry.instrument(progress=True)
    common.run_better_together(lm)
    assert "Traceback" not in screen.getvalue()
    assert (sys.stderr, sys.stdout) == (screen, before)


def test_nested_runs_are_shown_inside_and_everything_is_given_back(
    telemetry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    frames: list[list[list[str]]] = []
    display = progress.ProgressDisplay
    original = display.end

    def end(self: Any, run: Any) -> None:
        frames.append([row.cells() for row in self._rows])
        original(self, run)

    monkeypatch.setattr(display, "end", end)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    lm = scripted_lm()
    telemetry.instrument(progress=True)
    common.run_better_together(lm)
    assert sys.stderr is screen
    names = [[row[0] for row in frame] for frame in frames]
    assert ["BetterTogether", "  BootstrapFewShotWithRandomSearch"] in names
    assert frames[-1][0][1] == "3/3 trials"
    left = [row[-1] for frame in frames for row in frame if row[0] == "BetterTogether" and row[1] == "1/3 trials"]
    assert left
    assert all(re.fullmatch(r"\d+:\d\d left", cell) for cell in left)


def test_time_left_needs_something_to_go_by() -> None:
    assert progress.seconds_left(10, None) is None
    assert progress.seconds_left(10, 0.0) is None
    assert progress.seconds_left(10, 0.25) == 30
    assert [progress.clock(seconds) for seconds in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]


def test_it_is_off_by_default(telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    lm = scripted_lm()
    telemetry.instrument()
    quietly(common.run_random_search, lm)
    assert not re.search(r"\d trials", screen.getvalue())
