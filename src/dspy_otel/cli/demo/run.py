"""The demo itself: set up, run, evaluate, optimize, show."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dspy_otel.cli import ui
from dspy_otel.cli.demo import show
from dspy_otel.cli.demo.telemetry import Recorder, open_mlflow, set_up_telemetry
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.target import public_uri, ui_command

_RUN, _EVALUATE = "run", "evaluate"
_OPTIMIZERS = {"mipro": ("MIPROv2",), "gepa": ("GEPA",), "both": ("MIPROv2", "GEPA")}
_STORE = Path("demo-mlflow")
_NAME = "dusty teal"  # asked before and after
_THREADS = 4


def run_demo(
    *, model: str | None, optimizer: str, tracking_uri: str | None, content: bool, quick: bool, open_it: bool = False
) -> int:
    """Run the demo and print what was recorded.

    `model` is a DSPy model name, None the embedded model; `optimizer` is `mipro`, `gepa` or `both`; `tracking_uri` is
    MLflow's, None a sqlite store in `./demo-mlflow/`; `content` is whether prompts and answers are recorded; `open_it`
    opens MLflow on it at the end. Returns the exit status: 1 when the model gave no answer, 2 when MLflow cannot be
    used.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # GEPA's own progress bar, under ours
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else an import may wait for a download
    if tracking_uri is None:
        _STORE.mkdir(exist_ok=True)
        tracking_uri = f"sqlite:///{_STORE / 'mlflow.db'}"
    if logging.lastResort is not None:
        logging.getLogger("dspy_otel").addHandler(logging.lastResort)  # warnings, and no links of its own
    console = Console(file=sys.stdout)
    place = public_uri(tracking_uri)
    console.print(f"dspy-otel demo on {model or 'the embedded model'}, traces to {place}", highlight=False)

    recorder = Recorder()
    answers = []
    columns = (SpinnerColumn(finished_text="[green]✓[/]"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, show.NoteColumn(recorder), console=console, redirect_stdout=False) as progress:

        def step(title: str, work: Callable[[], Any], part: str = "") -> Any:
            row = progress.add_task(title, total=1, part=part, note=None if part else "")
            recorder.part = part
            result = work()
            progress.update(row, completed=1, note=show.progress_line(recorder, part) if part else "")
            return result

        try:
            step("open MLflow", lambda: open_mlflow(tracking_uri))
        except ExportError as error:
            console.print(f"{error}", markup=False, soft_wrap=True)
            return 2
        task, lm = step("load DSPy", lambda: _load(model))
        # DSPy's progress bars and MIPROv2's look at the program's source go to stdout.
        with contextlib.redirect_stdout(io.StringIO()):
            finish = set_up_telemetry(recorder, tracking_uri, content)
            try:
                program = task.ColourFamily()
                train = task.load_examples("train", 50 if quick else 80)
                val = task.load_examples("val", 20 if quick else 30)
                try:
                    answer = step(f"ask for {_NAME!r}", lambda: program(colour_name=_NAME), _RUN)
                except Exception as error:  # a wrong key or model name: say so before anything costs time
                    console.print(f"The model gave no answer: {type(error).__name__}: {error}", markup=False)
                    return 1
                answers.append(("before", answer.family))
                step(f"evaluate {len(val)} names", lambda: _evaluate(task, program, val), _EVALUATE)
                for name in _OPTIMIZERS[optimizer]:
                    compile_ = _mipro if name == "MIPROv2" else _gepa
                    better = step(name, lambda run=compile_: run(task, lm, train, val, quick), name)  # type: ignore[misc]
                    answers.append((f"after {name}", better(colour_name=_NAME).family))
            finally:
                step("store the last traces", finish)

    console.print(show.report(recorder, _OPTIMIZERS[optimizer], answers, _NAME), highlight=False)
    console.print(f"[bold]See it all:[/]\n{where_to_look(tracking_uri)}", highlight=False, soft_wrap=True)
    return ui.open_ui(tracking_uri) if open_it else 0


def _load(model: str | None) -> tuple[Any, Any]:
    """Import DSPy, choose the LM and quiet the logs; returns the task's module and the LM."""
    import dspy

    from dspy_otel.cli.demo import task
    from dspy_otel.cli.demo.lm import embedded_lm

    for name in ("dspy", "gepa", "alembic", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if model is None:
        dspy.configure_cache(enable_disk_cache=False)  # the same calls and the same cache hits in every run
    lm = embedded_lm() if model is None else dspy.LM(model)
    dspy.configure(lm=lm)
    return task, lm


def _evaluate(task: Any, program: Any, val: list[Any]) -> Any:
    import dspy

    return dspy.Evaluate(devset=val, metric=task.same_family_with_feedback, num_threads=_THREADS)(program)


def _mipro(task: Any, lm: Any, train: list[Any], val: list[Any], quick: bool) -> Any:
    import dspy

    optimizer = dspy.MIPROv2(
        metric=task.same_family,
        prompt_model=lm,
        task_model=lm,
        auto=None,
        num_candidates=3 if quick else 5,
        max_bootstrapped_demos=3,
        max_labeled_demos=4,
        num_threads=_THREADS,
    )
    trials = 3 if quick else 6
    return optimizer.compile(task.ColourFamily(), trainset=train, valset=val, num_trials=trials, minibatch=False)


def _gepa(task: Any, lm: Any, train: list[Any], val: list[Any], quick: bool) -> Any:
    import dspy

    optimizer = dspy.GEPA(
        metric=task.same_family_with_feedback,
        reflection_lm=lm,
        max_metric_calls=120 if quick else 300,
        reflection_minibatch_size=5,
        num_threads=_THREADS,
    )
    return optimizer.compile(task.ColourFamily(), trainset=train, valset=val)


def where_to_look(tracking_uri: str) -> str:
    """The command that opens MLflow on a store, or the address of a server that has its pages already."""
    if tracking_uri.startswith("http"):
        return public_uri(tracking_uri)
    return ui_command(public_uri(tracking_uri))
