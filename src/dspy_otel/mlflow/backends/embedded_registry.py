"""The registry of an embedded SQL store, through MLflow's client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from dspy_otel.mlflow.backends import base
from dspy_otel.mlflow.backends.registry import (
    IS_PROMPT,
    MAX_FOUND,
    PROMPT_EXPERIMENTS,
    PROMPT_TEXT,
    PROMPT_TYPE,
    ROWS_AT_ONCE,
    prompt_tags,
    records,
    with_experiment,
)
from dspy_otel.mlflow.retry import ExportError, Verdict
from dspy_otel.mlflow.versions import (
    LINKED_PROMPTS,
    MODEL_TYPE,
    TAG_INSTRUCTIONS,
    TAG_MODEL,
    TAG_OPTIMIZATION,
    TRACE_MODEL,
    EvaluationSet,
    Model,
    Prompt,
    PromptVersion,
    StoredModel,
    linked_prompts,
)

_Result = TypeVar("_Result")


class Call(Protocol):
    """Makes a call of MLflow's."""

    def __call__(self, cause: str, call: Callable[[], _Result]) -> _Result:
        """Call; an error of the given cause says whether the same call would fail again."""


class EmbeddedRegistry:
    """The registry of one store.

    Args:
        client: MLflow's.
        store: MLflow's store of runs and traces.
        experiment_id: of the backend's own experiment.
        call: makes a call of MLflow's, given a cause; an error says whether the same call would fail again.
    """

    def __init__(self, client: Any, store: Any, experiment_id: str, call: Call) -> None:
        self._client = client
        self._store = store
        self._experiment_id = experiment_id
        self._call = call

    # --- prompts ----------------------------------------------------------------------------------------------------
    def put_prompt(self, prompt: Prompt, experiment_id: str | None = None) -> PromptVersion:
        """The version of a prompt with that text."""
        return self._call("prompt", lambda: self._put_prompt(prompt, experiment_id or self._experiment_id))

    def _put_prompt(self, prompt: Prompt, place: str) -> PromptVersion:
        client = self._client
        found = _if_there(lambda: client.get_prompt(prompt.name))
        if found is None:
            client.create_prompt(prompt.name, tags={PROMPT_EXPERIMENTS: f",{place},"})
        else:
            if (more := with_experiment(found.tags.get(PROMPT_EXPERIMENTS), place)) is not None:
                client.set_prompt_tag(prompt.name, PROMPT_EXPERIMENTS, more)
            condition = f"name = '{prompt.name}' AND tags.`{IS_PROMPT}` = 'true'"
            for version in client.search_model_versions(condition, max_results=MAX_FOUND):
                if (getattr(version, "_tags", None) or version.tags).get(TAG_INSTRUCTIONS) == prompt.id:
                    return PromptVersion(prompt.name, int(version.version))
        own = {
            name: value
            for name, value in prompt_tags(prompt).items()
            if name not in (IS_PROMPT, PROMPT_TEXT, PROMPT_TYPE)
        }
        made = client.create_prompt_version(prompt.name, prompt.text, tags=own)
        return PromptVersion(prompt.name, int(made.version))

    # --- models -----------------------------------------------------------------------------------------------------
    def put_model(
        self, model: Model, key: str, run_id: str, prompts: Sequence[PromptVersion], experiment_id: str | None = None
    ) -> StoredModel:
        """A LoggedModel, made or found."""
        tags = {**model.tags, **({LINKED_PROMPTS: linked_prompts(prompts)} if prompts else {})}
        found = self.find_model(key, experiment_id)
        return self._call(
            "model", lambda: self._put_model(model, tags, found, run_id, experiment_id or self._experiment_id)
        )

    def _put_model(
        self, model: Model, tags: dict[str, str], found: StoredModel | None, run_id: str, place: str
    ) -> StoredModel:
        if found is None:
            made = self._client.create_logged_model(
                place, name=model.name, source_run_id=run_id, tags=tags, model_type=MODEL_TYPE
            )
            found = _model(made)
        elif any(found.tags.get(name) != value for name, value in tags.items()):
            self._client.set_logged_model_tags(found.model_id, tags)
        return found

    def put_model_artifact(self, model: StoredModel, path: str, text: str) -> None:
        """Store a text artifact of a model."""
        self._call("artifact", lambda: base.put_with_client(self._client, model.model_id, path, text))

    def finish_model(self, model_id: str) -> None:
        """Set a model's status to READY."""
        self._call("model", lambda: self._client.finalize_logged_model(model_id, "READY"))

    def link_traces(self, run_id: str, model_id: str) -> None:
        """Give the traces of a run to a model: rows are merged, for metadata has no call of its own."""

        def link() -> None:
            from mlflow.store.tracking.dbmodels.models import SqlTraceMetadata

            token, ids = None, []
            while True:
                page = self._client.search_traces(
                    locations=[self._experiment_id],
                    run_id=run_id,
                    max_results=500,
                    page_token=token,
                    include_spans=False,
                )
                ids += [one.info.trace_id for one in page if one.info.trace_metadata.get(TRACE_MODEL) != model_id]
                if not (token := page.token):
                    break
            if ids:
                with self._store.ManagedSessionMaker(read_only=False) as session:
                    for trace_id in ids:
                        session.merge(SqlTraceMetadata(request_id=trace_id, key=TRACE_MODEL, value=model_id))

        self._call("model", link)

    def find_model(self, key: str, experiment_id: str | None = None) -> StoredModel | None:
        """A model by its key."""
        places, condition = [experiment_id or self._experiment_id], f"tags.`{TAG_OPTIMIZATION}` = '{key}'"
        search = self._client.search_logged_models
        found = self._call("model", lambda: search(places, filter_string=condition, max_results=1))
        return _model(found[0]) if found else None

    def read_model_artifact(self, model: StoredModel, path: str) -> str | None:
        """A text artifact of a model."""
        return self._call("artifact", lambda: base.read_below(model.artifact_uri, path))

    # --- datasets ---------------------------------------------------------------------------------------------------
    def put_dataset(self, dataset: EvaluationSet, experiment_id: str | None = None) -> None:
        """A GenAI dataset with all of its rows."""
        place = experiment_id or self._experiment_id

        def put() -> None:
            name = dataset.name.replace("'", "")
            found = self._store.search_datasets([place], filter_string=f"name = '{name}'", max_results=1)
            entity = found[0] if found else self._store.create_dataset(name, dict(dataset.tags), [place])
            rows = records(dataset)
            for start in range(0, len(rows), ROWS_AT_ONCE):
                self._store.upsert_dataset_records(entity.dataset_id, rows[start : start + ROWS_AT_ONCE])

        self._call("dataset", put)

    # --- aliases ----------------------------------------------------------------------------------------------------
    def register(self, model: StoredModel, name: str) -> int:
        """The version of a model in the registry of models."""

        def register() -> int:
            if _if_there(lambda: self._client.get_registered_model(name)) is None:
                self._client.create_registered_model(name)
            for version in self._client.search_model_versions(f"name = '{name}'", max_results=MAX_FOUND):
                if version.tags.get(TAG_MODEL) == model.model_id:
                    return int(version.version)
            source, tags = f"models:/{model.model_id}", {TAG_MODEL: model.model_id}
            return int(self._client.create_model_version(name, source, tags=tags, model_id=model.model_id).version)

        return self._call("register", register)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Give an alias to a version."""
        self._call("alias", lambda: self._client.set_registered_model_alias(name, alias, str(version)))

    def set_prompt_alias(self, prompt: PromptVersion, alias: str) -> None:
        """Give an alias to a version of a prompt."""
        self._call("alias", lambda: self._client.set_prompt_alias(prompt.name, alias, prompt.version))

    def model_of_alias(self, name: str, alias: str) -> StoredModel | None:
        """The model of a registered version by its alias."""
        try:
            found = self._call("alias", lambda: self._client.get_model_version_by_alias(name, alias))
        except ExportError as error:
            if error.verdict is Verdict.LATER:
                raise
            return None
        model_id = found.tags.get(TAG_MODEL)
        return (
            None if model_id is None else _model(self._call("model", lambda: self._client.get_logged_model(model_id)))
        )


def _if_there(call: Callable[[], Any]) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _model(model: Any) -> StoredModel:
    return StoredModel(model.model_id, model.artifact_location, model.name, dict(model.tags or {}))
