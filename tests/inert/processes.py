"""A program that starts processes in its middle. Says on its last line how they ended."""

from __future__ import annotations

import json
import multiprocessing
import sys
from typing import Any

import dspy
from opentelemetry import _logs, metrics, trace

import dspy_otel
from tests.inert.test_concurrency import Chain, Counting


def flush() -> None:
    """Send what there is: a child of multiprocessing ends without its exit handlers."""
    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider(), _logs.get_logger_provider()):
        assert provider.force_flush(200_000)  # type: ignore[attr-defined]


def evaluate(number: int) -> None:
    rows = [dspy.Example(question=f"number{number} row {row}").with_inputs("question") for row in range(2)]
    dspy.Evaluate(devset=rows, metric=lambda *_: 1.0, num_threads=2, display_progress=False)(Chain())


def child(number: int, carrier: dict[str, str]) -> None:
    """In a new process, or in a copy of the old one with all its state."""
    if not dspy_otel.DSPyInstrumentor().is_instrumented_by_opentelemetry:
        dspy_otel.configure()
    with dspy.context(lm=Counting(), disable_history=True, trace=None):
        with dspy_otel.attach(carrier):
            Chain()(question=f"child {number} of number{number}")
        evaluate(number)
    flush()


class Starts(dspy.Module):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def forward(self, question: str) -> Any:
        context = multiprocessing.get_context(self.method)
        carrier = dspy_otel.inject()
        started = [context.Process(target=child, args=(number, carrier)) for number in range(2)]
        for process in started:
            process.start()
        answer = Chain()(question=question)
        for process in started:
            process.join()
        return dspy.Prediction(answer=answer, statuses=[process.exitcode for process in started])


def main(method: str) -> None:
    dspy_otel.configure()
    with dspy.context(lm=Counting(), disable_history=True, trace=None):
        evaluate(7)
        flush()  # from here on there are connections that a copy of this process must not use
        made = Starts(method)(question="number7")
    flush()
    print(json.dumps({"statuses": made.statuses}))


if __name__ == "__main__":
    main(sys.argv[1])
