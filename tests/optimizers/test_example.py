"""examples/optimize.py prints the trial table of the optimizer it is told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.waiting import run

pytest.importorskip("rich")
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("name", "row"), [("BetterTogether", "strategy=p -> w"), ("BootstrapFewShotWithRandomSearch", "seed=-3")]
)
def test_the_example_shows_trials(name: str, row: str) -> None:
    process = run(
        [sys.executable, "examples/optimize.py", name],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "150"},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert row in process.stdout
    assert "best_score: " in process.stdout
    assert f"optimizer='{name}'" in process.stdout
