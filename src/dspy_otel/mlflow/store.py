"""Spans into an embedded MLflow SQL store (``sqlite:///`` and the like), in this process, without a server.

MLflow has no public way in for finished OpenTelemetry spans. What its own OTLP endpoint does with a request is done
here in process: decode each span with ``Span.from_otel_proto`` and hand the list to the store's ``log_spans``
(read in MLflow 3.17.2, ``mlflow/server/otel_api.py``). So a trace looks the same as one that went through a server.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from packaging.version import Version

from dspy_otel.mlflow.base import (
    OLDEST_MLFLOW,
    ExportError,
    FoundExperiment,
    WantedExperiment,
    first_line,
    only_process,
    public_uri,
    resolve_experiment,
)
from dspy_otel.mlflow.translate import CHAT_USAGE, LLM_COST

_OPENING_SECONDS: Final = 300.0
"""For the migrations of a new store by another process, on a slow machine."""


class EmbeddedStore:
    """One SQL store and one experiment in it, through MLflow's client; a missing database is created.

    Args:
        uri: SQLAlchemy URI of the store.
        experiment: where the traces go.

    Attributes:
        experiment_id: of that experiment.

    Raises:
        ExportError: MLflow is missing, too old, not the full package, or cannot open the store.
    """

    def __init__(self, uri: str, experiment: WantedExperiment) -> None:
        self._name = public_uri(uri)
        _check_mlflow()
        with only_process(uri, _OPENING_SECONDS):  # migrations of a new store by two processes collide
            try:
                from mlflow.tracing.client import TracingClient
                from mlflow.tracking import MlflowClient

                self._traces = TracingClient(uri)
                experiments = _ClientExperiments(MlflowClient(tracking_uri=uri))
            except Exception as error:
                raise ExportError("store", f"MLflow cannot open {self._name}: {first_line(error)}") from error
            self.experiment_id = resolve_experiment(experiment, experiments)

    def send(self, spans: Sequence[ReadableSpan]) -> None:
        """Write a batch in one transaction.

        Raises:
            ExportError: the store refused it.
        """
        try:
            self._traces.log_spans(self.experiment_id, _to_mlflow(spans))
        except Exception as error:
            raise ExportError("write", f"MLflow cannot write to {self._name}: {first_line(error)}") from error

    def alive(self) -> bool:
        """A store in this process is."""
        return True

    def after_fork(self) -> None:
        """Forget the parent's database connections without closing them under it."""
        engine = getattr(self._traces.store, "engine", None)
        if engine is not None:
            engine.dispose(close=False)

    def close(self) -> None:
        """Nothing: MLflow shares one store per URI in a process, and others may use it."""


def _check_mlflow() -> None:
    install = "pip install 'dspy-otel[mlflow]'"
    try:
        import mlflow
    except ImportError as error:
        raise ExportError(
            "mlflow missing", f"An embedded MLflow store needs the mlflow package: {install}.", permanent=True
        ) from error
    if Version(mlflow.__version__) < Version(OLDEST_MLFLOW):
        raise ExportError(
            "mlflow old",
            f"MLflow {mlflow.__version__} is too old for an embedded store; {OLDEST_MLFLOW} or newer is needed.",
            permanent=True,
        )
    try:
        import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise ExportError(
            "mlflow skinny", f"mlflow-skinny and mlflow-tracing have no SQL store: {install}.", permanent=True
        ) from error


def _to_mlflow(spans: Sequence[ReadableSpan]) -> list[Any]:
    """Finished OpenTelemetry spans as MLflow's entities, as its own OTLP endpoint makes them."""
    from mlflow.entities import Span

    entities = [
        Span.from_otel_proto(span, resource=resource_spans.resource)
        for resource_spans in encode_spans(spans).resource_spans
        for scope_spans in resource_spans.scope_spans
        for span in scope_spans.spans
    ]
    for entity in entities:
        _leave_unpriced(entity)
    return entities


def _leave_unpriced(span: Any) -> None:
    """Keep the store from pricing a call of ours that DSPy could not price.

    It would import LiteLLM into the user's program, which takes seconds and asks the network for prices. An empty
    cost is read as given, and shown as none.
    """
    attributes = getattr(getattr(span, "_span", None), "_attributes", None)  # as MLflow's endpoint sets service.name
    if isinstance(attributes, MutableMapping) and CHAT_USAGE in attributes:
        attributes.setdefault(LLM_COST, "")


class _ClientExperiments:
    def __init__(self, client: Any) -> None:
        self._client = client

    def by_id(self, experiment_id: str) -> FoundExperiment | None:
        from mlflow.exceptions import MlflowException

        try:
            experiment = self._client.get_experiment(experiment_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return FoundExperiment(experiment.experiment_id, experiment.lifecycle_stage)

    def by_name(self, name: str) -> FoundExperiment | None:
        experiment = self._client.get_experiment_by_name(name)
        return FoundExperiment(experiment.experiment_id, experiment.lifecycle_stage) if experiment else None

    def create(self, name: str) -> str:
        try:
            return str(self._client.create_experiment(name))
        except Exception as error:
            raise ExportError("experiment", f"MLflow did not create {name!r}: {first_line(error)}") from error
