"""A program on a model of your own: any server with OpenAI's API (llama.cpp, vLLM, LM Studio, Ollama, SGLang, ...).

    pip install 'dspy-otel[instruments]' opentelemetry-sdk
    python examples/local_model.py --url http://127.0.0.1:8080/v1

Prints what was recorded of each call: who answered, where, with how many tokens. There is no price: nobody knows it.
"""

from __future__ import annotations

import argparse
import json
import urllib.request

import dspy
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel import DSPyInstrumentor

RECORDED = (
    *("gen_ai.provider.name", "gen_ai.response.model", "server.address", "server.port"),
    *("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", "dspy.lm.cost", "error.type"),
)


def first_model(url: str) -> str:
    """The first model that a server has."""
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except OSError as error:
        raise SystemExit(f"No server answers at {url} ({error}): start one, or name another with --url.") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a small DSPy program on a local model.")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1", help="of the server")
    parser.add_argument("--model", help="default: the first one that the server has")
    options = parser.parse_args()

    spans = InMemorySpanExporter()  # or dspy_otel.configure(mlflow="sqlite:///mlflow.db")
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    DSPyInstrumentor().instrument(tracer_provider=provider)

    # `openai/` names the API, not the company. A server that wants no key takes any.
    model = f"openai/{options.model or first_model(options.url)}"
    dspy.configure(lm=dspy.LM(model, api_base=options.url, api_key="none", max_tokens=200))
    try:
        print("answer:", dspy.Predict("question -> answer")(question="What colour is grass?").answer)
    except Exception as error:  # a small model may not keep to the form of the answer
        print("no answer that can be read:", type(error).__name__)
    for span in spans.get_finished_spans():
        if "gen_ai.request.model" in span.attributes:
            print(span.name, {name: span.attributes[name] for name in RECORDED if name in span.attributes})


if __name__ == "__main__":
    main()
