"""A web application: a program behind FastAPI on uvicorn, with the session and the user of each request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import dspy
import pytest
from opentelemetry import baggage, context

from tests.support.mlflow_server import free_port
from tests.support.openai_server import OpenAIServer
from tests.support.otlp_receiver import OtlpReceiver, attributes_of
from tests.support.spans import Recorder
from tests.support.waiting import LONGEST, wait_for, wait_for_exit
from tests.switching.process import ROOT, environment, installed
from tests.switching.test_neighbours import needs

pytestmark = [
    pytest.mark.integration,
    needs("fastapi", "fastapi"),
    needs("uvicorn", "uvicorn"),
    needs("opentelemetry.instrumentation.fastapi", "opentelemetry-instrumentation-fastapi"),
]


class Greeter(dspy.Module):
    """Goes on only when two calls are inside at once."""

    def __init__(self) -> None:
        super().__init__()
        self.reply = dspy.Predict("question -> answer")
        self.inside: set[str] = set()
        self.end = time.monotonic() + LONGEST

    def alone(self, question: str) -> bool:
        self.inside.add(question)
        return len(self.inside) < 2 and time.monotonic() < self.end

    def forward(self, question: str) -> Any:
        while self.alone(question):
            time.sleep(0.01)
        return self.reply(question=question)

    async def aforward(self, question: str) -> Any:
        while self.alone(question):
            await asyncio.sleep(0.01)
        return await self.reply.acall(question=question)


def application() -> Any:
    """As a user writes it; the middleware is the one of docs/web.md."""
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    app = FastAPI()

    @app.middleware("http")
    async def who_asks(request: Any, call_next: Any) -> Any:
        here = baggage.set_baggage("session.id", request.headers["x-session"])
        here = baggage.set_baggage("user.id", request.headers["x-user"], here)
        token = context.attach(here)
        try:
            return await call_next(request)
        finally:
            context.detach(token)

    greeters = {kind: Greeter() for kind in ("sync", "async", "stream")}

    @app.get("/sync")
    def sync(question: str) -> str:
        return greeters["sync"](question=question).answer

    @app.get("/async")
    async def asynchronous(question: str) -> str:
        return (await greeters["async"].acall(question=question)).answer

    @app.get("/stream")
    async def stream(question: str) -> Any:
        async def chunks() -> Any:
            async for chunk in dspy.streamify(greeters["stream"])(question=question):
                if isinstance(chunk, dspy.Prediction):
                    yield json.dumps(chunk.answer)

        return StreamingResponse(chunks())

    return app


@pytest.fixture
def address(telemetry: Recorder, server: OpenAIServer) -> Iterator[str]:
    import uvicorn
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    dspy.configure(lm=server.lm())
    app = application()
    FastAPIInstrumentor.instrument_app(app, tracer_provider=telemetry.tracer_provider)
    web = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=web.run)
    thread.start()
    try:
        while not web.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    finally:
        web.should_exit = True
        thread.join()


@pytest.mark.parametrize("kind", ["sync", "async", "stream"])
def test_two_requests_at_once_keep_their_spans_and_names_apart(telemetry: Recorder, address: str, kind: str):
    telemetry.instrument()

    def ask(who: str) -> str:
        asked = Request(f"{address}/{kind}?question={who}", headers={"x-session": f"s-{who}", "x-user": f"u-{who}"})
        with urlopen(asked, timeout=LONGEST) as answer:
            return json.loads(answer.read())

    with ThreadPoolExecutor(2) as clients:
        assert list(clients.map(ask, ("ann", "bob"))) == ["the answer"] * 2

    # A server's span ends after the client has its answer.
    def both() -> list[Any]:
        found = [span for span in telemetry.named(f"GET /{kind}") if span.parent is None]
        return found if len(found) == 2 else []

    requests = wait_for(both, "the spans of both requests")
    assert len({request.context.trace_id for request in requests}) == 2
    seen = []
    for request in requests:
        ours = [span for span in telemetry.spans if span.instrumentation_scope.name == "dspy_otel"]
        ours = [span for span in ours if span.context.trace_id == request.context.trace_id]
        assert [span.name for span in ours] == ["invoke_workflow Greeter", "Predict reply", "chat gpt-4o-mini"]
        above = [request, *ours]
        for parent, span in zip(above, ours):
            assert span.parent.span_id == parent.context.span_id
        seen += {(span.attributes["session.id"], span.attributes["user.id"]) for span in ours}
    assert sorted(seen) == [("s-ann", "u-ann"), ("s-bob", "u-bob")]


SERVICE = """
import os

import dspy
from dspy.utils import DummyLM

lm = DummyLM([{"answer": "Paris"}] * 10_000)
program = dspy.Predict("question -> answer")


def answer(question):
    with dspy.context(lm=lm):
        text = program(question=question).answer
    with open("answered", "a") as answered:
        answered.write(f"{os.getpid()}\\n")
    return text
"""
ASGI = """
@app.get("/ask")
def ask(question: str):
    return answer(question)
"""
WSGI = """
import json

answer("before the workers are there")


def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer("where")).encode()]
"""
GUNICORN = ["gunicorn", "--no-control-socket", "--preload", "--workers", "2", "--max-requests", "5"]


def recipe(word: str) -> str:
    """The block of docs/web.md with a word."""
    page = (ROOT / "docs/web.md").read_text(encoding="utf-8")
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if word in block]
    return found


@installed
@pytest.mark.parametrize(
    ("command", "options", "processes"),
    [
        (["opentelemetry-instrument", "uvicorn"], ["--port", "{}"], 1),
        pytest.param(
            ["opentelemetry-instrument", "uvicorn", "--workers", "2"],
            ["--port", "{}"],
            2,
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            ["opentelemetry-instrument", *GUNICORN, "-k", "uvicorn_worker.UvicornWorker"],
            ["--bind", "127.0.0.1:{}"],
            3,
            marks=[needs("uvicorn_worker", "uvicorn-worker"), pytest.mark.nightly],
        ),
        pytest.param(GUNICORN, ["--bind", "127.0.0.1:{}"], 3, marks=needs("gunicorn", "gunicorn")),
    ],
    ids=["uvicorn", "uvicorn's workers", "gunicorn with uvicorn's workers", "gunicorn"],
)
def test_a_server_that_is_stopped_has_sent_all_of_it(
    tmp_path: Path, command: list[str], options: list[str], processes: int
) -> None:
    """As on docs/web.md. gunicorn's workers are forked from a process that has the service, and restart."""
    own = command is GUNICORN
    (tmp_path / "service.py").write_text(SERVICE + WSGI if own else recipe("lifespan") + SERVICE + ASGI)
    if own:
        (tmp_path / "gunicorn.conf.py").write_text(recipe("post_fork"))
    port = free_port()

    def ask(_: int = 0) -> bool:
        with contextlib.suppress(OSError):  # not there yet, or of a worker that has served its last request
            with urlopen(f"http://127.0.0.1:{port}/ask?question=where", timeout=LONGEST) as response:
                return bool(json.load(response) == "Paris")
        return False

    def answered() -> Counter[int]:
        by_process = Counter(map(int, (tmp_path / "answered").read_text().split()))
        if own:
            del by_process[server.pid]  # before the workers were there
        return by_process

    with OtlpReceiver() as receiver, (tmp_path / "log").open("wb") as log:
        settings = environment(OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http, OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf")
        # Two of the three are scripts of this environment, also for the first one.
        settings["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), settings["PATH"]])
        line = [*command, *(option.format(port) for option in options), "service:app"]
        server = subprocess.Popen(line, cwd=tmp_path, env=settings, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(ask, "the service")
            with ThreadPoolExecutor(4) as clients:
                wait_for(lambda: any(clients.map(ask, range(8))) and len(answered()) >= processes, "enough processes")
        finally:
            server.send_signal(signal.SIGTERM)
            wait_for_exit(server, "the service")
        calls = receiver.spans("invoke_workflow Predict")
        assert len({span.id for span in calls}) == len(calls) == answered().total()
        # Each worker is an instance of the service, with metrics of its own.
        instances = Counter(span.resource["service.instance.id"] for span in calls)
        assert sorted(instances.values()) == sorted(answered().values())
        assert counted(receiver) == instances
        if own:
            assert {span.resource["process.pid"] for span in calls} == set(answered())


def counted(receiver: OtlpReceiver) -> dict[str, int]:
    """How many LM calls the last metrics of each instance have."""
    found = {}
    for request in receiver.requests("metrics"):
        for resource in request.message.resource_metrics:
            instance = attributes_of(resource.resource.attributes)["service.instance.id"]
            for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                if metric.name == "gen_ai.client.operation.duration":
                    found[instance] = sum(point.count for point in metric.histogram.data_points)
    return found
