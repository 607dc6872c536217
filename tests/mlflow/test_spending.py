"""What a run has spent does not hang on which traces are kept: real optimizations, and a store in memory."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel import DSPyInstrumentor, semconv
from tests.mlflow.test_runs import Exporter, Memory
from tests.optimizers.common import RUNS, quietly, scripted_lm


def spent(optimizer: str, traces: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Curves of the outermost run, totals of its span, and how many example traces there were."""
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
    curves = {
        name: [(point.step, round(point.value, 9)) for point in run["metrics"] if point.key == name] for name in names
    }
    totals = {name: top.attributes.get(semconv.USAGE_PREFIX + name) for name in names}
    return curves, totals, sum(span.name.startswith("example") for span in found)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["MIPROv2", "BootstrapFewShotWithRandomSearch"])
def test_spending_is_the_same_whichever_traces_are_kept(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("MODELS", "PROMPTS", "DATASETS"):
        monkeypatch.setenv(f"OTEL_DSPY_MLFLOW_{part}", "false")  # this store has no registry
    curves, totals, examples = spent(optimizer, "all")
    assert examples
    for name, curve in curves.items():
        assert (curve[-1][1] if curve else None) == pytest.approx(totals[name]), name
    values = [value for _, value in curves["lm_calls"]]
    assert values == sorted(values)
    assert values[0] > 0
    for traces in ("none", "failed_and_best"):
        other, other_totals, fewer = spent(optimizer, traces)
        assert fewer < examples
        assert other == curves, traces
        assert other_totals == pytest.approx(totals)
