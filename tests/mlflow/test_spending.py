"""What a run has spent does not hang on which traces are kept: real optimizations, and a store in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel import DSPyInstrumentor, semconv
from tests.mlflow.test_runs import Exporter, Memory
from tests.optimizers.common import RUNS, quietly, scripted_lm


def spent(optimizer: str, traces: str) -> tuple[list[tuple[int, float]], dict[str, Any], int]:
    """What the outermost run had spent by each trial, totals of its span, and how many example traces there were."""
    memory, spans = Memory(), InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    provider.add_span_processor(BatchSpanProcessor(Exporter(memory)))
    DSPyInstrumentor().instrument(tracer_provider=provider, optimization_traces=traces)
    quietly(RUNS[optimizer], scripted_lm())
    assert provider.force_flush()
    DSPyInstrumentor().uninstrument()
    provider.shutdown()
    found = spans.get_finished_spans()
    (top,) = [
        span
        for span in found
        if span.name.startswith("compile") and semconv.OPTIMIZER_PARENT_RUN_ID not in span.attributes
    ]
    run = memory.runs[f"id of {top.attributes[semconv.OPTIMIZER_RUN_ID]}"]
    names = ("lm_calls", "cost", "input_tokens", "task.lm_calls", "proposer.lm_calls")
    curve = [(point.step, round(point.value, 9)) for point in run["metrics"] if point.key == "cost"]
    totals = {name: top.attributes.get(semconv.USAGE_PREFIX + name) for name in names}
    numbers = json.loads(run["tags"]["dspy.numbers"])
    assert {name: numbers.get(name) for name in names} == pytest.approx(totals)
    return curve, totals, sum(span.name.startswith("example") for span in found)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["MIPROv2", "BootstrapFewShotWithRandomSearch"])
def test_spending_is_the_same_whichever_traces_are_kept(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("MODELS", "PROMPTS", "DATASETS"):
        monkeypatch.setenv(f"OTEL_DSPY_MLFLOW_{part}", "false")  # this store has no registry
    curve, totals, examples = spent(optimizer, "all")
    assert examples
    assert curve[-1][1] == pytest.approx(totals["cost"])
    values = [value for _, value in curve]
    assert values == sorted(values)
    assert values[0] > 0
    for traces in ("none", "failed_and_best"):
        other, other_totals, fewer = spent(optimizer, traces)
        assert fewer < examples
        assert other == curve, traces
        assert other_totals == pytest.approx(totals)
