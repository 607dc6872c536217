"""An evaluation, with telemetry switched on in code beside an OpenTelemetry set-up of your own.

    pip install 'dspy-otel[instruments,otlp]'
    python examples/evaluate.py

Prints each example's score as it was recorded on its span. With `--model openai/gpt-4o-mini`, or OPENAI_API_KEY set, it
runs on a real model, else on a small embedded one.
"""

from __future__ import annotations

import argparse
import os

import dspy
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel.cli.demo.lm import embedded_lm
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family
from dspy_otel.instrumentor import DSPyInstrumentor


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a small DSPy program.")
    parser.add_argument("--model", default="openai/gpt-4o-mini" if os.environ.get("OPENAI_API_KEY") else None)
    model = parser.parse_args().model

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    DSPyInstrumentor().instrument(tracer_provider=provider)

    dspy.configure(lm=dspy.LM(model) if model else embedded_lm())
    evaluate = dspy.Evaluate(devset=load_examples("val", 10), metric=same_family, num_threads=4)
    print("score:", evaluate(ColourFamily()).score)
    for span in spans.get_finished_spans():
        if "dspy.example.score" in span.attributes:
            print("example", span.attributes["dspy.example.index"], "score", span.attributes["dspy.example.score"])


if __name__ == "__main__":
    main()
