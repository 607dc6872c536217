"""The example of a gate in CI, run as it stands: each step of its workflow, on two versions of its program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.nightly import at_night

yaml = pytest.importorskip("yaml")
pytest.importorskip("mlflow")
pytest.importorskip("scipy")
pytest.importorskip("opentelemetry.distro")
pytestmark = pytest.mark.integration

EXAMPLE = Path(__file__).parents[2] / "examples" / "quality_gate"
WORSE = (
    "program = ColourFamily()",
    'program = ColourFamily(); program.forward = lambda **_: dspy.Prediction(family="red")',
)


@pytest.mark.parametrize(
    ("edit", "status", "verdict"), [(WORSE, 1, "is worse"), *at_night((None, 0, "No difference is shown"))]
)
def test_a_change_that_makes_it_worse_does_not_pass(
    tmp_path: Path, edit: tuple[str, str] | None, status: int, verdict: str
) -> None:
    for version in ("base", "change"):
        shutil.copytree(EXAMPLE, tmp_path / version / "examples" / "quality_gate")
    if edit is not None:
        script = tmp_path / "change" / "examples" / "quality_gate" / "evaluate.py"
        text = script.read_text()
        assert text.count(edit[0]) == 1
        script.write_text(text.replace(*edit))
    (job,) = yaml.safe_load((EXAMPLE / "workflow.yml").read_text())["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps[0].startswith("pip install ")  # what is installed here already
    env = {name: value for name, value in job["env"].items() if "secrets." not in value}
    env |= {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    env["GITHUB_RUN_ID"] = "7"
    kept = ("HOME", "XDG", "DSPY", "LANG", "TMP")
    env |= {name: value for name, value in os.environ.items() if name.startswith(kept)}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for number, step in enumerate(steps[1:], 1):
        done = subprocess.run(["bash", "-e", "-c", step], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == (status if number == len(steps) - 1 else 0), done.stdout + done.stderr
    assert verdict in done.stdout
    assert verdict in (tmp_path / "summary.md").read_text()
