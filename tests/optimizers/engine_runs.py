"""Engines of ``optimize_anything`` on deterministic evaluators. Skips where GEPA has none: up to 0.1.4."""

from __future__ import annotations

import json
import threading
import urllib.request
from typing import Any

import pytest

from tests.optimizers import common
from tests.optimizers.gepa_runs import ROWS, rate, reflect

launcher: Any = pytest.importorskip("gepa.gepa_launcher", reason="GEPA up to 0.1.4 has no engines")
oa: Any = pytest.importorskip("gepa.optimize_anything")

ALL_REQUESTS = (
    ("/evaluate", {"candidate": "one", "example_id": "train_1"}),
    ("/evaluate_examples", {"candidate": "some", "example_ids": ["train_0", "train_2"]}),
    ("/evaluate_examples", {"candidate": "all"}),
    ("/validate", {"candidate": "valid"}),
)


class Asks:
    """An engine as one in another process: it asks the server over HTTP."""

    name = "asks"

    def __init__(self, *requests: tuple[str, dict[str, Any]]) -> None:
        self.requests = requests
        self.answers: list[Any] = []

    def run(self, task: Any, server: Any) -> Any:
        def ask() -> None:
            for path, body in self.requests:
                request = urllib.request.Request(server.url + path, json.dumps(body).encode())
                with urllib.request.urlopen(request) as answer:
                    self.answers.append(json.load(answer))

        thread = threading.Thread(target=ask)  # nothing of this thread's context goes there
        thread.start()
        thread.join()
        return oa.Result(server.best_candidate, server.best_score)

    def process_result(self, result: Any, output_dir: Any) -> None:
        pass

    @property
    def scores(self) -> list[Any]:
        """The answers, without what depends on which row was ready first."""
        names = ("score", "average_score", "val_score", "scores", "errors")
        return [{name: answer.get(name) for name in names} for answer in self.answers]


def together(pairs: Any) -> list[Any]:
    """An evaluator of several rows, also with several candidates, at once."""
    return [rate(candidate, row) for candidate, row in pairs]


def run(evaluator: Any = rate, config: Any = None, **options: Any) -> Any:
    given = {"dataset": ROWS[:3], "valset": ROWS[3:5], **options}
    return common.quietly(oa.optimize_anything, "Answer.", evaluator=evaluator, config=config, **given)


def by_gepa(evals: int | None = 40, **settings: Any) -> Any:
    # One by one: GEPA shows a proposer how much of the budget was used when a row was evaluated.
    settings = {"reflection": {"reflection_lm": reflect}, "engine": {"seed": 1, "parallel": False}, **settings}
    return oa.OptimizeAnythingConfig(max_evals=evals, engine_config=settings)


def outcome(result: Any) -> Any:
    return result.candidates, result.val_aggregate_scores, result.best_candidate, result.total_evals, result.best_score
