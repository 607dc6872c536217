"""A proxy on loopback that writes down what a server of OpenAI's API answered, and passes each byte on at once."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Exchange:
    """One request and what came back.

    Attributes:
        path: of the request.
        request: its body.
        status: HTTP status of the answer; 0 where none came.
        answers: the answer's JSON, or each event of a stream.
    """

    path: str
    request: dict[str, Any]
    status: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def streamed(self) -> bool:
        """Whether a stream was asked for."""
        return bool(self.request.get("stream"))

    def last(self, key: str) -> Any:
        """What the server said last under ``key``; ``None`` if nothing."""
        bodies = [inner for body in self.answers for inner in (body, body.get("response")) if isinstance(inner, dict)]
        return next((body[key] for body in reversed(bodies) if body.get(key)), None)

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Input and output tokens, if it counted them."""
        usage = self.last("usage")
        if usage is None:
            return None
        before, after = ("prompt", "completion") if "prompt_tokens" in usage else ("input", "output")
        return usage[f"{before}_tokens"], usage[f"{after}_tokens"]


class LoggingProxy:
    """Passes requests on to ``upstream``.

    Attributes:
        url: its own address.
        exchanges: one for each request, in the order of their beginning.
    """

    def __init__(self, upstream: str, port: int) -> None:
        self.upstream = urlsplit(upstream)
        self.url = f"http://127.0.0.1:{port}/v1"
        self.exchanges: list[Exchange] = []

    def by_id(self) -> dict[str, Exchange]:
        """The exchanges that had an answer with an id."""
        return {each.last("id"): each for each in list(self.exchanges) if each.last("id") is not None}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: LoggingProxy

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        exchange = Exchange(urlsplit(self.path).path, json.loads(body or b"{}"))
        self.proxy.exchanges.append(exchange)
        self.close_connection = True
        upstream = http.client.HTTPConnection(self.proxy.upstream.hostname or "", self.proxy.upstream.port)
        try:
            headers = {"Content-Type": "application/json", "Connection": "close"}
            upstream.request("POST", self.path, body, headers)
            response = upstream.getresponse()
            exchange.status = response.status
            self.send_response(response.status)
            self.send_header("Content-Type", response.headers.get("Content-Type", "application/json"))
            self.send_header("Connection", "close")
            self.end_headers()
            self._pass_on(response, exchange)
        except (OSError, http.client.HTTPException):
            pass  # The server, or the client, is gone: the connection breaks, as it does without a proxy.
        finally:
            upstream.close()

    def _pass_on(self, response: http.client.HTTPResponse, exchange: Exchange) -> None:
        whole = b""
        for line in response:
            self.wfile.write(line)
            self.wfile.flush()
            if line.startswith(b"data: {"):
                exchange.answers.append(json.loads(line[6:]))
            whole += line
        if not exchange.answers and whole:
            exchange.answers.append(json.loads(whole))


@contextmanager
def logging_proxy(upstream: str) -> Iterator[LoggingProxy]:
    """A proxy that is up."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Handler.proxy = LoggingProxy(upstream, server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
