"""What a real MLflow has of one experiment, in the form in which a fake one says it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_OWN_TAGS = re.compile(r"mlflow\.(artifactLocation|artifact\..*)$")


def contents_of(client: Any, experiment_id: str, scratch: Path) -> dict[str, Any]:
    """All that an experiment has."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    found = client.search_runs([experiment_id], max_results=1000)
    keys = {run.info.run_id: run.data.tags["dspy.run.key"] for run in found}
    assert len(set(keys.values())) == len(keys), f"a run is there twice: {sorted(keys.values())}"

    of_models = client.search_logged_models([experiment_id])
    ids = {**keys, **{model.model_id: f"model of {keys[model.source_run_id]}" for model in of_models}}

    def named(text: str) -> str:
        return re.sub("|".join(ids) or "$^", lambda one: f"<{ids[one[0]]}>", text)

    runs: dict[str, Any] = {}
    links = []
    for run in found:
        run_id, killed = run.info.run_id, run.info.status == "KILLED"
        points = [point for key in run.data.metrics for point in client.get_metric_history(run_id, key)]
        artifacts = {}
        for item in client.list_artifacts(run_id):
            place = scratch / run_id
            place.mkdir(exist_ok=True)
            artifacts[item.path] = named(Path(client.download_artifacts(run_id, item.path, str(place))).read_text())
        runs[keys[run_id]] = {
            "status": run.info.status,
            "times": (run.info.start_time, None if killed else run.info.end_time),
            "tags": {key: named(value) for key, value in run.data.tags.items() if not _OWN_TAGS.match(key)},
            "params": dict(run.data.params),
            "metrics": sorted((p.key, p.value, 0 if killed else p.timestamp, p.step) for p in points),
            "datasets": sorted(
                (one.dataset.name, one.dataset.digest, one.tags[0].value) for one in run.inputs.dataset_inputs
            ),
            "artifacts": artifacts,
        }
        links += [(keys[run_id], trace.info.trace_id) for trace in _traces(client, experiment_id, run_id=run_id)]
    spans, scores = {}, {}
    for trace in _traces(client, experiment_id, include_spans=True):
        for span in trace.data.spans:
            spans[f"{trace.info.trace_id}/{span.span_id}"] = span.name
        for score in trace.info.assessments:
            scores[score.assessment_id] = (
                *(trace.info.trace_id, score.name, (score.feedback or score.expectation).value),
                None if score.feedback is None or score.error is None else score.error.error_code,
                {key: named(value) for key, value in (score.metadata or {}).items()},
            )
    models = {}
    for model in of_models:
        key = keys[model.source_run_id]
        assert key not in models, f"a model is there twice: {key}"
        traces = _traces(client, experiment_id, filter_string=f"request_metadata.`mlflow.modelId` = '{model.model_id}'")
        repository = get_artifact_repository(model.artifact_location, tracking_uri=client.tracking_uri)
        models[key] = {
            "name": model.name,
            "status": str(model.status),
            "tags": {name: named(value) for name, value in sorted(model.tags.items())},
            "artifacts": {
                item.path: Path(repository.download_artifacts(item.path, str(scratch))).read_text()
                for item in repository.list_artifacts()
            },
            "traces": sorted(trace.info.trace_id for trace in traces),
        }
    of_prompts = {one.name: one for one in client.search_prompts()}
    mine = [name for name, one in of_prompts.items() if f",{experiment_id}," in one.tags["_mlflow_experiment_ids"]]
    prompts = {name: [version.tags["mlflow.prompt.text"] for version in _versions(client, name)] for name in mine}
    store, datasets = client._tracking_client.store, {}
    for one in store.search_datasets([experiment_id]):
        rows, _ = store._load_dataset_records(one.dataset_id)
        datasets[one.name] = (one.tags, dict(sorted((json.dumps(row.inputs), row.expectations) for row in rows)))
    return {
        **{"runs": runs, "spans": spans, "links": sorted(links), "scores": scores},
        **{"models": models, "prompts": prompts, "datasets": datasets},
    }


def _versions(client: Any, name: str) -> list[Any]:
    found = client.search_model_versions(f"name = '{name}' AND tags.`mlflow.prompt.is_prompt` = 'true'")
    return sorted(found, key=lambda version: int(version.version))


def _traces(client: Any, experiment_id: str, include_spans: bool = False, **more: Any) -> list[Any]:
    found, token = [], None
    while True:
        page = client.search_traces(
            locations=[experiment_id], max_results=100, page_token=token, include_spans=include_spans, **more
        )
        found += page
        if not (token := page.token):
            return found


def comparable(contents: dict[str, Any]) -> dict[str, Any]:
    """What a fake one has, less what MLflow keeps in a form of its own."""
    return {
        **contents,
        "spans": {"/".join(place): span["name"] for place, span in contents["spans"].items()},
        "scores": {
            score_id: (
                *(score["trace_id"], score["assessment_name"], _value(score.get("feedback") or score["expectation"])),
                score.get("feedback", {}).get("error", {}).get("error_code"),
                score["metadata"],
            )
            for score_id, score in contents["scores"].items()
        },
    }


def _value(given: dict[str, Any]) -> Any:
    return given["value"] if "value" in given else json.loads(given["serialized_value"]["value"])


def timeless(contents: dict[str, Any]) -> dict[str, Any]:
    """Without the duration in the report of a killed run: that is when the program is known to have ended."""
    for run in contents["runs"].values():
        for path, text in run["artifacts"].items():
            run["artifacts"][path] = re.sub(r"<b>[^<]*</b><span>duration", "<span>duration", text)
    return contents
