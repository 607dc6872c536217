"""DSPy's tutorial "Tracking DSPy Optimizers with MLflow", step by step, recorded by OpenTelemetry.

1. Install:              pip install 'dspy-otel[demo]'
2. Start a server:       mlflow server --backend-store-uri sqlite:///mydb.sqlite    (in an environment of its own, or
                         with LITELLM_LOCAL_MODEL_COST_MAP=True when there is no network)
3. to 6. are this file:  python examples/mlflow_tutorial.py --tracking-uri http://localhost:5000

Without ``--tracking-uri`` everything goes into ``./mlflow.db``, without a server. ``--optimizer`` takes any of those
below, or ``all``. It runs on a small embedded model; with ``--model openai/gpt-4o-mini`` on a real one.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else an import may wait for a download

import dspy

import dspy_otel
from dspy_otel.cli.demo.lm import embedded_lm
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family, same_family_with_feedback
from dspy_otel.mlflow import load_best

EXPERIMENT = "DSPy-Optimization"
TRAIN, VAL = load_examples("train", 20), load_examples("val", 10)


def mipro(lm: Any) -> Any:
    optimizer = dspy.MIPROv2(
        metric=same_family,
        prompt_model=lm,
        task_model=lm,
        auto=None,
        num_candidates=3,
        max_bootstrapped_demos=2,
        max_labeled_demos=2,
        num_threads=4,
    )
    options = {"num_trials": 4, "minibatch_size": 5, "minibatch_full_eval_steps": 2}
    return optimizer.compile(ColourFamily(), trainset=TRAIN, valset=VAL, **options)


def gepa(lm: Any) -> Any:
    optimizer = dspy.GEPA(metric=same_family_with_feedback, reflection_lm=lm, max_metric_calls=80, num_threads=4)
    return optimizer.compile(ColourFamily(), trainset=TRAIN, valset=VAL)


def simba(lm: Any) -> Any:
    optimizer = dspy.SIMBA(metric=same_family, bsize=8, num_candidates=3, max_steps=2, prompt_model=lm, num_threads=4)
    return optimizer.compile(ColourFamily(), trainset=TRAIN, seed=0)


def copro(lm: Any) -> Any:
    optimizer = dspy.COPRO(metric=same_family, breadth=3, depth=2, prompt_model=lm)
    evaluation = {"num_threads": 4, "display_progress": False}
    return optimizer.compile(ColourFamily(), trainset=TRAIN[:8], eval_kwargs=evaluation)


def random_search(lm: Any) -> Any:
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=same_family, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=3, num_threads=4
    )
    return optimizer.compile(ColourFamily(), trainset=TRAIN, valset=VAL)


def better_together(lm: Any) -> Any:
    search = dspy.BootstrapFewShotWithRandomSearch(
        metric=same_family, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=1, num_threads=4
    )
    optimizer = dspy.BetterTogether(metric=same_family, p=search, k=dspy.LabeledFewShot(k=2))
    program = ColourFamily()
    program.set_lm(lm)
    return optimizer.compile(program, trainset=TRAIN, valset=VAL, strategy="p -> k")


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "MIPROv2": mipro,
    "GEPA": gepa,
    "SIMBA": simba,
    "COPRO": copro,
    "BootstrapFewShotWithRandomSearch": random_search,
    "BetterTogether": better_together,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Optimize a small DSPy program, and look at it in MLflow.")
    parser.add_argument("--optimizer", choices=[*OPTIMIZERS, "all"], default="MIPROv2")
    parser.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    parser.add_argument("--experiment", default=EXPERIMENT)
    parser.add_argument("--model", help="a DSPy model name; without it, the embedded model")
    given = parser.parse_args()
    for name in ("dspy", "gepa", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)

    # 3. In place of mlflow.dspy.autolog(), mlflow.set_tracking_uri() and mlflow.set_experiment(). The content switch
    #    adds what may be private: programs, dataset rows, prompts and answers.
    dspy_otel.configure(mlflow=given.tracking_uri, experiment=given.experiment, capture_content="span_only")

    # 4. Optimize.
    lm = dspy.LM(given.model) if given.model else embedded_lm()
    dspy.configure(lm=lm)
    names = list(OPTIMIZERS) if given.optimizer == "all" else [given.optimizer]
    optimized = {name: OPTIMIZERS[name](lm) for name in names}
    dspy.Evaluate(devset=VAL, metric=same_family, num_threads=4)(optimized[names[0]])

    # 5. Look at it in MLflow: experiment -> "Evaluation runs". Runs appear there while the optimizer works; what is
    #    left is written when the program ends. Here we wait for it, to load a program back.
    from opentelemetry import trace

    trace.get_tracer_provider().force_flush(120_000)

    # 6. Load the optimized program, as in the tutorial ...
    if given.tracking_uri.startswith("http"):
        import mlflow

        mlflow.set_tracking_uri(given.tracking_uri)
        experiment = mlflow.get_experiment_by_name(given.experiment)
        condition = f"tags.`dspy.run.kind` = 'compile' AND tags.`dspy.optimizer.name` = '{names[0]}'"
        run = mlflow.search_runs([experiment.experiment_id], condition, output_format="list")[0]
        with tempfile.TemporaryDirectory() as directory:
            path = mlflow.artifacts.download_artifacts(f"{run.info.artifact_uri}/best_model.json", dst_path=directory)
            program = ColourFamily()
            program.load(path, allow_unsafe_lm_state=True)

    # ... or the best one of the experiment, in one line. BetterTogether's program has its LM on it; DSPy wants to be
    # told that the embedded model's class may be loaded.
    place = {"experiment": given.experiment, "tracking_uri": given.tracking_uri}
    program = load_best(ColourFamily(), **place, allow_unsafe_lm_state=True)
    print("program", dspy_otel.program_id(program), "says", program(colour_name="dusty teal").family)


if __name__ == "__main__":
    main()
