"""Every LM call knows what it is for; sums agree wherever they are taken; metrics move with each trial."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import dspy
import pytest

from tests.optimizers import common
from tests.optimizers.common import compile_span, lm_calls, quietly, scripted_lm, trials

SUMS = {"lm_calls": None, "input_tokens": "gen_ai.usage.input_tokens", "output_tokens": "gen_ai.usage.output_tokens"}


def sums(calls: list[Any]) -> Counter[str]:
    """The totals of some LM calls, overall and by role, as `dspy.usage.*` would give them."""
    total: Counter[str] = Counter()
    for call in calls:
        for prefix in ("", f"{call.attributes['dspy.lm.role']}."):
            for name, key in SUMS.items():
                total[prefix + name] += 1 if key is None else call.attributes.get(key, 0)
            total[f"{prefix}microdollars"] += round(call.attributes.get("dspy.lm.cost", 0) * 1e6)
    return total


def told(span: Any) -> Counter[str]:
    """The totals that a span tells."""
    result: Counter[str] = Counter()
    for key, value in span.attributes.items():
        name = key.removeprefix("dspy.usage.")
        if name != key and name.rpartition(".")[2] in SUMS:
            result[name] = value
        elif name != key and name.endswith("cost"):
            result[name.removesuffix("cost") + "microdollars"] = round(value * 1e6)
    return result


@pytest.mark.parametrize("name", sorted(common.RUNS))
def test_lm_calls_add_up(telemetry: Any, name: str) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    quietly(common.RUNS[name], lm)
    calls = lm_calls(telemetry)
    span = compile_span(telemetry, name)
    assert {call.attributes["dspy.lm.role"] for call in calls} == common.SCENARIOS[name].roles
    assert all("dspy.optimizer.phase" in call.attributes for call in calls)
    assert +told(span) == +sums(calls)

    # Each call belongs to one trial, or to one phase in which no trial runs.
    by_trial: defaultdict[tuple[Any, Any], list[Any]] = defaultdict(list)
    rest = []
    for call in calls:
        key = call.attributes["dspy.optimizer.run.id"], call.attributes.get("dspy.trial.number")
        (by_trial[key] if key[1] is not None else rest).append(call)
    assert all(call.attributes["dspy.candidate.id"] for own in by_trial.values() for call in own) or name == "SIMBA"
    found = telemetry.named("trial")
    assert len(found) == len(by_trial)
    for trial in found:
        own = by_trial[trial.attributes["dspy.optimizer.run.id"], trial.attributes["dspy.trial.number"]]
        assert +told(trial) == +sums(own)
    phases = [
        phase
        for kind in ("bootstrap", "propose", "reflect")
        for phase in telemetry.spans
        if phase.name == kind and not any(up.name == kind for up in ancestors(telemetry, phase))
    ]
    total: Counter[str] = Counter()
    for phase in phases:
        total += told(phase)
    assert total == +sums(rest)


def ancestors(telemetry: Any, span: Any) -> list[Any]:
    by_id = {one.context.span_id: one for one in telemetry.spans}
    found = []
    while span.parent is not None and span.parent.span_id in by_id:
        span = by_id[span.parent.span_id]
        found.append(span)
    return found


def test_a_judge_is_told_from_the_program(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    quietly(common.run_mipro, lm, metric=common.judged)
    roles = Counter(call.attributes["dspy.lm.role"] for call in lm_calls(telemetry))
    evaluated = compile_span(telemetry, "MIPROv2").attributes["dspy.optimizer.examples.evaluated"]
    attempts = len(telemetry.named("attempt "))
    assert roles["judge"] == evaluated + attempts
    assert roles["task"] == 2 * evaluated
    assert roles["teacher"] == 2 * attempts


def test_gepa_feedback_calls_are_the_judges(telemetry: Any) -> None:
    def metric(example: Any, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        dspy.Predict("family -> verdict")(family=str(getattr(prediction, "family", "")))
        return common.same_family_with_feedback(example, prediction)

    lm = scripted_lm()
    telemetry.instrument()
    optimizer = dspy.GEPA(metric=metric, reflection_lm=lm, max_metric_calls=40, num_threads=2)
    train, val = common.load_examples("train", 8), common.load_examples("val", 6)
    quietly(optimizer.compile, common.ColourFamily(), trainset=train, valset=val)
    outside = [call for call in lm_calls(telemetry) if "dspy.trial.number" not in call.attributes]
    roles = Counter(call.attributes["dspy.lm.role"] for call in outside)
    assert set(roles) == {"judge", "reflection"}
    assert {call.attributes["dspy.optimizer.phase"] for call in outside} == {"reflect"}


def test_cached_calls_are_free_and_counted_apart(telemetry: Any) -> None:
    from dspy_otel.cli.demo.lm import embedded_lm

    if not hasattr(dspy, "lm15"):
        pytest.skip("on DSPy 3.3 only LMs on LiteLLM are cached")
    scripted_lm()
    lm = embedded_lm()
    dspy.configure(lm=lm)
    telemetry.instrument()
    quietly(common.run_random_search, lm)
    quietly(common.run_random_search, lm)
    _, again = telemetry.named("compile BootstrapFewShotWithRandomSearch")
    assert again.attributes["dspy.usage.lm_calls"] == again.attributes["dspy.usage.cache_hits"]
    assert "dspy.usage.input_tokens" not in again.attributes
    assert "dspy.usage.unpriced_calls" not in again.attributes


def test_metrics_move_with_each_trial(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    seen = []

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        points = telemetry.metrics().get("dspy.optimizer.trials")
        seen.append(sum(point.value for point in points.data.data_points) if points else 0)
        return common.same_family(example, prediction)

    quietly(common.run_mipro, lm, metric=metric)
    assert sorted(set(seen)) == list(range(9))

    def values(name: str, label: str) -> dict[Any, Any]:
        return {point.attributes.get(label): getattr(point, "value", None) for point in telemetry.metric(name)}

    span = compile_span(telemetry, "MIPROv2").attributes
    kinds = Counter(trial["trial.kind"] for trial in trials(telemetry, "MIPROv2"))
    assert values("dspy.optimizer.trials", "dspy.trial.kind") == kinds
    best = {
        point.attributes["dspy.optimizer.name"]: point.value for point in telemetry.metric("dspy.optimizer.best_score")
    }
    assert best == {"MIPROv2": span["dspy.optimizer.best_score"]}
    assert values("dspy.optimizer.trials.planned", "dspy.optimizer.name") == {"MIPROv2": 9}
    assert values("dspy.optimizer.examples", "dspy.optimizer.name") == {
        "MIPROv2": span["dspy.optimizer.examples.evaluated"]
    }
    calls = values("dspy.optimizer.lm_calls", "dspy.lm.role")
    costs = values("dspy.optimizer.cost", "dspy.lm.role")
    for role in ("task", "teacher", "proposer"):
        assert calls[role] == span[f"dspy.usage.{role}.lm_calls"]
        assert costs[role] == pytest.approx(span[f"dspy.usage.{role}.cost"])
    (scores,) = [
        point
        for point in telemetry.metric("dspy.optimizer.trial.score")
        if point.attributes["dspy.trial.kind"] == "minibatch"
    ]
    assert scores.count == kinds["minibatch"]
    assert {point.attributes["dspy.optimizer.name"] for point in telemetry.metric("dspy.optimizer.duration")} >= {
        "MIPROv2"
    }
    forbidden = ("run.id", "trial.number", "candidate.id", "program.id", "example")
    for metric_name, found in telemetry.metrics().items():
        if metric_name.startswith("dspy.optimizer"):
            keys = {key for point in found.data.data_points for key in point.attributes}
            assert not [key for key in keys if key.endswith(forbidden)]


def test_examples_are_linked_and_stamped(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument()
    quietly(common.run_simba, lm)
    evaluations = {span.context.span_id: span for span in telemetry.named("evaluate ")}
    examples = telemetry.named("example ")
    assert examples
    for example in examples:
        assert example.parent is None
        (link,) = example.links
        evaluate = evaluations[link.context.span_id]
        assert example.context.span_id in {back.context.span_id for back in evaluate.links}
        for key in ("dspy.optimizer.run.id", "dspy.trial.number"):
            assert example.attributes[key] == evaluate.attributes[key]
        assert "dspy.example.score" in example.attributes
        assert "dspy.example.index" in example.attributes


def test_nested_mode_is_one_tree(telemetry: Any) -> None:
    lm = scripted_lm()
    telemetry.instrument(evaluation_traces="nested")
    quietly(common.run_simba, lm)
    assert len({span.context.trace_id for span in telemetry.spans}) == 1
    ids = {span.context.span_id for span in telemetry.spans}
    assert [span.name for span in telemetry.spans if span.parent is None] == ["compile SIMBA"]
    assert all(span.parent is None or span.parent.span_id in ids for span in telemetry.spans)


@pytest.mark.parametrize("name", ["MIPROv2", "SIMBA", "GEPA"])
def test_the_same_spans_on_one_and_on_many_threads(telemetry: Any, name: str) -> None:
    lm = scripted_lm()
    telemetry.instrument()

    def spans(threads: int) -> Counter[Any]:
        telemetry.clear()
        quietly(common.RUNS[name], lm, threads=threads)
        ids = {span.context.span_id for span in telemetry.spans}
        assert not [span.name for span in telemetry.spans if span.parent and span.parent.span_id not in ids]
        keys = ("dspy.trial.number", "dspy.trial.score", "dspy.candidate.id", "dspy.example.index", "dspy.lm.role")
        return Counter((span.name, *(span.attributes.get(key) for key in keys)) for span in telemetry.spans)

    assert spans(1) == spans(8)


def test_a_trial_whose_evaluation_raises_ends_once(telemetry: Any, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def metric(example: Any, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        calls.append(1)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return common.same_family_with_feedback(example, prediction)

    lm = scripted_lm()
    telemetry.instrument()
    optimizer = dspy.GEPA(metric=metric, reflection_lm=lm, max_metric_calls=90, num_threads=1)
    train, val = common.load_examples("train", 16), common.load_examples("val", 8)
    with pytest.raises(BaseException) as raised:
        quietly(optimizer.compile, common.ColourFamily(), trainset=train, valset=val)
    span = compile_span(telemetry, "GEPA")
    assert span.attributes["dspy.optimizer.outcome"] == (
        "failed" if isinstance(raised.value, Exception) else "interrupted"
    )
    found = trials(telemetry, "GEPA")
    assert [trial["trial.number"] for trial in found] == list(range(1, len(found) + 1))
    assert span.attributes["dspy.optimizer.trials.done"] == len(found)
    assert telemetry.named("trial")[-1].status.status_code.name == "ERROR"
    assert not [record for record in caplog.records if "ended span" in record.getMessage()]
    assert not [record for record in caplog.records if record.name == "dspy_otel"]
