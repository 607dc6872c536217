"""An optimization is the same with and without us: candidates, scores, prompts and random numbers."""

from __future__ import annotations

import copy
import importlib
import pkgutil
import random
from collections import Counter
from importlib.util import find_spec
from typing import Any

import dspy
import pytest
import rich.style  # noqa: F401  (GEPA imports it when it first runs, which takes a random number)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspy_otel import program_id
from dspy_otel.optimizers import trackers
from dspy_otel.optimizers.tracker import registered
from dspy_otel.optimizers.trackers.gepa import Observer
from tests.optimizers import common
from tests.optimizers.common import quietly, scripted_lm
from tests.support.spans import Recorder

FIXED = ["MIPROv2", "GEPA", "SIMBA", "BootstrapFewShotWithRandomSearch", "COPRO"]


def outcome(name: str, seed: int) -> dict[str, Any]:
    """Everything an optimization leaves behind that does not depend on the clock."""
    lm = scripted_lm()
    common.asked.clear()
    random.seed(seed)
    program, optimizer = quietly(common.RUNS[name], lm, seed=seed)
    left: dict[str, Any] = {
        "program": program_id(program),
        "random": random.getstate(),
        "prompts": Counter(common.asked),
        "kept": sorted(vars(optimizer)),
        "kept on program": sorted(vars(program)),
    }
    if hasattr(program, "candidate_programs"):
        left["candidates"] = [(entry["score"], program_id(entry["program"])) for entry in program.candidate_programs]
    if hasattr(program, "trial_logs"):
        left["trials"] = {
            number: {key: value for key, value in log.items() if isinstance(value, (int, float))}
            for number, log in program.trial_logs.items()
        }
    if hasattr(program, "detailed_results"):
        results = program.detailed_results
        left["results"] = (
            results.val_aggregate_scores,
            results.val_subscores,
            results.parents,
            results.discovery_eval_counts,
            [program_id(candidate) for candidate in results.candidates],
        )
    if getattr(optimizer, "rng", None) is not None:
        left["own random"] = optimizer.rng.getstate()
    if hasattr(optimizer, "strategies"):
        left["strategies"] = [getattr(strategy, "__wrapped__", None) for strategy in optimizer.strategies]
    return left


@pytest.mark.parametrize("name", FIXED)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(1, 2**16),
    content=st.sampled_from(["no_content", "span_and_event"]),
    traces=st.sampled_from(["all", "failed_and_best", "none"]),
)
def test_same_with_and_without(name: str, seed: int, content: str, traces: str) -> None:
    bare = outcome(name, seed)
    recorder = Recorder()
    recorder.instrument(capture_content=content, optimization_traces=traces)
    try:
        watched = outcome(name, seed)
    finally:
        recorder.shutdown()
    assert recorder.named("trial")
    for part, value in bare.items():
        assert watched[part] == value, part


ANYTHING = ("gepa.gepa_launcher", "gepa.optimize_anything")
"""Where GEPA has its own function of that name; after 0.1.4 in the first one."""
PATCHED = [
    ("dspy.teleprompt.mipro_optimizer_v2", "MIPROv2._select_and_insert_instructions_and_demos"),
    ("dspy.teleprompt.mipro_optimizer_v2", "MIPROv2.compile"),
    ("dspy.teleprompt.copro_optimizer", "COPRO._set_signature"),
    ("dspy.teleprompt.bootstrap", "BootstrapFewShot._bootstrap_one_example"),
    ("dspy.teleprompt.bootstrap_finetune", "BootstrapFinetune.finetune_lms"),
    ("dspy.teleprompt.simba", "wrap_program"),
    ("dspy.teleprompt.simba", "prepare_models_for_resampling"),
    ("dspy.predict.parallel", "Parallel.__call__"),
    ("dspy.teleprompt.grpo", "GRPO.report_validation_metrics"),
    ("gepa", "optimize"),
    *next(([(module, "optimize_anything")] for module in ANYTHING if find_spec(module)), []),
    *([("gepa.oa.eval_server", "EvalServer.evaluate")] if find_spec(ANYTHING[0]) else []),
]


def current() -> list[Any]:
    found = []
    for module, path in PATCHED:
        owner: Any = importlib.import_module(module)
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part)
        found.append(vars(owner)[name])
    return found


def test_every_hook_is_taken_back(telemetry: Any) -> None:
    before = current()
    telemetry.instrument()
    assert not any(new is old for new, old in zip(current(), before, strict=True))
    telemetry.shutdown()
    assert all(new is old for new, old in zip(current(), before, strict=True))


def test_whatever_a_file_of_trackers_has_is_registered() -> None:
    """A file whose tracker or hooks were not registered would be silent in a program."""
    trackers.load()
    kinds, hooks = registered()
    for found in pkgutil.iter_modules(trackers.__path__):
        file = importlib.import_module(f"{trackers.__name__}.{found.name}")
        assert file.__name__ in {kind.__module__ for kind in kinds.values()}
        given = [value for value in vars(file).values() if "Patches" in str(getattr(value, "__annotations__", ""))]
        assert given == [function for function in hooks if function.__module__ == file.__name__], file.__name__


def test_whatever_is_registered_is_an_optimizer_of_dspy() -> None:
    trackers.load()
    for found in pkgutil.walk_packages(dspy.teleprompt.__path__, "dspy.teleprompt."):
        importlib.import_module(found.name)
    known, waiting = {"ReAnchor"}, [dspy.teleprompt.Teleprompter]  # it is new in DSPy 3.4
    while waiting:
        known.add(waiting[-1].__name__)
        waiting += waiting.pop().__subclasses__()
    assert set(registered()[0]) <= known


def test_a_missing_hook_costs_its_detail_and_one_warning(
    telemetry: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = dspy.COPRO(metric=common.same_family, breadth=2, depth=1)
    optimizer._set_signature = optimizer._set_signature  # kept for DSPy itself; the class has none
    monkeypatch.delattr(dspy.COPRO, "_set_signature")
    telemetry.instrument()
    said = [record.getMessage() for record in caplog.records if record.name == "dspy_otel"]
    assert len(said) == 1
    assert "_set_signature" in said[0]
    scripted_lm()
    rows = common.load_examples("train", 4)
    program = quietly(optimizer.compile, common.ColourFamily(), trainset=rows, eval_kwargs={"num_threads": 1})
    found = common.trials(telemetry, "COPRO")
    assert len(found) == program.total_calls
    assert all("trial.params.depth" in trial and "trial.params.predictor" not in trial for trial in found)


@pytest.mark.injects_faults
def test_a_hook_that_raises_costs_its_detail_and_one_warning(
    telemetry: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dspy_otel.optimizers.trackers.gepa import GEPATracker
    from dspy_otel.optimizers.trackers.mipro import MIPROv2Tracker
    from dspy_otel.optimizers.trackers.simba import SIMBATracker

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a new release")

    telemetry.instrument()
    bare = {name: outcome(name, 1) for name in ("MIPROv2", "GEPA", "SIMBA")}
    for tracker in (MIPROv2Tracker, GEPATracker, SIMBATracker):
        for method in ("begin", "end", "evaluation", "params", "score", "scored"):
            monkeypatch.setattr(tracker, method, broken)
        for method in [name for name in vars(tracker) if name.startswith(("on_", "new_step", "evaluated", "phase"))]:
            if callable(getattr(tracker, method)):
                monkeypatch.setattr(tracker, method, broken)
    telemetry.clear()
    for name, expected in bare.items():
        assert outcome(name, 1) == expected
        assert len(telemetry.named(f"compile {name}")) == 1
    assert not telemetry.named("trial")
    warnings = Counter(record.getMessage() for record in caplog.records if record.name == "dspy_otel")
    assert warnings
    assert set(warnings.values()) == {1}


def test_strategies_of_simba_are_the_same_list_again(telemetry: Any) -> None:
    scripted_lm()
    telemetry.instrument()
    optimizer = dspy.SIMBA(metric=common.same_family, bsize=4, num_candidates=2, max_steps=1, num_threads=2)
    strategies = optimizer.strategies
    kept = copy.copy(strategies)
    quietly(optimizer.compile, common.ColourFamily(), trainset=common.load_examples("train", 8))
    assert optimizer.strategies is strategies
    assert strategies == kept


def test_what_observes_gepa_can_be_copied() -> None:
    tracker: Any = object()
    copied = copy.copy(Observer(tracker))
    assert copied._tracker is tracker
    assert not hasattr(copied, "on_no_such_event")
