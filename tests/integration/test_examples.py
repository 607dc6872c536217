"""The examples with real models: a local one on llama.cpp's server, a hosted one on a stand-in of its API."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.llama_server import MODEL, llama_server, missing
from tests.support.openai_server import openai_server
from tests.support.waiting import run

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parent.parent.parent


def example(name: str, directory: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """What an example prints, and what it says was recorded of each call."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "MLFLOW_", "OPENAI_"))}
    own = {
        "PYTHONPATH": str(ROOT / "src"),
        "OPENAI_API_KEY": "sk-not-a-key",
        "DSPY_CACHEDIR": str(directory / "cache"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done: subprocess.CompletedProcess[str] = run(
        [sys.executable, f"examples/{name}.py", *arguments], cwd=ROOT, env={**inherited, **own}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    noise = [line for line in done.stderr.splitlines() if "dspy_otel" in line or "dspy-otel" in line]
    assert noise == []
    lines = [line.partition("{") for line in done.stdout.splitlines() if line.startswith("chat ")]
    return done.stdout, [ast.literal_eval("{" + recorded) for _, _, recorded in lines]


@pytest.mark.skipif(missing() is not None, reason=f"{missing()} is not installed: `make test-server` does it")
def test_a_local_model_has_a_provider_tokens_and_no_price(tmp_path: Path) -> None:
    with llama_server(tmp_path) as server:
        _, calls = example("local_model", tmp_path, "--url", f"{server.url}/v1")
    assert calls
    for call in calls:
        assert call["gen_ai.provider.name"] == "openai"  # whose API it is
        assert (call["server.address"], call["server.port"]) == ("127.0.0.1", server.port)
        assert call["gen_ai.response.model"] == MODEL
        assert call["gen_ai.usage.input_tokens"] > 0
        assert "dspy.lm.cost" not in call
        assert "error.type" not in call


def test_a_local_model_on_a_stand_in(tmp_path: Path) -> None:
    with openai_server() as server:
        printed, (call,) = example("local_model", tmp_path, "--url", server.url, "--model", "some-model-of-mine")
    assert "answer: the answer" in printed
    assert call["gen_ai.provider.name"] == "openai"
    assert (call["server.port"], call["gen_ai.usage.input_tokens"]) == (server.port, 100)
    assert "dspy.lm.cost" not in call


def test_without_a_server_a_local_model_is_one_sentence() -> None:
    done = run([sys.executable, "examples/local_model.py", "--url", "http://127.0.0.1:9/v1"], cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("No server answers at http://127.0.0.1:9/v1 ")
    assert done.stderr.count("\n") == 1


def test_a_hosted_model_is_billed_once_and_its_cached_answer_not(tmp_path: Path) -> None:
    with openai_server() as server:
        printed, (first, second) = example("hosted_model", tmp_path, "--url", server.url)
        assert len(server.requests) == 1
    assert printed.count("answer: the answer") == 2
    assert first["gen_ai.usage.input_tokens"] == 100
    assert first["dspy.lm.cost"] > 0
    assert (first["dspy.lm.cache_hit"], second["dspy.lm.cache_hit"]) == (False, True)
    assert (second["dspy.lm.cost"], second["dspy.lm.cost.saved"]) == (0.0, first["dspy.lm.cost"])
    assert f"in all: {first['dspy.lm.cost']:.6f} USD" in printed
