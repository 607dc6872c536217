"""What every operation shares while instrumentation is on."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opentelemetry import _logs, metrics, trace
from opentelemetry._logs import NoOpLogger, SeverityNumber
from opentelemetry.context import Context, get_current
from opentelemetry.metrics import Meter, MeterProvider, NoOpMeter, NoOpMeterProvider
from opentelemetry.trace import (
    Link,
    NoOpTracer,
    ProxyTracer,
    Span,
    SpanKind,
    Tracer,
    TracerProvider,
    set_span_in_context,
)

from dspy_otel import semconv
from dspy_otel.config import Config, EventSignal
from dspy_otel.content.encoder import Content
from dspy_otel.core.attributes import EMPTY, Attributes, keeps_attributes, repair
from dspy_otel.core.call_context import SpanFactory, current_call_context, suppressed, without_call_context
from dspy_otel.core.deferred_spans import DeferredSpan
from dspy_otel.core.errors import exception_attributes
from dspy_otel.core.id_generator import with_system_ids
from dspy_otel.core.internal_errors import failed, guard
from dspy_otel.core.metrics import Metrics
from dspy_otel.version import __version__

if TYPE_CHECKING:
    from dspy_otel.core.completion_hook import Completions


_WARNINGS: Final = frozenset({semconv.EVENT_LM_RETRY, semconv.EVENT_ADAPTER_PARSE_ERROR, semconv.EVENT_BUDGET_ALERT})
"""Events of spans that are warnings where they are log records; the others are for information."""


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
        light_tracer: the same, if it is one that makes light spans.
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
        self.light_tracer: SpanFactory | None = None
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

    def begin_span(
        self, name: str, context: Context, kind: SpanKind, attributes: Attributes, links: Sequence[Link]
    ) -> Span:
        """Start a span the public way."""
        return self.tracer.start_span(
            name, context, kind, attributes, links, record_exception=False, set_status_on_exception=False
        )

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
                from dspy_otel.core.spans import LightTracer, lightened  # needs the SDK

                tracer = lightened(tracer)
                self.light_tracer = tracer if isinstance(tracer, LightTracer) else None
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

    def emit_event(
        self,
        name: str,
        attributes: Attributes,
        context: Context,
        severity: SeverityNumber | None = None,
        when: int | None = None,
    ) -> None:
        """Emit a log event that belongs to the span in ``context``.

        Args:
            name: of the event.
            attributes: its attributes.
            context: has its span.
            severity: how bad it is, if anything says so.
            when: nanoseconds since 1970; default, now.
        """
        repair(attributes)
        # As a record: SDKs before 1.38 do not take its parts as arguments.
        kept = without_call_context(context)  # until the record is exported
        self.logger.emit(
            _logs.LogRecord(
                timestamp=when or time.time_ns(),
                event_name=name,
                attributes=attributes,
                context=kept,
                severity_number=severity,
            )
        )

    def add_event(
        self, span: Span | None, name: str, attributes: Attributes, content: Mapping[str, Any] = EMPTY
    ) -> None:
        """Record an event of a span, if that is still open and recorded: on it, as a log event, or as both.

        Args:
            span: the span, if there is one.
            name: of the event.
            attributes: its attributes.
            content: further values, which are content: each where content may be.
        """
        if span is None or not span.is_recording():
            return
        severity = SeverityNumber.WARN if name in _WARNINGS else SeverityNumber.INFO
        places = self.config.content_on_spans, self.config.content_on_events
        rendered = self._rendered(content) if content and any(places) else EMPTY
        on_span, in_log = ({**attributes, **rendered} if place else attributes for place in places)
        self._add_event(span, self.config.event_signal_opt_in, _Event(name, on_span), _Event(name, in_log), severity)

    def add_exception(self, span: Span, error: BaseException, attributes: Attributes, event: str) -> None:
        """Record an exception of a span that is recorded: on it, as a log event, or as both.

        The exception itself is not handed to the Logs API, as OpenTelemetry would have it: the SDK would take its
        message as it is.

        Args:
            span: the span.
            error: the exception. One that is no ``Exception`` cancels, or ends the program, and is no fault.
            attributes: those that the span may have of it.
            event: the name of the log event.
        """
        severity = SeverityNumber.WARN if isinstance(error, Exception) else SeverityNumber.DEBUG
        signal, in_log = self.config.exception_signal_opt_in, attributes
        if signal != "default" and self.config.content_on_events != self.config.content_on_spans:
            in_log = exception_attributes(error, self.content if self.config.content_on_events else None)
        self._add_event(span, signal, _Event(semconv.EVENT_EXCEPTION, attributes), _Event(event, in_log), severity)

    def _add_event(
        self, span: Span, signal: EventSignal, on_span: _Event, in_log: _Event, severity: SeverityNumber
    ) -> None:
        logged = signal != "default" and self.keeps_events
        if signal != "logs" or not logged:  # What nobody would keep in a log stays on its span.
            repair(on_span.attributes)
            span.add_event(on_span.name, on_span.attributes)
        if logged:
            around, when = get_current(), time.time_ns()

            def emit(real: Span) -> None:
                if real.get_span_context().trace_flags.sampled:
                    context = set_span_in_context(real, around)
                    self.emit_event(in_log.name, dict(in_log.attributes), context, severity, when)

            if isinstance(span, DeferredSpan):
                span.once_real(emit)  # Until then its ids are others.
            else:
                emit(span)

    def _rendered(self, content: Mapping[str, Any]) -> Attributes:
        with guard("content"):
            return {name: self.content.text(value) for name, value in content.items()}
        return EMPTY


class _Event(NamedTuple):
    """An event, as a span or a log has it."""

    name: str
    attributes: Attributes


def _stands_alone(proxy: Any) -> bool:
    """Whether OpenTelemetry's proxy of a tracer stands for no other tracer yet."""
    return getattr(proxy, "_tracer", None) is getattr(proxy, "_noop_tracer", proxy)
