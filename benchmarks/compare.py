"""How long `dspy-otel compare` takes for two large evaluations: from files, and from an embedded MLflow store.

    python benchmarks/compare.py                          # 10,000 rows each; most of the time is that of making them
    python benchmarks/compare.py --rows 500 --files       # files only
    python benchmarks/compare.py --check                  # exit code 1 when a goal is missed

Both evaluations are real: ``dspy.Evaluate`` on a program whose prompt has 2,000 characters and whose LM answers at
once, with content on. Their spans go to a file as the Collector writes it, and to a store through the exporter. The
goals, for 10,000 rows, are 5 s from files, 20 s from a store and 1 GB; ``--check`` judges by processor time, since a
machine may be busy with something else.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = 10_000
GOALS = {"files": 5.0, "store": 20.0}
MEGABYTES = 1000
INSTRUCTIONS = "Answer the question with a number, and say nothing else. " * 32
SHARES = {"A": 0.60, "B": 0.62}
"""How often each program is right."""


def with_hex(value: Any) -> Any:
    """A request of protobuf's JSON as the Collector writes it: with ids in hexadecimal."""
    if isinstance(value, list):
        return [with_hex(one) for one in value]
    if isinstance(value, dict):
        ids = ("traceId", "spanId", "parentSpanId")
        return {key: base64.b64decode(one).hex() if key in ids else with_hex(one) for key, one in value.items()}
    return value


def make(side: str, rows: int, directory: str, store: bool) -> None:
    """Evaluate one program, and write its spans to a file and, unless that is not wanted, to a store."""
    import dspy
    from google.protobuf.json_format import MessageToDict
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    import dspy_otel

    class File(SpanExporter):
        def __init__(self) -> None:
            self.path = Path(directory, f"{side}.jsonl")

        def export(self, spans: Any) -> SpanExportResult:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(with_hex(MessageToDict(encode_spans(spans)))) + "\n")
            return SpanExportResult.SUCCESS

    class Answering(dspy.LM):
        """Right as often as its program is to be."""

        def __init__(self) -> None:
            super().__init__(f"embedded/{side}", cache=False)
            self.draw = random.Random(side)

        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            from types import SimpleNamespace

            answer = "right" if self.draw.random() < SHARES[side] else "wrong"
            text = f"[[ ## answer ## ]]\n{answer}\n\n[[ ## completed ## ]]"
            choice = SimpleNamespace(message=SimpleNamespace(content=text), finish_reason="stop")
            usage = {"prompt_tokens": 500, "completion_tokens": 5, "total_tokens": 505}
            return SimpleNamespace(id="1", model=self.model, choices=[choice], usage=usage)

    def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
        return bool(example.answer == prediction.answer)

    class QA(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict(dspy.Signature("question -> answer", f"{INSTRUCTIONS}({side})"))

        def forward(self, question: str) -> Any:
            return self.ask(question=question)

    provider = TracerProvider(shutdown_on_exit=False)
    queue = {"max_queue_size": 100_000, "schedule_delay_millis": 500}
    provider.add_span_processor(BatchSpanProcessor(File(), **queue))
    if store:
        from dspy_otel.mlflow import MLflowSpanExporter

        exporter = MLflowSpanExporter(f"sqlite:///{directory}/mlflow.db", experiment=side)
        provider.add_span_processor(BatchSpanProcessor(exporter, **queue))
    dspy_otel.instrument(tracer_provider=provider, capture_content="span_only")
    questions = [f"What is {place} and {place + 1}? " * 5 for place in range(rows)]
    devset = [dspy.Example(question=one, answer="right").with_inputs("question") for one in questions]
    with dspy.context(lm=Answering()):
        dspy.Evaluate(devset=devset, metric=exact, num_threads=1, display_progress=False)(QA())
    dspy_otel.uninstrument()
    provider.force_flush(1_800_000)
    provider.shutdown()


def measure(arguments: Sequence[str]) -> tuple[float, float, float, dict[str, Any]]:
    """Seconds, processor seconds and megabytes of the command in a process of its own, and what it found."""
    command = [sys.executable, "-m", "dspy_otel.cli", "compare", *arguments, "--format", "json"]
    with tempfile.TemporaryFile() as output:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=output)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        found = json.load(output)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {found}")
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, found


def main() -> int:
    parser = argparse.ArgumentParser(description="How long `dspy-otel compare` takes.")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--files", action="store_true", help="files only")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a goal is missed")
    parser.add_argument("--make", metavar="SIDE", choices=list(SHARES), help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        make(options.make, options.rows, options.directory, not options.files)
        return 0
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OTEL_DSPY_EXIT_SECONDS": "1800"}
    os.environ.update({**environment, **os.environ})
    missed = []
    with tempfile.TemporaryDirectory() as directory:
        more = ["--files"] if options.files else []
        for side in SHARES:
            begin = time.monotonic()
            command = [sys.executable, __file__, "--make", side, "--rows", str(options.rows), "--directory", directory]
            subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            print(f"{side}: {options.rows:,} rows evaluated in {time.monotonic() - begin:.0f} s", flush=True)
        asked = {"files": [f"{directory}/{side}.jsonl" for side in SHARES]}
        if not options.files:
            asked["store"] = [*SHARES, "--tracking-uri", f"sqlite:///{directory}/mlflow.db"]
        for place, arguments in asked.items():
            seconds, used, megabytes, found = measure(arguments)
            pairs = found["scores"][0]["pairs"]
            print(f"{place}: {pairs:,} pairs, {seconds:.1f} s ({used:.1f} s processor), {megabytes:.0f} MB", flush=True)
            if pairs != options.rows or used > GOALS[place] or megabytes > MEGABYTES:
                missed.append(place)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"load {load}, {os.cpu_count()} processors; missed: {', '.join(missed) or 'nothing'}")
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
