"""An in-memory OpenTelemetry SDK, and a readable text of everything it exported."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import dspy_otel
from dspy_otel.content import encoder

try:
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
except ImportError:  # Older SDKs.
    from opentelemetry.sdk._logs.export import InMemoryLogExporter as InMemoryLogRecordExporter

# Different in each run, or in each version of DSPy: the snapshot says that it is there and of what kind.
_IDS = frozenset({"dspy.program.id", "dspy.example.id", "dspy.evaluation.id", "dspy.optimizer.run.id"})
# Which engine serves a call, and how the server numbered its answer, differ between versions, and all servers of tests
# are on loopback; tests that are about them say so themselves.
_LEFT_OUT = frozenset({"dspy.lm.engine", "dspy.lm.cost.loopback"})
_SECONDS = frozenset({"gen_ai.response.time_to_first_chunk", "dspy.lm.retry.delay"})


def forget_harmless_texts() -> None:
    """From now on each text is searched for secrets again, also one that was searched before in this process."""
    encoder._harmless = encoder._Harmless()


class Recorder:
    """What a test exported.

    Attributes:
        tracer_provider: of the test's own spans, too.
    """

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self._told: dict[str, Any] = {}
        self.meter_provider = MeterProvider([self.reader], shutdown_on_exit=False)
        self.log_exporter = InMemoryLogRecordExporter()
        self.logger_provider = LoggerProvider(shutdown_on_exit=False)
        self.logger_provider.add_log_record_processor(SimpleLogRecordProcessor(self.log_exporter))
        self.tracer = self.tracer_provider.get_tracer("application")

    def instrument(self, **options: Any) -> Recorder:
        """Switch instrumentation on, with this SDK; `options` as `dspy_otel.instrument` takes them."""
        dspy_otel.instrument(
            **{
                "tracer_provider": self.tracer_provider,
                "meter_provider": self.meter_provider,
                "logger_provider": self.logger_provider,
                **options,
            }
        )
        return self

    def shutdown(self) -> None:
        instrumentor = dspy_otel.DSPyInstrumentor()
        if instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.uninstrument()
        for provider in (self.tracer_provider, self.meter_provider, self.logger_provider):
            provider.shutdown()

    def clear(self) -> None:
        """Forget the spans and events so far."""
        self.exporter.clear()
        self.log_exporter.clear()

    # --- spans ---------------------------------------------------------------------------------------------------
    @property
    def spans(self) -> list[ReadableSpan]:
        """Finished spans, in the order of their start."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, prefix: str) -> list[ReadableSpan]:
        """Finished spans whose name begins so, in the order of their start."""
        return [span for span in self.spans if span.name.startswith(prefix)]

    def only(self, prefix: str) -> ReadableSpan:
        """The one finished span whose name begins so."""
        found = self.named(prefix)
        assert len(found) == 1, f"{len(found)} spans named {prefix}…: {[span.name for span in self.spans]}"
        return found[0]

    def children(self, span: ReadableSpan) -> list[ReadableSpan]:
        """Finished spans directly below one."""
        return [child for child in self.spans if child.parent and child.parent.span_id == span.context.span_id]

    def tree(self, *, sort: bool = False, attributes: bool = True) -> str:
        """Every finished span as text: name, kind, status, attributes, events, links, indented by parent.

        Args:
            sort: order siblings and traces by their text instead of their start (threads).
            attributes: `False` gives names and kinds only.
        """
        spans = self.spans
        by_id = {span.context.span_id: span for span in spans}
        below: defaultdict[int | None, list[ReadableSpan]] = defaultdict(list)
        for span in spans:
            below[span.parent.span_id if span.parent else None].append(span)

        def render(span: ReadableSpan, indent: str) -> str:
            lines = [f"{indent}{span.name} [{span.kind.name}]"]
            if span.status.status_code.name != "UNSET":
                said = f" {span.status.description!r}" if span.status.description else ""
                lines.append(f"{indent}  ! {span.status.status_code.name}{said}")
            if attributes:
                lines += _attribute_lines(span.attributes or {}, f"{indent}  . ")
            for event in span.events:
                lines.append(f"{indent}  * {event.name}")
                if attributes:
                    lines += _attribute_lines(event.attributes or {}, f"{indent}    . ")
            links = []
            for link in span.links:
                target = by_id.get(link.context.span_id)
                same = "same trace" if link.context.trace_id == span.context.trace_id else "other trace"
                links.append(f"{indent}  -> {target.name if target else '<unknown span>'} ({same})")
                if attributes:
                    links[-1] = "\n".join((links[-1], *_attribute_lines(link.attributes or {}, f"{indent}     . ")))
            lines += sorted(links) if sort else links
            inner = [render(child, indent + "  ") for child in below.get(span.context.span_id, ())]
            return "\n".join((*lines, *(sorted(inner) if sort else inner)))

        roots = [render(span, "") for span in below[None]]
        lost = [
            f"(parent not exported)\n{render(span, '  ')}"
            for span in spans
            if span.parent and span.parent.span_id not in by_id
        ]
        return "\n\n".join(sorted(roots + lost) if sort else roots + lost)

    # --- log events and metrics ----------------------------------------------------------------------------------
    @property
    def events(self) -> list[Any]:
        """Exported log records."""
        return [data.log_record for data in self.log_exporter.get_finished_logs()]

    def event_lines(self) -> str:
        """Exported log records as text."""
        lines = []
        for record in self.events:
            lines.append(str(record.event_name))
            lines += _attribute_lines(record.attributes or {}, "  . ")
        return "\n".join(lines)

    def metrics(self) -> dict[str, Any]:
        """Every metric by name, as the SDK's own objects (cumulative), as a backend knows them.

        Older SDKs tell a gauge only once each time it is set.
        """
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                self._told.update((metric.name, metric) for metric in scope.metrics)
        return dict(self._told)

    def metric(self, name: str) -> list[Any]:
        """Data points of one metric; none if it was never recorded."""
        found = self.metrics().get(name)
        return list(found.data.data_points) if found else []

    def everything(self) -> str:
        """All that was exported, as one text: to search for what must not be there."""
        spans = [span.to_json() for span in self.spans]
        records = [f"{record.event_name} {record.body} {dict(record.attributes or {})}" for record in self.events]
        data = self.reader.get_metrics_data()
        return "\n".join((*spans, *records, data.to_json() if data else ""))


def _attribute_lines(attributes: Mapping[str, Any], indent: str) -> list[str]:
    return [f"{indent}{key}: {_shown(key, attributes[key])}" for key in sorted(attributes) if key not in _LEFT_OUT]


def _shown(key: str, value: Any) -> str:
    if key in _IDS:
        assert isinstance(value, str)
        assert len(value) == 16
        return "<id>"
    if key in _SECONDS:
        assert isinstance(value, float)
        assert value >= 0
        return "<seconds>"
    if key == "server.port":
        return "<port>"
    if key == "gen_ai.response.id":
        return re.sub(r"resp_\w+=*$", "resp-<n>", re.sub(r"\d+$", "<n>", str(value)))  # LiteLLM's own form, too
    if key == "exception.stacktrace":
        return f"<{len(str(value)) > 0 and 'stack trace'}>"
    if isinstance(value, float):
        return repr(round(value, 9))
    if key in ("gen_ai.input.messages", "gen_ai.system_instructions"):
        # DSPy's own words in prompts change from version to version.
        return json.dumps(_shortened(json.loads(value)), ensure_ascii=False)
    if isinstance(value, tuple):
        return json.dumps(list(value), ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 60 else f"{value[:24]}…{value[-24:]}"
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return value
