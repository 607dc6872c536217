"""The demo's embedded model behind a real HTTP server, and a program under `opentelemetry-instrument` that asks it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspy_otel.cli.demo.brain import complete
from dspy_otel.cli.demo.prompt import Message
from tests.support.openai_server import Reply, openai_server
from tests.support.waiting import STALLED
from tests.switching.process import OTHERS

_TROUBLE = re.compile(r"(?P<what>unreadable|fails) (?P<when>once|always)(?: \d+)?")
WORKLOAD = Path(__file__).with_name("workload.py")


@contextmanager
def brain_server() -> Iterator[str]:
    """An OpenAI-compatible server that thinks as `dspy-otel demo` does; yields its URL.

    A prompt with `unreadable once` gets a first answer that no adapter can parse, `unreadable always` gets no other;
    `fails once` and `fails always` get HTTP status 500.
    """
    with openai_server() as server:
        asked: set[str] = set()

        def reply(body: dict[str, Any]) -> Reply:
            messages = [Message(message["role"], str(message["content"])) for message in body["messages"]]
            trouble = _TROUBLE.search(messages[-1].text)
            if trouble and not (trouble["when"] == "once" and trouble[0] in asked):
                asked.add(trouble[0])
                return Reply("no fields here") if trouble["what"] == "unreadable" else Reply("overloaded", status=500)
            return Reply(complete(messages).text)

        server.reply = reply  # type: ignore[method-assign]
        yield server.url


def start_workload(openai: str, endpoint: str, *parts: str, environment: Mapping[str, str] = {}) -> Any:
    """Start the workload under `opentelemetry-instrument`: all signals to an OTLP endpoint by gRPC, with content."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "MLFLOW_", "OPENAI_"))}
    settings = {
        "OPENAI_BASE_URL": openai,
        "OTEL_SERVICE_NAME": "colours",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": OTHERS,
        "OTEL_BSP_SCHEDULE_DELAY": "500",
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        "OTEL_EXPORTER_OTLP_TIMEOUT": f"{STALLED:.0f}",
        "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "span_and_event",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TQDM_DISABLE": "1",
        **environment,
    }
    instrument = Path(sys.executable).with_name("opentelemetry-instrument")
    command = [str(instrument), sys.executable, str(WORKLOAD), *parts]
    return subprocess.Popen(
        command, env={**inherited, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
