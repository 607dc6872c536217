"""Spans of optimizations as the instrumentation makes them, without DSPy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel import semconv
from tests.reports.test_optimizations import otlp_json


class Program:
    """A program that optimizes: :meth:`start`, :meth:`trial` as often as needed, :meth:`end`."""

    def __init__(
        self, *processors: SpanProcessor, content: str | None = None, resource: Mapping[str, Any] | None = None
    ) -> None:
        self.memory = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False, resource=Resource(resource or {}))
        for processor in (*processors, SimpleSpanProcessor(self.memory)):
            self.provider.add_span_processor(processor)
        self._tracer = self.provider.get_tracer(semconv.SCOPE_NAME)
        self._content = content
        self._stamps: dict[str, Any] = {}
        self.compile: Any = None
        self.phase: Any = None

    def start(self, id_: str = "r1", planned: int | None = 4) -> None:
        self._stamps = {
            semconv.OPTIMIZER_RUN_ID: id_,
            semconv.OPTIMIZER_NAME: "Searcher",
            semconv.PROGRAM_NAME: "Capitals",
        }
        planning = {} if planned is None else {semconv.OPTIMIZER_TRIALS_PLANNED: planned}
        self.compile = self._span("compile Searcher", None, **{semconv.INITIAL_PROGRAM_ID: "p1"}, **planning)
        self.phase = self._span("search", self.compile, **{semconv.OPTIMIZER_PHASE: "search"})

    def trial(self, number: int, score: float, kind: str = "full", best: bool = True) -> None:
        kind = "baseline" if number == 1 else kind
        span = self._span("trial", self.phase, **{semconv.TRIAL_NUMBER: number, semconv.TRIAL_KIND: kind})
        state = json.dumps({"qa": {"signature": {"instructions": f"{self._content} {number}"}, "demos": []}})
        ended = {
            semconv.TRIAL_SCORE: score,
            semconv.TRIAL_BEST_SCORE: score,
            semconv.TRIAL_IS_BEST: best,
            semconv.TRIAL_SIZE: 4,
            semconv.CANDIDATE_ID: f"p{number}",
            semconv.OPTIMIZER_PHASE: "search",
            "dspy.usage.lm_calls": 4,
            "dspy.usage.input_tokens": 1000,
            "dspy.usage.cost": 0.5,
            **({} if self._content is None else {semconv.PROGRAM_STATE: state}),
        }
        for name, value in ended.items():
            span.set_attribute(name, value)
        span.end()

    def end(self, outcome: str = "finished", best: float = 1.0) -> None:
        self.phase.end()
        for name, value in {
            semconv.OPTIMIZER_OUTCOME: outcome,
            semconv.OPTIMIZER_BASELINE_SCORE: 0.25,
            semconv.OPTIMIZER_BEST_SCORE: best,
            semconv.OPTIMIZER_GAIN: best - 0.25,
        }.items():
            self.compile.set_attribute(name, value)
        if outcome == "failed":
            self.compile.set_attribute("error.type", "RateLimitError")
            self.compile.set_status(trace.StatusCode.ERROR)
        self.compile.end()

    def _span(self, name: str, parent: Any, **attributes: Any) -> Any:
        context = None if parent is None else trace.set_span_in_context(parent)
        return self._tracer.start_span(name, context, attributes={**self._stamps, **attributes})

    def lines(self) -> str:
        """What has ended, as lines of a file."""
        return otlp_json(self.ended())

    def ended(self) -> Iterable[ReadableSpan]:
        return self.memory.get_finished_spans()
