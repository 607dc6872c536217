"""The example notebook, in a real kernel."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbconvert and ipykernel (make test-rest)")
pytest.importorskip("ipykernel", reason="needs nbconvert and ipykernel (make test-rest)")
pytest.importorskip("mlflow", reason="needs the extra mlflow")
preprocessors = pytest.importorskip("nbconvert.preprocessors")

pytestmark = pytest.mark.integration
NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def outputs(cell: Any, mimetype: str) -> list[str]:
    return [item["data"][mimetype] for item in cell.outputs if mimetype in item.get("data", {})]


def written(cell: Any) -> str:
    return "".join(item["text"] for item in cell.outputs if item["output_type"] == "stream")


def test_the_example_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("OTEL_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("OTEL_DSPY_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1] / "src"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    executor = preprocessors.ExecutePreprocessor(timeout=300, kernel_name="python3")
    executor.preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    once, changed, _, compiled, origin, report = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # A cell that is run again has nothing to say, and the other experiment is where the runs are.
    assert (written(once), written(changed)) == ("", "")
    (table,) = outputs(compiled, "text/html")
    found = re.search(r"✓ MIPROv2: (\d\.\d\d), \+(\d\.\d\d) from (\d\.\d\d)", table)
    assert found is not None, table
    assert "dspy-otel ui --tracking-uri sqlite:///" in table
    assert "dspy.teleprompt" not in written(compiled)
    (about,) = outputs(origin, "text/html")
    assert "MIPROv2 (winner)" in about
    assert found.group(1) in about
    (page,) = outputs(report, "text/html")
    assert "Downloading artifacts" not in written(report)
    assert page.startswith('<iframe srcdoc="&lt;!')
    assert "MIPROv2 on ColourFamily" in page
