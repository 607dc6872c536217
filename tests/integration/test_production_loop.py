"""The example of a whole loop, run as it stands: production, feedback, dataset, optimization, decision, production."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.waiting import run

pytest.importorskip("mlflow")
pytest.importorskip("scipy")
pytest.importorskip("gepa")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
EXAMPLE = Path(__file__).parents[2] / "examples" / "production_loop.py"


def test_the_service_gets_better_by_what_people_say(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MLFLOW_"))}
    env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OTEL_DSPY_SPOOL": str(tmp_path / "spool")}
    done = run([sys.executable, str(EXAMPLE)], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    story = done.stdout

    def found(pattern: str) -> tuple[str, ...]:
        match = re.search(pattern, story)
        assert match is not None, f"{pattern} is not in:\n{story}"
        return match.groups()

    before, right, asked = found(r"1\. The service answers with program (\w{16}): (\d+) of (\d+) right")
    wrong = int(asked) - int(right)
    taken, answers, corrected = found(
        r"3\. The dataset: (\d+) examples of (\d+) answers: \d+ of failed answers, (\d+) corr"
    )
    (skipped,) = found(r"(\d+) skipped: judged wrong, and nobody said what is right")
    assert (answers, int(taken) + int(skipped), int(corrected) + int(skipped)) == (asked, int(asked), wrong)
    parts = found(r"(\d+) to train on, (\d+) to choose by, (\d+) to compare with")
    assert sum(map(int, parts)) == int(taken)
    after, calls = found(r"4\. GEPA makes program (\w{16}) of it, with ([\d,]+) LM calls of 5,000 allowed")
    assert 0 < int(calls.replace(",", "")) < 5000
    low, high = found(r"5\. On the third part, which nobody has seen: (\d\.\d\d) -> (\d\.\d\d)")
    assert float(high) > float(low)
    assert "6. It is better: ColourFamily version 1 is production now." in story
    (loaded,) = found(r"7\. The service has loaded (\w{16}): \d+ of 30 right")
    assert before != after == loaded
    assert "30 traces carry the new id" in story
