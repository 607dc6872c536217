"""MIPROv2 and GEPA, whose programs answer on a Ray cluster: three worker processes, of which one is killed on the way.

    pip install 'dspy-otel[demo]' ray
    python examples/ray_optimize.py
    python examples/ray_optimize.py --optimizer GEPA --tracking-uri http://localhost:5000

Each optimization runs twice, in this process alone and with the cluster, and what both have used is printed side by
side. It is one optimization in MLflow either way: the spans of the workers stand below the examples they answered.
It runs on a small embedded model; the store is ``./mlflow.db``, without a server.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import queue
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else an import may wait for a download
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TQDM_DISABLE", "1")

import dspy
import ray
from opentelemetry import trace

import dspy_otel
from dspy_otel.cli.demo.lm import embedded_lm
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family, same_family_with_feedback
from dspy_otel.cli.demo.telemetry import Recorder
from dspy_otel.record.history import optimizations
from dspy_otel.record.model import Usage

EXPERIMENT = "optimized on Ray"
WORKERS = 3
KILL_AFTER = 20
"""Answers after which a worker is killed."""
TRAIN, VAL = load_examples("train", 12), load_examples("val", 8)
idle: queue.Queue[Any] = queue.Queue()
"""The workers that have nothing to do."""


# --- in the workers -------------------------------------------------------------------------------------------------
def answer(state: dict[str, Any], settings: dict[str, Any], inputs: dict[str, Any], killed: Path) -> Any:
    """What the program in this state predicts, and what its predictors did, for optimizers read that."""
    program = ColourFamily()
    program.load_state(state)
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    # DSPy's cache is one of each process: off, or what two workers ask both would count once here and twice there.
    with dspy.context(lm=embedded_lm(cache=False, **settings), trace=[]):
        prediction = program(**inputs)
        steps = [(names[id(predictor)], given, dict(said)) for predictor, given, said in dspy.settings.trace]
    if killed.exists():
        with contextlib.suppress(FileNotFoundError):
            killed.unlink()  # only one of them can
            os.kill(os.getpid(), signal.SIGKILL)  # as for want of memory, after the work and before the answer
    return dict(prediction), steps


class Worker:
    """An actor of Ray. What is sent to it brings context and usage along."""

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``work``, which is a function that was delegated: its result has to be returned as it is."""
        result = work(*arguments)
        dspy_otel.flush()  # Ray ends it without exit handlers
        return result


# --- in the process that optimizes ----------------------------------------------------------------------------------
class Colours(ColourFamily):
    """The demo's program. A worker answers, if there is one."""

    on_cluster = False
    answered = 0
    killed = Path("killed")

    def forward(self, **inputs: Any) -> Any:
        """A prediction, as of the demo's program."""
        if not Colours.on_cluster:
            return super().forward(**inputs)
        worker = idle.get()
        try:
            task = dspy_otel.delegate(answer)
            reference = worker.run.remote(task, self.dump_state(), dspy.settings.lm.kwargs, inputs, Colours.killed)
            fields, steps = ray.get(reference)
        finally:
            idle.put(worker)
        Colours.answered += 1
        if Colours.answered == KILL_AFTER:
            Colours.killed.touch()
        if dspy.settings.trace is not None:
            predictors = dict(self.named_predictors())
            dspy.settings.trace.extend(
                (predictors[name], given, dspy.Prediction(**said)) for name, given, said in steps
            )
        return dspy.Prediction(**fields)


def mipro(lm: Any) -> Any:
    optimizer = dspy.MIPROv2(
        metric=same_family,
        prompt_model=lm,
        task_model=lm,
        auto=None,
        num_candidates=3,
        max_bootstrapped_demos=2,
        max_labeled_demos=2,
        num_threads=WORKERS,
    )
    options = {"num_trials": 3, "minibatch_size": 4, "minibatch_full_eval_steps": 2}
    return optimizer.compile(Colours(), trainset=TRAIN, valset=VAL, **options)


def gepa(lm: Any) -> Any:
    optimizer = dspy.GEPA(
        metric=same_family_with_feedback, reflection_lm=lm, max_metric_calls=60, num_threads=WORKERS, seed=0
    )
    return optimizer.compile(Colours(), trainset=TRAIN, valset=VAL)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {"MIPROv2": mipro, "GEPA": gepa}


def main() -> None:
    parser = argparse.ArgumentParser(description="Optimize a small DSPy program on a cluster of Ray.")
    parser.add_argument("--optimizer", choices=[*OPTIMIZERS, "both"], default="both")
    parser.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    given = parser.parse_args()
    for name in ("dspy", "gepa", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)

    uri = given.tracking_uri
    if uri.startswith("sqlite:///"):  # workers have another current directory
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"

    def switch_on() -> None:
        dspy_otel.configure(mlflow=uri, experiment=EXPERIMENT, capture_content="span_only")

    switch_on()
    recorder = Recorder()
    provider: Any = trace.get_tracer_provider()
    provider.add_span_processor(recorder)
    lm = embedded_lm(cache=False)
    dspy.configure(lm=lm)

    ray.init(
        address="local",
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env={"worker_process_setup_hook": switch_on},
    )
    remote = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=1)(Worker)
    workers = [remote.remote() for _ in range(WORKERS)]
    before = set(ray.get([worker.run.remote(os.getpid) for worker in workers]))
    for worker in workers:
        idle.put(worker)

    same = True
    with tempfile.TemporaryDirectory() as folder:
        for name in OPTIMIZERS if given.optimizer == "both" else [given.optimizer]:
            Colours.killed = Path(folder, name)
            Colours.answered = 0
            used = {}
            for recorder.part in (f"{name} alone", f"{name} on Ray"):
                Colours.on_cluster = recorder.part.endswith("Ray")
                with contextlib.redirect_stdout(io.StringIO()):  # what optimizers print
                    OPTIMIZERS[name](lm)
                (optimization,) = optimizations(recorder.of(recorder.part))
                used[recorder.part] = optimization.usage or Usage()
            same = shown(name, *used.values()) and same
    after = set(ray.get([worker.run.remote(os.getpid) for worker in workers]))
    print(f"worker processes: {len(before)} at first, {len(after - before)} of the last are new")
    ray.shutdown()
    provider.force_flush(120_000)
    print(f"runs: dspy-otel runs --tracking-uri {given.tracking_uri}")
    sys.exit(0 if same else 1)


def shown(name: str, alone: Usage, together: Usage) -> bool:
    """Print both side by side. Returns whether they are the same."""
    one, other = alone.flat(), together.flat()
    print(f"{name:<26} {'one process':>14} {f'{WORKERS} workers':>14}")
    for key in [*one, *(key for key in other if key not in one)]:
        print(f"  {key:<24} {one.get(key, 0):>14,.0f} {other.get(key, 0):>14,.0f}")
    return {key: other[key] for key in other if key not in ("worker_tasks", "unanswered_tasks")} == one


if __name__ == "__main__":
    main()
