"""Each benchmark runs: nobody runs all with each change, and what they reach into changes. Numbers are not read."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.waiting import run

pytestmark = [pytest.mark.integration, pytest.mark.nightly]
ROOT = Path(__file__).parent.parent.parent
COMMANDS = (
    "overhead.py --here --quick --only floor,dspy-otel",
    "compile.py --here --quick --only floor,dspy-otel",
    "overhead.py --here --quick --only dspy-otel --instructions",
    "growth.py --here --quick",
    "endurance.py --here --quick --only null",
    "imports.py --repeat 1",
    "workers.py --repeat 1",
    "parts.py",
    "parts.py --program large --content",
    "bytecodes.py --program nested --lines",
    "masking.py",
    "rare.py",
    "compare.py --rows 40 --files",
    "mlflow_export.py --uri sqlite:///{}/export.db --examples 5 --candidates 1 --ways bare dspy-otel queue",
    "mlflow_side_by_side.py --uri sqlite:///{}/side.db --only GEPA --ways bare dspy-otel",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs(tmp_path: Path, command: str) -> None:
    script, *arguments = command.format(tmp_path).split()
    if "--instructions" in arguments and shutil.which("valgrind") is None:
        pytest.skip("there is no valgrind")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "MLFLOW_"))}
    own = {"DSPY_CACHEDIR": str(tmp_path / "cache"), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = run([sys.executable, str(ROOT / "benchmarks" / script), *arguments], cwd=tmp_path, env={**kept, **own})
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
