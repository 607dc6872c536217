"""Programs in fresh processes, with nothing of this one's telemetry settings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.support.waiting import run, wait_for_exit

APP = Path(__file__).with_name("app.py")
ROOT = Path(__file__).parents[2]

_FOREIGN = re.compile(r"^(OTEL_|MLFLOW_|TRACEPARENT$|TRACESTATE$|BAGGAGE$)")
_COMMAND = Path(sys.executable).with_name("opentelemetry-instrument")

installed = pytest.mark.skipif(
    not entry_points(group="opentelemetry_instrumentor", name="dspy_otel") or not _COMMAND.exists(),
    reason="needs dspy-otel and opentelemetry-instrument installed beside this Python (make test does that)",
)
"""For tests that need our entry points: those exist only when the package is installed."""


@dataclass(frozen=True)
class Finished:
    """A program that has ended well."""

    output: str
    errors: str

    @property
    def warnings(self) -> list[str]:
        """What we warned about."""
        return [line for line in self.errors.splitlines() if "dspy-otel: " in line]


OTHERS = "celery,dspy,fastapi,httpx,httpx2,litellm,openai,requests,threading,urllib,urllib3"
"""Instrumentations that may be installed beside ours; two of DSPy are called `dspy`, and some import all they watch."""


def environment(**settings: str) -> dict[str, str]:
    """This process's environment without telemetry settings, but with ``settings``."""
    inherited = {key: value for key, value in os.environ.items() if not _FOREIGN.search(key)}
    return {**inherited, "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": OTHERS, **settings}


def instrumented(*arguments: str, program: Path = APP, cwd: Path | None = None, **settings: str) -> Finished:
    """``opentelemetry-instrument python app.py arguments``, as a user types it."""
    return _run([str(_COMMAND), sys.executable, str(program), *arguments], cwd, settings)


def python(code: str, *arguments: str, cwd: Path | None = None, **settings: str) -> Finished:
    """``python -c code arguments``; finds this package, installed or not, and ``tests``."""
    return _run([sys.executable, "-c", code, *arguments], cwd, {"PYTHONPATH": _path(), **settings})


def script(program: Path, *arguments: str, cwd: Path | None = None, **settings: str) -> Finished:
    """``python program arguments``, likewise."""
    return _run([sys.executable, str(program), *arguments], cwd, {"PYTHONPATH": _path(), **settings})


@contextmanager
def running(*arguments: str, cwd: Path, **settings: str) -> Iterator[None]:
    """``python arguments`` for as long as the block lasts; then it is asked to end, and given time for that."""
    with open(cwd / "output.txt", "w+") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(PYTHONPATH=_path(), **settings),
            cwd=cwd,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
            process.terminate()
            ended = wait_for_exit(process, " ".join(arguments))
            output.seek(0)
            assert ended == 0, output.read()[-4000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]))


def _run(command: list[str], cwd: Path | None, settings: dict[str, str]) -> Finished:
    done = run(command, env=environment(**settings), cwd=cwd)
    assert done.returncode == 0, done.stderr[-4000:]
    return Finished(done.stdout, done.stderr)
