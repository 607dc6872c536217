"""How many traces of examples an optimization leaves: the trial table, totals and metrics are the same in any mode."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from dspy_otel.optimizers import trace_sampling
from tests.optimizers import common
from tests.optimizers.common import compile_span, quietly, scripted_lm, trials

MODES = ["all", "failed_and_best", "none"]
OPTIMIZERS = ["MIPROv2", "GEPA", "SIMBA", "BootstrapFewShotWithRandomSearch", "COPRO"]


def run(telemetry: Any, name: str, mode: str, **options: Any) -> Any:
    lm = scripted_lm()
    telemetry.instrument(optimization_traces=mode, **options)
    return quietly(common.RUNS[name], lm)


def steady(attributes: Any) -> dict[str, Any]:
    # Threads add up costs in any order.
    return {
        key: round(value, 9) if isinstance(value, float) else value
        for key, value in attributes.items()
        if "run.id" not in key and "evaluation.id" not in key
    }


def of_the_run(telemetry: Any) -> list[Any]:
    """All spans that say something about the optimization itself, without what differs between two runs."""
    kinds = ("compile ", "trial", "evaluate ", "bootstrap", "propose", "search", "sample", "reflect", "final_")
    found = [(span.name, steady(span.attributes)) for span in telemetry.spans if span.name.startswith(kinds)]
    return sorted(found, key=str)


def roots(telemetry: Any) -> list[Any]:
    return [span for span in telemetry.spans if span.name.startswith(("example ", "attempt "))]


def counters(telemetry: Any) -> list[Any]:
    names = ["dspy.optimizer.trials", "dspy.optimizer.examples", "dspy.optimizer.lm_calls", "dspy.evaluation.examples"]
    points = [(name, point) for name in names for point in telemetry.metric(name)]
    return sorted((name, sorted(point.attributes.items()), point.value) for name, point in points)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trial_table_is_complete_in_every_mode(name: str) -> None:
    from tests.support.spans import Recorder

    said = []
    for mode in MODES:
        recorder = Recorder()
        try:
            run(recorder, name, mode)
            said.append((of_the_run(recorder), counters(recorder), len(roots(recorder))))
        finally:
            recorder.shutdown()
    (spans, points, every), (fewer_spans, fewer_points, some), (no_spans, no_points, none) = said
    assert spans == fewer_spans == no_spans
    assert points == fewer_points == no_points
    assert len(trials_of := [span for span in spans if span[0] == "trial"]) > 2, trials_of
    assert every > some > 0 == none


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("traces", ["linked", "nested"])
def test_failed_ones_and_those_of_the_best_trials_are_whole(telemetry: Any, name: str, traces: str) -> None:
    run(telemetry, name, "failed_and_best", evaluation_traces=traces, capture_content="span_only")
    by_id = {span.context.span_id: span for span in telemetry.spans}
    best = {trial["trial.number"]: trial for trial in trials(telemetry, name) if trial["trial.is_best"]}
    kept: dict[int, int] = {}
    for span in telemetry.named("example "):
        attributes = span.attributes
        number = attributes.get("dspy.trial.number")
        own = attributes["dspy.optimizer.run.id"] == compile_span(telemetry, name).attributes["dspy.optimizer.run.id"]
        if own and number in best:
            kept[number] = kept.get(number, 0) + 1
        else:
            assert attributes.get("dspy.example.score", 0) <= 0
        assert attributes["input.value"]
        assert traces == "nested" or span.parent is None
    assert kept == {number: trial["trial.size"] for number, trial in best.items()}
    for attempt in telemetry.named("attempt "):
        assert attempt.attributes.get("dspy.bootstrap.accepted") is not True
    # Nothing is orphaned, parents are around their children, and LM calls are there with all they say.
    for span in telemetry.spans:
        if span.parent is not None:
            parent = by_id[span.parent.span_id]
            assert parent.start_time <= span.start_time <= span.end_time
            assert span.name == "trial" or span.end_time <= parent.end_time
        if span.name.startswith("chat "):
            assert span.attributes["gen_ai.output.messages"]
    links = {link.context.span_id for span in telemetry.spans for link in span.links}
    assert links <= set(by_id)
    if traces == "linked":
        assert {span.context.span_id for span in telemetry.named("example ")} & links


def test_none_leaves_only_the_compile_trace(telemetry: Any) -> None:
    run(telemetry, "MIPROv2", "none")
    assert len({span.context.trace_id for span in telemetry.spans}) == 1
    assert not any(span.attributes.get("dspy.lm.role") == "task" for span in telemetry.named("chat "))
    assert any(span.attributes.get("dspy.lm.role") == "proposer" for span in telemetry.named("chat "))
    assert compile_span(telemetry, "MIPROv2").attributes["dspy.usage.task.lm_calls"] > 0


def test_an_evaluation_outside_of_an_optimization_leaves_all_its_traces(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument(optimization_traces="none")
    quietly(common.run_random_search, lm)
    assert not roots(telemetry)
    examples = common.load_examples("val", 4)
    quietly(dspy.Evaluate(devset=examples, metric=common.same_family, num_threads=2), common.ColourFamily())
    assert len(roots(telemetry)) == 4


def test_an_example_that_raises_is_kept_with_its_error(telemetry: Any) -> None:
    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        if example.colour_name == bad:
            raise ValueError("no verdict")
        return True

    bad = common.load_examples("val", 8)[3].colour_name
    lm = scripted_lm()
    dspy.settings.configure(max_errors=1000)
    telemetry.instrument(optimization_traces="failed_and_best")
    quietly(common.run_mipro, lm, metric=metric)
    failed = [span for span in telemetry.named("example ") if "error.type" in span.attributes]
    assert len(failed) >= 2
    for span in failed:
        assert span.status.status_code.name == "ERROR"
        assert [event.name for event in span.events] == ["exception"]
        assert any(
            child.name.startswith("invoke_workflow") and child.parent.span_id == span.context.span_id
            for child in telemetry.spans
            if child.parent is not None
        )


def test_a_large_trial_does_not_wait_in_memory(telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_sampling, "MAX_DEFERRED_SPANS", 12)
    run(telemetry, "BootstrapFewShotWithRandomSearch", "failed_and_best")
    passed = [span for span in telemetry.named("example ") if span.attributes["dspy.example.score"] > 0]
    best = [trial for trial in trials(telemetry, "BootstrapFewShotWithRandomSearch") if trial["trial.is_best"]]
    assert 0 < len(passed) <= 2 * len(best)  # an example makes five or six spans
