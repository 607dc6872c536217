"""``configure()``: providers and exporters for programs that have none. ``flush()``: whoever has set them up."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Final

from opentelemetry import _logs, metrics, trace

from dspy_otel.config import Config
from dspy_otel.instrumentor import DSPyInstrumentor

_LOG: Final = logging.getLogger(__name__)

_GROUPS: Final = {
    "traces": "opentelemetry_traces_exporter",
    "metrics": "opentelemetry_metrics_exporter",
    "logs": "opentelemetry_logs_exporter",
}
_PROVIDERS: Final[Mapping[str, tuple[str, Callable[[], Any]]]] = {
    "traces": ("tracer", trace.get_tracer_provider),
    "metrics": ("meter", metrics.get_meter_provider),
    "logs": ("logger", _logs.get_logger_provider),
}
_PROTOCOLS: Final = ("grpc", "http/protobuf")
_SDK_MISSING: Final = "dspy_otel.configure() needs the OpenTelemetry SDK: pip install 'dspy-otel[otlp]'"

_Key = tuple[object, ...]
_Found = tuple[_Key, Callable[[], Any]]
"""What makes two exporters the same, and what makes one: that is called only when there is need of it."""

_in_force: Config | None = None
"""The settings that :func:`configure` has switched instrumentation on with."""


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

    Without any destination among the arguments, the environment decides: ``OTEL_TRACES_EXPORTER``,
    ``OTEL_METRICS_EXPORTER`` and ``OTEL_LOGS_EXPORTER``, if any of them is set (a signal without its own is then off);
    else ``MLFLOW_TRACKING_URI`` (traces) and ``OTEL_EXPORTER_OTLP_ENDPOINT`` (all three), if set; else OTLP to
    ``localhost``. A provider that somebody else has set is never replaced: its signal is left alone, with a warning.

    It may be called again, as a notebook's cell is. Nothing happens when nothing has changed. Other destinations,
    another experiment and other settings are in force from then on; what was recorded before goes to the former ones.
    Settings that are not given are back at their defaults. ``service_name`` stays what it was first.

    Args:
        service_name: ``service.name`` of what is recorded; default, from ``OTEL_SERVICE_NAME`` or
            ``OTEL_RESOURCE_ATTRIBUTES``.
        otlp: an OTLP endpoint (``http://localhost:4318`` or ``http://localhost:4317``), or ``True`` for the one in
            the environment. Takes all three signals. Port 4317 means gRPC, unless ``OTEL_EXPORTER_OTLP_PROTOCOL``
            has another protocol.
        mlflow: an MLflow tracking URI (``http://...`` or ``sqlite:///...``), or ``True`` for the one in the
            environment. Takes traces.
        experiment: name of the MLflow experiment; made if it is missing.
        console: print finished spans.
        **options: settings of :class:`~dspy_otel.config.Config`, such as ``capture_content="span_only"``.

    Returns:
        The instrumentor, for ``uninstrument()``.

    Raises:
        RuntimeError: when the OpenTelemetry SDK, or an exporter that is needed, is not installed; the message
            says what to install.
        TypeError: for an unknown option.
    """
    Config.check(options)
    if not _installed("opentelemetry.sdk.trace"):
        raise RuntimeError(_SDK_MISSING)
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        _LOG.warning("dspy-otel: OTEL_SDK_DISABLED is set; nothing will be recorded")
    else:
        _set_up(_destinations(otlp, mlflow, experiment, console), service_name)
    return _switch_on(options)


def flush(timeout_millis: int = 30_000) -> bool:
    """Send what this process has recorded so far: before it is frozen, or ends without Python's exit handlers.

    Metrics and events are first, for spans on their way to MLflow may take all of the time. Those are in MLflow when it
    returns True.

    Args:
        timeout_millis: most time to wait, as far as the SDK keeps to it.

    Returns:
        Whether the global providers have done so, as far as they say: what an exporter could not send is in the SDK's
        log only. One that is not the SDK's has nothing to send. Never raises.
    """
    until = time.monotonic() + timeout_millis / 1000
    sent = True
    for signal in ("metrics", "logs", "traces"):
        try:
            force_flush = getattr(_PROVIDERS[signal][1](), "force_flush", None)
            if force_flush is not None:
                sent = bool(force_flush(max(0, int((until - time.monotonic()) * 1000)))) and sent
        except Exception:
            _LOG.debug("dspy-otel: %s are not flushed", signal, exc_info=True)
            sent = False
    return sent


def _switch_on(options: Mapping[str, Any]) -> DSPyInstrumentor:
    global _in_force  # noqa: PLW0603
    instrumentor = DSPyInstrumentor()
    if not instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.instrument(**options)
    elif instrumentor.config is not _in_force:
        if options:
            _LOG.warning(
                "dspy-otel: instrument() has switched instrumentation on already; configure() leaves its settings as "
                "they are. To change them, call dspy_otel.uninstrument() first"
            )
        return instrumentor
    elif Config.load(**options) != _in_force:
        instrumentor.uninstrument()
        instrumentor.instrument(**options)
    _in_force = instrumentor.config
    return instrumentor


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _destinations(
    otlp: str | bool | None, mlflow: str | bool | None, experiment: str | None, console: bool
) -> dict[str, list[_Found]]:
    """Each signal's exporters. One that is not installed is an error already here."""
    found: dict[str, list[_Found]] = {signal: [] for signal in _GROUPS}
    if not (otlp or mlflow or console):
        named = {signal: _names(os.environ.get(f"OTEL_{signal.upper()}_EXPORTER", "")) for signal in _GROUPS}
        if any(named.values()):
            for signal, names in named.items():
                found[signal] = [_by_name(signal, name, experiment) for name in names if name != "none"]
            return found
        mlflow = bool(os.environ.get("MLFLOW_TRACKING_URI"))
        otlp = not mlflow or bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"))
    if otlp:
        for signal in _GROUPS:
            found[signal].append(_otlp(signal, otlp if isinstance(otlp, str) else None))
    if mlflow:
        found["traces"].append(_mlflow(mlflow if isinstance(mlflow, str) else None, experiment))
    if console:
        found["traces"].append((("console",), _load("traces", "console")))
    return found


def _names(variable: str) -> list[str]:
    return [part.strip() for part in variable.split(",") if part.strip()]


def _by_name(signal: str, name: str, experiment: str | None) -> _Found:
    if name == "otlp":
        return _otlp(signal, None)
    if signal == "traces" and name in ("mlflow", "dspy_mlflow"):
        return _mlflow(None, experiment)
    return (name,), _load(signal, name)


def _mlflow(uri: str | None, experiment: str | None) -> _Found:
    needed = ["requests", "opentelemetry.exporter.otlp.proto.common"]
    if not (uri or os.environ.get("MLFLOW_TRACKING_URI", "")).startswith(("http:", "https:")):
        needed += ["mlflow", "sqlalchemy"]  # a store of its own, without a server
    missing = [name for name in needed if not _installed(name)]
    if missing:
        raise RuntimeError(f"traces to MLflow need {', '.join(missing)}: pip install 'dspy-otel[mlflow]'")
    from dspy_otel.mlflow import MLflowSpanExporter
    from dspy_otel.mlflow.target import Target, absolute, working_directory

    target = Target(uri, experiment)
    # MLflow's own set_experiment() sets the variable: without an experiment of its own, the next call follows it.
    key = ("mlflow", absolute(target.raw_uri, working_directory()), target.named_experiment)
    return key, lambda: MLflowSpanExporter(tracking_uri=uri, experiment=experiment)


def _otlp(signal: str, endpoint: str | None) -> _Found:
    """OTLP by gRPC or HTTP/protobuf: the environment decides, or else the port of the endpoint. Default: HTTP."""
    if endpoint is not None and "://" not in endpoint:
        endpoint = f"http://{endpoint}"
    protocol = _protocol(signal, endpoint)
    variables = tuple(sorted(item for item in os.environ.items() if item[0].startswith("OTEL_EXPORTER_OTLP_")))
    key = ("otlp", protocol, endpoint, variables)
    if protocol == "grpc":
        exporter = _load(signal, "otlp_proto_grpc")
        if endpoint is None:
            return key, exporter
        return key, lambda: exporter(endpoint=endpoint, insecure=not endpoint.startswith("https:"))
    exporter = _load(signal, "otlp_proto_http")
    if endpoint is None:
        return key, exporter
    return key, lambda: exporter(endpoint=f"{endpoint.rstrip('/')}/v1/{signal}")


def _protocol(signal: str, endpoint: str | None) -> str:
    for variable in (f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(variable, "").strip().lower()
        if protocol in _PROTOCOLS:
            return protocol
        if protocol:
            _LOG.warning("dspy-otel: %s: use one of %s", variable, ", ".join(_PROTOCOLS))
    target = (
        endpoint
        or os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
        or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        or ""
    )
    return "grpc" if target.strip().rstrip("/").endswith(":4317") else "http/protobuf"


def _load(signal: str, name: str) -> Any:
    """The exporter class that an installed package registers under ``name``."""
    for entry in entry_points(group=_GROUPS[signal], name=name):
        try:
            return entry.load()
        except ImportError as error:
            raise RuntimeError(f"the {signal} exporter {name!r} cannot be loaded: {error}") from error
    hint = "pip install 'dspy-otel[otlp]'" if name.startswith(("otlp", "console")) else "install the package with it"
    raise RuntimeError(f"no {signal} exporter named {name!r} is installed: {hint}")


def _set_up(found: dict[str, list[_Found]], service_name: str | None) -> None:
    from dspy_otel.own_providers import Destination, change_provider, is_own, set_provider

    fixed: list[str] = []
    for signal, items in found.items():
        destinations = [Destination(key, make) for key, make in items]
        name, get = _PROVIDERS[signal]
        current = get()
        if is_own(signal, current):
            fixed += change_provider(signal, destinations, service_name)
        elif destinations and _free(name, current):
            set_provider(signal, destinations, service_name)
    if fixed:
        _LOG.warning(
            "dspy-otel: configure() cannot change %s any more; start a new process for it",
            ", ".join(dict.fromkeys(fixed)),
        )


def _free(name: str, current: Any) -> bool:
    """Whether no provider is set for a signal yet. Until then, the API has a proxy there."""
    kind = type(current)
    if kind.__module__.startswith("opentelemetry.") and kind.__name__.lstrip("_").startswith("Proxy"):
        return True
    _LOG.warning(
        "dspy-otel: a %s provider (%s) is set already; configure() leaves it as it is and adds no exporter to it. "
        "Use DSPyInstrumentor().instrument() and add exporters where that provider is made",
        name,
        kind.__name__,
    )
    return False
