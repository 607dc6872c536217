"""``optimize_anything`` of GEPA after 0.1.4: any engine, and evaluations in its server's threads and over HTTP."""

from __future__ import annotations

import dataclasses
import importlib
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_otel
from dspy_otel.record.history import optimizations
from dspy_otel.reports import render
from tests.optimizers import common, gepa_runs
from tests.optimizers.engine_runs import ALL_REQUESTS, Asks, by_gepa, launcher, oa, outcome, run
from tests.optimizers.gepa_runs import ROWS, hash_of, rate

RUN_ID = "dspy.optimizer.run.id"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # GEPA writes to `outputs/`


@pytest.fixture
def asking() -> Callable[..., Any]:
    """An evaluator that asks a program of DSPy's."""
    dspy.configure(lm=common.HashLM("embedded/hash", cache=False))
    program = dspy.Predict("question -> answer")

    def asking(candidate: Any, example: Any = None) -> Any:
        program(question=f"{candidate} {example}")
        return rate(candidate, example)

    return asking


CONFIGURED: dict[str, Callable[[], Any]] = {
    "default": lambda: None,
    "engine's settings": lambda: by_gepa(),
    "callbacks": lambda: by_gepa(callbacks=[], stop_callbacks=[]),
    "of GEPA 0.1": lambda: oa.GEPAConfig(engine=oa.EngineConfig(max_metric_calls=30)),
}


def test_without_content_no_text_of_a_task_leaves(telemetry: Any, asking: Callable[..., Any]) -> None:
    telemetry.instrument(capture_content="no_content")
    canary = "a canary of a text"  # one word may be the choice of an option
    task = {"seed_candidate": canary, "objective": canary, "background": canary, "test_set": [canary]}
    engine = Asks(
        ("/evaluate", {"candidate": f"{canary} 1", "example_id": "train_1"}), ("/validate", {"candidate": canary})
    )
    config = oa.OptimizeAnythingConfig(engine=engine, max_evals=40)
    given = {"dataset": [f"{canary} {n}" for n in range(3)], "valset": [f"{canary} v"], **task}
    common.quietly(oa.optimize_anything, evaluator=asking, config=config, **given)
    assert telemetry.named("compile Asks")
    assert telemetry.named("example")
    assert canary not in telemetry.everything()


def test_a_server_without_a_run_is_asked_for_nothing_more(telemetry: Any) -> None:
    asked: list[str] = []

    class Asked(oa.EvalServer):
        def iter_split(self, split: str) -> Any:
            asked.append(split)
            return super().iter_split(split)

    def evaluated() -> list[str]:
        asked.clear()
        task = oa.Task(name="task", train_set=ROWS[:3])
        server = Asked(task, rate, oa.BudgetTracker(max_evals=10))
        server.evaluate_examples("Answer.")
        return list(asked)

    bare = evaluated()
    telemetry.instrument()
    assert evaluated() == bare


@pytest.mark.parametrize("configured", CONFIGURED)
def test_the_engine_gets_what_it_gets_unwatched(
    telemetry: Any, monkeypatch: pytest.MonkeyPatch, configured: str
) -> None:
    """Above all the budget that the front sets by default; GEPA itself gets callbacks in a copy of its settings."""
    seen: list[Any] = []

    class Seeing(oa.GepaEngine):
        def run(self, task: Any, server: Any) -> Any:
            seen.append({**vars(task), "max_evals": server.budget.max_evals, "threads": server.max_concurrency})
            return super().run(task, server)

    def gepa(seed_candidate: Any, *, evaluator: Any, config: Any, **others: Any) -> Any:
        seen.append({"seed": seed_candidate, **vars(config), **others})
        raise oa.BudgetExhausted

    monkeypatch.setattr(launcher, "optimize_anything", gepa)
    monkeypatch.setitem(oa.get_engine_cls.__globals__["_ENGINES"], "gepa", Seeing)
    run(config=CONFIGURED[configured]())
    telemetry.instrument()
    run(config=CONFIGURED[configured]())
    assert len(telemetry.named("compile GEPA")) == 1
    task, own, watched_task, watched = seen
    for each in (task, watched_task):
        assert each.pop("name").startswith("gepa-")
    for each in (own, watched):  # a folder and an LM of each call's own
        each["engine"] = dataclasses.replace(each["engine"], run_dir=None)
        each["reflection"] = dataclasses.replace(each["reflection"], reflection_lm=None)
    assert task == watched_task
    assert len(watched.pop("callbacks")) == len(own.pop("callbacks") or ()) + 1
    assert own == watched
    if configured == "default":
        assert watched["engine"].max_metric_calls == watched_task["max_evals"] == oa.OptimizeAnythingConfig().max_evals


def test_gepas_own_engine(telemetry: Any, asking: Any) -> None:
    """One optimization, with GEPA's trials, around everything that the call does."""
    bare = run(asking, by_gepa(), test_set=ROWS[5:7])
    telemetry.instrument(capture_content="span_only")
    result = run(asking, by_gepa(), test_set=ROWS[5:7])
    assert outcome(result) == outcome(bare)
    span = telemetry.only("compile GEPA")
    assert span.attributes["dspy.program.name"] == "asking"
    assert span.attributes["dspy.optimizer.params.door"] == "gepa.optimize_anything"
    assert span.attributes["dspy.optimizer.params.engine"] == "gepa"
    assert span.attributes["dspy.optimizer.params.max_evals"] == 40
    assert span.attributes["dspy.optimizer.params.candidate_selection_strategy"] == "pareto"
    assert span.attributes["dspy.optimizer.best_score"] == pytest.approx(result.best_score)
    (record,) = optimizations(telemetry.spans)
    assert record.returned is not None
    assert record.returned.predictors["current_candidate"].instructions == result.best_candidate
    assert "Version " in render(record)
    deciding = [each for each in telemetry.named("trial") if each.attributes["dspy.trial.kind"] != "minibatch"]
    assert {each.attributes["dspy.trial.kind"] for each in deciding} == {"baseline", "full", "sample"}
    calls = telemetry.named("chat")
    tests = 2 * len(ROWS[5:7])  # the seed and the best candidate
    assert span.attributes["dspy.usage.task.lm_calls"] == len(calls) == result.total_evals + tests
    assert len([call for call in calls if "dspy.trial.number" not in call.attributes]) == tests
    assert {call.attributes[RUN_ID] for call in calls} == {span.attributes[RUN_ID]}
    assert {call.attributes["dspy.lm.role"] for call in calls} == {"task"}


def test_a_budget_that_ends_gepa_is_no_failure(telemetry: Any) -> None:
    telemetry.instrument()
    result = run(rate, by_gepa(3))
    span = telemetry.only("compile GEPA")
    assert result.total_evals == 3
    assert span.attributes["dspy.optimizer.outcome"] == "finished"


def test_a_proposer_that_evaluates_over_http(telemetry: Any, asking: Any) -> None:
    """Its evaluations are no trials of GEPA's, and in its totals."""
    servers: list[Any] = []

    class Here(oa.GepaEngine):
        def run(self, task: Any, server: Any) -> Any:
            servers.append(server)
            return super().run(task, server)

    def propose(candidate: Any, feedback: Any, components: Any) -> Any:
        request = json.dumps({"candidate": "tried", "example_id": "train_0"}).encode()
        urllib.request.urlopen(servers[-1].url + "/evaluate", request).close()
        return {name: f"Version {hash_of(str(feedback)) % 1000}" for name in components}

    def config() -> Any:
        settings = by_gepa(reflection={"custom_candidate_proposer": propose})
        return dataclasses.replace(settings, engine=Here(settings), engine_config={})

    bare = run(asking, config())
    telemetry.instrument()
    assert outcome(run(asking, config())) == outcome(bare)
    span = telemetry.only("compile GEPA")
    calls = telemetry.named("chat")
    assert span.attributes["dspy.usage.task.lm_calls"] == len(calls) == bare.total_evals
    assert all("Version" in str(text) or text == "Answer." for text in bare.candidates[0].values())
    tried = [call for call in calls if "dspy.trial.number" not in call.attributes]
    assert tried
    assert {call.context.trace_id for call in tried} == {span.context.trace_id}


@pytest.mark.parametrize("traces", ["linked", "nested"])
def test_another_engine_over_http(telemetry: Any, asking: Any, traces: str) -> None:
    """Each of its evaluations is below the optimization, whichever thread of the server makes it."""
    bare = Asks(*ALL_REQUESTS)
    run(asking, oa.OptimizeAnythingConfig(engine=bare, max_evals=20))
    telemetry.instrument(capture_content="span_only", evaluation_traces=traces)
    watched = Asks(*ALL_REQUESTS)
    result = run(asking, oa.OptimizeAnythingConfig(engine=watched, max_evals=20))
    assert watched.scores == bare.scores
    span = telemetry.only("compile Asks")
    assert span.attributes["dspy.optimizer.params.engine"] == "asks"
    assert span.attributes["dspy.program.name"] == "asking"
    calls = telemetry.named("chat")
    assert span.attributes["dspy.usage.task.lm_calls"] == len(calls) == result.total_evals == 1 + 2 + 5 + 2
    assert span.attributes["dspy.optimizer.examples.evaluated"] == result.total_evals
    assert {each.attributes[RUN_ID] for each in telemetry.spans if "chat" in each.name} == {span.attributes[RUN_ID]}
    trials = {each.attributes["dspy.trial.kind"]: each for each in telemetry.named("trial")}
    assert sorted(each.attributes["dspy.trial.size"] for each in telemetry.named("trial")) == [1, 2, 2, 5]
    assert all("dspy.trial.score" in each.attributes for each in telemetry.named("trial"))
    average = watched.answers[2]["average_score"]
    assert trials["full"].attributes["dspy.trial.score"] == pytest.approx(average)
    assert span.attributes["dspy.optimizer.best_score"] == pytest.approx(average)
    names = {each.context.span_id: each.name for each in telemetry.spans}
    assert {names[each.parent.span_id] for each in telemetry.named("invoke_workflow")} == {"example asking"}
    assert {names[each.parent.span_id] for each in telemetry.named("evaluate")} == {"trial"}
    (record,) = optimizations(telemetry.spans)
    assert record.returned is not None
    render(record)


@pytest.mark.parametrize("rows", [{}, {"dataset": None, "valset": None}], ids=["rows", "no rows"])
def test_sampling_the_best_of_some(telemetry: Any, monkeypatch: pytest.MonkeyPatch, rows: dict[str, Any]) -> None:
    """GEPA's own sampler: without rows each candidate is a trial; with rows, the engine says which is best."""
    best_of_n = importlib.import_module("gepa.oa.engines.best_of_n")

    class LM:
        total_cost = 0.0

        def __init__(self, *_: Any, **__: Any) -> None:
            self.asked = 0

        def __call__(self, prompt: str) -> str:
            self.asked += 1
            return f"```\nVersion {self.asked}\n```"

    monkeypatch.setattr(best_of_n, "LM", LM)
    config = oa.OptimizeAnythingConfig(engine="best_of_n", max_evals=6, engine_config={"model": "m", "max_n": 4})
    evaluator = (lambda candidate: rate(candidate, None)) if rows else rate
    bare = run(evaluator, config, **rows)
    telemetry.instrument()
    result = run(evaluator, config, **rows)
    assert outcome(result) == outcome(bare)
    span = telemetry.only("compile BestOfNEngine")
    assert span.attributes["dspy.optimizer.params.max_n"] == 4
    assert span.attributes["dspy.optimizer.best_score"] == pytest.approx(result.best_score)
    trials = [each.attributes for each in telemetry.named("trial")]
    best = [each for each in trials if each["dspy.candidate.id"] == span.attributes["dspy.program.id"]]
    assert best[0]["dspy.trial.number"] == span.attributes["dspy.optimizer.winner.trial"]
    assert [each["dspy.trial.size"] for each in trials] == ([1] * 4 if rows else [3, 3])
    assert max(each["dspy.trial.score"] for each in trials) == pytest.approx(result.best_score)
    assert len(telemetry.named("example")) == result.total_evals


@pytest.mark.parametrize("grouped", [False, True])
def test_several_engines(telemetry: Any, asking: Any, grouped: bool) -> None:
    """Each run is an optimization of its own, side by side or one after another."""
    telemetry.instrument()
    requests = (("/evaluate_examples", {"candidate": "all"}),)
    configs = [by_gepa(20), oa.OptimizeAnythingConfig(engine=Asks(*requests), max_evals=9)]
    call = oa.optimize_parallel if grouped else oa.optimize_sequential
    given = {"dataset": ROWS[:3], "valset": ROWS[3:5]}
    common.quietly(call, "Answer.", evaluator=asking, configs=configs, **given)
    assert sorted(each.name for each in telemetry.named("compile")) == ["compile Asks", "compile GEPA"]
    by_run = {each.attributes[RUN_ID]: each for each in telemetry.named("compile")}
    for id_, span in by_run.items():
        calls = [each for each in telemetry.named("chat") if each.attributes[RUN_ID] == id_]
        assert span.attributes["dspy.usage.lm_calls"] == len(calls) > 0
        assert span.parent is None


def test_an_engine_made_of_others(telemetry: Any, asking: Any) -> None:
    """It may run another one on its own server, and evaluate afterwards."""

    class Outer(Asks):
        def run(self, task: Any, server: Any) -> Any:
            few = {"seed": 1, "parallel": False, "max_candidate_proposals": 2}
            common.quietly(oa.optimize_anything_with_server, server, by_gepa(engine=few))
            return super().run(task, server)

    telemetry.instrument()
    run(asking, oa.OptimizeAnythingConfig(engine=Outer(*ALL_REQUESTS), max_evals=40))
    outer, inner = telemetry.only("compile Outer"), telemetry.only("compile GEPA")
    assert inner.attributes["dspy.optimizer.parent_run.id"] == outer.attributes[RUN_ID]
    assert outer.attributes["dspy.usage.lm_calls"] == len(telemetry.named("chat"))
    assert outer.attributes["dspy.usage.lm_calls"] == inner.attributes["dspy.usage.lm_calls"] + 10


@pytest.mark.parametrize("engine", ["gepa", "other"])
def test_a_batch_evaluator(telemetry: Any, engine: str) -> None:
    dspy.configure(lm=common.HashLM("embedded/hash", cache=False))
    program = dspy.Predict("question -> answer")

    def together(pairs: Any) -> Any:
        for _, row in pairs:
            program(question=row["input"])
        return [rate(candidate, row) for candidate, row in pairs]

    def config() -> Any:
        other = oa.OptimizeAnythingConfig(engine=Asks(*ALL_REQUESTS), max_evals=20)
        return by_gepa() if engine == "gepa" else other

    bare = run(None, config(), batch_evaluator=together)
    telemetry.instrument()
    result = run(None, config(), batch_evaluator=together)
    assert outcome(result) == outcome(bare)
    span = telemetry.only("compile")
    assert span.attributes["dspy.program.name"] == "together"
    assert span.attributes["dspy.usage.task.lm_calls"] == len(telemetry.named("chat")) == result.total_evals
    assert len(telemetry.named("example")) == result.total_evals


def test_what_the_evaluator_raises_reaches_the_engine(telemetry: Any) -> None:
    def failing(candidate: Any, example: Any) -> Any:
        if example is ROWS[1]:
            raise ValueError("no such row")
        return rate(candidate, example)

    requests = (("/evaluate_examples", {"candidate": "all"}),)
    bare, watched = Asks(*requests), Asks(*requests)
    run(failing, oa.OptimizeAnythingConfig(engine=bare))
    telemetry.instrument()
    run(failing, oa.OptimizeAnythingConfig(engine=watched))
    assert bare.scores == watched.scores
    assert watched.answers[0]["errors"] == {"train_1": "no such row"}
    states = [each.attributes.get("error.type") for each in telemetry.named("example")]
    assert sorted(states, key=str) == [*[None] * 4, "ValueError"]
    assert telemetry.only("evaluate").attributes["dspy.evaluation.failures"] == 1


def test_a_budget_of_lm_calls_holds_in_the_servers_threads(telemetry: Any, asking: Any) -> None:
    """It ends GEPA with the best candidate so far, and any other engine where that asks for more."""

    class Here(Asks):
        def run(self, task: Any, server: Any) -> Any:
            return [server.evaluate_examples(candidate, split="all") for candidate in ("first", "second")]

    telemetry.instrument()
    with dspy_otel.budget(lm_calls=12):
        run(asking, by_gepa())
    assert 12 <= telemetry.only("compile GEPA").attributes["dspy.usage.lm_calls"] < 40
    with dspy_otel.budget(lm_calls=6), pytest.raises(dspy_otel.BudgetExceeded) as stopped:
        run(asking, oa.OptimizeAnythingConfig(engine=Here()))
    assert stopped.value.program == {"current_candidate": "first"}
    assert 6 <= telemetry.only("compile Here").attributes["dspy.usage.lm_calls"] < 10  # those in flight end


def test_a_run_that_goes_on_is_one_run(telemetry: Any) -> None:
    telemetry.instrument()
    for evals in (20, 40):
        run(config=dataclasses.replace(by_gepa(evals), run_dir="state"))
    first, second = telemetry.named("compile GEPA")
    assert [span.attributes["dspy.optimizer.attempt"] for span in (first, second)] == [1, 2]
    assert first.attributes[RUN_ID] == second.attributes[RUN_ID]


def test_an_evaluator_that_optimizes(telemetry: Any) -> None:
    """Also before the engine has begun, on the test set: an optimization inside, with trials of its own."""
    inner: list[Any] = []

    def nested(candidate: Any, example: Any) -> Any:
        if not inner:
            inner.append(None)
            inner[0] = gepa_runs.optimize_anything(calls=10, parallel=False)
        return rate(candidate, example)

    telemetry.instrument()
    run(nested, by_gepa(20), test_set=ROWS[5:6])
    outer, inside = telemetry.named("compile GEPA")
    assert inside.attributes["dspy.optimizer.parent_run.id"] == outer.attributes[RUN_ID]
    for span in (inside, outer):
        own = [each for each in telemetry.named("trial") if each.attributes[RUN_ID] == span.attributes[RUN_ID]]
        assert len(own) == span.attributes["dspy.optimizer.trials.done"] > 2


def test_suppressed(telemetry: Any, asking: Any) -> None:
    from opentelemetry.instrumentation.utils import suppress_instrumentation

    telemetry.instrument()
    with suppress_instrumentation():
        run(asking, by_gepa(10))
    assert not telemetry.named("compile")


def test_gepa_without_its_front(telemetry: Any) -> None:
    """Who calls what is behind it has an optimization as before."""
    telemetry.instrument()
    result = gepa_runs.optimize_anything()
    span = telemetry.only("compile GEPA")
    assert span.attributes["dspy.program.name"] == "rate"
    assert span.attributes["dspy.optimizer.examples.evaluated"] == result.total_metric_calls
