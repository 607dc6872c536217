"""How long `dspy-otel compare` takes for two large evaluations: from files, and from an embedded MLflow store.

    python benchmarks/compare.py                          # 10,000 rows each; the store takes minutes to fill
    python benchmarks/compare.py --rows 1000 --files      # files only

Each row is a trace of four spans with a prompt of 2,000 characters. Exit code 1 when a goal is missed: 5 s from files,
20 s from a store, for 10,000 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

GOALS = {"files": 5.0, "store": 20.0}
EVALUATION = "evaluate QA"
SECOND = 1_000_000_000


def evaluation(
    rows: int, side: str, share: float
) -> Iterator[tuple[int, int, str, int | None, dict[str, object], float]]:
    """Trace, span, name, parent, attributes and duration of each span of an evaluation."""
    draw = random.Random(side)
    trace = {"A": 1, "B": 2}[side] << 64
    about = {"dspy.evaluation.id": f"e{side}", "dspy.program.name": "QA", "dspy.program.id": side.lower() * 16}
    about["dspy.evaluation.metric.name"] = "exact"
    for row in range(rows):
        span, seconds = 4 * row + 1, draw.uniform(0.1, 2)
        question = json.dumps({"question": "What is it? " * 10 + str(row)})
        answer = json.dumps({"answer": "right"})
        content = {"input.value": question, "output.value": answer}
        score = {"dspy.example.index": row, "dspy.example.id": f"{row:016x}", "dspy.example.expected": answer}
        score["dspy.example.score"] = float(draw.random() < share)
        yield trace + row + 1, span, "example QA", None, {**about, **content, **score}, seconds
        workflow = {"gen_ai.operation.name": "invoke_workflow", "dspy.usage.lm_calls": 1}
        yield trace + row + 1, span + 1, "invoke_workflow QA", span, {**about, **content, **workflow}, seconds
        module = {"dspy.module.class": "Predict", "dspy.module.path": "qa", "dspy.adapter.name": "ChatAdapter"}
        yield trace + row + 1, span + 2, "Predict qa", span + 1, {**about, **content, **module}, seconds
        call = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.usage.input_tokens": 500}
        messages = json.dumps([{"role": "user", "parts": [{"type": "text", "content": "x" * 2000}]}])
        yield (
            trace + row + 1,
            span + 3,
            "chat m",
            span + 2,
            {**about, **call, "gen_ai.input.messages": messages},
            seconds,
        )
    usage = {"dspy.usage.lm_calls": rows, "dspy.usage.input_tokens": 500 * rows, "dspy.usage.cost": 1.5}
    yield trace, 1 << 62, EVALUATION, None, {**about, **usage, "dspy.evaluation.size": rows}, 10_000.0


def write_file(path: Path, rows: int, side: str, share: float) -> None:
    """As the Collector's file exporter writes it."""
    kinds = {bool: "boolValue", int: "intValue", float: "doubleValue", str: "stringValue"}
    start = time.time_ns()
    with path.open("w", encoding="utf-8") as file:
        batch: list[dict[str, object]] = []
        for trace, span, name, parent, attributes, seconds in evaluation(rows, side, share):
            pairs = [
                {"key": key, "value": {kinds[type(value)]: str(value) if type(value) is int else value}}
                for key, value in attributes.items()
            ]
            one = {"traceId": f"{trace:032x}", "spanId": f"{span:016x}", "name": name, "attributes": pairs}
            one |= {"startTimeUnixNano": str(start), "endTimeUnixNano": str(start + int(seconds * SECOND))}
            batch.append(one if parent is None else {**one, "parentSpanId": f"{parent:016x}"})
            if len(batch) == 512 or name == EVALUATION:
                scope = {"scope": {"name": "dspy_otel"}, "spans": batch}
                file.write(json.dumps({"resourceSpans": [{"scopeSpans": [scope]}]}) + "\n")
                batch = []


def fill_store(uri: str, rows: int, side: str, share: float) -> None:
    """Through the exporter, as a program does."""
    from opentelemetry import trace as api
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from dspy_otel.mlflow import MLflowSpanExporter
    from dspy_otel.mlflow.exporter import track_runs

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(MLflowSpanExporter(uri, experiment=side)))
    track_runs(provider)
    tracer = provider.get_tracer("dspy_otel")
    start = time.time_ns()
    spans = list(evaluation(rows, side, share))
    nowhere = api.set_span_in_context(api.INVALID_SPAN)
    _, _, name, _, attributes, _ = spans.pop()
    whole = tracer.start_span(name, nowhere, attributes=attributes, start_time=start)  # type: ignore[arg-type]
    made: dict[int, api.Span] = {}
    for place, (_, span, name, parent, attributes, seconds) in enumerate(spans):
        context = nowhere if parent is None else api.set_span_in_context(made[parent])
        made[span] = tracer.start_span(name, context, attributes=attributes, start_time=start)  # type: ignore[arg-type]
        if place % 4 == 3:
            for one in reversed(list(made.values())):
                one.end(start + int(seconds * SECOND))
            made.clear()
        if place % 2000 == 0:
            provider.force_flush(300_000)
    whole.end(start + 10_000 * SECOND)
    provider.shutdown()


def measure(arguments: Sequence[str]) -> tuple[float, float, float]:
    """Seconds, processor seconds and megabytes of the command in a process of its own."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "dspy_otel.cli", "compare", *arguments, "--format", "json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, used, after.ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description="How long `dspy-otel compare` takes.")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--files", action="store_true", help="files only")
    options = parser.parse_args()
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    os.environ.setdefault("OTEL_DSPY_EXIT_SECONDS", "1800")
    missed = False
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        asked = {"files": ["a.jsonl", "b.jsonl"]}
        for side, share in (("A", 0.60), ("B", 0.62)):
            write_file(Path(f"{side.lower()}.jsonl"), options.rows, side, share)
        if not options.files:
            uri = f"sqlite:///{directory}/mlflow.db"
            for side, share in (("A", 0.60), ("B", 0.62)):
                fill_store(uri, options.rows, side, share)
            asked["store"] = ["A", "B", "--tracking-uri", uri]
        for place, arguments in asked.items():
            seconds, used, megabytes = measure(arguments)
            missed |= seconds > GOALS[place]
            print(f"{place}: {options.rows:,} rows each, {seconds:.1f} s ({used:.1f} s processor), {megabytes:.0f} MB")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
