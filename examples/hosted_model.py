"""A program on a hosted model.

    pip install 'dspy-otel[instruments]' opentelemetry-sdk
    OPENAI_API_KEY=... python examples/hosted_model.py --model openai/gpt-4o-mini

Any provider that DSPy knows will do: `anthropic/...` with ANTHROPIC_API_KEY, `gemini/...` with GEMINI_API_KEY, ...
Prints what was recorded of each call, and what the program cost in all. The second question is answered from DSPy's
cache: it bills nothing.
"""

from __future__ import annotations

import argparse

import dspy
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel import DSPyInstrumentor

RECORDED = (
    *("gen_ai.provider.name", "gen_ai.response.model", "server.address", "gen_ai.usage.input_tokens"),
    *("gen_ai.usage.output_tokens", "dspy.lm.cache_hit", "dspy.lm.cost", "dspy.lm.cost.saved", "error.type"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a small DSPy program on a hosted model.")
    parser.add_argument("--model", default="openai/gpt-4o-mini")
    parser.add_argument("--url", help="another address of the provider's API, such as a gateway's")
    options = parser.parse_args()

    spans = InMemorySpanExporter()  # or dspy_otel.configure(mlflow="http://localhost:5000")
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    DSPyInstrumentor().instrument(tracer_provider=provider)

    dspy.configure(lm=dspy.LM(options.model, **({"api_base": options.url} if options.url else {})))
    answer = dspy.Predict("question -> answer")
    for _ in range(2):
        print("answer:", answer(question="What colour is grass?").answer)
    for span in spans.get_finished_spans():
        if "gen_ai.request.model" in span.attributes:
            print(span.name, {name: span.attributes[name] for name in RECORDED if name in span.attributes})
    costs = [span.attributes.get("dspy.lm.cost", 0.0) for span in spans.get_finished_spans()]
    print(f"in all: {sum(costs):.6f} USD")


if __name__ == "__main__":
    main()
