"""The OpenTelemetry span exporter that writes MLflow traces."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from dspy_otel.mlflow.base import Destination, ExportError, Patience, WantedExperiment, first_line, public_uri, say
from dspy_otel.mlflow.spool import Spool, spool_directory, spool_limit
from dspy_otel.mlflow.translate import translate
from dspy_otel.version import __version__

if TYPE_CHECKING:
    from dspy_otel.mlflow.tracker import RunTracker
    from dspy_otel.mlflow.writer import RunStore

_logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT: Final = 60.0
"""Seconds for one request. A server may import its pricing library on the first batch, which takes 5 to 60 s."""

_PAUSE: Final = 3.0
"""Seconds without a new attempt after a failed batch, so that a dead backend does not hold up a program's exit.
Shorter than the 5 s between two batches of ``BatchSpanProcessor``."""

_SQL_SCHEMES: Final = frozenset({"sqlite", "postgresql", "mysql", "mssql"})


class MLflowSpanExporter(SpanExporter):
    """Write spans as MLflow traces, to a server or into an embedded SQL store.

    Nothing is opened before the first batch, so building one is cheap and cannot fail. Every argument has its
    environment variable, MLflow's own:

    Args:
        tracking_uri: ``http(s)://`` of an MLflow server (3.14 or newer; MLflow need not be installed here), or a SQL
            store such as ``sqlite:///mlflow.db`` (the full ``mlflow`` package is needed, no server). Else
            ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in the working directory, MLflow's own default.
        experiment: name or id of the experiment. Else ``MLFLOW_EXPERIMENT_ID``, else ``MLFLOW_EXPERIMENT_NAME``, else
            MLflow's default experiment (id 0). A name that does not exist is created.
        timeout: seconds for one request to a server, 60 by default.
        runs: also record optimizations and evaluations as MLflow runs. The instrumentor sees to it when it makes its
            first span: this exporter must be on the provider by then, in a batch or simple processor of the SDK.

    Credentials for a server are those MLflow's client reads: ``MLFLOW_TRACKING_USERNAME`` and
    ``MLFLOW_TRACKING_PASSWORD`` (or ``~/.mlflow/credentials``), ``MLFLOW_TRACKING_TOKEN``, the TLS variables
    ``MLFLOW_TRACKING_INSECURE_TLS``, ``MLFLOW_TRACKING_SERVER_CERT_PATH``, ``MLFLOW_TRACKING_CLIENT_CERT_PATH``, and
    ``MLFLOW_WORKSPACE``. ``OTEL_EXPORTER_OTLP_*`` belongs to another backend and is not read.

    Attributes:
        wants_runs: as ``runs``.
        tracker: what records the runs and delivers spans, once there is one.
        patience: how long a request may take.
        wanted: the experiment, if it is not the one that the environment names.

    No method raises. What goes wrong is logged once per cause on the logger ``dspy_otel.mlflow.exporter``.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str | int | None = None,
        timeout: float | None = None,
        runs: bool = True,
    ) -> None:
        self._tracking_uri = tracking_uri
        self.wanted = None if experiment is None else WantedExperiment(str(experiment), is_id=None)
        self.patience = Patience(timeout if timeout is not None and timeout > 0 else DEFAULT_TIMEOUT)
        self.wants_runs = runs
        self.tracker: RunTracker | None = None
        # A relative store is meant from here, even if the program changes its directory before the first batch.
        self._directory = os.getcwd()
        # MLflow imports these when it is first used. In a short program that is at exit, when they can no longer be
        # imported: they start threads, or ask to be told of the exit.
        for module in ("opentelemetry.sdk._logs", "concurrent.futures.process"):
            importlib.import_module(module)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._destination: Destination | None = None
        self._dead = False
        self._resume_at = 0.0
        self._lost = 0
        self._reported: set[str] = set()
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Deliver a batch; returns FAILURE, and never raises, when it could not be delivered."""
        if self.tracker is not None:
            # What ended since then has gone to the tracker, which loses nothing in a burst.
            spans = [span for span in spans if (span.end_time or 0) < self.tracker.since]
        if not spans:
            return SpanExportResult.SUCCESS
        if self._stopped.is_set():
            return SpanExportResult.FAILURE
        if self._dead or time.monotonic() < self._resume_at:
            self._lost += len(spans)
            return SpanExportResult.FAILURE
        try:
            self.write(spans)
        except ExportError as error:
            self._dead = error.permanent
            self._fail(error.cause, str(error), len(spans))
            return SpanExportResult.FAILURE
        except Exception as error:
            self._fail(type(error).__name__, f"Spans could not be written: {first_line(error)}", len(spans))
            return SpanExportResult.FAILURE
        if self._reported:
            say(_logger.warning, "MLflow takes spans again; lost in between: %d.", self._lost)
            self._reported.clear()
            self._lost = 0
        return SpanExportResult.SUCCESS

    def write(self, spans: Sequence[ReadableSpan]) -> None:
        """Deliver a batch.

        Raises:
            Exception: it could not be delivered.
        """
        with self._lock:  # one connection set-up, and one writer for a SQL store
            if self._destination is None:
                self._destination = self._connect()
            self._destination.send(translate(spans))

    def shutdown(self) -> None:
        """Stop; spans that come later are refused. A second call does nothing."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._lost:
            say(_logger.warning, "Spans not written to MLflow: %d.", self._lost)
        if self.tracker is None:
            self.close()

    def close(self) -> None:
        """Release connections."""
        try:
            if self._destination is not None:
                self._destination.close()
        except Exception:
            _logger.debug("closing failed", exc_info=True)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is buffered here, so there is nothing to do."""
        return True

    def open_runs(self, stopped: threading.Event, *, create: bool = True) -> RunStore:
        """Open the way for runs to where the traces go, on a connection of its own.

        Args:
            stopped: set when the program ends; ends waiting between retries.
            create: make what does not exist: the experiment, a sqlite database. False for those who only read.

        Raises:
            ExportError: the store cannot be opened.
        """
        uri = self.uri
        wanted = dataclasses.replace(self._wanted_experiment(), create=create)
        if _is_server(uri):
            from dspy_otel.mlflow.runs_server import ServerRuns
            from dspy_otel.mlflow.server import MLflowServer

            return ServerRuns(MLflowServer(uri, wanted, self.patience, stopped))
        path = uri.partition(":///")[2] if _scheme(uri) == "sqlite" else ""
        if not create and path and not path.startswith((":memory:", "file:")) and not os.path.exists(path):
            raise ExportError("store", f"There is no database {path}.", permanent=True)
        from dspy_otel.mlflow.runs_store import EmbeddedRuns

        return EmbeddedRuns(uri, wanted)

    @property
    def server(self) -> str | None:
        """Address of the server, without credentials; None for an embedded store.

        Raises:
            ExportError: the tracking URI is of a kind that cannot be used.
        """
        uri = self.uri
        return public_uri(uri).rstrip("/") if _is_server(uri) else None

    def open_spool(self) -> Spool | None:
        """Where what cannot be sent waits on disk; None when that is switched off. From now on requests are not retried
        by themselves: who asks for the spool has a queue.
        """
        self.patience.insists = False
        directory = spool_directory()
        return None if directory is None else Spool(directory, spool_limit(_logger.warning), self.about)

    def about(self) -> dict[str, Any]:
        """Where this exporter writes, for the spool: no credentials."""
        try:
            uri = self.uri
        except ExportError:
            uri = self.given_uri
        wanted = self._wanted_experiment()
        return {
            "tracking_uri": public_uri(uri),
            "experiment": wanted.value,
            "experiment_is_id": wanted.is_id,
            "runs": self.wants_runs,
            "made_by": f"dspy-otel {__version__}",
        }

    @property
    def given_uri(self) -> str:
        """Where it writes, as given."""
        return self._tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"

    @property
    def is_remote(self) -> bool:
        """Whether it writes to a server."""
        return _is_server(self.given_uri)

    def alive(self) -> bool:
        """Whether MLflow answers at all."""
        return self._destination is not None and self._destination.alive()

    def is_here(self, tracking_uri: str) -> bool:
        """Whether ``tracking_uri`` is where this exporter writes."""
        return _absolute(tracking_uri, self._directory).rstrip("/") == self.uri.rstrip("/")

    def _connect(self) -> Destination:
        uri = self.uri
        if not (self._tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
            path = os.path.join(self._directory, "mlflow.db")
            say(
                _logger.warning,
                "MLFLOW_TRACKING_URI is not set: traces go to %s. To look at them: mlflow ui --backend-store-uri %s",
                path,
                uri,
            )
        if _is_server(uri):
            from dspy_otel.mlflow.server import MLflowServer

            return MLflowServer(uri, self._wanted_experiment(), self.patience, self._stopped)
        from dspy_otel.mlflow.store import EmbeddedStore

        return EmbeddedStore(uri, self._wanted_experiment())

    @property
    def uri(self) -> str:
        """The tracking URI, a relative sqlite path made absolute.

        Raises:
            ExportError: it is of a kind that cannot be used.
        """
        uri = self.given_uri
        if _is_server(uri):
            return uri
        scheme = _scheme(uri)
        if scheme in _SQL_SCHEMES:
            return _absolute(uri, self._directory)
        if scheme in ("", "file") and not uri.startswith(("databricks", "uc")):
            raise ExportError(
                "file store",
                f"MLflow's file store ({public_uri(uri)}) cannot take OpenTelemetry traces. Use a SQL store, "
                "for example MLFLOW_TRACKING_URI=sqlite:///mlflow.db, or a server.",
                permanent=True,
            )
        raise ExportError(
            "uri",
            f"The MLflow tracking URI {public_uri(uri)} is not supported: use http(s):// of an MLflow server, "
            "or a SQL store such as sqlite:///mlflow.db.",
            permanent=True,
        )

    def _wanted_experiment(self) -> WantedExperiment:
        if self.wanted is not None:
            return self.wanted
        if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return WantedExperiment(experiment_id, is_id=True)
        if name := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            return WantedExperiment(name, is_id=False)
        return WantedExperiment("0", is_id=True)

    def _fail(self, cause: str, message: str, spans: int) -> None:
        self._lost += spans
        self._resume_at = time.monotonic() + _PAUSE
        if cause not in self._reported:
            self._reported.add(cause)
            until = "No span will be written." if self._dead else "Spans are dropped until it works."
            say(_logger.error, "%s %s", message, until)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._lost = 0
        if self._destination is not None:
            self._destination.after_fork()


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme.split("+", 1)[0].lower()


def _is_server(uri: str) -> bool:
    return _scheme(uri) in ("http", "https")


def _absolute(uri: str, directory: str) -> str:
    """A ``sqlite:///`` URI with its relative path, if it has one, taken from ``directory``."""
    prefix, separator, path = uri.partition(":///")
    if prefix.split("+", 1)[0] != "sqlite" or not separator or not path or path.startswith((":memory:", "file:")):
        return uri
    return f"{prefix}:///{os.path.join(directory, path)}"
