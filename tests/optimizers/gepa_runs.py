"""GEPA without DSPy's class, on deterministic evaluators and reflections. Skips where GEPA has no callbacks for it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest

gepa: Any = pytest.importorskip("gepa")
module: Any = pytest.importorskip("gepa.optimize_anything", reason="GEPA before 0.1.0 has no optimize_anything")
if find_spec("gepa.gepa_launcher") is not None:  # after 0.1.4: what runs behind a front, and can be called as before
    module = importlib.import_module("gepa.gepa_launcher")
if "callbacks" not in module.GEPAConfig.__dataclass_fields__:
    pytest.skip("before GEPA 0.1.2 optimize_anything has no callbacks", allow_module_level=True)

SEED = {"system": "Answer.", "style": "Be brief."}
ROWS = [{"input": f"question {number}", "answer": str(number)} for number in range(9)]


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def score(texts: Any, row: Any) -> float:
    """Each candidate is good at something else, so that the Pareto front has several. Sums of eighths are exact."""
    return hash_of(f"{sorted(texts.items()) if isinstance(texts, dict) else texts}|{row}") % 9 / 8


def reflect(prompt: Any) -> str:
    """A function of the prompt alone."""
    return f"```\nVersion {hash_of(str(prompt)) % 10_000}\n```"


class AtOnce:
    """A reflection LM that answers the prompts of several proposals in one call, in threads of its own."""

    def __init__(self, reflection: Any = reflect) -> None:
        self.reflection = reflection

    def __call__(self, prompt: Any) -> str:
        return str(self.reflection(prompt))

    def batch_complete(self, prompts: list[Any]) -> list[str]:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(self, prompts))


class Adapter:
    """Evaluates rows one by one, or in threads of its own, and asks a program of the user's."""

    propose_new_texts = None

    def __init__(self, threads: bool = False, program: Any = None, fails_at: int | None = None) -> None:
        self.threads = threads
        self.program = program
        self.fails_at = fails_at
        self.evaluated = 0

    def _one(self, row: Any, candidate: Any) -> tuple[Any, float]:
        output = row["answer"] if self.program is None else self.program(question=row["input"]).answer
        return output, score(candidate, row)

    def evaluate(self, batch: Any, candidate: Any, capture_traces: bool = False) -> Any:
        self.evaluated += 1
        if self.evaluated == self.fails_at:
            raise ValueError("the evaluation failed")
        if self.threads:
            with ThreadPoolExecutor(3) as pool:
                done = list(pool.map(lambda row: self._one(row, candidate), batch))
        else:
            done = [self._one(row, candidate) for row in batch]
        outputs, scores = [output for output, _ in done], [each for _, each in done]
        feedback = [{"feedback": f"It scored {each}."} for each in scores]
        return gepa.EvaluationBatch(outputs=outputs, scores=scores, trajectories=feedback if capture_traces else None)

    def make_reflective_dataset(self, candidate: Any, eval_batch: Any, components_to_update: list[str]) -> Any:
        return {name: list(eval_batch.trajectories) for name in components_to_update}


class Batched(Adapter):
    """Evaluates several candidates in one call, side by side."""

    def batch_evaluate(self, items: Any, capture_traces: bool = True) -> Any:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda item: self.evaluate(item[1], item[0], capture_traces), items))


def optimize(adapter: Any = None, calls: int = 60, reflection: Any = reflect, **options: Any) -> Any:
    """``gepa.optimize`` on a train set and a validation set."""
    with contextlib.redirect_stdout(io.StringIO()):
        return gepa.optimize(
            seed_candidate=dict(SEED),
            trainset=ROWS[:5],
            valset=ROWS[5:],
            adapter=Adapter() if adapter is None else adapter,
            reflection_lm=reflection,
            max_metric_calls=calls,
            seed=1,
            **options,
        )


def rate(candidate: str, example: Any) -> tuple[float, dict[str, Any]]:
    """An evaluator of one text on one row."""
    rated = score(candidate, example)
    return rated, {"feedback": f"It scored {rated}."}


def optimize_anything(evaluator: Any = rate, calls: int = 40, parallel: bool = True, **options: Any) -> Any:
    """``optimize_anything`` on one text; ``options`` are those of the engine."""
    callbacks = options.pop("callbacks", None)
    config = module.GEPAConfig(
        engine=module.EngineConfig(
            max_metric_calls=calls, parallel=parallel, max_workers=3 if parallel else None, seed=1, **options
        ),
        reflection=module.ReflectionConfig(reflection_lm=reflect),
        callbacks=callbacks,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return module.optimize_anything(
            "Answer.", evaluator=evaluator, dataset=ROWS[:4], valset=ROWS[4:8], config=config
        )


def outcome(result: Any) -> Any:
    """What a result says, to be compared."""
    shown = (result.candidates, result.parents, result.val_aggregate_scores, result.total_metric_calls)
    return re.sub(r" object at 0x\w+", "", repr(shown))
