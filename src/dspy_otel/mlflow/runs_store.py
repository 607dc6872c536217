"""Runs in an embedded SQL store, by MLflow's client in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Final

from dspy_otel.mlflow.base import ExportError, WantedExperiment, first_line
from dspy_otel.mlflow.pending import Pending
from dspy_otel.mlflow.runs import TAG_KEY, TAG_NAME, Dataset, Metric, Score, StoredRun
from dspy_otel.mlflow.runs_server import dataset_fields, read_with_client, score_metadata
from dspy_otel.mlflow.store import EmbeddedStore

_LASTING: Final = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
"""Codes of MLflow's errors that the same call would get again."""


class EmbeddedRuns:
    """Runs, links and scores of one experiment in one store.

    Args:
        uri: SQLAlchemy URI of the store.
        experiment: where the runs go.

    Raises:
        ExportError: as :class:`~dspy_otel.mlflow.store.EmbeddedStore`.
    """

    parallel = False
    """Sqlite has one writer."""

    def __init__(self, uri: str, experiment: WantedExperiment) -> None:
        store = EmbeddedStore(uri, experiment)  # checks MLflow, finds the experiment
        from mlflow.tracing.client import TracingClient
        from mlflow.tracking import MlflowClient

        self._experiment_id = store.experiment_id
        self._client = MlflowClient(tracking_uri=uri)
        self._traces = TracingClient(uri)

    def create(self, run: Pending, tags: Mapping[str, str]) -> tuple[str, str]:
        """Create a run; returns its id and the address of its artifacts."""
        if run.tried and (found := self.find(run.key)) is not None:
            return found
        run.tried = True
        made = self._client.create_run(self._experiment_id, run.started, dict(tags), tags[TAG_NAME])
        return made.info.run_id, made.info.artifact_uri

    def find(self, key: str) -> tuple[str, str] | None:
        """A run by its key: a process may have made it and not lived to hear of it."""
        runs = self._client.search_runs([self._experiment_id], f"tags.`{TAG_KEY}` = '{key}'", max_results=1)
        return (runs[0].info.run_id, runs[0].info.artifact_uri) if runs else None

    def log(self, run: Pending, metrics: Sequence[Metric], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Write at most 100 parameters, 100 tags and 1,000 metrics in all 1,000 items."""
        from mlflow.entities import Metric as Point
        from mlflow.entities import Param, RunTag

        self._client.log_batch(
            run.run_id,
            [Point(metric.key, metric.value, metric.time, metric.step) for metric in metrics],
            [Param(key, value) for key, value in params.items()],
            [RunTag(key, value) for key, value in tags.items()],
        )

    def datasets(self, run: Pending, datasets: Sequence[Dataset]) -> None:
        """Add dataset inputs."""
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        inputs = [
            DatasetInput(Entity(**dataset_fields(dataset)), [InputTag("mlflow.data.context", dataset.context)])
            for dataset in datasets
        ]
        self._client.log_inputs(run.run_id, inputs)

    def artifact(self, run: Pending, path: str, text: str) -> None:
        """Store a text artifact."""
        self._client.log_text(run.run_id, text.encode("utf-8", "replace").decode(), path)

    def end(self, run: Pending, status: str, when: int) -> None:
        """Set a run's status and end."""
        self._client.set_terminated(run.run_id, status, when)

    def link(self, run_id: str, trace_ids: Sequence[str]) -> None:
        """Put at most 100 traces on a run."""
        self._client.link_traces_to_run(list(trace_ids), run_id)

    def assess(self, score: Score, run_id: str | None) -> bool:
        """Put a score on a trace; False when the trace does not exist."""
        from mlflow.entities import AssessmentError, AssessmentSource, Feedback
        from mlflow.exceptions import MlflowException

        error = None if score.error is None else AssessmentError(score.error, "The example failed.")
        feedback = Feedback(
            name=score.name,
            value=score.value,
            error=error,
            rationale=score.rationale,
            source=AssessmentSource("CODE", score.name),
            metadata=score_metadata(score, run_id),
            span_id=score.span_id,
        )
        feedback.assessment_id = score.id
        try:
            self._traces.log_assessment(score.trace_id, feedback)
        except MlflowException as failure:
            if failure.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            # It may be there already, from an attempt that was cut short.
            with contextlib.suppress(MlflowException):
                self._traces.get_assessment(score.trace_id, feedback.assessment_id)
                return True
            raise
        return True

    def find_runs(self, run_id: str | None, condition: str, experiment_id: str | None = None) -> list[StoredRun]:
        """The run with an id, or those of an experiment that match a search condition (the newest 1,000)."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            found = self._client.search_runs([experiment_id or self._experiment_id], condition, max_results=1000)
        else:
            try:
                found = [self._client.get_run(run_id)]
            except MlflowException:
                found = []
        return [
            StoredRun(
                run.info.run_id,
                run.info.artifact_uri,
                run.info.start_time,
                run.data.tags,
                run.data.metrics,
                run.data.params,
                run.info.experiment_id,
                run.info.status,
                run.info.end_time,
            )
            for run in found
        ]

    def read_artifact(self, run_id: str, artifact_uri: str, path: str) -> str | None:
        """A text artifact, or None when the run has none under that path."""
        return read_with_client(self._client, run_id, path)

    def alive(self) -> bool:
        """A store in this process is."""
        return True

    def explain(self, error: Exception) -> ExportError:
        """An error as one of ours; permanent when the same call would fail again."""
        if isinstance(error, ExportError):
            return error
        lasting = getattr(error, "error_code", None) in _LASTING
        return ExportError("write", f"MLflow's store refused: {first_line(error)}.", permanent=lasting)

    def close(self) -> None:
        """Nothing: MLflow shares one store per URI in a process, and others may use it."""

    def after_fork(self) -> None:
        """Forget the parent's database connections without closing them under it."""
        engine = getattr(self._traces.store, "engine", None)
        if engine is not None:
            engine.dispose(close=False)
