"""`dspy-otel watch`: the report of an optimization in the browser while it runs."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_otel.cli.ui import port_number
from dspy_otel.cli.working import quiet

if TYPE_CHECKING:
    from dspy_otel.live.feeds import Feed


def add_command(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    command = commands.add_parser(
        "watch",
        help="show an optimization in the browser while it runs",
        description="Opens the report of an optimization in the browser and keeps it up to date while that runs, until "
        "Ctrl-C: the newest of MLflow's experiment, or that of a run; with --spans, from a file of OTLP JSON that "
        "grows. Only this machine can reach the page, and only with the token in its address.",
    )
    command.add_argument(
        "run", nargs="?", metavar="RUN_ID", help="MLflow's run of the optimization, or its id in the file"
    )
    command.add_argument("--experiment", metavar="NAME", help="name or id (default: MLFLOW_EXPERIMENT_NAME or _ID)")
    command.add_argument("--spans", metavar="FILE", type=Path, help="a file of spans in place of MLflow")
    command.add_argument("--tracking-uri", metavar="URI", help="MLflow to read from (default: MLFLOW_TRACKING_URI)")
    command.add_argument("--host", default="127.0.0.1", help="to listen on (default: this machine only)")
    command.add_argument("--port", type=port_number, default=0, help="to listen on (default: a free one)")
    command.add_argument(
        "--open",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="open the browser (default: yes on a terminal)",
    )


def run(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C. Returns the exit status: 1 when it cannot listen, 2 when something is missing."""
    try:
        from dspy_otel.live.feeds import FileFeed, MLflowFeed
        from dspy_otel.live.server import LOOPBACK, LiveServer
    except ImportError as error:
        print(f"dspy-otel: watch needs {error.name}: pip install 'dspy-otel[watch]'", file=sys.stderr)
        return 2
    if options.spans is not None and options.spans.is_dir():
        print(f"dspy-otel: {options.spans} is a directory: name a file of OTLP JSON", file=sys.stderr)
        return 2
    if options.spans is not None and not options.spans.exists():
        print(f"waiting for {options.spans}, which is not there yet", file=sys.stderr)
    feed: Feed
    if options.spans is not None:
        feed = FileFeed(options.spans, options.run)
    else:
        feed = MLflowFeed(options.run, options.experiment, options.tracking_uri)
    try:
        server = LiveServer(feed, options.host, options.port)
    except OSError as error:
        print(f"dspy-otel: cannot listen on {options.host}:{options.port}: {error.strerror}", file=sys.stderr)
        return 1
    if options.host not in LOOPBACK:
        print("dspy-otel: other machines can reach this page: whoever has its address sees it", file=sys.stderr)
    print(f"{server.url} (Ctrl-C ends it)", flush=True)
    if options.open or (options.open is None and sys.stdout.isatty()):
        webbrowser.open(server.url)
    try:
        with quiet():
            server.run()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
    return 0
