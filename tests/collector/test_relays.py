"""Several collectors in a row: agents, Kafka and gateways; and rotel, a collector that is not OpenTelemetry's."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import Status, StatusCode, set_span_in_context

from tests.collector.brain import brain_server, start_workload
from tests.collector.stack import COLLECTOR, Collector, Jaeger, Kafka, Rotel, running, wait_for
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.waiting import STALLED, finish

pytestmark = [pytest.mark.integration, pytest.mark.nightly]


def test_kafka_spreads_traces_over_gateways_and_keeps_each_whole(tmp_path: Path) -> None:
    kafka = Kafka(tmp_path)
    with ExitStack() as stack:
        receivers = [stack.enter_context(OtlpReceiver()) for _ in range(2)]
        agents = []
        for number in range(2):
            directory = tmp_path / f"agent{number}"
            directory.mkdir()
            agent = Collector(directory, ("base", COLLECTOR / "scale/agent.yaml"), {"KAFKA_BROKERS": kafka.brokers})
            agents.append(stack.enter_context(running(agent)))

        # Kafka is not there yet. Each trace passes both agents, one span each, and the failed span is in the second.
        tracers = []
        for agent in agents:
            provider = TracerProvider()
            exporter = OTLPSpanExporter(agent.grpc, insecure=True, timeout=STALLED)
            provider.add_span_processor(SimpleSpanProcessor(exporter))
            tracers.append(provider.get_tracer("relay"))
        failed = set()

        def send(traces: int) -> None:
            for number in range(traces):
                root = tracers[0].start_span("invoke_workflow App")
                child = tracers[1].start_span("chat m", set_span_in_context(root))
                if number % 2:
                    child.set_status(Status(StatusCode.ERROR))
                    failed.add(f"{root.get_span_context().trace_id:032x}")
                child.end()
                root.end()

        send(20)
        stack.enter_context(running(kafka))
        # Both spans of each trace are in Kafka before a gateway takes the first one.
        for agent in agents:
            sent = functools.partial(agent.number, "otelcol_exporter_sent_spans", 'exporter="kafka"')
            wait_for(lambda sent=sent: sent() == 20, "the first traces in Kafka")
        gateways: list[Collector] = []
        for number, receiver in enumerate(receivers):
            directory = tmp_path / f"gateway{number}"
            directory.mkdir()
            settings = {
                "KAFKA_BROKERS": kafka.brokers,
                "PHOENIX_ENDPOINT": receiver.http,
                "DECISION_WAIT": "12s",  # longer than it takes the two to share the partitions
                "KEEP_REST_PERCENT": "0",
            }
            files = ("base", COLLECTOR / "scale/gateway.yaml", "sampling", "content", "metrics", "phoenix")
            gateways.append(Collector(directory, files, settings))
            stack.enter_context(running(gateways[-1]))

        for gateway in gateways:
            shares = functools.partial(gateway.number, "otelcol_kafka_receiver_partition_start")
            wait_for(shares, "a share of the partitions")
        send(60)

        def spans() -> int:
            return sum(len(receiver.spans()) for receiver in receivers)

        wait_for(lambda: spans() >= 2 * len(failed), "the failed traces")
        assert all(receiver.spans() for receiver in receivers), "one gateway does all the work"
        whole: list[str] = []
        for receiver in receivers:
            traces = [span.trace for span in receiver.spans()]
            assert all(traces.count(trace) == 2 for trace in traces), "half a trace"
            whole += set(traces)
        assert sorted(whole) == sorted(failed), "each failed trace once, at one of the gateways, and no other"


def test_rotel_hands_a_real_run_to_jaeger_and_to_a_collector(tmp_path: Path) -> None:
    """rotel has one exporter, no guard and no sampling: it goes in front of either."""
    with ExitStack() as stack:
        jaeger = stack.enter_context(running(Jaeger(tmp_path)))
        receiver = stack.enter_context(OtlpReceiver())
        settings = {"PHOENIX_ENDPOINT": receiver.http}
        collector = Collector(tmp_path, ("base", "keep-all", "content", "phoenix"), settings)
        stack.enter_context(running(collector))
        brain = stack.enter_context(brain_server())
        for endpoint in (f"http://{jaeger.otlp}", collector.grpc):
            rotel = Rotel(tmp_path, endpoint)
            stack.enter_context(running(rotel))
            quiet = {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
            workload = start_workload(brain, rotel.grpc, "evaluation", environment=quiet)
            done = finish(workload)
            assert done.returncode == 0, done.stdout[-2000:]

        names = ["evaluate ColourFamily"] * 2 + ["example ColourFamily"] * 16
        wait_for(lambda: len(receiver.spans("e")) == 18, "the run in the receiver behind the Collector")
        assert sorted(span.name for span in receiver.spans("e")) == names

        def in_jaeger() -> list[str]:
            spans = [span["operationName"] for trace in jaeger.traces("colours") for span in trace["spans"]]
            return sorted(name for name in spans if name.startswith("e"))

        assert wait_for(lambda: in_jaeger() == names, "the run in Jaeger")
