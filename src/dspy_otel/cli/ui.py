"""``dspy-otel ui``: MLflow's pages of the store that traces go to."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
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
    command.add_argument("--port", type=int, default=5000, help="where it listens, on this machine only (5000)")


def run(options: argparse.Namespace) -> int:
    """Run it; the exit status is MLflow's, 1 when there is nothing to open, 2 when MLflow is missing."""
    from dspy_otel.mlflow.retry import ExportError
    from dspy_otel.mlflow.target import Target, public_uri, sqlite_path

    target = Target(options.tracking_uri, directory=os.getcwd())
    try:
        uri = target.uri
    except ExportError as error:
        print(f"dspy-otel: {error}", file=sys.stderr)
        return 1
    if target.is_server:
        print(public_uri(uri))
        return 0
    path = sqlite_path(uri)
    if path is not None and not os.path.exists(path):
        print(
            f"dspy-otel: there is no {path} yet: run your program first, or name another store with --tracking-uri or "
            "MLFLOW_TRACKING_URI",
            file=sys.stderr,
        )
        return 1
    if find_spec("mlflow") is None:
        print("dspy-otel: ui needs mlflow: pip install 'dspy-otel[mlflow]'", file=sys.stderr)
        return 2
    print(f"{public_uri(uri)}: http://127.0.0.1:{options.port} (Ctrl-C ends it)", flush=True)
    # A password in the address would be readable for everybody as an argument of the command.
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    environment.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its start may wait for a download
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(options.port)]
    try:
        return subprocess.call([*command, "--workers", "1"], env=environment)
    except KeyboardInterrupt:
        return 0
