"""What a real MLflow has of one experiment, in the form in which a fake one says it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_OWN_TAGS = re.compile(r"mlflow\.(artifactLocation|artifact\..*)$")


def contents_of(client: Any, experiment_id: str, scratch: Path) -> dict[str, Any]:
    """All that an experiment has."""
    found = client.search_runs([experiment_id], max_results=1000)
    keys = {run.info.run_id: run.data.tags["dspy.run.key"] for run in found}
    assert len(set(keys.values())) == len(keys), f"a run is there twice: {sorted(keys.values())}"

    def named(text: str) -> str:
        return re.sub("|".join(keys) or "$^", lambda one: f"<{keys[one[0]]}>", text)

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
    return {"runs": runs, "spans": spans, "links": sorted(links), "scores": scores}


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
