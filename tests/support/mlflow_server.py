"""A real MLflow server for tests: its own process group on a free loopback port, with a sqlite store of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import STALLED, wait_for


def free_port() -> int:
    """A loopback port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(
    directory: Path,
    *,
    environment: Mapping[str, str] | None = None,
    arguments: tuple[str, ...] = (),
    port: int | None = None,
) -> Iterator[str]:
    """Run ``mlflow server`` on ``directory/mlflow.db``, wait until it answers, yield its URL, stop all of it.

    Args:
        directory: an empty directory; the server's log is ``server.log`` in it.
        environment: variables beside those of this process.
        arguments: further arguments of ``mlflow server``.
        port: a port to listen on; default, a free one.
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{directory / 'mlflow.db'}"),
        *("--artifacts-destination", str(directory / "artifacts"), *arguments),
    ]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "MLFLOW_"))}
    # Without the first, a server in a venv with LiteLLM and no network hangs at start.
    defaults = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # half of its memory, and always busy
    }
    log_path = directory / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**inherited, **defaults, **(environment or {})},
            start_new_session=True,  # its workers die with it: the whole group is stopped below
        )
        try:
            _wait_until_ready(url, process, log_path)
            yield url
        finally:
            _stop(process)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    def ready() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"mlflow server did not start:\n{log_path.read_text(errors='replace')[-4000:]}")
        with urllib.request.urlopen(url + "/health", timeout=STALLED) as answer:
            return bool(answer.status == 200)

    wait_for(ready, f"mlflow server, see {log_path}", lambda: log_path.stat().st_size, ignored=(OSError,), pause=0.3)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
        if signal_number is signal.SIGTERM:
            time.sleep(0.5)  # the leader is gone; give its workers a moment before the group is killed
