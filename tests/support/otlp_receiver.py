"""A real OTLP receiver inside the test process: gRPC and HTTP/protobuf, for traces, metrics and logs.

It decodes what arrives with OpenTelemetry's own protocol classes and keeps it, with the headers it came with::

    with OtlpReceiver() as receiver:
        run(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http)
        assert "invoke_workflow App" in receiver.span_names()
"""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

Signal = Literal["traces", "metrics", "logs"]
Transport = Literal["grpc", "http"]

_REQUESTS: dict[Signal, Any] = {
    "traces": trace_service_pb2.ExportTraceServiceRequest,
    "metrics": metrics_service_pb2.ExportMetricsServiceRequest,
    "logs": logs_service_pb2.ExportLogsServiceRequest,
}
_RESPONSES: dict[Signal, Any] = {
    "traces": trace_service_pb2.ExportTraceServiceResponse,
    "metrics": metrics_service_pb2.ExportMetricsServiceResponse,
    "logs": logs_service_pb2.ExportLogsServiceResponse,
}


@dataclass(frozen=True)
class Received:
    """One export request: its signal, how it came, its headers (lower-case names), the decoded message, its path."""

    signal: Signal
    transport: Transport
    headers: Mapping[str, str]
    message: Any
    path: str = ""


@dataclass(frozen=True)
class ReceivedSpan:
    """One span as the receiver sees it; ids are lower-case hexadecimal, ``parent`` is empty for a root."""

    name: str
    trace: str
    id: str
    parent: str
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]
    scope: str


def value_of(value: AnyValue) -> Any:
    """An OTLP attribute value as a Python object."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return attributes_of(value.kvlist_value.values)
    return getattr(value, kind) if kind else None


def attributes_of(pairs: Any) -> dict[str, Any]:
    """OTLP attributes as a dictionary."""
    return {pair.key: value_of(pair.value) for pair in pairs}


class OtlpReceiver:
    """Receives OTLP on two free ports of 127.0.0.1; use as a context manager.

    Attributes:
        received: every request, in order of arrival.
    """

    def __init__(self) -> None:
        self.received: list[Received] = []
        self._arrived = threading.Condition()

    def __enter__(self) -> OtlpReceiver:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self._grpc = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self._servicer("traces"), self._grpc)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(self._servicer("metrics"), self._grpc)
        logs_service_pb2_grpc.add_LogsServiceServicer_to_server(self._servicer("logs"), self._grpc)
        port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        self.grpc = f"http://127.0.0.1:{port}"
        """Endpoint for ``OTEL_EXPORTER_OTLP_ENDPOINT`` with gRPC."""
        self.http = f"http://127.0.0.1:{self._http.server_port}"
        """Endpoint for ``OTEL_EXPORTER_OTLP_ENDPOINT`` with HTTP/protobuf."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(grace=None).wait()

    # --- what arrived --------------------------------------------------------------------------------------------
    def requests(self, signal: Signal) -> list[Received]:
        """All requests of one signal."""
        return [request for request in self.received if request.signal == signal]

    def spans(self, prefix: str = "") -> list[ReceivedSpan]:
        """All spans whose name starts with ``prefix``, in order of arrival."""
        return [span for span in self._spans() if span.name.startswith(prefix)]

    def span_names(self) -> list[str]:
        """The names of all spans, sorted."""
        return sorted(span.name for span in self._spans())

    def metric_names(self) -> set[str]:
        """The names of all metrics."""
        return {
            metric.name
            for request in self.requests("metrics")
            for resource in request.message.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def event_names(self) -> list[str]:
        """The event names of all log records."""
        return [
            record.event_name
            for request in self.requests("logs")
            for resource in request.message.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]

    def _spans(self) -> Iterator[ReceivedSpan]:
        for request in self.requests("traces"):
            for resource in request.message.resource_spans:
                about = attributes_of(resource.resource.attributes)
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        yield ReceivedSpan(
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            attributes_of(span.attributes),
                            about,
                            scope.scope.name,
                        )

    # --- the two servers -----------------------------------------------------------------------------------------
    def _keep(
        self, signal: Signal, transport: Transport, headers: Mapping[str, str], message: Any, path: str = ""
    ) -> Any:
        with self._arrived:
            self.received.append(Received(signal, transport, headers, message, path))
            self._arrived.notify_all()
        return _RESPONSES[signal]()

    def _servicer(self, signal: Signal) -> Any:
        keep = self._keep

        class Servicer:
            def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
                headers = {key.lower(): str(value) for key, value in context.invocation_metadata()}
                return keep(signal, "grpc", headers, request)

        return Servicer()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        keep = self._keep

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                signal = self.path.rpartition("/v1/")[2]
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if signal not in _REQUESTS or self.headers.get("Content-Type") != "application/x-protobuf":
                    self.send_error(404)
                    return
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                elif self.headers.get("Content-Encoding") == "deflate":
                    body = zlib.decompress(body)
                headers = {key.lower(): value for key, value in self.headers.items()}
                message = _REQUESTS[signal].FromString(body)
                answer = keep(signal, "http", headers, message, self.path).SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
