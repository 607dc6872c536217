"""Switches telemetry on for the demo, and keeps what was recorded so that it can be shown."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

import dspy_otel
from dspy_otel import semconv

EXPERIMENT = "dspy-otel demo"
"""Name of the MLflow experiment the demo writes to."""


@dataclass(frozen=True)
class Evaluation:
    """One recorded evaluation: its place in time (ns), number of examples and score (0 to 100)."""

    start: int
    size: int
    score: float


class Recorder(SpanProcessor):
    """Keeps every finished span, under the part of the demo that was running (`part`)."""

    def __init__(self) -> None:
        self.part = ""
        self.spans: list[tuple[str, ReadableSpan]] = []
        self._lock = threading.Lock()

    def on_end(self, span: ReadableSpan) -> None:
        """Keep a finished span."""
        with self._lock:
            self.spans.append((self.part, span))

    def of(self, part: str | None = None) -> list[ReadableSpan]:
        """The spans of one part, or all of them."""
        with self._lock:
            return [span for where, span in self.spans if part in (None, where)]

    def evaluations(self, part: str) -> list[Evaluation]:
        """The scored evaluations of one part, oldest first."""
        found = [
            Evaluation(span.start_time or 0, attribute(span, semconv.EVALUATION_SIZE, 0), score)
            for span in self.of(part)
            if span.name.startswith(semconv.SPAN_EVALUATE + " ")
            and (score := attribute(span, semconv.EVALUATION_SCORE, None)) is not None
        ]
        return sorted(found, key=lambda evaluation: evaluation.start)

    def totals(self, part: str | None = None) -> Counter[str]:
        """Counts of one part, or of all: `spans`, `traces`, `lm_calls`, `cache_hits`, and both kinds of tokens."""
        spans = self.of(part)
        totals: Counter[str] = Counter(spans=len(spans), traces=len({ids_of(span)[0] for span in spans}))
        for span in spans:
            if is_lm_call(span):
                totals["lm_calls"] += 1
                totals["cache_hits"] += attribute(span, semconv.LM_CACHE_HIT, False) is True
                totals["input_tokens"] += attribute(span, semconv.GEN_AI_USAGE_INPUT_TOKENS, 0)
                totals["output_tokens"] += attribute(span, semconv.GEN_AI_USAGE_OUTPUT_TOKENS, 0)
        return totals


def set_up_telemetry(recorder: Recorder, tracking_uri: str, content: bool) -> Callable[[], None]:
    """Instrument DSPy, with spans going to `recorder` and to an MLflow store.

    `tracking_uri` is MLflow's (`sqlite:///...` or `http://...`); `content` is whether prompts and answers are
    recorded. The function it returns switches instrumentation off and sends what is left.
    """
    # The embedded model answers in microseconds: room for what is made faster than a store can write it.
    os.environ.setdefault("OTEL_BSP_MAX_QUEUE_SIZE", "100000")
    instrumentor = dspy_otel.configure(
        service_name="dspy-otel-demo",
        mlflow=tracking_uri,
        experiment=EXPERIMENT,
        capture_content="span_only" if content else "no_content",
    )
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):  # not when OTEL_SDK_DISABLED is set
        provider.add_span_processor(recorder)

    def finish() -> None:
        instrumentor.uninstrument()
        if isinstance(provider, TracerProvider):
            provider.shutdown()

    return finish


def ids_of(span: ReadableSpan) -> tuple[int, int]:
    """A span's trace id and span id."""
    context = span.get_span_context()
    return (context.trace_id, context.span_id) if context else (0, 0)


def attribute(span: ReadableSpan, key: str, default: Any) -> Any:
    """A span's attribute, or `default`."""
    return (span.attributes or {}).get(key, default)


def is_lm_call(span: ReadableSpan) -> bool:
    """Whether a span is one call of a language model."""
    operation = attribute(span, semconv.GEN_AI_OPERATION_NAME, None)
    return operation in {semconv.OPERATION_CHAT, semconv.OPERATION_TEXT_COMPLETION}
