"""The same optimizations recorded in MLflow by dspy-otel and by ``mlflow.dspy.autolog`` with everything on, read back.

    python benchmarks/mlflow_side_by_side.py --uri http://127.0.0.1:5000 --uri sqlite:////tmp/side.db
    python benchmarks/mlflow_side_by_side.py --uri sqlite:////tmp/side.db --only GEPA --markdown

Runs the optimizers of ``examples/mlflow_tutorial.py``, and one ``Evaluate`` of 1,000 examples, each in a process of its
own, and counts with MLflow's client what has arrived. The counts are exact; the times are those of this machine now.

Columns:

* metric calls: how many examples were scored, and how many attempts a bootstrap judged;
* traces: of program calls (not of the optimizer's own), stored and finished;
* on a trial: of those, on a run below the optimization's, which is where the tutorial looks for them;
* scored: of those, with a score as an assessment;
* runs: in the experiment, and how many of them are at the top (there should be one for each optimization);
* params: of the optimizer's constructor and ``compile``, by name, that the top run has;
* points: of score metrics on the top run, which make the curve of the optimization.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

WAYS = ("bare", "dspy-otel", "autolog")
EVALUATE = "Evaluate"
PROGRAMS = ("MIPROv2", "GEPA", "SIMBA", "COPRO", "BootstrapFewShotWithRandomSearch", "BetterTogether", EVALUATE)
ROWS = 1000
OWN = ("compile", "evaluate", "Predict", "ChainOfThought")
"""Beginnings of the names of traces that are the optimizer's own."""


class Counted:
    """The tutorial's metrics, counted."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    def wrap(self, metric: Any) -> Any:
        """The metric, counted."""

        @functools.wraps(metric)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.calls += 1
            return metric(*args, **kwargs)

        return counted


def measure(way: str, uri: str, program: str) -> dict[str, Any]:
    """One optimization, in this process."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import dspy
    import mlflow_tutorial as tutorial

    for name in ("dspy", "gepa", "optuna", "mlflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    experiment = f"{program} {way} {time.time_ns()}"
    counted = Counted()
    tutorial.same_family = counted.wrap(tutorial.same_family)
    tutorial.same_family_with_feedback = counted.wrap(tutorial.same_family_with_feedback)
    lm = tutorial.embedded_lm()
    dspy.configure(lm=lm)
    tutorial.ColourFamily()(colour_name="teal")  # imports are not what is measured
    provider = None
    if way == "dspy-otel":
        import dspy_otel

        dspy_otel.configure(mlflow=uri, experiment=experiment, capture_content="span_only")
        from opentelemetry import trace

        provider = trace.get_tracer_provider()
    elif way == "autolog":
        import mlflow

        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(experiment)
        mlflow.dspy.autolog(log_compiles=True, log_evals=True, log_traces_from_compile=True, log_traces_from_eval=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        began, cpu = time.monotonic(), time.process_time()
        if program == EVALUATE:
            rows = (tutorial.TRAIN + tutorial.VAL) * (ROWS // 30 + 1)
            dspy.Evaluate(devset=rows[:ROWS], metric=tutorial.same_family, num_threads=4)(tutorial.ColourFamily())
        else:
            tutorial.OPTIMIZERS[program](lm)
        took = time.monotonic() - began
    if provider is not None:
        provider.force_flush(600_000)  # type: ignore[attr-defined]
    elif way == "autolog":
        mlflow.flush_trace_async_logging()
    found: dict[str, Any] = {
        "program": program,
        "way": way,
        "metric calls": counted.calls,
        "s": round(took, 1),
        "until written s": round(time.monotonic() - began, 1),
        "CPU s": round(time.process_time() - cpu, 1),
        "MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    if way != "bare":
        found.update(arrived(uri, experiment, program))
    return found


def arrived(uri: str, experiment: str, program: str) -> dict[str, int]:
    """What MLflow has of it."""
    import dspy
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    place = client.get_experiment_by_name(experiment).experiment_id
    runs = client.search_runs([place], max_results=1000)
    tops = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    below = [run for run in runs if run not in tops] if program != EVALUATE else runs

    def traces(**where: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        token = None
        while True:
            page = client.search_traces(
                locations=[place], max_results=500, page_token=token, include_spans=False, **where
            )
            found.update({trace.info.trace_id: trace for trace in page if of_program(trace)})
            token = page.token
            if not token:
                return found

    every = traces()
    linked = {trace_id for run in below for trace_id in traces(run_id=run.info.run_id)}
    scored = [trace_id for trace_id, trace in every.items() if any(a.value is not None for a in trace.info.assessments)]
    top = min(tops, key=lambda run: run.info.start_time) if tops else None
    known: set[str] = set()
    if program != EVALUATE:
        optimizer = getattr(dspy, program)
        for function in (optimizer.__init__, optimizer.compile):
            known |= set(inspect.signature(function).parameters)
    points = 0
    if top is not None:
        for name in top.data.metrics:
            if "score" in name or name.startswith("eval"):
                points += len(client.get_metric_history(top.info.run_id, name))
    return {
        "traces": len(every),
        "on a trial": len(linked),
        "scored": len(scored),
        "runs": len(runs),
        "at the top": len(tops),
        "params": 0 if top is None else len(known & set(top.data.params)),
        "points": points,
    }


def of_program(trace: Any) -> bool:
    """Whether a trace is of a call of the program, and whole."""
    name = trace.info.tags.get("mlflow.traceName", "")
    return str(trace.info.state).endswith("OK") and not name.startswith(OWN)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/mlflow.md."""
    columns = [
        "program",
        "way",
        "metric calls",
        "traces",
        "on a trial",
        "scored",
        "runs",
        "at the top",
        "params",
        "points",
    ]
    columns += ["s", "until written s", "CPU s", "MB"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uri", action="append", required=True, help="of a server or a sqlite store; again for more")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--markdown", action="store_true", help="the table, at the end")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], given.uri[0], given.one[1])))
        return
    print(f"OpenTelemetry SDK {version('opentelemetry-sdk')}")
    for uri in given.uri:
        rows = []
        for program in given.only:
            for way in given.ways:
                command = [sys.executable, os.path.abspath(__file__), "--one", way, program, "--uri", uri]
                environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "TQDM_DISABLE": "1", **os.environ}
                result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(result.stdout.splitlines()[-1]))
                print(uri.partition(":")[0], json.dumps(rows[-1]), flush=True)
        if given.markdown:
            print(f"\n{uri.partition(':')[0]}\n\n{markdown(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
