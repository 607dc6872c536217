"""Any optimizer, by name, with its trial table read from telemetry.

    pip install 'dspy-otel[demo]'
    python examples/optimize.py SIMBA
    OTEL_DSPY_PROGRESS=true OTEL_DSPY_OPTIMIZATION_TRACES=none python examples/optimize.py GEPA

With `--model openai/gpt-4o-mini` it runs on a real model, else on a small embedded one. `--otlp` sends everything
to an OTLP receiver on this machine, too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
from collections.abc import Callable
from typing import Any

import dspy
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from rich.console import Console

import dspy_otel
from dspy_otel.cli.demo.lm import embedded_lm
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family, same_family_with_feedback
from dspy_otel.cli.demo.telemetry import Recorder
from dspy_otel.cli.demo.trials import trial_tables
from dspy_otel.record.history import optimizations

THREADS = 4
FEW: dict[str, Any] = {"max_bootstrapped_demos": 2, "max_labeled_demos": 3}


def labeled_few_shot(lm: Any, train: list[Any], val: list[Any]) -> Any:
    return dspy.LabeledFewShot(k=4).compile(ColourFamily(), trainset=train)


def bootstrap_few_shot(lm: Any, train: list[Any], val: list[Any]) -> Any:
    return dspy.BootstrapFewShot(metric=same_family, **FEW).compile(ColourFamily(), trainset=train)


def random_search(lm: Any, train: list[Any], val: list[Any]) -> Any:
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=same_family, num_candidate_programs=5, num_threads=THREADS, **FEW
    )
    return optimizer.compile(ColourFamily(), trainset=train, valset=val)


def optuna(lm: Any, train: list[Any], val: list[Any]) -> Any:
    from dspy.teleprompt.teleprompt_optuna import BootstrapFewShotWithOptuna

    optimizer = BootstrapFewShotWithOptuna(metric=same_family, num_candidate_programs=5, num_threads=THREADS, **FEW)
    return optimizer.compile(ColourFamily(), max_demos=2, trainset=train, valset=val)


def mipro(lm: Any, train: list[Any], val: list[Any]) -> Any:
    optimizer = dspy.MIPROv2(
        metric=same_family, prompt_model=lm, task_model=lm, auto=None, num_candidates=4, num_threads=THREADS, **FEW
    )
    return optimizer.compile(
        ColourFamily(), trainset=train, valset=val, num_trials=8, minibatch_size=8, minibatch_full_eval_steps=3
    )


def copro(lm: Any, train: list[Any], val: list[Any]) -> Any:
    optimizer = dspy.COPRO(metric=same_family, breadth=3, depth=2, prompt_model=lm)
    evaluation = {"num_threads": THREADS, "display_progress": False}
    return optimizer.compile(ColourFamily(), trainset=train, eval_kwargs=evaluation)


def simba(lm: Any, train: list[Any], val: list[Any]) -> Any:
    optimizer = dspy.SIMBA(
        metric=same_family, bsize=8, num_candidates=4, max_steps=3, prompt_model=lm, num_threads=THREADS
    )
    return optimizer.compile(ColourFamily(), trainset=train, seed=0)


def gepa(lm: Any, train: list[Any], val: list[Any]) -> Any:
    optimizer = dspy.GEPA(
        metric=same_family_with_feedback,
        reflection_lm=lm,
        max_metric_calls=200,
        reflection_minibatch_size=4,
        num_threads=THREADS,
    )
    return optimizer.compile(ColourFamily(), trainset=train, valset=val)


def infer_rules(lm: Any, train: list[Any], val: list[Any]) -> Any:
    optimizer = dspy.InferRules(metric=same_family, num_candidates=3, num_threads=THREADS, **FEW)
    return optimizer.compile(ColourFamily(), trainset=train, valset=val)


def better_together(lm: Any, train: list[Any], val: list[Any]) -> Any:
    search = dspy.BootstrapFewShotWithRandomSearch(
        metric=same_family, num_candidate_programs=2, num_threads=THREADS, **FEW
    )
    optimizer = dspy.BetterTogether(metric=same_family, p=search, w=dspy.LabeledFewShot(k=4))
    program = ColourFamily()
    if not hasattr(lm, "launch"):  # BetterTogether starts and stops local models
        lm.launch = lm.kill = lambda: None
    program.set_lm(lm)
    return optimizer.compile(program, trainset=train, valset=val, strategy="p -> w")


def knn_few_shot(lm: Any, train: list[Any], val: list[Any]) -> Any:
    import numpy

    def letters(texts: list[str]) -> Any:
        return numpy.array([[text.count(chr(97 + letter)) for letter in range(26)] for text in texts], dtype=float)

    optimizer = dspy.KNNFewShot(k=4, trainset=train, vectorizer=dspy.Embedder(letters), metric=same_family, **FEW)
    program = optimizer.compile(ColourFamily())
    program(**val[0].inputs())  # it bootstraps anew for each question
    return program


def ensemble(lm: Any, train: list[Any], val: list[Any]) -> Any:
    programs = [dspy.LabeledFewShot(k=k).compile(ColourFamily(), trainset=train) for k in (2, 4, 8)]
    return dspy.Ensemble(reduce_fn=dspy.majority).compile(programs)


# All that the embedded model can serve: BootstrapFinetune and GRPO need weights to train, ReAnchor needs probabilities.
OPTIMIZERS: dict[str, Callable[[Any, list[Any], list[Any]], Any]] = {
    "LabeledFewShot": labeled_few_shot,
    "BootstrapFewShot": bootstrap_few_shot,
    "BootstrapFewShotWithRandomSearch": random_search,
    "BootstrapFewShotWithOptuna": optuna,
    "MIPROv2": mipro,
    "COPRO": copro,
    "SIMBA": simba,
    "GEPA": gepa,
    "InferRules": infer_rules,
    "BetterTogether": better_together,
    "KNNFewShot": knn_few_shot,
    "Ensemble": ensemble,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Optimize a small DSPy program, and show the trials.")
    parser.add_argument("optimizer", choices=OPTIMIZERS, help="name of the optimizer")
    parser.add_argument("--model", help="a real model, e.g. openai/gpt-4o-mini")
    parser.add_argument("--otlp", action="store_true", help="send to an OTLP receiver, too")
    options = parser.parse_args()

    recorder = Recorder()
    if options.otlp:
        dspy_otel.configure(service_name="optimize", otlp=True)
    else:
        trace.set_tracer_provider(TracerProvider())
        dspy_otel.instrument()
    provider: Any = trace.get_tracer_provider()
    provider.add_span_processor(recorder)
    for name in ("dspy", "optuna", "gepa"):
        logging.getLogger(name).setLevel(logging.WARNING)

    lm = dspy.LM(options.model) if options.model else embedded_lm()
    dspy.configure(lm=lm)
    os.environ.setdefault("TQDM_DISABLE", "1")
    with contextlib.redirect_stdout(io.StringIO()):  # what optimizers print is in the telemetry
        program = OPTIMIZERS[options.optimizer](lm, load_examples("train", 40), load_examples("val", 20))
    provider.force_flush()

    console = Console()
    for table in trial_tables(recorder.trials()):
        console.print(table)
    result = next(one for one in optimizations(recorder.of()) if one.optimizer == options.optimizer)
    values = {
        "baseline_score": result.baseline,
        "best_score": result.best,
        "gain": result.gain,
        "trials": result.done,
        "examples evaluated": result.evaluated,
        "winner": result.winner,
    }
    for name, value in values.items():
        if value is not None:
            console.print(f"{name}: {value}")
    console.print("made by:", dspy_otel.optimization(program))


if __name__ == "__main__":
    main()
