"""The SDK's limits: it drops the oldest attributes and links of a span that has too many, and cuts long texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy.teleprompt import Teleprompter
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import dspy_otel
from dspy_otel import semconv
from dspy_otel.core.call_context import MAX_LINKS
from tests.optimizers.common import quietly, run_random_search, scripted_lm


class Limited:
    """An SDK with limits, and what it exported."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    def instrument(self, limits: SpanLimits | None = None, **options: Any) -> None:
        provider = TracerProvider(span_limits=limits)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        dspy_otel.instrument(tracer_provider=provider, **options)

    def named(self, word: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name.split(" ")[0] == word]


@pytest.fixture
def limited() -> Iterator[Limited]:
    found = Limited()
    yield found
    found.exporter.shutdown()


@pytest.mark.parametrize("traces", ["all", "failed_and_best"])
@pytest.mark.parametrize("content", ["no_content", "span_only"])
def test_few_attributes_are_allowed_and_every_trial_is_still_known(limited: Limited, content: str, traces: str) -> None:
    limited.instrument(SpanLimits(max_span_attributes=10), capture_content=content, optimization_traces=traces)
    quietly(run_random_search, scripted_lm())

    runs = [span.attributes[semconv.OPTIMIZER_RUN_ID] for span in limited.named("compile")]
    assert any(span.dropped_attributes for span in limited.exporter.get_finished_spans())
    trials = limited.named("trial")
    outer = [trial for trial in trials if trial.attributes[semconv.OPTIMIZER_RUN_ID] == runs[-1]]
    assert [trial.attributes[semconv.TRIAL_NUMBER] for trial in outer] == list(range(1, len(outer) + 1))
    for span in (*limited.named("evaluate"), *limited.named("example")):
        assert span.attributes[semconv.OPTIMIZER_RUN_ID] in runs
        assert span.attributes[semconv.EVALUATION_ID]
        assert span.attributes[semconv.TRIAL_NUMBER] in {trial.attributes[semconv.TRIAL_NUMBER] for trial in trials}


class Crowded(Teleprompter):
    """An optimizer with more parameters than a span may have attributes."""

    def compile(self, student: Any, *, trainset: Any, **parameters: Any) -> Any:
        return student


def test_more_parameters_than_attributes(limited: Limited) -> None:
    limited.instrument()
    rows = [dspy.Example(question="?", answer="!").with_inputs("question")]
    many = {f"parameter_{number}": number for number in range(300)}
    Crowded().compile(dspy.Predict("question -> answer"), trainset=rows, **many)

    (span,) = limited.named("compile")
    assert span.dropped_attributes
    assert span.attributes[semconv.OPTIMIZER_NAME] == "Crowded"
    assert span.attributes[semconv.OPTIMIZER_OUTCOME] == "finished"
    assert len(span.attributes[semconv.OPTIMIZER_RUN_ID]) == 16
    assert span.attributes[semconv.DATASET_TRAIN_SIZE] == 1


def test_an_evaluation_links_as_many_examples_as_a_span_can_and_each_example_links_back(limited: Limited) -> None:
    limited.instrument()
    scripted_lm()
    rows = [dspy.Example(question=str(number), answer="!").with_inputs("question") for number in range(MAX_LINKS + 20)]
    evaluate = dspy.Evaluate(devset=rows, metric=lambda *_: True, num_threads=4, display_progress=False)
    quietly(evaluate, dspy.Predict("question -> answer"))

    (span,) = limited.named("evaluate")
    examples = limited.named("example")
    assert len(span.links) == MAX_LINKS
    assert span.dropped_links == 0
    assert len(examples) == len(rows)
    assert {link.context.span_id for link in span.links} <= {example.context.span_id for example in examples}
    assert all(example.links[0].context.span_id == span.context.span_id for example in examples)
