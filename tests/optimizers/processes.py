"""Optimizations whose programs answer in worker processes, or here: the same program, the same LM."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import dspy

import dspy_otel
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family, same_family_with_feedback
from tests.optimizers.common import ScriptedLM, scripted_lm

workers: list[Executor] = []
"""The pool that answers, if there is one."""
marker: list[Path] = []
"""The worker that finds this file is killed, after its LM calls and before its answer."""


class Anywhere(ColourFamily):
    """The demo's program. Its calls are answered by a worker process, if there is a pool."""

    def forward(self, colour_name: str) -> Any:
        if not workers:
            return super().forward(colour_name)
        try:
            fields, steps = self.ask(colour_name)
        except BrokenProcessPool:
            workers[:] = [made(1)]
            fields, steps = self.ask(colour_name)
        predictors = dict(self.named_predictors())
        if dspy.settings.trace is not None:  # what optimizers read demos and failures from
            for name, given, said in steps:
                dspy.settings.trace.append((predictors[name], given, dspy.Prediction(**said)))
        return dspy.Prediction(**fields)

    def ask(self, colour_name: str) -> Any:
        task = dspy_otel.delegate(answer)
        return workers[0].submit(task, self.dump_state(), dspy.settings.lm.kwargs, colour_name, *marker).result()


def answer(state: dict[str, Any], settings: dict[str, Any], colour_name: str, marker: Path | None = None) -> Any:
    """In a worker: what the program in this state predicts, and what its predictors did. Predictions cannot be sent."""
    program = ColourFamily()
    program.load_state(state)
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    with dspy.context(lm=ScriptedLM("embedded/scripted", cache=False, **settings), trace=[]):
        prediction = program(colour_name=colour_name)
        steps = [(names[id(predictor)], given, dict(said)) for predictor, given, said in dspy.settings.trace]
    if marker is not None:
        answered = marker.with_suffix(".answered")
        answered.write_text(answered.read_text() + "." if answered.exists() else ".")
        if marker.exists() and len(answered.read_text()) == int(marker.read_text()):
            marker.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    return dict(prediction), steps


def nothing(number: int) -> int:
    return number


def made(processes: int) -> Executor:
    """A pool of forked processes."""
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork"))
    list(pool.map(nothing, range(processes)))  # all of them begin before there are threads here
    return pool


@contextlib.contextmanager
def pool(processes: int = 2, kill_at: int | None = None, folder: Path | None = None) -> Iterator[None]:
    """Programs answer in worker processes inside of this block.

    Args:
        processes: how many.
        kill_at: the answer before which its worker is killed.
        folder: for what workers must know for that.
    """
    if kill_at is not None and folder is not None:
        marker.append(folder / "kill")
        marker[0].write_text(str(kill_at))
    workers.append(made(processes))
    try:
        yield
    finally:
        workers[0].shutdown()
        workers.clear()
        marker.clear()


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


def run_random_search(threads: int = 2) -> Any:
    scripted_lm()
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=same_family, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=2, num_threads=threads
    )
    return optimizer.compile(Anywhere(), trainset=load_examples("train", 10), valset=load_examples("val", 6))


RUNS = {"MIPROv2": run_mipro, "GEPA": run_gepa}
