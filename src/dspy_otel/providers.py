"""``configure()``: providers and exporters for people who have none yet."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
from importlib.metadata import entry_points
from typing import Any, Final

from opentelemetry import _logs, metrics, trace

from .instrumentor import DSPyInstrumentor

_LOG: Final = logging.getLogger(__name__)

_GROUPS: Final = {
    "traces": "opentelemetry_traces_exporter",
    "metrics": "opentelemetry_metrics_exporter",
    "logs": "opentelemetry_logs_exporter",
}


def configure(
    *,
    service_name: str | None = None,
    otlp: str | bool | None = None,
    mlflow: str | bool | None = None,
    experiment: str | None = None,
    console: bool = False,
    **options: Any,
) -> DSPyInstrumentor:
    """Set up tracing, metrics and log events in one line, and switch instrumentation on.

    Without any destination among the arguments, the environment decides, as OpenTelemetry reads it
    (``OTEL_TRACES_EXPORTER``, ``OTEL_METRICS_EXPORTER``, ``OTEL_LOGS_EXPORTER``); failing that, everything goes to
    MLflow when ``MLFLOW_TRACKING_URI`` is set, else by OTLP to ``OTEL_EXPORTER_OTLP_ENDPOINT`` (default:
    ``localhost``). A provider that somebody has set already is never replaced: its signal is left alone, and a
    warning says so.

    Args:
        service_name: ``service.name`` of what is recorded; default, from ``OTEL_SERVICE_NAME`` or
            ``OTEL_RESOURCE_ATTRIBUTES``.
        otlp: an OTLP endpoint (``http://localhost:4318`` or ``http://localhost:4317``), or ``True`` for the one in
            the environment. Takes all three signals. Port 4317 means gRPC, unless ``OTEL_EXPORTER_OTLP_PROTOCOL``
            says otherwise.
        mlflow: an MLflow tracking URI (``http://...`` or ``sqlite:///...``), or ``True`` for the one in the
            environment. Takes traces.
        experiment: name of the MLflow experiment; made if it is missing.
        console: print finished spans.
        **options: settings of :class:`~dspy_otel.config.Config`, such as ``capture_content="span_only"``.

    Returns:
        The instrumentor, for ``uninstrument()``.

    Raises:
        RuntimeError: when the OpenTelemetry SDK, or the exporter that was asked for, is not installed; the message
            says what to install.
        TypeError: for an unknown option.
    """
    if importlib.util.find_spec("opentelemetry.sdk") is None:
        raise RuntimeError("dspy_otel.configure() needs the OpenTelemetry SDK: pip install 'dspy-otel[otlp]'")
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        _LOG.warning("dspy-otel: OTEL_SDK_DISABLED is set; nothing will be recorded")
    else:
        exporters = _exporters(otlp, mlflow, experiment, console)
        _set_up(exporters, service_name)
    instrumentor = DSPyInstrumentor()
    if not instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.instrument(**options)
    elif options:
        _LOG.warning("dspy-otel: already instrumented; configure() leaves its settings as they are")
    return instrumentor


def _exporters(
    otlp: str | bool | None, mlflow: str | bool | None, experiment: str | None, console: bool
) -> dict[str, list[Any]]:
    exporters: dict[str, list[Any]] = {signal: [] for signal in _GROUPS}
    if otlp:
        for signal in _GROUPS:
            exporters[signal].append(_otlp_exporter(signal, otlp if isinstance(otlp, str) else None))
    if mlflow:
        exporters["traces"].append(_mlflow_exporter(mlflow if isinstance(mlflow, str) else None, experiment))
    if console:
        exporters["traces"].append(_load("traces", "console")())
    if any(exporters.values()):
        return exporters
    for signal in _GROUPS:
        names = os.environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").strip()
        for name in filter(None, (part.strip() for part in names.split(","))):
            if name == "otlp":
                exporters[signal].append(_otlp_exporter(signal, None))
            elif name != "none":
                exporters[signal].append(_load(signal, name)())
        if not names:
            if signal == "traces" and os.environ.get("MLFLOW_TRACKING_URI"):
                exporters[signal].append(_mlflow_exporter(None, experiment))
            elif not os.environ.get("MLFLOW_TRACKING_URI"):
                exporters[signal].append(_otlp_exporter(signal, None))
    return exporters


def _mlflow_exporter(uri: str | None, experiment: str | None) -> Any:
    from .exporters.mlflow import MLflowSpanExporter

    return MLflowSpanExporter(tracking_uri=uri, experiment=experiment)


def _otlp_exporter(signal: str, endpoint: str | None) -> Any:
    """OTLP by gRPC or HTTP/protobuf, as the environment, else the port of ``endpoint``, says. Default: HTTP."""
    protocol = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    if not protocol:
        protocol = "grpc" if endpoint is not None and endpoint.rstrip("/").endswith(":4317") else "http/protobuf"
    if protocol == "grpc":
        exporter = _load(signal, "otlp_proto_grpc")
        return (
            exporter() if endpoint is None else exporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
        )
    exporter = _load(signal, "otlp_proto_http")
    return exporter() if endpoint is None else exporter(endpoint=f"{endpoint.rstrip('/')}/v1/{signal}")


def _load(signal: str, name: str) -> Any:
    """The exporter class that an installed package registers under ``name``."""
    for entry in entry_points(group=_GROUPS[signal], name=name):
        return entry.load()
    hint = (
        "pip install 'dspy-otel[otlp]'" if name.startswith(("otlp", "console")) else f"a package that offers {name!r}"
    )
    raise RuntimeError(f"no {signal} exporter named {name!r} is installed; install {hint}")


def _set_up(exporters: dict[str, list[Any]], service_name: str | None) -> None:
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": service_name} if service_name else None)
    if exporters["traces"] and _free("tracer", trace.get_tracer_provider(), TracerProvider):
        tracers = TracerProvider(resource=resource)
        for exporter in exporters["traces"]:
            tracers.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(tracers)
    if exporters["metrics"] and _free("meter", metrics.get_meter_provider(), MeterProvider):
        readers = [
            exporter if isinstance(exporter, MetricReader) else PeriodicExportingMetricReader(exporter)
            for exporter in exporters["metrics"]
        ]
        metrics.set_meter_provider(MeterProvider(readers, resource=resource))
    if exporters["logs"] and _free("logger", _logs.get_logger_provider(), LoggerProvider):
        loggers = LoggerProvider(resource=resource)
        for exporter in exporters["logs"]:
            loggers.add_log_record_processor(BatchLogRecordProcessor(exporter))
        _logs.set_logger_provider(loggers)
        atexit.register(loggers.shutdown)


def _free(signal: str, current: Any, sdk: type) -> bool:
    """Whether no provider is set for a signal yet. The API's own stand-in until then is a proxy."""
    if type(current).__name__.startswith("Proxy") and not isinstance(current, sdk):
        return True
    _LOG.warning(
        "dspy-otel: a %s provider (%s) is set already; configure() leaves it as it is and adds no exporter to it. "
        "Use DSPyInstrumentor().instrument() and add exporters where that provider is made",
        signal,
        type(current).__name__,
    )
    return False
