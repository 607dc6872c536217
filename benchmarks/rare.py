"""What is there for rare situations, and what it costs where the situation does not arise: shares of a watched Predict.

    python benchmarks/rare.py

A program that is seeded while its OTLP backend is away, or that switches on another instrumentation
(``before_each_program``), an exception that passes several spans (``Recorded``), a sampler that drops attributes
(``restore_dropped``), half a character in a text (``repair``), and an optimization that is killed and goes on later
(``Checkpoint``). Each has a test of that situation.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
from opentelemetry.sdk.trace import TracerProvider

import dspy_otel
from dspy_otel.core.attributes import repair, restore_dropped
from dspy_otel.core.errors import Recorded
from dspy_otel.instrumentor import before_each_program

ATTRIBUTES: dict[str, Any] = {
    "gen_ai.operation.name": "chat",
    "gen_ai.request.model": "instant/instant",
    "dspy.lm.role": "task",
    "dspy.program.id": "b0cd52037f1d5a77",
    "dspy.program.name": "Predict",
    "openinference.span.kind": "LLM",
    "gen_ai.usage.input_tokens": 100,
    "dspy.lm.cache_hit": False,
    "gen_ai.response.finish_reasons": ["stop"],
}


def cost(call: Callable[[], object], times: int = 2000) -> float:
    """The least CPU microseconds of one call."""
    found = []
    for _ in range(20):
        start = time.process_time()
        for _ in range(times):
            call()
        found.append((time.process_time() - start) / times)
    return min(found) * 1e6


class _Instant(dspy.BaseLM):  # type: ignore[misc]
    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        message = SimpleNamespace(content="[[ ## answer ## ]]\n42\n\n[[ ## completed ## ]]")
        choice = SimpleNamespace(message=message, finish_reason="stop")
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return SimpleNamespace(id="x", model=self.model, choices=[choice], usage=usage)


def raised() -> ValueError:
    def deeper(levels: int) -> None:
        if levels:
            deeper(levels - 1)
        raise ValueError("no answer")

    try:
        deeper(20)
    except ValueError as error:
        return error
    raise AssertionError


class _Resumable(dspy.GEPA):  # type: ignore[misc]
    """An optimizer with a directory to go on from, that does nothing else."""

    def compile(self, student: Any, **_: Any) -> Any:
        return student


def compiles() -> tuple[float, float]:
    """Milliseconds of a compile that does nothing: without a directory, and in one that a killed process has left."""

    def seconds(**options: Any) -> float:
        optimizer = _Resumable(metric=lambda *_: 1.0, max_metric_calls=1, reflection_lm=_Instant("m"), **options)
        rows = [dspy.Example(question="q", answer="a").with_inputs("question")]
        return cost(lambda: optimizer.compile(dspy.Predict("question -> answer"), trainset=rows), 5) / 1000

    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        plain = seconds()
        seconds(log_dir=directory)
        file = Path(directory, "dspy_otel_run.json")
        if file.exists():
            file.write_text(json.dumps({**json.loads(file.read_text()), "outcome": "running"}))
        return plain, seconds(log_dir=directory)


def main() -> None:
    provider = TracerProvider()
    dspy.configure(lm=_Instant("instant/instant", cache=False), adapter=dspy.ChatAdapter(), disable_history=True)
    dspy_otel.instrument(tracer_provider=provider)
    program = dspy.Predict("question -> answer")
    whole = cost(lambda: program(question="what?"), 100)
    print(f"OpenTelemetry SDK {version('opentelemetry-sdk')}")
    print(f"{'a watched Predict':44} {whole:8.1f} us")
    error, span = raised(), provider.get_tracer("benchmark").start_span("span", attributes=ATTRIBUTES)
    check, recorded = before_each_program(content=False), Recorded.of(error, "lm")
    for name, call, times in (
        ("before_each_program, once a Predict", check, 1),
        ("restore_dropped, with samplers not the SDK's", lambda: restore_dropped(span, ATTRIBUTES), 2),
        ("repair, twice a Predict", lambda: repair(ATTRIBUTES), 2),
        ("Recorded, once for each span an error passes", lambda: Recorded.of(error, "lm"), 1),
        ("and to recognize it", lambda: recorded.is_(error, "module"), 1),
    ):
        each = cost(call)
        print(f"{name:44} {each:8.2f} us  {each * times / whole:6.1%}")
    plain, resumed = compiles()
    print(f"{'a compile that does nothing':44} {plain:8.2f} ms")
    print(f"{'with a directory, after a killed process':44} {resumed:8.2f} ms")


if __name__ == "__main__":
    main()
