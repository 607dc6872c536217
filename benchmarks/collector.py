"""What one Collector node can take, with the pipelines of `collector/`, and what that means for many LM calls a second.

    make collector                       # once; `make kafka` for the rows with Kafka
    python benchmarks/collector.py       # in the environment of the tests (`make test` makes it)
    python benchmarks/collector.py --seconds 5 --only "one node"

Real calls of the demo's program, content on, are recorded once. Their spans are then sent again and again by OTLP/HTTP,
each time with new ids, by a few threads. What is measured is the Collector's own CPU time, from the first span until
its queues are empty again: on a busy machine it says more than spans a second do.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

from tests.collector.stack import COLLECTOR, Collector, Kafka, running  # noqa: E402
from tests.support.otlp_receiver import OtlpReceiver  # noqa: E402

SINK = """
receivers:
  otlp: { protocols: { grpc: { endpoint: "localhost:${env:SINK_PORT}", max_recv_msg_size_mib: 64 } } }
exporters: { nop: }
extensions: { health_check: { endpoint: "localhost:${env:COLLECTOR_HEALTH_PORT}" } }
service:
  extensions: [health_check]
  telemetry: { metrics: { level: none } }
  pipelines: { traces: { receivers: [otlp], exporters: [nop] } }
"""
"""A backend that costs nothing: takes everything, keeps nothing."""
WANTED = 10_000
"""LM calls a second that the arithmetic below the table is about."""


@dataclass
class Recording:
    """Spans of a real run. `parts` is one serialized request, cut at its trace ids; `order`: which id goes where."""

    parts: list[bytes]
    order: list[int]
    traces: int
    spans: int
    lm_calls: int
    size: int

    def request(self) -> bytes:
        """The same spans with new trace ids."""
        ids = [secrets.token_bytes(16) for _ in range(self.traces)]
        pieces = [self.parts[0]]
        for place, part in zip(self.order, self.parts[1:], strict=True):
            pieces += (ids[place], part)
        return b"".join(pieces)


def record(content: bool) -> Recording:
    """Evaluate the demo's program, and keep what the SDK sent."""
    import dspy
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from dspy_otel import DSPyInstrumentor
    from dspy_otel.cli.demo.lm import embedded_lm
    from dspy_otel.cli.demo.task import ColourFamily, load_examples

    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    with OtlpReceiver() as receiver:
        provider = TracerProvider(resource=Resource({"service.name": "bench"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{receiver.http}/v1/traces"), 100_000))
        instrumentor = DSPyInstrumentor()
        instrumentor.instrument(tracer_provider=provider, capture_content="span_only" if content else "no_content")
        program = ColourFamily()
        with dspy.context(lm=embedded_lm(cache=False)):
            for example in load_examples("val", 80):
                program(colour_name=example.colour_name)
        provider.shutdown()
        instrumentor.uninstrument()
        merged = ExportTraceServiceRequest()
        for request in receiver.requests("traces"):
            merged.resource_spans.extend(request.message.resource_spans)
        lm_calls = len(receiver.spans("chat "))
    data = merged.SerializeToString()
    ids = sorted({span.trace_id for r in merged.resource_spans for s in r.scope_spans for span in s.spans})
    pattern = re.compile(b"|".join(map(re.escape, ids)))
    order = [ids.index(found) for found in pattern.findall(data)]
    return Recording(pattern.split(data), order, len(ids), len(receiver.spans()), lm_calls, len(data))


def cpu_seconds(collector: Collector) -> float:
    """CPU time that a process has used so far."""
    fields = Path(f"/proc/{collector.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(collector: Collector) -> float:
    """The most memory that a process has had."""
    status = Path(f"/proc/{collector.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1024  # type: ignore[union-attr]


def send(endpoint: str, recording: Recording, seconds: float, threads: int) -> tuple[int, int]:
    """Send for some seconds; gives the spans that were accepted, and how often the Collector said no."""
    address, until = urlsplit(endpoint).netloc, time.monotonic() + seconds
    accepted, refused = [0] * threads, [0] * threads

    def loop(place: int) -> None:
        connection = http.client.HTTPConnection(address, timeout=60)
        while time.monotonic() < until:
            body = recording.request()
            connection.request("POST", "/v1/traces", body, {"Content-Type": "application/x-protobuf"})
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                accepted[place] += recording.spans
            else:
                refused[place] += 1
                time.sleep(0.2)

    workers = [threading.Thread(target=loop, args=(place,)) for place in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(accepted), sum(refused)


@dataclass
class Result:
    """One row of the table."""

    spans: int
    seconds: float
    cpu: float
    memory: float
    refused: int


def measure(
    to: Collector, watched: Collector, recording: Recording, options: Any, drained: Callable[[], bool]
) -> Result:
    """Load one Collector, and take the CPU time of one (the same, or one further on)."""
    before, begin = cpu_seconds(watched), time.monotonic()
    spans, refused = send(to.http, recording, options.seconds, options.threads)
    took = time.monotonic() - begin
    until, quiet = time.monotonic() + 120, 0
    while quiet < 3 and time.monotonic() < until:  # some polls in a row: a queue may be empty between two batches
        quiet = quiet + 1 if drained() else 0
        time.sleep(0.5)
    if quiet < 3:
        print("  not drained within two minutes: the CPU time is too small", file=sys.stderr)
    return Result(spans, took, cpu_seconds(watched) - before, peak_mib(watched), refused)


def rows(directory: Path, sink: str, recording: Recording, options: Any) -> dict[str, Result]:
    """Measure each set-up."""
    settings = {
        "JAEGER_OTLP": sink,
        "COLLECTOR_MEMORY_MIB": "3000",
        "DECISION_WAIT": "5s",
        "SAMPLING_TRACES": "1000000",
    }
    base = {"one node, all kept": "keep-all", "one node, sampling": "sampling"}
    found = {}

    def wanted(name: str) -> bool:
        return not options.only or options.only in name

    def place(name: str) -> Path:
        path = directory / re.sub(r"\W+", "-", name)
        path.mkdir()
        return path

    def empty(collector: Collector) -> bool:
        return collector.number("otelcol_exporter_queue_size") == 0

    for name, keep in base.items():
        if wanted(name):
            collector = Collector(place(name), ("base", keep, "content", "metrics", "jaeger"), settings)
            with running(collector):
                began = time.monotonic()
                found[name] = measure(
                    collector,
                    collector,
                    recording,
                    options,
                    lambda c=collector, t=began: empty(c) and time.monotonic() - t > options.seconds + 8,  # type: ignore[misc]
                )
    names = ("agent, to Kafka", "gateway, from Kafka, sampling")
    if options.kafka and any(map(wanted, names)):
        kafka = Kafka(place("kafka"))
        settings |= {"KAFKA_BROKERS": kafka.brokers}
        agent = Collector(place(names[0]), ("base", COLLECTOR / "scale/agent.yaml"), settings)
        files = ("base", COLLECTOR / "scale/gateway.yaml", "sampling", "content", "metrics", "jaeger")
        gateway = Collector(place(names[1]), files, settings)
        with running(kafka, 120), running(agent):
            found[names[0]] = measure(agent, agent, recording, options, lambda: empty(agent))
            with running(gateway):
                before, begin = cpu_seconds(gateway), time.monotonic()
                spans = found[names[0]].spans
                while gateway.number("otelcol_receiver_accepted_spans") < spans and time.monotonic() - begin < 240:
                    time.sleep(0.2)
                took = time.monotonic() - begin
                time.sleep(10)
                got = int(gateway.number("otelcol_receiver_accepted_spans"))
                found[names[1]] = Result(got, took, cpu_seconds(gateway) - before, peak_mib(gateway), 0)
    return found


def main() -> None:
    """Measure, and print the table and the arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="how long each set-up is loaded (default 20)")
    parser.add_argument("--threads", type=int, default=2, help="senders (default 2)")
    parser.add_argument("--only", help="the set-ups whose name has this text")
    parser.add_argument("--no-kafka", dest="kafka", action="store_false", help="without the rows that need Kafka")
    parser.add_argument("--no-content", dest="content", action="store_false", help="spans without prompts and answers")
    options = parser.parse_args()

    recording = record(options.content)
    per_call, size = recording.spans / recording.lm_calls, recording.size / recording.spans
    content = "with" if options.content else "without"
    print(f"OpenTelemetry SDK {version('opentelemetry-sdk')}")
    print(f"{per_call:.1f} spans for an LM call, {size:.0f} bytes a span, {content} content")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        (directory / "sink.yaml").write_text(SINK)
        (directory / "sink").mkdir()
        sink = Collector(directory / "sink", (directory / "sink.yaml",))
        port = urlsplit(sink.grpc).port
        sink.environment["SINK_PORT"] = str(port)
        stack.enter_context(running(sink))
        found = rows(directory, f"localhost:{port}", recording, options)

    print("\n| set-up | spans/s | MB/s | CPU s for 1,000 spans | spans/s for a core | memory, MiB | refused |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in found.items():
        rate, core = row.spans / row.seconds, row.spans / row.cpu
        cells = [f"{rate:,.0f}", f"{rate * size / 1e6:.0f}", f"{1000 * row.cpu / row.spans:.3f}", f"{core:,.0f}"]
        print(f"| {name} | {' | '.join(cells)} | {row.memory:,.0f} | {row.refused} |")
    spans = WANTED * per_call
    rate, day = spans * size / 1e6, spans * size * 86400 / 1e12
    print(f"\n{WANTED:,} LM calls a second: {spans:,.0f} spans/s, {rate:,.0f} MB/s, {day:.1f} TB a day.")
    for name, row in found.items():
        cores = spans * row.cpu / row.spans
        print(f"  {name}: {cores:.1f} cores busy; at 60 %: {cores / 0.6:.0f}")


if __name__ == "__main__":
    main()
