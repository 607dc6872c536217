"""A proxy on loopback before a real server, that misbehaves when told to."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.support.mlflow_server import free_port


class FaultProxy:
    """Passes requests on to ``upstream``; attributes say what goes wrong, and may be changed at any time.

    Attributes:
        delay: seconds before a request is passed on.
        status: answer this instead of asking the server.
        lose_answers: ask the server, and break the connection instead of passing the answer on; so many times.
        requests: method and path of each request that arrived.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.delay = 0.0
        self.status = 0
        self.lose_answers = 0
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._connections: set[socket.socket] = set()

    def up(self) -> None:
        """Listen."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                proxy._connections.add(self.connection)

            def finish(self) -> None:
                proxy._connections.discard(self.connection)
                with contextlib.suppress(OSError):
                    super().finish()

            def log_message(self, *_: Any) -> None:
                pass

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append((self.command, urlsplit(self.path).path))
                time.sleep(proxy.delay)
                if proxy.status:
                    self.answer(proxy.status, b"proxy says no", "text/plain")
                    return
                upstream = urlsplit(proxy.upstream)
                connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port)
                headers = {key: value for key, value in self.headers.items() if key.lower() != "host"}
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                answer = response.read()
                connection.close()
                with proxy._lock:
                    lost = proxy.lose_answers > 0
                    proxy.lose_answers -= lost
                if lost:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.answer(response.status, answer, response.headers.get("Content-Type", "text/plain"))

            def answer(self, status: int, body: bytes, kind: str) -> None:
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self) -> None:
        """Stop listening, and break all connections."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy that is up."""
    proxy = FaultProxy(upstream)
    proxy.up()
    try:
        yield proxy
    finally:
        proxy.down()
