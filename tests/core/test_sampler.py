"""A sampler of the program's own that returns no attributes, or only its own, takes none of ours away."""

from __future__ import annotations

from collections import Counter
from typing import Any

import dspy
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    ParentBased,
    ParentBasedTraceIdRatio,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import NoOpTracer

from dspy_otel import DSPyInstrumentor
from dspy_otel.core.attributes import keeps_attributes
from tests.optimizers.common import RUNS, quietly, scripted_lm


class Forgetful(Sampler):
    def __init__(self, own: dict[str, Any] | None) -> None:
        self._own = own

    def should_sample(self, *_: Any, **__: Any) -> SamplingResult:
        return SamplingResult(Decision.RECORD_AND_SAMPLE, self._own)

    def get_description(self) -> str:
        return "forgetful"


def attributes(sampler: Sampler) -> Counter[tuple[str, str]]:
    """How often each attribute is there, by the span's name."""
    spans = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    DSPyInstrumentor().instrument(tracer_provider=provider, capture_content="span_only")
    quietly(RUNS["BootstrapFewShotWithRandomSearch"], scripted_lm())
    DSPyInstrumentor().uninstrument()
    return Counter(
        (span.name, key) for span in spans.get_finished_spans() for key in span.attributes or () if key != "own"
    )


@pytest.mark.parametrize("sampler", [Forgetful(None), Forgetful({"own": 1}), ParentBased(Forgetful(None))])
def test_a_sampler_that_forgets_the_attributes(sampler: Sampler) -> None:
    assert attributes(sampler) == attributes(ALWAYS_ON)


def test_only_samplers_of_the_sdks_own_are_trusted() -> None:
    samplers = {
        True: (ALWAYS_ON, ALWAYS_OFF, ParentBased(ALWAYS_ON), TraceIdRatioBased(0.5), ParentBasedTraceIdRatio(0.5)),
        False: (Forgetful(None), ParentBased(Forgetful(None)), ParentBased(ParentBased(Forgetful(None)))),
    }
    for trusted, each in samplers.items():
        for sampler in each:
            tracer = TracerProvider(sampler=sampler, shutdown_on_exit=False).get_tracer("tests")
            assert keeps_attributes(tracer) is trusted
    assert not keeps_attributes(NoOpTracer())
