"""An alias for the result of an optimization, in MLflow's registry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from dspy_otel import semconv
from dspy_otel.mlflow.backends import open_backend
from dspy_otel.mlflow.load import NO_PROGRAM
from dspy_otel.mlflow.runs import BEST_PROGRAM, COMPILE, FINISHED, TAG_KEY, TAG_KIND
from dspy_otel.mlflow.target import Target
from dspy_otel.mlflow.versions import ENV_PARTS, MODELS, PromptVersion, read_linked_prompts, registered_name

_ALIAS: Final = re.compile(r"(?!latest\Z)(?!v\d+\Z)[A-Za-z0-9_-]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Promoted:
    """What has an alias now.

    Attributes:
        name, version: of the program in the registry of models.
        program_id: ``dspy.program.id``.
        prompts: versions of its instructions, which have the alias too.
    """

    name: str
    version: int
    program_id: str | None
    prompts: tuple[PromptVersion, ...]


def promote(run_id: str, alias: str, *, tracking_uri: str | None = None) -> Promoted:
    """Give an alias to the program that an optimization returned, and to its instructions.

    The program becomes a version in the registry of models, once. Another version that had the alias loses it.

    Args:
        run_id: the MLflow run of the optimization.
        alias: letters, digits, ``_`` and ``-``.
        tracking_uri: default ``MLFLOW_TRACKING_URI``.

    Raises:
        ValueError: MLflow has no such aliases.
        LookupError: no such run, or one that returned no program that can be loaded.
        ExportError: MLflow cannot be reached or opened, or does not take the alias.
    """
    if not _ALIAS.fullmatch(alias):
        raise ValueError(f"{alias!r} cannot be an alias: use letters, digits, _ and -, and neither latest nor v1.")
    store = open_backend(Target(tracking_uri, "0", create=False))
    try:
        runs = store.find_runs(run_id, "")
        if not runs:
            raise LookupError(f"There is no run {run_id}.")
        run = runs[0]
        if run.tags.get(TAG_KIND) != COMPILE:
            raise LookupError(f"Run {run_id} is no optimization: promote the run above it, whose result is a version.")
        if run.status != FINISHED:
            raise LookupError(f"Run {run_id} has not finished ({run.status}): it has no result.")
        model = store.registry.find_model(run.tags.get(TAG_KEY, ""), run.experiment_id)
        if model is None:
            raise LookupError(
                f"Run {run_id} has no model: it is a step of another optimization, {ENV_PARTS[MODELS]} was off, or it "
                "has not been delivered yet (`dspy-otel replay`)."
            )
        if store.registry.read_model_artifact(model, BEST_PROGRAM) is None:
            raise LookupError(f"Run {run_id} {NO_PROGRAM.format(BEST_PROGRAM)}.")
        name = registered_name(model.tags.get(semconv.PROGRAM_NAME, "Program"))
        version = store.registry.register(model, name)
        prompts = tuple(read_linked_prompts(model.tags))
        for prompt in prompts:
            store.registry.set_prompt_alias(prompt, alias)
        store.registry.set_alias(name, alias, version)  # last: it is what a program loads by
        return Promoted(name, version, model.tags.get(semconv.PROGRAM_ID), prompts)
    finally:
        store.close()
