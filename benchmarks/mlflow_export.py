"""What recording an optimization in MLflow costs, and what of it arrives: dspy-otel beside ``mlflow.dspy.autolog``.

    python benchmarks/mlflow_export.py --uri http://127.0.0.1:5000 --uri sqlite:////tmp/bench.db

Runs one BootstrapFewShotWithRandomSearch on an LM that answers at once, in a process of its own for each way of
recording, and reads back with MLflow's client what has arrived. Instant answers are the hardest case: everything that
recording costs is in the open, and the bursts are as large as they can be. Two more ways are not about optimizing:
``steady`` makes 200 traces a second for half a minute, and ``queue`` finds what a span costs in the program's thread.
The last lines are ratios, which hold on a busy machine too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

WAYS = ("bare", "spans", "dspy-otel", "autolog", "steady", "queue")
"""``spans`` is dspy-otel with an exporter that drops them: what recording costs before MLflow comes in."""


STEADY_RATE, STEADY_SECONDS = 200, 30
QUEUED = 500
"""Spans that are made at once: what a busy program makes in half a second."""


def instant_lm() -> Any:
    """An LM that answers at once."""
    import dspy

    class Instant(dspy.BaseLM):  # type: ignore[misc]
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            from types import SimpleNamespace

            message = SimpleNamespace(content="[[ ## answer ## ]]\n42\n\n[[ ## completed ## ]]")
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            choice = SimpleNamespace(message=message, finish_reason="stop")
            return SimpleNamespace(id="x", model=self.model, choices=[choice], usage=usage)

    return Instant("instant/instant", cache=False)


def optimize(examples: int, candidates: int) -> int:
    """Run the optimizer; how many examples it has evaluated."""
    import dspy

    def right(example: Any, prediction: Any, trace: Any = None) -> bool:
        return len(example.question) % 3 != 0

    dspy.configure(lm=instant_lm(), adapter=dspy.ChatAdapter())
    rows = [
        dspy.Example(question=f"What is {'1+' * i}1?", answer="42").with_inputs("question") for i in range(examples)
    ]
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=right,
        max_bootstrapped_demos=2,
        max_labeled_demos=2,
        num_candidate_programs=candidates,
        num_threads=4,
    )
    optimizer.compile(dspy.Predict("question -> answer"), trainset=rows[:20], valset=rows)
    return examples * (candidates + 3)


def measure(way: str, uri: str, experiment: str, examples: int, candidates: int) -> dict[str, Any]:
    """One way of recording, in this process: seconds of the compile and until all is written, CPU, memory, arrivals."""
    import logging

    import dspy

    logging.getLogger("dspy").setLevel(logging.ERROR)
    provider = None
    if way == "spans":
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

        import dspy_otel

        class Nowhere(SpanExporter):  # type: ignore[misc]
            def export(self, spans: Any) -> SpanExportResult:
                return SpanExportResult.SUCCESS

        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(Nowhere()))
        dspy_otel.instrument(tracer_provider=provider, capture_content="span_only")
    elif way == "dspy-otel":
        import dspy_otel

        dspy_otel.configure(mlflow=uri, experiment=experiment, capture_content="span_only")
        from opentelemetry import trace

        provider = trace.get_tracer_provider()
    elif way == "autolog":
        import mlflow

        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment)
        mlflow.dspy.autolog(log_compiles=True, log_evals=True, log_traces_from_compile=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        dspy.Predict("question -> answer")  # imports, and the making of a store, are not what is measured
        if way == "dspy-otel":
            from dspy_otel.mlflow.backends import open_backend
            from dspy_otel.mlflow.target import Target

            open_backend(Target(uri, experiment)).find_run("none")
        began, cpu = time.monotonic(), time.process_time()
        evaluated = optimize(examples, candidates)
        compiled, used = time.monotonic() - began, time.process_time() - cpu
        aside = background()
    if provider is not None:
        provider.force_flush(600_000)  # type: ignore[attr-defined]
    elif way == "autolog":
        mlflow.flush_trace_async_logging()
    written = time.monotonic() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found: dict[str, Any] = {
        "way": way,
        "examples evaluated": evaluated,
        "compile s": round(compiled, 2),
        "until written s": round(written, 1),
        "program's CPU s": round(used - aside, 2),
        "background CPU s meanwhile": round(aside, 2),
        "CPU s": round(time.process_time() - cpu, 1),
        "MB": round(usage.ru_maxrss / 1024),
    }
    if way in ("dspy-otel", "autolog"):
        found.update(arrived(uri, experiment))
    return found


def steady(uri: str, experiment: str) -> dict[str, Any]:
    """Make traces at a steady rate; how many of them are in MLflow, and how long after the last one."""
    import dspy
    from opentelemetry import trace

    import dspy_otel

    dspy_otel.configure(mlflow=uri, experiment=experiment, capture_content="span_only")
    dspy.configure(lm=instant_lm(), adapter=dspy.ChatAdapter())
    program = dspy.Predict("question -> answer")
    began = time.monotonic()
    for number in range(STEADY_RATE * STEADY_SECONDS):
        time.sleep(max(0.0, began + number / STEADY_RATE - time.monotonic()))
        program(question=f"question {number}")
    ended = time.monotonic()
    trace.get_tracer_provider().force_flush(600_000)  # type: ignore[attr-defined]
    return {
        "way": "steady",
        "made": STEADY_RATE * STEADY_SECONDS,
        "traces a second": round(STEADY_RATE * STEADY_SECONDS / (ended - began)),
        "until written s": round(time.monotonic() - ended, 1),
        **arrived(uri, experiment),
    }


def queue(uri: str) -> dict[str, Any]:
    """CPU time of the program's thread for a span that goes to MLflow, beside one that goes nowhere."""
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    from dspy_otel.mlflow.processor import MLflowProcessor
    from dspy_otel.mlflow.target import Target

    def tracer(processor: SpanProcessor) -> Any:
        provider = TracerProvider()
        provider.add_span_processor(processor)
        return provider.get_tracer("benchmark")

    def cpu(tracer: Any) -> float:
        began = time.thread_time()
        for number in range(QUEUED):
            tracer.start_span("span", attributes={"number": number}).end()
        return (time.thread_time() - began) / QUEUED * 1e6

    nowhere, ours = tracer(SpanProcessor()), tracer(MLflowProcessor(Target(uri)))
    pairs = []
    for _ in range(41):
        pairs.append((cpu(nowhere), cpu(ours)))
        time.sleep(0.3)  # until they are in the journal
    return {
        "way": "queue",
        "us a span": round(statistics.median(with_ours - without for without, with_ours in pairs), 2),
        "of the SDK's own us": round(statistics.median(without for without, _ in pairs), 1),
    }


def background() -> float:
    """CPU seconds of the threads that export, so far (Linux); DSPy's own threads have ended by now."""
    ticks = 0
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread is not threading.main_thread():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(") ")[2].split()
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def arrived(uri: str, experiment: str) -> dict[str, int]:
    """Traces of evaluated examples in MLflow, those on a run, and those with a score."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    place = client.get_experiment_by_name(experiment).experiment_id
    runs = [run.info.run_id for run in client.search_runs([place], max_results=1000)]

    def traces(**where: Any) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = client.search_traces(locations=[place], max_results=500, page_token=token, **where)
            found += [
                trace for trace in page if not trace.info.tags["mlflow.traceName"].startswith(("compile", "attempt"))
            ]
            token = page.token
            if not token:
                return found

    every = traces(include_spans=False)
    linked = {trace.info.trace_id for run in runs for trace in traces(run_id=run, include_spans=False)}
    scored = sum(any(one.feedback for one in trace.info.assessments) for trace in every)
    return {"traces": len(every), "on a run": len(linked), "scored": scored, "runs": len(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uri", action="append", required=True, help="of a server or a sqlite store; again for more")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=15)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        experiment = f"bench {given.one} {time.time_ns()}"
        if given.one == "steady":
            found = steady(given.uri[0], experiment)
        elif given.one == "queue":
            found = queue(given.uri[0])
        else:
            found = measure(given.one, given.uri[0], experiment, given.examples, given.candidates)
        print(json.dumps(found))
        return
    print(f"OpenTelemetry SDK {version('opentelemetry-sdk')}")
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for uri in given.uri:
        for way in given.ways:
            if way in ("bare", "spans", "queue") and uri != given.uri[0]:
                continue
            command = [sys.executable, __file__, "--one", way, "--uri", uri]
            command += ["--examples", str(given.examples), "--candidates", str(given.candidates)]
            environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", **os.environ}
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            print(uri.partition(":")[0], result.stdout.splitlines()[-1], flush=True)
            results[uri, way] = json.loads(result.stdout.splitlines()[-1])
        ratios(uri, results, results.get((given.uri[0], "spans")))


def ratios(uri: str, results: dict[tuple[str, str], dict[str, Any]], null: dict[str, Any] | None) -> None:
    """Print how one place compares: with a null exporter, and with autolog."""
    ours, autolog = results.get((uri, "dspy-otel")), results.get((uri, "autolog"))
    if ours and null:
        print(f"  compile: {ours['compile s'] / null['compile s']:.2f} x that with a null exporter")
    if ours and autolog:
        stored = [one["traces"] / (one["CPU s"] or 1) for one in (ours, autolog)]
        factor = stored[0] / stored[1]
        print(f"  traces stored per CPU second: {stored[0]:.0f} / {stored[1]:.0f} = {factor:.1f} x autolog")


if __name__ == "__main__":
    main()
