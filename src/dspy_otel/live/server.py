"""The server of the live page: three addresses behind a token, and one event when the report has changed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dspy_otel.live.feeds import Feed, View
from dspy_otel.live.page import POLICY, page

SILENT: Final = 120.0
"""Seconds without anything new after which the page says so."""
_INTERVAL: Final = 1.0
"""Seconds between two looks at the feed, at least; four times what a look takes, if that is more."""
_LONGEST: Final = 10.0
"""Most seconds between two: the first look may take long, for it imports MLflow."""
_TURN: Final = 0.2
_ALIVE: Final = 15.0
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Report:
    """What the page shows, made anew when it is looked at and its feed may have something new.

    Args:
        feed: where the optimization is read from.
        interval: seconds between two looks.
        silent: seconds without anything new after which the page says so.
        clock: of seconds.
    """

    def __init__(
        self,
        feed: Feed,
        interval: float = _INTERVAL,
        silent: float = SILENT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._feed, self._interval, self._silent, self._clock = feed, interval, silent, clock
        self._lock = threading.Lock()
        self._due = self._changed = clock()
        self._seen: View | None = None
        self.html = ""
        self.version = ""

    def refresh(self) -> None:
        """Look at the feed, if it is time to."""
        with self._lock:
            started = self._clock()
            if self.html and started < self._due:
                return
            view = self._feed.read()
            if view != self._seen:
                self._seen, self._changed = view, started
            quiet = started - self._changed
            # In steps, so that the page is not made anew each second.
            html = page(view, self._feed.name, quiet // 60 * 60 or quiet if quiet >= self._silent else None)
            self.html, self.version = html, hashlib.sha256(html.encode()).hexdigest()[:16]
            ended = self._clock()
            self._due = ended + max(self._interval, min(4 * (ended - started), _LONGEST))


def application(
    report: Report, token: str, host: str = LOOPBACK[0], stopping: Callable[[], bool] = lambda: False
) -> Starlette:
    """The ASGI application.

    Args:
        report: what the page shows.
        token: the first part of every address; without it there is nothing.
        host: that it listens on. On this machine's own, a page of another site cannot ask it under a name of its own.
        stopping: whether the server ends; streams of events end then, too.
    """

    def behind_token(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            if host in LOOPBACK and request.url.hostname not in LOOPBACK:
                return Response(status_code=400)
            given = str(request.path_params["token"])
            if not hmac.compare_digest(given.encode(), token.encode()):
                return Response(status_code=404)
            return await answer(request)

        return checked

    async def whole(request: Request) -> Response:
        await run_in_threadpool(report.refresh)
        return Response(report.html, media_type="text/html", headers=_HEADERS)

    async def events(request: Request) -> Response:
        async def changes() -> AsyncIterator[str]:
            sent, alive = None, time.monotonic()
            while not stopping():
                await run_in_threadpool(report.refresh)
                if report.version != sent:
                    sent, alive = report.version, time.monotonic()
                    yield f"id: {sent}\ndata: {sent}\n\n"
                elif time.monotonic() - alive > _ALIVE:
                    alive = time.monotonic()
                    yield ": alive\n\n"
                await asyncio.sleep(_TURN)

        return StreamingResponse(changes(), media_type="text/event-stream", headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/{token}/", behind_token(whole)),
            Route("/{token}/report", behind_token(whole)),
            Route("/{token}/events", behind_token(events)),
        ]
    )


class LiveServer:
    """Serves the live page of a feed.

    Args:
        feed: where the optimization is read from.
        host: to listen on; by default this machine alone can reach it.
        port: to listen on; 0 takes a free one.
        options: of :class:`Report`.

    Attributes:
        url: of the page, with the token. Whoever has it sees the page.

    Raises:
        OSError: that port is taken.
    """

    def __init__(self, feed: Feed, host: str = LOOPBACK[0], port: int = 0, **options: Any) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen(128)
        except OSError:
            self._socket.close()
            raise
        token = secrets.token_urlsafe(24)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/{token}/"
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(Report(feed, **options), token, host, lambda: self._server.should_exit),
                log_config=None,
                access_log=False,  # addresses have the token
                lifespan="off",
                timeout_graceful_shutdown=1,
                server_header=False,
            )
        )
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until Ctrl-C."""
        self._server.run(sockets=[self._socket])

    def start(self) -> None:
        """Serve from a thread that does not keep the program from ending."""
        self._thread = threading.Thread(target=self.run, name="dspy-otel watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(5)
        self._socket.close()
