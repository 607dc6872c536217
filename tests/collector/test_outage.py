"""What arrives when a backend is down and the Collector is killed, under load. Counted, span by span."""

from __future__ import annotations

import functools
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.trace import Status, StatusCode

from tests.collector.stack import Collector, Jaeger, own_metric, running, wait_for
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.waiting import STALLED

pytestmark = pytest.mark.integration

TRACES = 1000
"""The backend is away for all of this load, 20 seconds or more; the Collector is killed in the middle."""


class Load:
    """Traces of three spans at a steady rate, sent by the SDK as a program sends its own. `sent` are their ids."""

    def __init__(self, endpoint: str, rate: float = 50) -> None:
        provider = TracerProvider(resource=Resource({"service.name": "load"}))
        exporter = OTLPSpanExporter(endpoint, insecure=True, timeout=STALLED)  # retries for that long
        queue = BatchSpanProcessor(exporter, max_queue_size=100_000, schedule_delay_millis=200)
        provider.add_span_processor(queue)
        self.provider, self.rate, self.sent = provider, rate, set[str]()

    def run(self, traces: int) -> None:
        """Make some traces, then hand over what is left."""
        tracer = self.provider.get_tracer("load")
        for _ in range(traces):
            with tracer.start_as_current_span("invoke_workflow App") as root:
                for name in ("Predict answer", "chat gpt-4o-mini"):
                    with tracer.start_as_current_span(name, attributes={"input.value": secrets.token_hex(200)}) as span:
                        self.sent.add(f"{span.get_span_context().span_id:016x}")
            self.sent.add(f"{root.get_span_context().span_id:016x}")
            time.sleep(1 / self.rate)
        self.provider.force_flush(int(STALLED * 1000))
        self.provider.shutdown()


@contextmanager
def under(load: Load, traces: int) -> Iterator[None]:
    """Run a load beside the block, and wait for its end."""
    thread = threading.Thread(target=load.run, args=(traces,))
    thread.start()
    yield
    thread.join()


def test_a_backend_that_is_down_and_a_killed_collector_lose_no_span(tmp_path: Path) -> None:
    jaeger = Jaeger(tmp_path)
    files = ("base", "keep-all", "content", "jaeger", "file")
    collector = Collector(tmp_path, files, {"JAEGER_OTLP": jaeger.otlp})
    collector.start()
    try:
        load = Load(collector.grpc)
        with under(load, TRACES):
            wait_for(lambda: len(load.sent) > TRACES, "a third of the load")
            wait_for(lambda: collector.number("otelcol_exporter_queue_size", "jaeger") > 0, "a queue for Jaeger")
            collector.kill()
            time.sleep(1)
            collector.start()
        assert len(load.sent) == 3 * TRACES
        with running(jaeger):

            def arrived() -> set[str]:
                return {span["spanID"] for trace in jaeger.traces("load") for span in trace["spans"]}

            wait_for(lambda: arrived() >= load.sent, "all spans in Jaeger")
            assert arrived() == load.sent
            wait_for(lambda: collector.number("otelcol_exporter_queue_size", "jaeger") == 0, "an empty queue")
            assert collector.number("otelcol_exporter_send_failed_spans") == 0
    finally:
        collector.stop()


def test_tail_sampling_keeps_what_matters_and_a_share_of_the_rest(tmp_path: Path) -> None:
    kinds = {
        "optimization": {"dspy.optimizer.run.id": "r", "name": "propose"},
        "trial": {"dspy.optimizer.run.id": "r", "name": "trial"},
        "evaluation": {"dspy.evaluation.id": "e", "name": "evaluate App"},
        "low score": {"dspy.evaluation.id": "e", "dspy.example.score": 0.25, "name": "example App"},
        "good example": {"dspy.evaluation.id": "e", "dspy.example.score": 1.0, "name": "example App"},
        "error": {"fails": True},
        "parse error": {"event": "dspy.adapter.parse_error"},
        "slow": {"seconds": 20},
        "plain": {},
    }
    with OtlpReceiver() as receiver:
        settings = {
            "DECISION_WAIT": "2s",
            "KEEP_REST_PERCENT": "20",
            "KEEP_EXAMPLES_PERCENT": "40",
            "PHOENIX_ENDPOINT": receiver.http,
        }
        with running(Collector(tmp_path, ("base", "sampling", "content", "phoenix"), settings)) as collector:
            provider = TracerProvider()
            exporter = OTLPSpanExporter(collector.grpc, insecure=True, timeout=STALLED)
            provider.add_span_processor(BatchSpanProcessor(exporter))
            tracer, number = provider.get_tracer("sampling"), 200
            for kind, about in kinds.items():
                for _ in range(number):
                    attributes = {key: value for key, value in about.items() if "." in key}
                    begin = time.time_ns() - int(about.get("seconds", 1) * 1e9)
                    with tracer.start_as_current_span(
                        "invoke_workflow App", attributes={"kind": kind}, start_time=begin
                    ):
                        with tracer.start_as_current_span(about.get("name", "chat m"), attributes=attributes) as span:
                            if "event" in about:
                                span.add_event(about["event"])
                            if "fails" in about:
                                span.set_status(Status(StatusCode.ERROR))
                assert provider.force_flush()  # the SDK's queue drops what is more than 2,048 spans
            provider.shutdown()

            def kept(kind: str) -> int:
                return sum(span.attributes.get("kind") == kind for span in receiver.spans("invoke_workflow"))

            always = [kind for kind in kinds if kind not in ("plain", "good example")]
            decided = functools.partial(collector.number, "otelcol_processor_tail_sampling_global_count_traces_sampled")
            wait_for(lambda: decided() == number * len(kinds), "a decision on every trace")
            wait_for(lambda: len(receiver.spans()) == 2 * decided('sampled="true"'), "the sampled traces")
            assert {kind: kept(kind) for kind in always} == dict.fromkeys(always, number)
            assert 10 <= kept("plain") <= 70  # 20 % of 200: more than 5 standard deviations on each side
            # Either share may keep a good example: 40 % and 20 % of the rest of it at most.
            assert 45 <= kept("good example") <= 140
            # Traces are whole, or not there.
            assert len(receiver.spans()) == 2 * len(receiver.spans("invoke_workflow"))


def test_what_a_killed_collector_loses_while_tail_sampling_decides(tmp_path: Path) -> None:
    """The price of sampling.yaml, as it says there: what waits in memory, and nothing else."""
    with OtlpReceiver() as receiver:
        settings = {"DECISION_WAIT": "2s", "KEEP_REST_PERCENT": "100", "PHOENIX_ENDPOINT": receiver.http}
        collector = Collector(tmp_path, ("base", "sampling", "content", "phoenix"), settings)
        collector.start()
        try:
            early, late, last = (Load(collector.grpc) for _ in range(3))
            early.run(60)
            wait_for(lambda: {span.id for span in receiver.spans()} == early.sent, "the decided traces")
            collector.stop()
            collector.environment["DECISION_WAIT"] = "1h"
            collector.start()
            late.run(40)
            collector.kill()
            collector.environment["DECISION_WAIT"] = "2s"
            collector.start()
            last.run(20)
            wait_for(lambda: {span.id for span in receiver.spans()} >= last.sent, "the traces after the late ones")
            assert {span.id for span in receiver.spans()} == early.sent | last.sent
        finally:
            collector.stop()


def test_spans_that_arrive_at_once_are_all_counted(tmp_path: Path) -> None:
    """Sums are made of each batch's own count, and one that is older than the last would be dropped."""
    programs, each = 16, 250
    with running(Collector(tmp_path, ("base", "metrics"))) as collector:
        assert isinstance(collector, Collector)

        def program(number: int) -> None:
            provider = TracerProvider(shutdown_on_exit=False)
            exporter = OTLPSpanExporter(collector.grpc, insecure=True, timeout=STALLED)
            provider.add_span_processor(SimpleSpanProcessor(exporter))
            tracer = provider.get_tracer("counting")
            for _ in range(each):  # a request for each
                tracer.start_span("chat m").end()
            provider.shutdown()

        threads = [threading.Thread(target=program, args=(number,)) for number in range(programs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counted = functools.partial(own_metric, collector.prometheus, "dspy_collector_spans_total")
        wait_for(lambda: counted() == programs * each, "the count of all spans")


def test_a_span_that_ends_long_after_others_is_counted(tmp_path: Path) -> None:
    """A count has the times of its spans: what began before the first one would be dropped, with all around it."""
    with running(Collector(tmp_path, ("base", "metrics"))) as collector:
        assert isinstance(collector, Collector)
        provider = TracerProvider(shutdown_on_exit=False)
        exporter = OTLPSpanExporter(collector.grpc, insecure=True, timeout=STALLED)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        tracer = provider.get_tracer("counting")
        counted = functools.partial(own_metric, collector.prometheus, "dspy_collector_spans_total")
        compiling = tracer.start_span("compile MIPROv2")
        tracer.start_span("chat m").end()
        wait_for(lambda: counted() == 1, "the count of the first span")
        compiling.end()
        wait_for(lambda: counted() == 2, "the count of the second span")
        provider.shutdown()
