"""``dspy_otel.watch()``: the live page of the optimizations of this process."""

from __future__ import annotations

import sys
import webbrowser
from typing import TYPE_CHECKING, Final

from opentelemetry import trace

if TYPE_CHECKING:
    from dspy_otel.live.feeds import SpanFeed
    from dspy_otel.live.server import LiveServer

INSTALL: Final = "pip install 'dspy-otel[watch]'"


class Watch:
    """A live page that is open.

    Attributes:
        url: its address, with the token. Whoever has it sees the page.
    """

    def __init__(self, server: LiveServer, feed: SpanFeed) -> None:
        self._server, self._feed = server, feed
        self.url = server.url

    def close(self) -> None:
        """Stop serving the page, and following the program."""
        self._server.close()
        self._feed.shutdown()

    def __repr__(self) -> str:
        return f"Watch({self.url!r})"

    def _repr_html_(self) -> str:
        return f'<a href="{self.url}" target="_blank" rel="noreferrer">{self.url}</a>'


def watch(*, host: str = "127.0.0.1", port: int = 0, open: bool = False) -> Watch:
    """Show the optimizations of this process in the browser while they run, from now on.

    The page is served by a thread of this process, and is gone when that ends. It has what is recorded: without
    content capture, scores, lineage and usage, and no texts. Call it after :func:`~dspy_otel.configure`; without, it
    sets up a tracer provider that sends nothing anywhere, and switches instrumentation on.

    Args:
        host: to listen on; by default this machine alone can reach the page.
        port: to listen on; 0 takes a free one.
        open: open the page in a browser.

    Returns:
        The page; its address is printed to stderr.

    Raises:
        RuntimeError: something is not installed; the message says what.
        OSError: that port is taken.
    """
    try:
        from opentelemetry.sdk.trace import TracerProvider

        from dspy_otel.live.feeds import SpanFeed
        from dspy_otel.live.server import LiveServer
    except ImportError as error:
        raise RuntimeError(f"dspy_otel.watch() needs {error.name}: {INSTALL}") from error
    from dspy_otel.instrumentor import DSPyInstrumentor

    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    if not isinstance(provider, TracerProvider):
        raise RuntimeError("dspy_otel.watch() needs a tracer provider of the OpenTelemetry SDK")
    feed = SpanFeed()
    server = LiveServer(feed, host, port)
    provider.add_span_processor(feed)
    instrumentor = DSPyInstrumentor()
    if not instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.instrument()
    server.start()
    print(f"dspy-otel: live page at {server.url}", file=sys.stderr)
    if open:
        webbrowser.open(server.url)
    return Watch(server, feed)
