"""Optimizations whose programs answer in worker processes, or here: the same program, the same LM."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import dspy

import dspy_otel
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family, same_family_with_feedback
from tests.optimizers.common import ScriptedLM, scripted_lm

workers: list[Executor] = []
"""The pool that answers, if there is one."""


class Anywhere(ColourFamily):
    """The demo's program. Its calls are answered by a worker process, if there is a pool."""

    def forward(self, colour_name: str) -> Any:
        if not workers:
            return super().forward(colour_name)
        task = dspy_otel.delegate(answer)
        sent = workers[0].submit(task, self.dump_state(), dspy.settings.lm.kwargs, colour_name)
        fields, steps = sent.result()
        predictors = dict(self.named_predictors())
        if dspy.settings.trace is not None:  # what optimizers read demos and failures from
            for name, given, said in steps:
                dspy.settings.trace.append((predictors[name], given, dspy.Prediction(**said)))
        return dspy.Prediction(**fields)


def answer(state: dict[str, Any], settings: dict[str, Any], colour_name: str) -> Any:
    """In a worker: what the program in this state predicts, and what its predictors did. Predictions cannot be sent."""
    program = ColourFamily()
    program.load_state(state)
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    with dspy.context(lm=ScriptedLM("embedded/scripted", cache=False, **settings), trace=[]):
        prediction = program(colour_name=colour_name)
        steps = [(names[id(predictor)], given, dict(said)) for predictor, given, said in dspy.settings.trace]
    return dict(prediction), steps


def nothing(number: int) -> int:
    return number


@contextlib.contextmanager
def pool(method: str = "fork", processes: int = 2) -> Iterator[Executor]:
    """Programs answer in worker processes inside of this block."""
    initializer = None if method == "fork" else dspy_otel.instrument
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=initializer) as made:
        list(made.map(nothing, range(processes)))  # all of them begin before there are threads here
        workers.append(made)
        try:
            yield made
        finally:
            workers.clear()


def run_mipro(threads: int = 2) -> Any:
    lm = scripted_lm()
    optimizer = dspy.MIPROv2(
        metric=same_family,
        prompt_model=lm,
        task_model=lm,
        auto=None,
        num_candidates=3,
        max_bootstrapped_demos=2,
        max_labeled_demos=2,
        num_threads=threads,
        seed=9,
    )
    train, val = load_examples("train", 10), load_examples("val", 6)
    return optimizer.compile(Anywhere(), trainset=train, valset=val, num_trials=3, minibatch=False)


def run_gepa(threads: int = 2, calls: int = 60) -> Any:
    lm = scripted_lm()
    optimizer = dspy.GEPA(
        metric=same_family_with_feedback,
        reflection_lm=lm,
        max_metric_calls=calls,
        num_threads=threads,
        seed=0,
    )
    return optimizer.compile(Anywhere(), trainset=load_examples("train", 10), valset=load_examples("val", 6))


RUNS = {"MIPROv2": run_mipro, "GEPA": run_gepa}
