"""What every operation shares while instrumentation is on."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opentelemetry import _logs, metrics, trace
from opentelemetry._logs import NoOpLogger
from opentelemetry.context import Context, get_current
from opentelemetry.metrics import Meter, MeterProvider, NoOpMeter, NoOpMeterProvider
from opentelemetry.trace import NoOpTracer, ProxyTracer, Span, Tracer, TracerProvider

from dspy_otel import semconv
from dspy_otel.config import Config
from dspy_otel.content.encoder import Content
from dspy_otel.core.attributes import Attributes, keeps_attributes, repair
from dspy_otel.core.call_context import current_call_context, suppressed, without_call_context
from dspy_otel.core.id_generator import with_system_ids
from dspy_otel.core.internal_errors import failed, guard
from dspy_otel.core.metrics import Metrics
from dspy_otel.version import __version__

if TYPE_CHECKING:
    from dspy_otel.core.completion_hook import Completions


class Telemetry:
    """Tracer, instruments, event logger and settings.

    Args:
        config: the settings in force.
        tracer_provider: default, the global one (also one that is set later).
        meter_provider: likewise.
        logger_provider: likewise.
        on_provider: called once with the tracer provider in use, before the first span.
        on_outermost: called before each outermost span; must be cheap, and not raise.
        default_parent: the context of spans that have no parent of their own.

    Attributes:
        tracer_provider: the one that was given; ``None`` for the global one.
        completions: hands content to a completion hook, if there is one.
        settled_tracer: our tracer, as soon as there is a provider.
        keeps_attributes: whether no sampler can drop the attributes that a span is started with.
    """

    def __init__(
        self,
        config: Config,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        logger_provider: _logs.LoggerProvider | None = None,
        on_provider: Callable[[TracerProvider], None] | None = None,
        on_outermost: Callable[[], None] = lambda: None,
        default_parent: Context | None = None,
    ) -> None:
        self.config = config
        self._on_provider = on_provider
        self.active = True
        self._proxy: Tracer | None = None
        self._discards = False
        self.keeps_attributes = False
        self.on_outermost = on_outermost
        self.tracer_provider = tracer_provider
        self.settled_tracer: Tracer | None = None
        self._settling = threading.RLock()
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())
        meters = meter_provider if config.metrics else NoOpMeterProvider()
        self.measuring = not isinstance(meters, NoOpMeterProvider)
        self._meter: Meter = NoOpMeter("none")
        self.metrics = Metrics(self._meter)
        with guard("meter provider"):
            self.metrics = self._make_metrics(meters)
        self.logger: _logs.Logger = NoOpLogger("none")
        with guard("logger provider"):
            self.logger = self._make_logger(logger_provider)
        self.content = Content(config.content_limit, config.capture_media, config.redact)
        self.completions: Completions | None = None
        if config.completion_hook is not None:
            with guard("completion hook"):
                from dspy_otel.core.completion_hook import load  # not needed by many

                self.completions = load(config.completion_hook, self.metrics.content_files)
        self.default_parent = default_parent
        self.default_call_context = None if default_parent is None else current_call_context(default_parent)

    def _make_metrics(self, provider: MeterProvider | None) -> Metrics:
        self._meter = metrics.get_meter(semconv.SCOPE_NAME, __version__, provider, schema_url=semconv.SCHEMA_URL)
        return Metrics(self._meter, self.config.light_metrics, self.config.semconv_opt_in)

    def _make_logger(self, provider: _logs.LoggerProvider | None) -> _logs.Logger:
        return _logs.get_logger(
            semconv.SCOPE_NAME, __version__, logger_provider=provider, schema_url=semconv.SCHEMA_URL
        )

    def _after_fork(self) -> None:
        self._settling = threading.RLock()  # The thread that may own the old one is not here.

    @property
    def tracer(self) -> Tracer:
        """Our tracer; of the global provider as soon as there is one."""
        if self.settled_tracer is not None:
            return self.settled_tracer
        if self._proxy is not None and _stands_alone(self._proxy):
            return self._proxy
        tracer = trace.get_tracer(semconv.SCOPE_NAME, __version__, self.tracer_provider, schema_url=semconv.SCHEMA_URL)
        if isinstance(tracer, ProxyTracer):  # No provider has been set yet.
            self._proxy = tracer
            return tracer
        return self._settle(tracer)

    @property
    def discards(self) -> bool:
        """Whether nothing of what is recorded is kept: the SDK is disabled, or no provider has been set yet."""
        if self.settled_tracer is None and type(self.tracer) is ProxyTracer:
            has_meter = getattr(self._meter, "_real_meter", self._meter) is not None
            return not (has_meter and self.measuring) and not (self.config.content_on_events and self.keeps_events)
        return self._discards

    def _settle(self, tracer: Tracer) -> Tracer:
        """Keep ``tracer``, and call ``on_provider``. Other threads wait, or it would miss their span."""
        with self._settling:
            if self.settled_tracer is None:
                if self._on_provider is not None:
                    with guard("tracer provider"):
                        self._on_provider(self.tracer_provider or trace.get_tracer_provider())
                with guard("sampler"):
                    self.keeps_attributes = keeps_attributes(tracer)
                self.settled_tracer = self._lightened(with_system_ids(tracer))
                events = self.config.content_on_events and not isinstance(self.logger, NoOpLogger)
                self._discards = isinstance(tracer, NoOpTracer) and isinstance(self._meter, NoOpMeter) and not events
            return self.settled_tracer

    def _lightened(self, tracer: Tracer) -> Tracer:
        """``tracer``, or one that makes its spans at a lower cost, if it is the SDK's."""
        if self.config.light_spans and type(tracer).__module__ == "opentelemetry.sdk.trace":
            with contextlib.suppress(Exception):  # an SDK that is not known
                from dspy_otel.core.spans import lightened  # needs the SDK

                return lightened(tracer)
        return tracer

    @property
    def span_content(self) -> Content | None:
        """How to render content for spans; ``None`` when it must not get there."""
        return self.content if self.config.content_on_spans else None

    def enabled(self) -> bool:
        """Whether to record right now: switched on, and not inside ``suppress_instrumentation()``."""
        return self.active and not suppressed(get_current())

    def put_content(self, attributes: Attributes, key: str, value: Any) -> None:
        """Add ``value`` as JSON text under ``key``, if content may be on spans. Failing content is left out."""
        if self.config.content_on_spans:
            try:  # For each span, and without the two calls of a guard.
                attributes[key] = self.content.json(value)
            except Exception as error:
                failed("content", error)

    def put_text(self, attributes: Attributes, key: str, value: str) -> None:
        """Add ``value`` as text under ``key``, if content may be on spans."""
        if self.config.content_on_spans:
            try:
                attributes[key] = self.content.text(value)
            except Exception as error:
                failed("content", error)

    @property
    def keeps_events(self) -> bool:
        """Whether anybody may keep a log event; not before there is a provider."""
        logger: Any = self.logger
        if type(logger).__name__ == "ProxyLogger":
            logger = getattr(logger, "_logger", logger)  # what stands behind OpenTelemetry's proxy
        return not isinstance(logger, NoOpLogger)

    def emit_event(self, name: str, attributes: Attributes, context: Context) -> None:
        """Emit a log event that belongs to the span in ``context``."""
        repair(attributes)
        # As a record: SDKs before 1.38 do not take its parts as arguments.
        kept = without_call_context(context)  # until the record is exported
        self.logger.emit(
            _logs.LogRecord(timestamp=time.time_ns(), event_name=name, attributes=attributes, context=kept)
        )

    def add_event(self, span: Span | None, name: str, attributes: Attributes) -> None:
        """Add a span event, if the span is still open and recorded."""
        if span is not None and span.is_recording():
            repair(attributes)
            span.add_event(name, attributes)


def _stands_alone(proxy: Any) -> bool:
    """Whether OpenTelemetry's proxy of a tracer stands for no other tracer yet."""
    return getattr(proxy, "_tracer", None) is getattr(proxy, "_noop_tracer", proxy)
