"""What a quality gate runs on both versions of a program: an evaluation, and nothing about telemetry.

`workflow.yml` beside it runs this under `opentelemetry-instrument`, once for the base of a pull request and once for
its change, and lets `dspy-otel compare` decide. With OPENAI_API_KEY set it runs on a real model, else on a small
embedded one.
"""

from __future__ import annotations

import os

import dspy

from dspy_otel.cli.demo.lm import embedded_lm
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family

if __name__ == "__main__":
    dspy.configure(lm=dspy.LM("openai/gpt-4o-mini") if os.environ.get("OPENAI_API_KEY") else embedded_lm())
    program = ColourFamily()
    dspy.Evaluate(devset=load_examples("val", 24), metric=same_family, num_threads=4)(program)
