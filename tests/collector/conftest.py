"""One Collector with all backends that this machine has, and a real DSPy service and optimizations sending to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.collector.brain import brain_server, start_workload
from tests.collector.stack import COLLECTOR, ROOT, get, own_metric, program, wait_for
from tests.support.mlflow_server import free_port
from tests.support.otlp_receiver import attributes_of
from tests.support.waiting import STALLED, finish, wait_for_exit

PORTS = (
    *("COLLECTOR_GRPC_PORT", "COLLECTOR_HTTP_PORT", "COLLECTOR_PROMETHEUS_PORT", "COLLECTOR_TELEMETRY_PORT"),
    *("COLLECTOR_HEALTH_PORT", "JAEGER_OTLP_PORT", "JAEGER_UI_PORT", "JAEGER_QUERY_GRPC_PORT", "PROMETHEUS_PORT"),
    *("MLFLOW_PORT", "PHOENIX_PORT", "PHOENIX_GRPC_PORT"),
)


@dataclass
class Span:
    """One span that the Collector wrote to its file: what was sent, with secrets masked."""

    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Stack:
    """The running servers.

    Attributes:
        directory: their data and logs.
        ports: the port of each, by the name of its variable.
        started, ended: when the workload ran, seconds since the epoch.
    """

    directory: Path
    ports: dict[str, int]
    started: float = 0
    ended: float = 0

    def url(self, name: str) -> str:
        """Where a backend answers; a test of one that is not on this machine is skipped."""
        port = self.ports[f"{name.upper()}_PORT" if name != "jaeger" else "JAEGER_UI_PORT"]
        if f"  {name}" not in self.output:
            pytest.skip(next(line for line in self.output.splitlines() if line.lower().startswith(f"no {name}")))
        return f"http://localhost:{port}"

    @property
    def output(self) -> str:
        return (self.directory / "run.log").read_text(errors="replace")

    @cached_property
    def spans(self) -> list[Span]:
        """Every span, from the Collector's file: what backends are compared with."""
        from google.protobuf.json_format import ParseDict
        from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

        found = []
        for line in (self.directory / "files/traces.jsonl").read_text(encoding="utf-8").splitlines():
            for resource in json.loads(line)["resourceSpans"]:
                for scope in resource["scopeSpans"]:
                    for span in scope["spans"]:
                        ids = [span.pop(key, "") for key in ("traceId", "spanId", "parentSpanId")]
                        span.pop("links", None)
                        message = ParseDict(span, Message(), ignore_unknown_fields=True)
                        events = [{"name": e.name, **attributes_of(e.attributes)} for e in message.events]
                        found.append(Span(message.name, *ids, attributes_of(message.attributes), events))
        return found

    @property
    def written(self) -> int:
        """Spans in the Collector's file by now."""
        lines = (self.directory / "files/traces.jsonl").read_text(encoding="utf-8").splitlines()
        resources = [resource for line in lines for resource in json.loads(line)["resourceSpans"]]
        return sum(len(scope["spans"]) for resource in resources for scope in resource["scopeSpans"])

    @property
    def scraped(self) -> float | None:
        """Spans that Prometheus knows of by now."""
        return self.last("sum(dspy_collector_spans_total)").get(())

    def sent(self, exporter: str) -> float:
        """Spans that a backend has confirmed to the Collector."""
        url = f"http://localhost:{self.ports['COLLECTOR_TELEMETRY_PORT']}/metrics"
        return own_metric(url, "otelcol_exporter_sent_spans", f'exporter="{exporter}"')

    def promql(self, query: str) -> list[dict[str, Any]]:
        """The series that a PromQL query gives, from the start of the workload until now; no `NaN` in them."""
        window = {"start": self.started, "end": time.time(), "step": 1}
        answer = get(f"{self.url('prometheus')}/api/v1/query_range", query=query, **window)
        series = answer["data"]["result"]
        for each in series:
            each["values"] = [(when, float(value)) for when, value in each["values"] if value != "NaN"]
        return [each for each in series if each["values"]]

    def last(self, query: str, *labels: str) -> dict[Any, float]:
        """The last value of each series of a query, by its labels."""
        series = self.promql(query)
        return {tuple(each["metric"].get(label) for label in labels): each["values"][-1][1] for each in series}


class Settled:
    """Whether Prometheus knows of all spans, or has not heard of another one for long.

    Where a count was lost, the test of it says so; no other needs to wait for it, while servers that are busy with
    other things seem to make progress.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._seen: tuple[float | None, int] | None = None
        self._since = time.monotonic()

    def __call__(self) -> bool:
        """Look once."""
        seen = self._stack.scraped, self._stack.written
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return seen[0] == seen[1] or time.monotonic() - self._since > STALLED / 2


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """`collector/run.sh` on free ports; the workload has run, and its metrics have been scraped."""
    program("collector")
    directory = tmp_path_factory.mktemp("stack")
    stack = Stack(directory, {name: free_port() for name in PORTS})
    foreign = ("OTEL_", "MLFLOW_", "PHOENIX_", "COLLECTOR_", "JAEGER_", "PROMETHEUS_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    environment |= {name: str(port) for name, port in stack.ports.items()}
    environment |= {"DATA": str(directory), "PROMETHEUS_INTERVAL": "1s", "METRICS_FLUSH_INTERVAL": "1s"}
    with (directory / "run.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", COLLECTOR / "run.sh"],
            env=environment,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:

        def says(text: str) -> bool:
            if process.poll() is not None:
                pytest.fail(f"run.sh ended:\n{stack.output}")
            return text in stack.output

        # The workload does not wait for slow backends: queues on disk keep what is theirs.
        wait_for(lambda: says("  collector"), "the Collector of run.sh")
        stack.started = time.time()
        with brain_server() as server:
            workload = start_workload(server, f"http://127.0.0.1:{stack.ports['COLLECTOR_GRPC_PORT']}")
            done = finish(workload)
        stack.ended = time.time()
        assert done.returncode == 0, done.stdout[-3000:]
        wait_for(lambda: says("ready;"), "all servers of run.sh")
        if "  prometheus" in stack.output:
            wait_for(Settled(stack), "metrics of all spans")
        yield stack
    finally:
        process.send_signal(signal.SIGTERM)
        wait_for_exit(process, "run.sh")
