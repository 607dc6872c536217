"""GEPA without DSPy's class, in MLflow's embedded store: its runs, its report, and MLflow's own way to GEPA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_otel import semconv
from dspy_otel.cli import main
from dspy_otel.mlflow.read import read_optimization
from tests.optimizers import common, gepa_runs
from tests.support.mlflow_store import Store

pytest.importorskip("mlflow")
pytestmark = [pytest.mark.integration, pytest.mark.parametrize("uri", ["sqlite"], indirect=True)]


def run_of(store: Store) -> tuple[Any, Any]:
    """The only compile span, and its run in MLflow."""
    store.flush()
    (span,) = store.named("compile")
    runs, key = store.runs(), span.attributes[semconv.OPTIMIZER_RUN_ID]
    assert set(runs) == {key, *(f"{key}/{trial.attributes[semconv.TRIAL_NUMBER]}" for trial in store.named("trial"))}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    return span, runs[key]


@pytest.mark.parametrize("door", ["optimize", "optimize_anything"])
def test_runs_report_and_show(
    store: Store, door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.instrument()
    result = getattr(gepa_runs, door)()
    _, run = run_of(store)
    assert run.data.metrics["best_score"] == pytest.approx(max(result.val_aggregate_scores), abs=1e-4)
    record = read_optimization(run.info.run_id, tracking_uri=store.uri).optimization
    assert [trial.score for trial in record.trials if trial.kind in ("baseline", "full")] == pytest.approx(
        result.val_aggregate_scores, abs=1e-4
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert main(["show", run.info.run_id]) == 0
    assert "GEPA" in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert main(["report", run.info.run_id, "--output", str(page)]) == 0
    assert "Version " in page.read_text(encoding="utf-8")


def test_optimize_prompts(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MLflow evaluates in threads of its own; what DSPy does there is inside."""
    genai = pytest.importorskip("mlflow.genai")
    optimizers = pytest.importorskip("mlflow.genai.optimize.optimizers")
    lms = pytest.importorskip("gepa.lm", reason="GEPA before 0.1.2 has no LM of its own")
    monkeypatch.setattr(lms.LM, "__call__", lambda self, prompt: gepa_runs.reflect(prompt))  # no network
    # By the environment: MLflow's functions that set it have no way back, and other tests would use this registry.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'prompts.db'}")
    prompt = genai.register_prompt(name="qa", template="Answer {{question}}")
    lm = common.HashLM("embedded/hash", cache=False)
    dspy.configure(lm=lm)
    predict = dspy.Predict("question -> answer")

    def answer(question: str) -> str:
        text = genai.load_prompt(prompt.uri).format(question=question)
        return f"{predict(question=text).answer} {text}"

    @genai.scorers.scorer
    def right(outputs: str) -> float:
        return gepa_runs.hash_of(outputs) % 10 / 10

    store.instrument()
    result = common.quietly(
        genai.optimize_prompts,
        predict_fn=answer,
        train_data=[{"inputs": {"question": str(number)}, "outputs": str(number)} for number in range(5)],
        prompt_uris=[prompt.uri],
        optimizer=optimizers.GepaPromptOptimizer(reflection_model="openai:/none", max_metric_calls=30),
        scorers=[right],
    )
    span, run = run_of(store)
    assert span.attributes["dspy.optimizer.params.door"] == "mlflow.genai.optimize_prompts"
    assert span.attributes[semconv.PROGRAM_NAME] == "optimize_prompts"
    assert span.attributes[semconv.OPTIMIZER_BASELINE_SCORE] == pytest.approx(result.initial_eval_score)
    assert span.attributes[semconv.OPTIMIZER_BEST_SCORE] == pytest.approx(result.final_eval_score)
    assert span.attributes[semconv.USAGE_LM_CALLS] == span.attributes[semconv.OPTIMIZER_EXAMPLES_EVALUATED]
    assert run.data.metrics["best_score"] == pytest.approx(result.final_eval_score, abs=1e-4)
