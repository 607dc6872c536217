"""The OpenTelemetry span exporter that writes MLflow traces. The :mod:`.processor` does the work."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Sequence
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from dspy_otel.mlflow.processor import MLflowProcessor
from dspy_otel.mlflow.target import DEFAULT_TIMEOUT, Target, working_directory

WAIT: Final = 30.0
"""Most seconds that :meth:`MLflowSpanExporter.export` waits for delivery. The batch is in the journal by then."""


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
        runs: also record optimizations and evaluations as MLflow runs. The instrumentor calls :func:`track_runs` when
            it makes its first span: this exporter must be on the provider by then, in a batch or simple processor
            of the SDK.

    Credentials for a server are those MLflow's client reads: a user and password in the address,
    ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD`` (or ``~/.mlflow/credentials``),
    ``MLFLOW_TRACKING_TOKEN``, the TLS variables ``MLFLOW_TRACKING_INSECURE_TLS``, ``MLFLOW_TRACKING_SERVER_CERT_PATH``,
    ``MLFLOW_TRACKING_CLIENT_CERT_PATH``, and ``MLFLOW_WORKSPACE``. ``OTEL_EXPORTER_OTLP_*`` belongs to another backend
    and is not read.

    Attributes:
        target: where it writes.
        processor: what it writes with. Once :func:`track_runs` has put that on the provider, spans go there directly.

    No method raises. What goes wrong is logged once for each cause, on loggers below ``dspy_otel.mlflow``.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str | int | None = None,
        timeout: float | None = None,
        runs: bool = True,
    ) -> None:
        self.target = Target(
            tracking_uri,
            None if experiment is None else str(experiment),
            directory=working_directory(),  # a relative path starts here, even if the program changes its directory
            timeout=timeout if timeout is not None and timeout > 0 else DEFAULT_TIMEOUT,
        )
        # MLflow imports these when it is first used. In a short program that is at exit, which is too late: they start
        # threads, or register functions with atexit.
        for module in ("opentelemetry.sdk._logs", "concurrent.futures.process"):
            importlib.import_module(module)
        self.processor = MLflowProcessor(self.target, runs=runs)
        self._attached = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Put a batch into the journal, and wait up to ``WAIT`` seconds for its delivery; never raises.

        Returns:
            FAILURE when spans were lost. Spans in the journal are not lost.
        """
        with contextlib.suppress(Exception):
            return self._export(spans)
        return SpanExportResult.FAILURE

    def _export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        processor, worker = self.processor, self.processor.worker
        if processor.over:
            return SpanExportResult.FAILURE
        before = sum(worker.account.dropped.values())
        processor.export(spans)
        if not self._attached:
            until = time.monotonic() + WAIT
            while not processor.force_flush(200) and time.monotonic() < until and worker.backoff.error is None:
                pass
        lost = sum(worker.account.dropped.values()) > before
        return SpanExportResult.FAILURE if lost or worker.failed else SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Deliver what is pending. A second call does nothing."""
        if not self._attached:
            self.processor.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Wait until everything so far is in MLflow; False when it is not within the time."""
        return self.processor.force_flush(timeout_millis)

    def attach(self, add: Any) -> None:
        """Put the processor on a provider, whose ``add_span_processor`` is given; once."""
        if not self._attached:
            self._attached = True
            add(self.processor)
            self.processor.since = time.time_ns()


def track_runs(provider: Any) -> None:
    """Give the processors of our exporters on a provider the starts of spans too: runs need them.

    Args:
        provider: a tracer provider; one that is not the SDK's is left alone.
    """
    add = getattr(provider, "add_span_processor", None)
    if add is not None:
        for exporter in exporters_of(provider):
            exporter.attach(add)


def exporters_of(provider: Any) -> list[MLflowSpanExporter]:
    """Our exporters that a provider feeds, in a batch or simple processor of the SDK."""
    found: list[MLflowSpanExporter] = []
    waiting = [getattr(provider, "_active_span_processor", None)]
    while waiting:
        processor = waiting.pop()
        waiting += getattr(processor, "_span_processors", ())
        exporter = getattr(processor, "span_exporter", None)
        if isinstance(exporter, MLflowSpanExporter):
            found.append(exporter)
    return found
