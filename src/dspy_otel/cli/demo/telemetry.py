"""Switches telemetry on for the demo, and keeps what was recorded so that it can be shown."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

import dspy_otel
from dspy_otel.mlflow.backends import open_backend
from dspy_otel.mlflow.target import Target
from dspy_otel.record.model import Evaluation, LMCall, Trial
from dspy_otel.record.spans import Kind, Part, kind_of, read

EXPERIMENT = "dspy-otel demo"
"""Name of the MLflow experiment the demo writes to."""


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
        found = [one for one in self._read(part, Kind.EVALUATION) if isinstance(one, Evaluation)]
        return sorted((one for one in found if one.score is not None), key=lambda one: one.started or 0)

    def trials(self, part: str | None = None) -> list[Trial]:
        """The trials of one part, or all of them, in the order in which they ended."""
        return [one for one in self._read(part, Kind.TRIAL) if isinstance(one, Trial)]

    def totals(self, part: str | None = None) -> Counter[str]:
        """Counts of one part, or of all: `spans`, `traces`, `lm_calls`, `cache_hits`, and both kinds of tokens."""
        spans = self.of(part)
        totals: Counter[str] = Counter(spans=len(spans), traces=len({ids_of(span)[0] for span in spans}))
        for call in self._read(part, Kind.LM_CALL):
            if isinstance(call, LMCall):
                totals["lm_calls"] += 1
                totals["cache_hits"] += call.cache_hit
                totals["input_tokens"] += call.input_tokens or 0
                totals["output_tokens"] += call.output_tokens or 0
        return totals

    def _read(self, part: str | None, kind: Kind) -> Iterator[Part | None]:
        return (read(span, kind) for span in self.of(part) if kind_of(span) is kind)


def open_mlflow(tracking_uri: str) -> None:
    """Find out whether traces can be written there, which is better known before all of the work than after it.

    Raises:
        ExportError: they cannot; the message says what to do.
    """
    backend = open_backend(Target(tracking_uri, EXPERIMENT))
    try:
        backend.find_run("none")
    finally:
        backend.close()


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
