"""What every operation shares while instrumentation is on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from opentelemetry import _logs, metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.metrics import MeterProvider, NoOpMeterProvider
from opentelemetry.trace import Span, TracerProvider

from .. import semconv as names
from ..config import Config
from ..version import __version__
from .attributes import Attributes
from .content import Content
from .guard import failed
from .metrics import Metrics

_Result = TypeVar("_Result")


class Telemetry:
    """Tracer, instruments, event logger and settings.

    Args:
        config: the settings in force.
        tracer_provider: default, the global one (also one that is set later).
        meter_provider: likewise.
        logger_provider: likewise.
    """

    def __init__(
        self,
        config: Config,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        logger_provider: _logs.LoggerProvider | None = None,
    ) -> None:
        self.config = config
        self.active = True
        self.tracer = trace.get_tracer(names.SCOPE_NAME, __version__, tracer_provider, schema_url=names.SCHEMA_URL)
        meters = meter_provider if config.metrics else NoOpMeterProvider()
        self.metrics = Metrics(metrics.get_meter(names.SCOPE_NAME, __version__, meters, schema_url=names.SCHEMA_URL))
        self.logger = _logs.get_logger(
            names.SCOPE_NAME, __version__, logger_provider=logger_provider, schema_url=names.SCHEMA_URL
        )
        self.content = Content(config.content_limit, config.capture_media, config.redact)
        self.default_parent = parent_of_process()

    @property
    def span_content(self) -> Content | None:
        """How to render content for spans; ``None`` when it must not get there."""
        return self.content if self.config.content_on_spans else None

    def enabled(self) -> bool:
        """Whether to record right now: switched on, and not inside ``suppress_instrumentation()``."""
        return self.active and is_instrumentation_enabled()

    def safely(self, where: str, default: _Result, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """``function(*arguments)``; if that fails, ``default`` and one warning naming ``where``."""
        try:
            return function(*arguments)
        except Exception as error:
            failed(where, error)
            return default

    def put_content(self, attributes: Attributes, key: str, value: Any) -> None:
        """Add ``value`` as JSON text under ``key``, if content may be on spans. Failing content is left out."""
        if self.config.content_on_spans:
            text = self.safely("content", None, self.content.json, value)
            if text is not None:
                attributes[key] = text

    def put_text(self, attributes: Attributes, key: str, value: str) -> None:
        """Add ``value`` as text under ``key``, if content may be on spans."""
        if self.config.content_on_spans:
            text = self.safely("content", None, self.content.text, value)
            if text is not None:
                attributes[key] = text

    def emit_event(self, name: str, attributes: Attributes, context: Context) -> None:
        """Emit a log event that belongs to the span in ``context``."""
        self.logger.emit(event_name=name, attributes=attributes, context=context)

    def add_event(self, span: Span | None, name: str, attributes: Attributes) -> None:
        """Add a span event, if the span is still open and recorded."""
        if span is not None and span.is_recording():
            span.add_event(name, attributes)


def parent_of_process() -> Context | None:
    """The parent that the environment names (``TRACEPARENT``, ``TRACESTATE``, ``BAGGAGE``), if it names one.

    OpenTelemetry's "environment variables as context propagation carriers"; read once, when instrumentation starts.
    """
    carrier = {
        key: os.environ[key.upper()] for key in ("traceparent", "tracestate", "baggage") if key.upper() in os.environ
    }
    if not carrier:
        return None
    context = propagate.extract(carrier, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None
