"""The Collector and the backends as real processes on free loopback ports, configured by the files in `collector/`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.support import waiting
from tests.support.mlflow_server import free_port

ROOT = Path(__file__).parents[2]
COLLECTOR = ROOT / "collector"
CONFIG = COLLECTOR / "config"


def program(name: str) -> str:
    """Where a program is that `make` has got or the machine has, or skip the test and say how to get it."""
    done = subprocess.run(["bash", COLLECTOR / "install.sh", "--path", name], capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.strip()
    if name in {"prometheus", "promtool"}:
        return shutil.which(name) or pytest.skip(f"no {name} on this machine: Debian's package `prometheus` has it")
    needs = {"collector": " (needs Go)", "jaeger": " (needs Go)"}.get(name, "")
    pytest.skip(f"no {name} on this machine: `make {name}` gets it{needs}")


def wait_for(condition: Callable[[], Any], what: str, progress: Callable[[], Any] | None = None) -> Any:
    """What `condition()` gives once it is true; a server that does not answer (yet) means "not yet"."""
    return waiting.wait_for(condition, what, progress, ignored=(OSError, urllib.error.URLError, ValueError), pause=0.2)


def get(url: str, **parameters: Any) -> Any:
    """The JSON that a GET request is answered with."""
    query = "?" + urlencode(parameters, doseq=True) if parameters else ""
    with urllib.request.urlopen(url + query, timeout=waiting.STALLED) as answer:
        return json.load(answer)


class Process:
    """A server with its children: started, ended, killed.

    Args:
        command: the program and its arguments.
        log: file that its output is added to.
        environment: variables beside those of this process (of which no OTEL_, MLFLOW_ or PHOENIX_ one is passed on).
        ready: a URL that answers when it is up.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str], ready: str) -> None:
        self.command, self.log, self.ready = [str(part) for part in command], log, ready
        foreign = ("OTEL_", "MLFLOW_", "PHOENIX_", "COLLECTOR_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | dict(environment)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
            )
        wait_for(self._answers, f"{Path(self.command[0]).name} answers; see {self.log}")

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"{self.command[0]} ended:\n{self.log.read_text(errors='replace')[-3000:]}")
        with urllib.request.urlopen(self.ready, timeout=waiting.STALLED):
            return True

    def stop(self, with_signal: int = signal.SIGTERM) -> None:
        """End it and its children, gently unless told otherwise."""
        for each in (with_signal, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, each)
                self.process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def kill(self) -> None:
        """End it without a chance to do anything."""
        self.stop(signal.SIGKILL)


class Collector(Process):
    """A Collector of some of the files in `collector/config`.

    Attributes:
        grpc, http: endpoints for `OTEL_EXPORTER_OTLP_ENDPOINT`.
        prometheus: where the `metrics` pipeline is scraped.
        directory: where its queues, files and log are.
    """

    def __init__(self, directory: Path, files: Sequence[str | Path], environment: Mapping[str, str] = {}) -> None:
        names = ("GRPC", "HTTP", "HEALTH", "TELEMETRY", "PROMETHEUS")
        ports = {f"COLLECTOR_{name}_PORT": str(free_port()) for name in names}
        settings = {"COLLECTOR_STORAGE": str(directory / "queues"), "COLLECTOR_FILES": str(directory), **ports}
        configs = [f"--config={CONFIG / f'{file}.yaml' if isinstance(file, str) else file}" for file in files]
        self.directory = directory
        self.grpc = f"http://127.0.0.1:{ports['COLLECTOR_GRPC_PORT']}"
        self.http = f"http://127.0.0.1:{ports['COLLECTOR_HTTP_PORT']}"
        self.prometheus = f"http://127.0.0.1:{ports['COLLECTOR_PROMETHEUS_PORT']}/metrics"
        self.telemetry = f"http://127.0.0.1:{ports['COLLECTOR_TELEMETRY_PORT']}/metrics"
        health = f"http://127.0.0.1:{ports['COLLECTOR_HEALTH_PORT']}"
        super().__init__(
            [program("collector"), *configs], directory / "collector.log", {**settings, **environment}, health
        )

    def number(self, metric: str, containing: str = "") -> float:
        """The sum of one of the Collector's own metrics over the series whose labels contain a text."""
        return own_metric(self.telemetry, metric, containing)


def own_metric(url: str, metric: str, containing: str = "") -> float:
    """The sum of a metric on a page for Prometheus, over the series whose labels contain a text."""
    with urllib.request.urlopen(url, timeout=waiting.STALLED) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith((metric + "{", metric + " ")) and containing in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


@contextmanager
def running(process: Process) -> Iterator[Process]:
    """Start a process for the length of a block."""
    process.start()
    try:
        yield process
    finally:
        process.stop()


class Jaeger(Process):
    """Jaeger with its traces in memory: `otlp` is where it takes them, `url` where it answers."""

    def __init__(self, directory: Path, prometheus: str = "http://localhost:9") -> None:
        otlp, query, grpc = free_port(), free_port(), free_port()
        self.otlp, self.url = f"localhost:{otlp}", f"http://localhost:{query}"
        settings = {"JAEGER_OTLP_PORT": str(otlp), "JAEGER_UI_PORT": str(query), "JAEGER_QUERY_GRPC_PORT": str(grpc)}
        command = [program("jaeger"), f"--config={COLLECTOR / 'jaeger/jaeger.yaml'}"]
        environment = {**settings, "PROMETHEUS_URL": prometheus}
        super().__init__(command, directory / "jaeger.log", environment, f"{self.url}/api/services")

    def traces(self, service: str, **parameters: Any) -> list[dict[str, Any]]:
        """Traces of a service, as the query API gives them."""
        found: list[dict[str, Any]] = get(f"{self.url}/api/traces", service=service, limit=20000, **parameters)["data"]
        return found


class Kafka(Process):
    """One Kafka broker on loopback, topics with four partitions."""

    def __init__(self, directory: Path) -> None:
        java = shutil.which("java") or pytest.skip("no Java on this machine: Kafka needs it")
        port, controller = free_port(), free_port()
        self.brokers = f"127.0.0.1:{port}"
        settings = directory / "kafka.properties"
        settings.write_text(
            "process.roles=broker,controller\nnode.id=1\n"
            f"controller.quorum.voters=1@127.0.0.1:{controller}\n"
            f"listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n"
            "controller.listener.names=CONTROLLER\n"
            f"log.dirs={directory / 'kafka'}\nnum.partitions=4\nmessage.max.bytes=8000000\n"
            "offsets.topic.replication.factor=1\ngroup.initial.rebalance.delay.ms=0\n"
        )
        run = [java, "-Xmx512m", "-cp", f"{program('kafka')}/*"]
        subprocess.run(
            [*run, "kafka.tools.StorageTool", "format", "-t", uuid.uuid4().hex[:22], "-c", settings],
            check=True,
            capture_output=True,
        )
        super().__init__([*run, "kafka.Kafka", settings], directory / "kafka.log", {}, "")

    def _answers(self) -> bool:
        host, port = self.brokers.split(":")
        with socket.create_connection((host, int(port)), waiting.STALLED):
            return True


class Rotel(Process):
    """rotel, handing everything to one OTLP receiver by gRPC; `grpc` is where it takes it."""

    def __init__(self, directory: Path, endpoint: str) -> None:
        grpc, http = free_port(), free_port()
        self.grpc = f"http://127.0.0.1:{grpc}"
        listen = ["--otlp-grpc-endpoint", f"127.0.0.1:{grpc}", "--otlp-http-endpoint", f"127.0.0.1:{http}"]
        command = [program("rotel"), "start", "--exporter", "otlp", "--otlp-exporter-endpoint", endpoint, *listen]
        super().__init__(command, directory / "rotel.log", {"HOME": str(directory)}, f"http://127.0.0.1:{http}")

    def _answers(self) -> bool:
        try:
            return super()._answers()
        except urllib.error.HTTPError:  # it is up, and has no such page
            return True
