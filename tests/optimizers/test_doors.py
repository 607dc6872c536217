"""GEPA without DSPy's class: ``gepa.optimize``, ``optimize_anything``, and what calls them."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import dspy
import pytest

from dspy_otel import semconv
from dspy_otel.optimizers.doors import Batch
from dspy_otel.record.history import optimizations
from dspy_otel.reports import render
from tests.optimizers import common, gepa_runs
from tests.optimizers.gepa_runs import Adapter, Batched, module, optimize, optimize_anything, outcome, rate, reflect

GEPA = tuple(map(int, version("gepa").split(".")[:3]))
whole = pytest.mark.skipif(
    GEPA < (0, 1, 4) or find_spec("gepa.gepa_launcher") is not None, reason="other GEPA versions have other parameters"
)

RUNS: dict[str, Callable[[], Any]] = {
    "optimize": lambda: optimize(use_merge=True, calls=45),
    "optimize in threads": lambda: optimize(Adapter(threads=True)),
    "optimize_anything": lambda: optimize_anything(parallel=False),
    "optimize_anything in threads": optimize_anything,
}
if find_spec("gepa.strategies.proposal_sampling") is not None:
    RUNS["optimize with several proposals at once"] = lambda: optimize_many(reflect)


def optimize_many(reflection: Any, calls: int = 60) -> Any:
    """Proposals by one call of the reflection LM, evaluated by one call of the adapter."""
    sampling = importlib.import_module("gepa.strategies.proposal_sampling").IndependentSampling(3)
    return optimize(Batched(), calls, gepa_runs.AtOnce(reflection), sampling_strategy=sampling)


@whole
@pytest.mark.parametrize("name", ["optimize", "optimize_anything"])
def test_every_span(telemetry: Any, snapshot: Callable[..., None], name: str) -> None:
    telemetry.instrument(capture_content="span_only", id_key="a key of the tests")
    RUNS[name]()
    snapshot(telemetry.tree(), f"GEPA's doors, {name}")


@pytest.mark.parametrize("name", sorted(RUNS))
@pytest.mark.parametrize("traces", ["all", "failed_and_best", "none"])
def test_same_result_and_all_trials(telemetry: Any, name: str, traces: str) -> None:
    bare = RUNS[name]()
    telemetry.instrument(optimization_traces=traces, capture_content="span_and_event")
    result = RUNS[name]()
    assert outcome(result) == outcome(bare)
    span = telemetry.only("compile GEPA")
    deciding = [trial.attributes for trial in telemetry.named("trial") if trial.attributes["dspy.trial.kind"] in _POOL]
    by_index = {int(trial["dspy.trial.params.candidate_index"]): trial for trial in deciding}
    scores = [by_index[index]["dspy.trial.score"] for index in range(len(result.candidates))]
    assert scores == pytest.approx(result.val_aggregate_scores)
    ids = [by_index[index]["dspy.candidate.id"] for index in range(len(result.candidates))]
    for index, parents in enumerate(result.parents[1:], 1):
        assert list(by_index[index]["dspy.candidate.parent_ids"]) == [ids[parent] for parent in parents]
    assert span.attributes["dspy.optimizer.examples.evaluated"] == result.total_metric_calls
    assert span.attributes["dspy.optimizer.best_score"] == pytest.approx(max(result.val_aggregate_scores))
    assert span.attributes["dspy.program.id"] == ids[result.best_idx]


_POOL = ("baseline", "full")


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_record_and_a_page(telemetry: Any, name: str) -> None:
    telemetry.instrument(capture_content="span_only")
    result = RUNS[name]()
    (record,) = optimizations(telemetry.spans)
    assert (record.optimizer, record.best) == ("GEPA", pytest.approx(max(result.val_aggregate_scores)))
    assert record.returned is not None
    assert list(record.returned.predictors) == list(result.candidates[0])
    assert {len(examples) for number, examples in record.examples.items() if number == 1} == {4}
    page = render(record)
    assert "Version " in page


def test_lm_calls_in_threads_are_inside(telemetry: Any) -> None:
    """Those of the adapter's threads, and those of the evaluator, which GEPA calls in threads of its own."""
    lm = common.HashLM("embedded/hash", cache=False)
    dspy.configure(lm=lm)
    program = dspy.Predict("question -> answer")

    def asking(candidate: str, example: Any) -> Any:
        program(question=example["input"])
        return rate(candidate, example)

    telemetry.instrument()
    optimize(Adapter(threads=True, program=program), calls=20)
    optimize_anything(asking, calls=20)
    first, second = telemetry.named("compile GEPA")
    for span, around in ((first, "evaluate Adapter"), (second, "example asking")):
        run = span.attributes["dspy.optimizer.run.id"]
        calls = [each for each in telemetry.named("chat") if each.attributes["dspy.optimizer.run.id"] == run]
        assert len(calls) == span.attributes["dspy.usage.lm_calls"] == span.attributes["dspy.usage.task.lm_calls"]
        assert len(calls) == span.attributes["dspy.optimizer.examples.evaluated"]
        assert all("dspy.trial.number" in each.attributes for each in calls)
        names = {each.context.span_id: each.name for each in telemetry.spans}
        parents = {names[each.parent.span_id] for each in telemetry.named("invoke_workflow") if _of(each, run)}
        assert parents == {around}


def _of(span: Any, run: str) -> bool:
    return bool(span.attributes["dspy.optimizer.run.id"] == run)


@pytest.mark.parametrize("at_once", [False, True])
def test_reflection_by_dspy_is_reflection(telemetry: Any, at_once: bool) -> None:
    """Also where it is asked for several proposals in one call."""
    if at_once and "optimize with several proposals at once" not in RUNS:
        pytest.skip("this GEPA makes one proposal at a time")
    lm = common.HashLM("embedded/hash", cache=False)

    def reflection(prompt: Any) -> str:
        return str((lm(messages=prompt) if isinstance(prompt, list) else lm(prompt))[0])

    telemetry.instrument()
    if at_once:
        optimize_many(reflection, 30)
    else:
        optimize(calls=20, reflection=reflection)
    span = telemetry.only("compile GEPA")
    assert span.attributes["dspy.usage.reflection.lm_calls"] == len(telemetry.named("chat")) > 0
    assert {call.attributes["dspy.optimizer.phase"] for call in telemetry.named("chat")} == {"reflect"}


def test_dspys_gepa_is_counted_once(telemetry: Any) -> None:
    """Also where its metric optimizes by a door of GEPA's own: that is an optimization inside."""
    telemetry.instrument()
    common.quietly(common.run_gepa_digits, calls=30)
    (span,) = telemetry.named("compile")
    assert "dspy.optimizer.params.door" not in span.attributes
    telemetry.clear()
    inner: list[Any] = []

    def metric(*arguments: Any, **named: Any) -> Any:
        if not inner:
            inner.append(None)
            inner[0] = optimize(calls=10)
        return common.sum_of_digits(*arguments, **named)

    lm = common.HashLM("embedded/hash", cache=False)
    rows = [dspy.Example(question=f"question {number}").with_inputs("question") for number in range(6)]
    with dspy.context(lm=lm):
        optimizer = dspy.GEPA(metric=metric, reflection_lm=lm, max_metric_calls=20, num_threads=1)
        common.quietly(optimizer.compile, common.Digits(), trainset=rows[:3], valset=rows[3:])
    outer, inside = telemetry.named("compile GEPA")
    assert inside.attributes[semconv.OPTIMIZER_PARENT_RUN_ID] == outer.attributes["dspy.optimizer.run.id"]
    assert inside.attributes["dspy.optimizer.params.door"] == "gepa.optimize"


def test_an_adapter_of_dspys_is_counted_once(telemetry: Any) -> None:
    """An adapter may evaluate with DSPy's ``Evaluate``: the same examples."""
    lm = common.HashLM("embedded/hash", cache=False)
    dspy.configure(lm=lm)

    class Evaluating(Adapter):
        def evaluate(self, batch: Any, candidate: Any, capture_traces: bool = False) -> Any:
            rows = [dspy.Example(question=row["input"]).with_inputs("question") for row in batch]
            common.quietly(dspy.Evaluate(devset=rows, metric=common.sum_of_digits), common.Digits())
            return super().evaluate(batch, candidate, capture_traces)

    telemetry.instrument()
    result = optimize(Evaluating(), calls=20)
    span = telemetry.only("compile GEPA")
    assert span.attributes["dspy.optimizer.examples.evaluated"] == result.total_metric_calls
    assert {example.name for example in telemetry.named("example")} == {"example Digits"}


def test_several_candidates_in_one_call(telemetry: Any) -> None:
    """An adapter with a ``batch_evaluate``: its evaluations are open together, also in its threads."""
    strategies = pytest.importorskip("gepa.strategies.proposal_sampling")

    options = {"sampling_strategy": strategies.IndependentSampling(3), "calls": 60}
    bare = optimize(gepa_runs.Batched(), **options)
    telemetry.instrument()
    result = optimize(gepa_runs.Batched(), **options)
    assert outcome(result) == outcome(bare)
    span = telemetry.only("compile GEPA")
    assert span.attributes["dspy.optimizer.examples.evaluated"] == result.total_metric_calls
    minibatches = [each for each in telemetry.named("trial") if each.attributes["dspy.trial.kind"] == "minibatch"]
    assert all("dspy.trial.score" in each.attributes for each in minibatches)
    assert len(telemetry.named("example")) == result.total_metric_calls
    telemetry.clear()
    both = optimize_anything(sampling_strategy=strategies.IndependentSampling(3))
    assert len(telemetry.named("example")) == both.total_metric_calls


def test_callbacks_and_configuration_of_the_user_stay(telemetry: Any) -> None:
    class Callback:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_iteration_start(self, event: Any) -> None:
            self.seen.append(event["iteration"])

    telemetry.instrument()
    given = [Callback()]
    optimize(callbacks=given)
    assert len(given) == 1
    assert given[0].seen
    config = module.GEPAConfig(
        engine=module.EngineConfig(max_metric_calls=10, parallel=False),
        reflection=module.ReflectionConfig(reflection_lm=gepa_runs.reflect),
        callbacks=given,
    )
    given[0].seen.clear()
    common.quietly(module.optimize_anything, "Answer.", evaluator=rate, dataset=gepa_runs.ROWS[:3], config=config)
    assert config.callbacks is given
    assert given[0].seen
    assert len(telemetry.named("compile GEPA")) == 2


def test_gepa_gets_what_it_gets_unwatched(telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callbacks, in a copy of its settings, are all that is added. A default that is not GEPA's own stays GEPA's."""
    seen: list[Any] = []

    def anything(seed_candidate: Any, *, evaluator: Any, dataset: Any = None, valset: Any = None, config: Any = None):
        seen.append((seed_candidate, dataset, valset, config))

    anything.__annotations__["config"] = "GEPAConfig | None"
    monkeypatch.setattr(module, "optimize_anything", anything)
    telemetry.instrument()
    module.optimize_anything("Answer.", evaluator=rate, dataset=gepa_runs.ROWS)
    *given, config = seen.pop()
    assert given == ["Answer.", gepa_runs.ROWS, None]
    assert vars(config).keys() == vars(module.GEPAConfig()).keys()
    assert len(config.callbacks) == 1
    for name, value in vars(module.GEPAConfig()).items():
        assert name == "callbacks" or getattr(config, name) == value
    anything.__annotations__["config"] = "OptimizeAnythingConfig | None"
    module.optimize_anything("Answer.", evaluator=rate, dataset=gepa_runs.ROWS)
    assert seen == [("Answer.", gepa_runs.ROWS, None, None)]


def test_a_task_without_rows(telemetry: Any) -> None:
    telemetry.instrument()

    def rated(candidate: str) -> float:
        return gepa_runs.hash_of(candidate) % 10 / 10

    config = module.GEPAConfig(
        engine=module.EngineConfig(max_metric_calls=8),
        reflection=module.ReflectionConfig(reflection_lm=gepa_runs.reflect),
    )
    common.quietly(module.optimize_anything, "Answer.", evaluator=rated, config=config)
    assert {example.attributes["dspy.example.index"] for example in telemetry.named("example rated")} == {0}


def test_a_failed_evaluation_fails_the_optimization(telemetry: Any) -> None:
    telemetry.instrument()
    with pytest.raises(ValueError, match="the evaluation failed"):
        optimize(Adapter(fails_at=1))
    span = telemetry.only("compile GEPA")
    assert span.attributes["dspy.optimizer.outcome"] == "failed"
    assert span.attributes["error.type"] == "ValueError"
    assert {each.status.status_code.name for each in telemetry.spans} == {"ERROR"}


def test_pools_of_others_get_what_they_are_given(telemetry: Any) -> None:
    """Outside of an adapter, a function reaches a pool as it is."""
    telemetry.instrument()
    optimize(calls=10)
    seen: list[Any] = []

    def work() -> str:
        seen.append(threading.current_thread())
        return "done"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == "done"
        with pytest.raises(TypeError, match=r"submit\(\) missing 1 required positional argument"):
            pool.submit()  # type: ignore[call-arg]
    telemetry.shutdown()
    assert "dspy_otel" not in ThreadPoolExecutor.submit.__code__.co_filename
    assert "dspy_otel" not in Adapter.evaluate.__code__.co_filename


def test_a_run_that_goes_on_is_one_run(telemetry: Any, tmp_path: Any) -> None:
    telemetry.instrument()
    for calls in (20, 40):
        optimize(calls=calls, run_dir=str(tmp_path / "gepa"))
    first, second = telemetry.named("compile GEPA")
    assert [span.attributes["dspy.optimizer.attempt"] for span in (first, second)] == [1, 2]
    assert first.attributes["dspy.optimizer.run.id"] == second.attributes["dspy.optimizer.run.id"]


def test_the_place_of_a_row() -> None:
    rows = [{"a": 1}, {"a": 2}]
    batch = Batch(SimpleNamespace(), None, [], [*rows, rows[0]])
    assert [batch.place(row) for row in (rows[0], rows[1], rows[0])] == [(0, False), (1, False), (2, False)]
    assert batch.place(rows[0]) == (2, True)
    assert batch.place({"a": 1}) == (-1, False)
    assert batch.place({"a": 1}) == (-1, True)


def test_a_gepa_that_is_suppressed_is_not_recorded(telemetry: Any) -> None:
    from opentelemetry.instrumentation.utils import suppress_instrumentation

    telemetry.instrument()
    with suppress_instrumentation():
        optimize(calls=10)
        optimize_anything(calls=10)
    assert not telemetry.spans
