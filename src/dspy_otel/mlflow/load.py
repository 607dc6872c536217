"""Programs back from MLflow."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final, TypeVar

from dspy_otel.mlflow.backends import Backend, open_backend
from dspy_otel.mlflow.backends.base import CreatedRun
from dspy_otel.mlflow.retry import ExportError
from dspy_otel.mlflow.runs import BEST_PROGRAM, COMPILE, TAG_KEY, TAG_KIND, StoredRun
from dspy_otel.mlflow.target import Target
from dspy_otel.mlflow.versions import registered_name
from dspy_otel.record.stored import read_optimization

_Program = TypeVar("_Program")
NO_PROGRAM: Final = (
    "has no {}: programs are recorded with OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=span_only, and stored "
    "when nothing of them was cut or masked"
)
"""Why there is no program to load."""


def load_best(
    program: _Program,
    *,
    run_id: str | None = None,
    alias: str | None = None,
    name: str | None = None,
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
        alias: load the version that has this alias instead, in whichever experiment it was made; ``dspy-otel promote``
            gives one.
        name: of the program in MLflow's registry, for ``alias``; default the name of its class.
        experiment: name or id; default as for :class:`~dspy_otel.mlflow.MLflowSpanExporter`.
        tracking_uri: likewise.
        **options: for the program's ``load``, such as ``allow_unsafe_lm_state=True`` for a program whose LM is of a
            class of its own.

    Returns:
        ``program``.

    Raises:
        LookupError: no such run, alias or experiment, or its program was not recorded (content capture was off).
        ValueError: both a run and an alias.
        ExportError: MLflow cannot be reached or opened.
    """
    if run_id is not None and alias is not None:
        raise ValueError("Give a run_id or an alias, not both.")
    named = "0" if alias is not None or run_id is not None else None if experiment is None else str(experiment)
    target = Target(tracking_uri, named, create=False)
    store = None
    try:
        store = open_backend(target)
        if alias is not None:
            text = _of_alias(store, registered_name(name or type(program).__name__), alias)
        else:
            text = _of_run(store, run_id)
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


def _of_alias(store: Backend, name: str, alias: str) -> str:
    model = store.registry.model_of_alias(name, alias)
    if model is None:
        raise LookupError(f"MLflow has no program {name!r} with the alias {alias!r}: `dspy-otel promote` gives one")
    text = store.registry.read_model_artifact(model, BEST_PROGRAM)
    if text is None:
        raise LookupError(f"Model {model.model_id} {NO_PROGRAM.format(BEST_PROGRAM)}")
    return text


def _of_run(store: Backend, run_id: str | None) -> str:
    runs = store.find_runs(run_id, f"tags.`{TAG_KIND}` = '{COMPILE}' AND attributes.status = 'FINISHED'")
    # A run that is a step of another optimization is left out.
    runs = [run for run in runs if run_id is not None or read_optimization(run.tags, {}, {}).parent is None]
    if not runs:
        raise LookupError("MLflow has no finished optimization there" if run_id is None else f"No run {run_id}")
    best = max(runs, key=rank)
    model = store.registry.find_model(best.tags.get(TAG_KEY, ""), best.experiment_id)
    text = None if model is None else store.registry.read_model_artifact(model, BEST_PROGRAM)
    if text is None:  # models may be switched off, and older runs have none
        text = store.read_artifact(CreatedRun(best.run_id, best.artifact_uri), BEST_PROGRAM)
    if text is None:
        raise LookupError(f"Run {best.run_id} {NO_PROGRAM.format(BEST_PROGRAM)}")
    return text


def rank(run: StoredRun) -> tuple[float, int]:
    """The best score of an optimization's run, comparable with that of others, and when it began."""
    found = read_optimization(run.tags, run.params, run.metrics)
    return (float("-inf") if found.best is None else found.best), run.started
