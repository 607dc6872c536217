"""The contract of a registry: LoggedModels, prompts, GenAI datasets and aliases of one MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from dspy_otel.mlflow.versions import (
    TAG_INSTRUCTIONS,
    EvaluationSet,
    Model,
    Prompt,
    PromptVersion,
    StoredModel,
)

IS_PROMPT: Final = "mlflow.prompt.is_prompt"
PROMPT_TEXT: Final = "mlflow.prompt.text"
PROMPT_TYPE: Final = "_mlflow_prompt_type"
PROMPT_EXPERIMENTS: Final = "_mlflow_experiment_ids"
"""MLflow's tag of a prompt with the experiments whose pages show it: ``,1,2,``."""
PROMPT_SOURCE: Final = "dummy-source"
"""What MLflow's own client gives as the source of a prompt version; servers take nothing else."""
MAX_FOUND: Final = 1000
"""Most versions of one prompt or model that are looked through: MLflow cannot search all of them by tag alone."""
ROWS_AT_ONCE: Final = 500


class Registry(Protocol):
    """What one MLflow has beside runs and traces.

    Every method that writes is idempotent, and every method raises
    :class:`~dspy_otel.mlflow.retry.ExportError` and nothing else. One thread at a time may use it.
    """

    def put_prompt(self, prompt: Prompt, experiment_id: str | None = None) -> PromptVersion:
        """The version of a prompt with that text, made if there is none."""

    def put_model(
        self, model: Model, key: str, run_id: str, prompts: Sequence[PromptVersion], experiment_id: str | None = None
    ) -> StoredModel:
        """A LoggedModel, made or found, whose source is a run.

        It is no output of the run: MLflow's page "Evaluation runs" shows no run that has one, and none below it.

        Args:
            model: what it should be.
            key: the value of its tag ``TAG_OPTIMIZATION``, by which it is found.
            run_id: of the run that made it.
            prompts: that it consists of.
            experiment_id: where, if not in the backend's own experiment.
        """

    def put_model_artifact(self, model: StoredModel, path: str, text: str) -> None:
        """Store a text artifact of a model, in place of one that may be there."""

    def finish_model(self, model_id: str) -> None:
        """Set a model's status to READY."""

    def link_traces(self, run_id: str, model_id: str) -> None:
        """Give the traces of a run to a model."""

    def put_dataset(self, dataset: EvaluationSet, experiment_id: str | None = None) -> None:
        """A GenAI dataset with all of its rows, in an experiment."""

    def find_model(self, key: str, experiment_id: str | None = None) -> StoredModel | None:
        """A model by its key."""

    def read_model_artifact(self, model: StoredModel, path: str) -> str | None:
        """A text artifact of a model; None when it has none under that path."""

    def register(self, model: StoredModel, name: str) -> int:
        """The version of a model in the registry of models, made if there is none."""

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Give an alias to a version of a registered model; another version loses it."""

    def set_prompt_alias(self, prompt: PromptVersion, alias: str) -> None:
        """Give an alias to a version of a prompt; another version loses it."""

    def model_of_alias(self, name: str, alias: str) -> StoredModel | None:
        """The model of a registered version by its alias; None when there is none."""


def prompt_tags(prompt: Prompt) -> dict[str, str]:
    """Tags of a version of a prompt."""
    return {
        IS_PROMPT: "true",
        PROMPT_TYPE: "text",
        PROMPT_TEXT: prompt.text,
        TAG_INSTRUCTIONS: prompt.id,
        "dspy.program.id": prompt.program,
    }


def with_experiment(tag: str | None, experiment_id: str) -> str | None:
    """The value of ``PROMPT_EXPERIMENTS`` with one more experiment; None when it is there."""
    known = [one for one in (tag or "").split(",") if one]
    return None if experiment_id in known else f",{','.join([*known, experiment_id])},"


def records(dataset: EvaluationSet) -> list[dict[str, Any]]:
    """The rows of a dataset as MLflow's."""
    return [{"inputs": dict(given), "expectations": dict(expected)} for given, expected in dataset.rows]
