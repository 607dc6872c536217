"""Programs back from MLflow."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, TypeVar

from dspy_otel.mlflow.backends import open_backend
from dspy_otel.mlflow.backends.base import CreatedRun
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.runs import BEST_PROGRAM, COMPILE, TAG_KIND, StoredRun
from dspy_otel.mlflow.target import Target
from dspy_otel.record.stored import read_optimization

_Program = TypeVar("_Program")


def load_best(
    program: _Program,
    *,
    run_id: str | None = None,
    experiment: str | int | None = None,
    tracking_uri: str | None = None,
    **options: Any,
) -> _Program:
    """Load the best program of an optimization that is in MLflow into ``program``.

    Its calls carry the run's ``dspy.program.id`` from then on: the id follows from the state.

    Args:
        program: a program of the class that was optimized; changed in place, by its ``load``.
        run_id: the MLflow run of the optimization. Without one: of all finished ones in the experiment, the one with
            the best score (the newest of equals).
        experiment: name or id; default as for :class:`~dspy_otel.mlflow.MLflowSpanExporter`.
        tracking_uri: likewise.
        **options: for the program's ``load``, such as ``allow_unsafe_lm_state=True`` for a program whose LM is of a
            class of its own.

    Returns:
        ``program``.

    Raises:
        LookupError: no such run or experiment, or its program was not recorded (content capture was off).
        ExportError: MLflow cannot be reached or opened.
    """
    target = Target(tracking_uri, None if experiment is None else str(experiment), create=False)
    store = None
    try:
        store = open_backend(target)
        runs = store.find_runs(run_id, f"tags.`{TAG_KIND}` = '{COMPILE}' AND attributes.status = 'FINISHED'")
        # A run that is a step of another optimization is left out.
        runs = [run for run in runs if run_id is not None or read_optimization(run.tags, {}, {}).parent is None]
        if not runs:
            raise LookupError("MLflow has no finished optimization there" if run_id is None else f"No run {run_id}")
        best = max(runs, key=rank)
        text = store.read_artifact(CreatedRun(best.run_id, best.artifact_uri), BEST_PROGRAM)
        if text is None:
            raise LookupError(
                f"Run {best.run_id} has no {BEST_PROGRAM}: programs are recorded with "
                "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=span_only"
            )
    except ExportError as error:
        if error.cause == "experiment":
            raise LookupError(str(error)) from error
        raise
    finally:
        if store is not None:
            store.close()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, BEST_PROGRAM)
        path.write_text(text, encoding="utf-8")
        program.load(str(path), **options)  # type: ignore[attr-defined]
    return program


def rank(run: StoredRun) -> tuple[float, int]:
    """The best score of an optimization's run, comparable with that of others, and when it began."""
    found = read_optimization(run.tags, run.params, run.metrics)
    return (float("-inf") if found.best is None else found.best), run.started
