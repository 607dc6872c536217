"""A sampler of the program's own that returns no attributes, or only its own, takes none of ours away."""

from __future__ import annotations

from collections import Counter
from typing import Any

import dspy
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, Sampler, SamplingResult

from dspy_otel import DSPyInstrumentor
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


@pytest.mark.parametrize("own", [None, {"own": 1}])
def test_a_sampler_that_forgets_the_attributes(own: dict[str, Any] | None) -> None:
    assert attributes(Forgetful(own)) == attributes(ALWAYS_ON)
