"""A plain DSPy program, without one line of telemetry. Watch it from outside:

    pip install 'dspy-otel[instruments,otlp]'
    OTEL_TRACES_EXPORTER=console OTEL_METRICS_EXPORTER=none opentelemetry-instrument python examples/quickstart.py

It runs on a small embedded model; with `--model openai/gpt-4o-mini`, or OPENAI_API_KEY set, on a real one.
"""

from __future__ import annotations

import argparse
import os

import dspy

from dspy_otel.cli.demo.lm import embedded_lm


class Palette(dspy.Module):
    """Name a colour, then say what it goes with."""

    def __init__(self) -> None:
        super().__init__()
        self.describe = dspy.ChainOfThought("colour_name -> description")
        self.pair = dspy.Predict("colour_name, description -> goes_with")

    def forward(self, colour_name: str) -> dspy.Prediction:
        """A prediction with `goes_with`."""
        description = self.describe(colour_name=colour_name).description
        return self.pair(colour_name=colour_name, description=description)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a small DSPy program.")
    parser.add_argument("--model", default="openai/gpt-4o-mini" if os.environ.get("OPENAI_API_KEY") else None)
    model = parser.parse_args().model
    dspy.configure(lm=dspy.LM(model) if model else embedded_lm())
    print(Palette()(colour_name="dusty purple").goes_with)


if __name__ == "__main__":
    main()
