"""``dspy-otel ui``: MLflow's pages of the store that traces go to."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from importlib.util import find_spec
from typing import Any


def add_command(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    command = commands.add_parser(
        "ui",
        help="open MLflow on the store of the environment",
        description="Starts MLflow's pages for the store that MLFLOW_TRACKING_URI names (by default mlflow.db in this "
        "directory), until Ctrl-C. Of a server, which has them already, it prints the address.",
    )
    command.add_argument("--tracking-uri", metavar="URI", help="another MLflow (default: MLFLOW_TRACKING_URI)")
    command.add_argument("--port", type=port_number, default=5000, help="where it listens, on this machine only (5000)")


def run(options: argparse.Namespace) -> int:
    """Run it; the exit status is MLflow's, 1 when there is nothing to open, 2 when MLflow is missing."""
    return open_ui(options.tracking_uri, options.port, browser=False)


def open_ui(tracking_uri: str | None, port: int = 5000, *, browser: bool = True) -> int:
    """Start MLflow's pages for a store, until Ctrl-C; a server has them already.

    Args:
        tracking_uri: of the store; None for the environment's.
        port: where it listens.
        browser: open them in the browser, too.

    Returns:
        The exit status.
    """
    from dspy_otel.mlflow.retry import ExportError
    from dspy_otel.mlflow.target import Target, public_uri, sqlite_path

    target = Target(tracking_uri, directory=os.getcwd())
    try:
        uri = target.uri
    except ExportError as error:
        print(f"dspy-otel: {error}", file=sys.stderr)
        return 1
    if target.is_server:
        print(public_uri(uri))
        if browser:
            webbrowser.open(public_uri(uri))
        return 0
    path = sqlite_path(uri)
    if path is not None and not os.path.isfile(path):
        print(
            f"dspy-otel: there is no {path} yet: run your program first, or name another store with --tracking-uri or "
            "MLFLOW_TRACKING_URI",
            file=sys.stderr,
        )
        return 1
    if find_spec("mlflow") is None:
        print("dspy-otel: ui needs mlflow: pip install 'dspy-otel[mlflow]'", file=sys.stderr)
        return 2
    if not _free(port):
        print(f"dspy-otel: port {port} is in use here: choose another one with --port", file=sys.stderr)
        return 1
    address = f"http://127.0.0.1:{port}"
    print(f"{public_uri(uri)}: {address} (Ctrl-C ends it)", flush=True)
    if browser:
        threading.Thread(target=_open_when_there, args=(address, port), daemon=True).start()
    # A password in the address would be readable for everybody as an argument of the command.
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    environment.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its start may wait for a download
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    try:
        return subprocess.call([*command, "--workers", "1"], env=environment)
    except KeyboardInterrupt:
        return 0


def port_number(text: str) -> int:
    """A port, for argparse."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"use a number from 1 to 65535, not {text}")
    return int(text)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _open_when_there(address: str, port: int) -> None:
    for _ in range(240):
        if not _free(port):
            webbrowser.open(address)
            return
        time.sleep(0.5)
