"""Providers that ``configure()`` sets. They stay for the life of the process; where they send to can be exchanged."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from opentelemetry import _logs, metrics, trace
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs._internal import SynchronousMultiLogRecordProcessor
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SynchronousMultiSpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter


@dataclass(frozen=True, slots=True)
class Destination:
    """Where one signal is sent to.

    Attributes:
        key: what makes two destinations the same.
        make: makes the exporter, or a metric reader.
    """

    key: tuple[object, ...]
    make: Callable[[], Any] = field(compare=False)


class SpanProcessors(SynchronousMultiSpanProcessor):
    """The processors of our exporters, in one place of a tracer provider. A user's own are beside it."""

    def exchange(self, exporters: Sequence[SpanExporter]) -> None:
        """Send to other exporters from now on. What the former ones have is delivered first."""
        before = self._span_processors
        self._span_processors = tuple(BatchSpanProcessor(exporter) for exporter in exporters)
        mlflow = sys.modules.get("dspy_otel.mlflow.exporter")
        for exporter in exporters if mlflow is not None else ():
            if isinstance(exporter, mlflow.MLflowSpanExporter):  # type: ignore[union-attr]
                exporter.attach(self.add_span_processor)
        for processor in before:
            processor.shutdown()


class LogProcessors(SynchronousMultiLogRecordProcessor):
    """The same for log events."""

    def exchange(self, exporters: Sequence[Any]) -> None:
        """Send to other exporters from now on."""
        before = self._log_record_processors
        self._log_record_processors = tuple(BatchLogRecordProcessor(exporter) for exporter in exporters)
        for processor in before:
            processor.shutdown()


class MetricExporters(MetricExporter):
    """The same for metrics: one exporter that hands on to others. Temporality is that of the first ones."""

    def __init__(self, exporters: Sequence[MetricExporter]) -> None:
        first = exporters[0]
        super().__init__(first._preferred_temporality, first._preferred_aggregation)
        self._exporters = tuple(exporters)

    def exchange(self, exporters: Sequence[MetricExporter]) -> None:
        """Send to other exporters from now on."""
        before, self._exporters = self._exporters, tuple(exporters)
        for exporter in before:
            exporter.shutdown()

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Hand on to all of them."""
        results = [exporter.export(metrics_data, timeout_millis, **kwargs) for exporter in self._exporters]
        failed = MetricExportResult.FAILURE in results
        return MetricExportResult.FAILURE if failed else MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Flush all of them."""
        flushed = [exporter.force_flush(timeout_millis) for exporter in self._exporters]
        return all(flushed)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Shut all of them down."""
        for exporter in self._exporters:
            exporter.shutdown(timeout_millis, **kwargs)


@dataclass(slots=True)
class _Own:
    """A provider of ours.

    Attributes:
        provider: the provider.
        exporters: where its exporters can be exchanged; None for metrics that a reader of its own kind collects.
        destinations: where it sends to.
        service_name: as it was given.
    """

    provider: Any
    exporters: SpanProcessors | LogProcessors | MetricExporters | None
    destinations: tuple[Destination, ...]
    service_name: str | None


_own: Final[dict[str, _Own]] = {}


def is_own(signal: str, current: Any) -> bool:
    """Whether the provider that a signal has is one that ``configure()`` has set."""
    return signal in _own and current is _own[signal].provider


def set_provider(signal: str, destinations: Sequence[Destination], service_name: str | None) -> None:
    """Set the provider of a signal that has none. It flushes and shuts down when the program ends."""
    resource = Resource.create({"service.name": service_name} if service_name else None)
    if signal == "traces" and any(destination.key[0] != "mlflow" for destination in destinations):
        # MLflow would make tags of each trace of them.
        resource = Resource({"process.pid": os.getpid(), "host.name": socket.gethostname()}).merge(resource)
    made = [destination.make() for destination in destinations]
    own = _Own(None, None, tuple(destinations), service_name)
    if signal == "traces":
        own.exporters = spans = SpanProcessors()  # type: ignore[no-untyped-call]
        spans.exchange(made)
        own.provider = TracerProvider(resource=resource)
        own.provider.add_span_processor(spans)
        _follow_forks(own.provider)
        trace.set_tracer_provider(own.provider)
    elif signal == "metrics":
        readers = [item for item in made if isinstance(item, MetricReader)]
        exporters = [item for item in made if not isinstance(item, MetricReader)]
        if exporters:
            own.exporters = MetricExporters(exporters)
            readers.append(PeriodicExportingMetricReader(own.exporters))
        if len(readers) > bool(exporters):
            own.exporters = None
        own.provider = MeterProvider(readers, resource=resource)
        metrics.set_meter_provider(own.provider)
    else:
        own.exporters = logs = LogProcessors()  # type: ignore[no-untyped-call]
        logs.exchange(made)
        own.provider = LoggerProvider(resource=resource)
        own.provider.add_log_record_processor(logs)
        _logs.set_logger_provider(own.provider)
    _own[signal] = own


def _follow_forks(provider: Any) -> None:
    """Give a provider the id of the process in a forked one too. The SDK does so from 1.44 on, with its own attributes.

    Registered when the provider is made: after the SDK's own function, which replaces the provider's locks.
    """
    parent = os.getpid()
    if not hasattr(os, "register_at_fork") or not hasattr(provider, "_update_resource"):
        return

    def after_fork() -> None:
        nonlocal parent
        with contextlib.suppress(Exception):
            if provider.resource.attributes.get("process.pid") == parent:  # else it is what a user has set
                parent = os.getpid()
                provider._update_resource(Resource({"process.pid": parent}))

    os.register_at_fork(after_in_child=after_fork)


def change_provider(signal: str, destinations: Sequence[Destination], service_name: str | None) -> list[str]:
    """Let a provider of ours send to other destinations, if they are others.

    Returns:
        What cannot be changed, for a warning.
    """
    own = _own[signal]
    fixed = []
    if service_name != own.service_name and destinations:
        fixed.append(f"service_name ({own.service_name or 'from the environment'})")
    if tuple(destinations) == own.destinations:
        return fixed
    if own.exporters is None:
        return [*fixed, f"the exporters of {signal}"]
    made = [destination.make() for destination in destinations]
    if signal == "metrics":
        own.provider.force_flush()  # what was measured so far
    own.exporters.exchange(made)
    own.destinations = tuple(destinations)
    return fixed
