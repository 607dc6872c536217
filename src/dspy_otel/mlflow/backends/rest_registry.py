"""The registry of an MLflow server, over its REST API."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from dspy_otel.mlflow.backends import base
from dspy_otel.mlflow.backends.registry import (
    IS_PROMPT,
    MAX_FOUND,
    PROMPT_EXPERIMENTS,
    PROMPT_SOURCE,
    ROWS_AT_ONCE,
    prompt_tags,
    records,
    with_experiment,
)
from dspy_otel.mlflow.retry import ExportError
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

_TRACES: Final = 500
_READY: Final = 2
"""``LOGGED_MODEL_READY``."""


class _Rest(Protocol):
    def __call__(
        self, method: str, path: str, gives: str | None, *, empty: bool = False, version: str = "2.0", **kwargs: Any
    ) -> dict[str, Any] | None: ...


class RestRegistry:
    """The registry of one server.

    Args:
        rest: calls MLflow's REST API; None when what is asked for does not exist.
        experiment_id: gives the id of the backend's own experiment.
        put_artifact: stores a text artifact below an address.
        read_artifact: reads one.
    """

    def __init__(
        self,
        rest: _Rest,
        experiment_id: Callable[[], str],
        put_artifact: Callable[[StoredModel, str, str], None],
        read_artifact: Callable[[StoredModel, str], str | None],
    ) -> None:
        self._rest = rest
        self._experiment_id = experiment_id
        self.put_model_artifact = put_artifact
        self.read_model_artifact = read_artifact

    # --- prompts ----------------------------------------------------------------------------------------------------
    def put_prompt(self, prompt: Prompt, experiment_id: str | None = None) -> PromptVersion:
        """The version of a prompt with that text."""
        place = experiment_id or self._experiment_id()
        found = self._rest("GET", "registered-models/get", "registered_model", params={"name": prompt.name})
        if found is None:
            tags = {IS_PROMPT: "true", PROMPT_EXPERIMENTS: f",{place},"}
            self._must("registered-models/create", {"name": prompt.name, "tags": _pairs(tags)}, "registered_model")
        else:
            tags = _dict(found["registered_model"].get("tags", ()))
            if tags.get(IS_PROMPT) != "true":
                raise base.refusal("prompt", f"The registry has a model of the name {prompt.name}.")
            if (more := with_experiment(tags.get(PROMPT_EXPERIMENTS), place)) is not None:
                self._must("registered-models/set-tag", {"name": prompt.name, "key": PROMPT_EXPERIMENTS, "value": more})
            for version in self._versions(f"name = '{prompt.name}' AND tags.`{IS_PROMPT}` = 'true'"):
                if _dict(version.get("tags", ())).get(TAG_INSTRUCTIONS) == prompt.id:
                    return PromptVersion(prompt.name, int(version["version"]))
        body: dict[str, Any] = {"name": prompt.name, "source": PROMPT_SOURCE, "tags": _pairs(prompt_tags(prompt))}
        made = self._must("model-versions/create", body, "model_version")["model_version"]
        return PromptVersion(prompt.name, int(made["version"]))

    # --- models -----------------------------------------------------------------------------------------------------
    def put_model(
        self, model: Model, key: str, run_id: str, prompts: Sequence[PromptVersion], experiment_id: str | None = None
    ) -> StoredModel:
        """A LoggedModel, made or found."""
        tags = {**model.tags, **({LINKED_PROMPTS: linked_prompts(prompts)} if prompts else {})}
        found = self.find_model(key, experiment_id)
        if found is None:
            body = {
                "experiment_id": experiment_id or self._experiment_id(),
                "name": model.name,
                "model_type": MODEL_TYPE,
                "source_run_id": run_id,
                "tags": _pairs(tags),
            }
            found = _model(self._must("logged-models", body, "model")["model"])
        elif any(found.tags.get(name) != value for name, value in tags.items()):
            self._must(f"logged-models/{found.model_id}/tags", {"tags": _pairs(tags)}, method="PATCH", empty=True)
        return found

    def finish_model(self, model_id: str) -> None:
        """Set a model's status to READY."""
        body = {"model_id": model_id, "status": _READY}
        self._must(f"logged-models/{model_id}", body, "model", method="PATCH")

    def link_traces(self, run_id: str, model_id: str) -> None:
        """Give the traces of a run to a model: the whole header is written, for metadata has no call of its own."""
        place = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": self._experiment_id()}}
        body: dict[str, Any] = {
            "locations": [place],
            "filter": f"attributes.run_id = '{run_id}'",
            "max_results": _TRACES,
        }
        while True:
            answer = self._rest("POST", "traces/search", "traces", empty=True, version="3.0", json=body) or {}
            for trace in answer.get("traces", ()):
                metadata = trace.get("trace_metadata", {})
                if metadata.get(TRACE_MODEL) == model_id:
                    continue
                header = {name: value for name, value in trace.items() if name != "assessments"}
                header["trace_metadata"] = {**metadata, TRACE_MODEL: model_id}
                self._must("traces", {"trace": {"trace_info": header}}, "trace", version="3.0")
            if not answer.get("next_page_token"):
                return
            body["page_token"] = answer["next_page_token"]

    def find_model(self, key: str, experiment_id: str | None = None) -> StoredModel | None:
        """A model by its key."""
        body = {
            "experiment_ids": [experiment_id or self._experiment_id()],
            "filter": f"tags.`{TAG_OPTIMIZATION}` = '{key}'",
            "max_results": 1,
        }
        found = self._must("logged-models/search", body, "models", empty=True).get("models") or []
        return _model(found[0]) if found else None

    # --- datasets ---------------------------------------------------------------------------------------------------
    def put_dataset(self, dataset: EvaluationSet, experiment_id: str | None = None) -> None:
        """A GenAI dataset with all of its rows."""
        place = experiment_id or self._experiment_id()
        name = dataset.name.replace("'", "")
        body: dict[str, Any] = {"experiment_ids": [place], "filter_string": f"name = '{name}'", "max_results": 1}
        found = self._must("datasets/search", body, "datasets", empty=True, version="3.0").get("datasets") or []
        if found:
            dataset_id = found[0]["dataset_id"]
        else:
            body = {"name": name, "experiment_ids": [place], "tags": json.dumps(dict(dataset.tags))}
            dataset_id = self._must("datasets/create", body, "dataset", version="3.0")["dataset"]["dataset_id"]
        rows = records(dataset)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            body = {"records": json.dumps(rows[start : start + ROWS_AT_ONCE])}
            self._must(f"datasets/{dataset_id}/records", body, "inserted_count", empty=True, version="3.0")

    # --- aliases ----------------------------------------------------------------------------------------------------
    def register(self, model: StoredModel, name: str) -> int:
        """The version of a model in the registry of models."""
        if self._rest("GET", "registered-models/get", "registered_model", params={"name": name}) is None:
            self._must("registered-models/create", {"name": name}, "registered_model")
        for version in self._versions(f"name = '{name}'"):
            if _dict(version.get("tags", ())).get(TAG_MODEL) == model.model_id:
                return int(version["version"])
        body = {
            "name": name,
            "source": f"models:/{model.model_id}",
            "model_id": model.model_id,
            "tags": _pairs({TAG_MODEL: model.model_id}),
        }
        return int(self._must("model-versions/create", body, "model_version")["model_version"]["version"])

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Give an alias to a version."""
        self._must("registered-models/alias", {"name": name, "alias": alias, "version": str(version)})

    def set_prompt_alias(self, prompt: PromptVersion, alias: str) -> None:
        """Give an alias to a version of a prompt."""
        self.set_alias(prompt.name, alias, prompt.version)

    def model_of_alias(self, name: str, alias: str) -> StoredModel | None:
        """The model of a registered version by its alias."""
        try:
            found = self._rest("GET", "registered-models/alias", "model_version", params={"name": name, "alias": alias})
        except ExportError as error:
            if error.unavailable:
                raise
            return None  # MLflow answers 400 for an alias that is not there
        if found is None:
            return None
        model_id = _dict(found["model_version"].get("tags", ())).get(TAG_MODEL)
        model = self._rest("GET", f"logged-models/{model_id}", "model")
        return None if model is None else _model(model["model"])

    # --- parts ------------------------------------------------------------------------------------------------------
    def _versions(self, condition: str) -> list[dict[str, Any]]:
        params: dict[str, Any] = {"filter": condition, "max_results": MAX_FOUND}
        return (self._rest("GET", "model-versions/search", "model_versions", empty=True, params=params) or {}).get(
            "model_versions"
        ) or []

    def _must(
        self,
        path: str,
        body: Mapping[str, Any],
        gives: str | None = None,
        *,
        method: str = "POST",
        empty: bool = False,
        version: str = "2.0",
    ) -> dict[str, Any]:
        answer = self._rest(method, path, gives, empty=empty, version=version, json=body)
        if answer is None:
            raise base.refusal("not found", f"MLflow says that what {path} is for does not exist any more.")
        return answer


def _model(answer: Mapping[str, Any]) -> StoredModel:
    info = answer["info"]
    return StoredModel(
        str(info["model_id"]), str(info.get("artifact_uri", "")), str(info.get("name", "")), _dict(info.get("tags", ()))
    )


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _dict(pairs: Any) -> dict[str, str]:
    return {str(one["key"]): str(one.get("value", "")) for one in pairs}
