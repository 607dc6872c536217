"""Runs on an MLflow server, by its REST API alone."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from dspy_otel.mlflow.base import ExportError, first_line
from dspy_otel.mlflow.pending import Pending
from dspy_otel.mlflow.runs import TAG_KEY, TAG_NAME, Dataset, Metric, Score, StoredRun
from dspy_otel.mlflow.server import MLflowServer

_ARTIFACTS: Final = "mlflow-artifacts"


class ServerRuns:
    """Runs, links and scores of one experiment on one server. Methods may be called from several threads.

    Args:
        server: a connection of its own.
    """

    parallel = True
    """A server answers several requests at once."""

    def __init__(self, server: MLflowServer) -> None:
        self._server = server

    def create(self, run: Pending, tags: Mapping[str, str]) -> tuple[str, str]:
        """Create a run; returns its id and the address of its artifacts."""
        experiment = self._server.experiment_id()
        if run.tried and (found := self.find(run.key)) is not None:
            return found
        run.tried = True
        body = {
            "experiment_id": experiment,
            "run_name": tags[TAG_NAME],
            "start_time": run.started,
            "tags": _pairs(tags),
        }
        return _run_of(self._post("runs/create", body)["run"])

    def find(self, key: str) -> tuple[str, str] | None:
        """A run by its key: one whose creation got no answer may be there all the same."""
        experiments = [self._server.experiment_id()]
        body = {"experiment_ids": experiments, "filter": f"tags.`{TAG_KEY}` = '{key}'", "max_results": 1}
        runs = self._post("runs/search", body).get("runs") or []
        return _run_of(runs[0]) if runs else None

    def log(self, run: Pending, metrics: Sequence[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Write at most 100 parameters, 100 tags and 1,000 metrics in all 1,000 items."""
        points = [{"key": m.key, "value": m.value, "timestamp": m.time, "step": m.step} for m in metrics]
        self._post(
            "runs/log-batch", {"run_id": run.run_id, "metrics": points, "params": _pairs(params), "tags": _pairs(tags)}
        )

    def datasets(self, run: Pending, datasets: Sequence[Dataset]) -> None:
        """Add dataset inputs."""
        inputs = [
            {"tags": [{"key": "mlflow.data.context", "value": dataset.context}], "dataset": dataset_fields(dataset)}
            for dataset in datasets
        ]
        self._post("runs/log-inputs", {"run_id": run.run_id, "datasets": inputs})

    def artifact(self, run: Pending, path: str, text: str) -> None:
        """Store a text artifact.

        Raises:
            ExportError: permanent, when the server leaves artifacts to its clients and MLflow is not installed here.
        """
        address = urlsplit(run.artifact_uri)
        if address.scheme != _ARTIFACTS:
            self._artifact_by_client(run, path, text)
            return
        place = quote(f"{address.path.strip('/')}/{path}")
        path = f"/api/2.0/mlflow-artifacts/artifacts/{place}"
        response = self._server.request("PUT", path, data=text.encode("utf-8", "replace"))
        if response.content or not response.ok:  # MLflow answers an upload with nothing; a login page is something
            self._server.object_of(response)

    def _artifact_by_client(self, run: Pending, path: str, text: str) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise ExportError(
                "artifacts",
                f"This server's artifacts are at {urlsplit(run.artifact_uri).scheme}://, where only MLflow's client "
                "can write: pip install mlflow-skinny.",
                permanent=True,
            ) from error
        MlflowClient(tracking_uri=self._server.uri).log_text(run.run_id, text, path)

    def end(self, run: Pending, status: str, when: int) -> None:
        """Set a run's status and end."""
        self._post("runs/update", {"run_id": run.run_id, "status": status, "end_time": when})

    def link(self, run_id: str, trace_ids: Sequence[str]) -> None:
        """Put at most 100 traces on a run."""
        self._post("traces/link-to-run", {"trace_ids": list(trace_ids), "run_id": run_id})

    def assess(self, score: Score, run_id: str | None) -> bool:
        """Put a score on a trace; False when the trace does not exist."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z")
        feedback: dict[str, Any] = {"value": score.value}
        if score.error is not None:
            feedback["error"] = {"error_code": score.error, "error_message": "The example failed."}
        assessment: dict[str, Any] = {
            "assessment_id": score.id,
            "trace_id": score.trace_id,
            "assessment_name": score.name,
            "source": {"source_type": "CODE", "source_id": score.name},
            "create_time": now,
            "last_update_time": now,
            "feedback": feedback,
            "metadata": score_metadata(score, run_id),
        }
        if score.rationale is not None:
            assessment["rationale"] = score.rationale
        if score.span_id is not None:
            assessment["span_id"] = score.span_id
        path = f"traces/{score.trace_id}/assessments"
        try:
            return self._server.rest("POST", path, version="3.0", json={"assessment": assessment}) is not None
        except ExportError as error:
            # It may be there already, from an attempt whose answer got lost.
            if error.cause != "status 500":
                raise
            if self._server.rest("GET", f"{path}/{score.id}", version="3.0") is None:
                raise
            return True

    def find_runs(self, run_id: str | None, condition: str, experiment_id: str | None = None) -> list[StoredRun]:
        """The run with an id, or those of an experiment that match a search condition (the newest 1,000)."""
        if run_id is not None:
            answer = self._server.rest("GET", "runs/get", params={"run_id": run_id})
            return [] if answer is None else [_stored(answer["run"])]
        place = experiment_id or self._server.experiment_id()
        body = {"experiment_ids": [place], "filter": condition, "max_results": 1000}
        return [_stored(run) for run in self._post("runs/search", body).get("runs") or []]

    def read_artifact(self, run_id: str, artifact_uri: str, path: str) -> str | None:
        """A text artifact, or None when the run has none under that path."""
        address = urlsplit(artifact_uri)
        if address.scheme != _ARTIFACTS:
            from mlflow.tracking import MlflowClient

            return read_with_client(MlflowClient(tracking_uri=self._server.uri), run_id, path)
        place = quote(f"{address.path.strip('/')}/{path}")
        response = self._server.request("GET", f"/api/2.0/mlflow-artifacts/artifacts/{place}")
        return response.content.decode("utf-8") if response.ok else None

    def alive(self) -> bool:
        """Whether the server answers at all."""
        return self._server.alive()

    def explain(self, error: Exception) -> ExportError:
        """An error as one of ours; permanent when the same call would fail again."""
        if isinstance(error, ExportError):
            # The status of a request that MLflow will never take; what may pass has another cause.
            lasting = error.cause.startswith("status 4") or error.cause == "status 501"
            return ExportError(error.cause, str(error), permanent=error.permanent or lasting)
        return ExportError(type(error).__name__, f"MLflow: {first_line(error)}.")

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def after_fork(self) -> None:
        """Drop the connections shared with the parent process."""
        self._server.after_fork()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._server.rest("POST", path, json=body)
        if answer is None:
            raise ExportError("gone", "MLflow says the run or experiment does not exist any more.", permanent=True)
        return answer


def read_with_client(client: Any, run_id: str, path: str) -> str | None:
    """A text artifact through MLflow's client, or None when there is none."""
    if path not in {item.path for item in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory() as directory:
        return Path(client.download_artifacts(run_id, path, directory)).read_text(encoding="utf-8")


def dataset_fields(dataset: Dataset) -> dict[str, str]:
    """A dataset as MLflow's entity. DSPy's are lists in memory: there is no place to load them from again."""
    columns = [{"type": kind, "name": name, "required": False} for name, kind in dataset.columns]
    return {
        "name": dataset.name,
        "digest": dataset.digest,
        "source_type": "code",
        "source": json.dumps({"tags": {}}),
        "schema": json.dumps({"mlflow_colspec": columns}) if columns else "",
        "profile": json.dumps({"num_rows": dataset.size}),
    }


def score_metadata(score: Score, run_id: str | None) -> dict[str, str]:
    """What an assessment says beside its value; the run's page shows the scores that name it."""
    metadata = {} if run_id is None else {"mlflow.assessment.sourceRunId": run_id}
    if score.row is not None:
        metadata["dspy.example.index"] = str(score.row)
    return metadata


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _run_of(answer: Mapping[str, Any]) -> tuple[str, str]:
    info = answer["info"]
    return str(info["run_id"]), str(info.get("artifact_uri", ""))


def _stored(answer: Mapping[str, Any]) -> StoredRun:
    info, data = answer["info"], answer.get("data", {})
    return StoredRun(
        str(info["run_id"]),
        str(info.get("artifact_uri", "")),
        int(info.get("start_time", 0)),
        {tag["key"]: tag.get("value", "") for tag in data.get("tags", ())},
        {metric["key"]: float(metric["value"]) for metric in data.get("metrics", ())},
        {param["key"]: param.get("value", "") for param in data.get("params", ())},
        str(info.get("experiment_id", "")),
        str(info.get("status", "")),
        int(info["end_time"]) if info.get("end_time") else None,
    )
