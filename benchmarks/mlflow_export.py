"""What recording an optimization in MLflow costs, and what of it arrives: dspy-otel beside ``mlflow.dspy.autolog``.

    python benchmarks/mlflow_export.py --uri http://127.0.0.1:5000 --uri sqlite:////tmp/bench.db

Runs one BootstrapFewShotWithRandomSearch on an LM that answers at once, in a process of its own for each way of
recording, and reads back with MLflow's client what has arrived. Instant answers are the hardest case: everything that
recording costs is in the open, and the bursts are as large as they can be.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

WAYS = ("bare", "spans", "dspy-otel", "autolog")
"""``spans`` is dspy-otel with an exporter that drops them: what recording costs before MLflow comes in."""


def optimize(examples: int, candidates: int) -> int:
    import dspy

    class Instant(dspy.BaseLM):  # type: ignore[misc]
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            from types import SimpleNamespace

            message = SimpleNamespace(content="[[ ## answer ## ]]\n42\n\n[[ ## completed ## ]]")
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            choice = SimpleNamespace(message=message, finish_reason="stop")
            return SimpleNamespace(id="x", model=self.model, choices=[choice], usage=usage)

    def right(example: Any, prediction: Any, trace: Any = None) -> bool:
        return len(example.question) % 3 != 0

    dspy.configure(lm=Instant("instant/instant", cache=False), adapter=dspy.ChatAdapter())
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
        dspy.Predict("question -> answer")  # imports are not what is measured
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
    scored = sum(bool(trace.info.assessments) for trace in every)
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
        print(json.dumps(measure(given.one, given.uri[0], experiment, given.examples, given.candidates)))
        return
    for uri in given.uri:
        for way in given.ways:
            if way in ("bare", "spans") and uri != given.uri[0]:
                continue
            command = [sys.executable, __file__, "--one", way, "--uri", uri]
            command += ["--examples", str(given.examples), "--candidates", str(given.candidates)]
            environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", **os.environ}
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            print(uri.partition(":")[0], result.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
