"""The Runtime API of AWS Lambda inside the test process, for the client that Lambda's Python images run.

As Lambda does, it freezes the function's process when a result comes in: the process is stopped (``SIGSTOP``) before
the request of the result is answered, and goes on with the next event, or never again::

    with LambdaRuntime() as runtime, runtime.function("service.handler", cwd=tmp_path, env=variables) as function:
        assert function.invoke({"question": "where"}) == {"answer": "Paris"}
        # frozen: what has not left the process by now comes with the next event, if there is one

The API: https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.waiting import wait_for

_INVOCATION = "/2018-06-01/runtime/invocation/"
ARN = "arn:aws:lambda:eu-central-1:123456789012:function:answer"


class Function:
    """One sandbox: the process of a function, frozen between two events."""

    def __init__(self, runtime: LambdaRuntime, process: subprocess.Popen[bytes], log: Path) -> None:
        self._runtime = runtime
        self._process = process
        self._log = log

    def invoke(self, event: Any) -> Any:
        """Let the process go on with an event, and give its result; it is frozen then.

        Returns:
            What the handler returned, or Lambda's description of what it raised.
        """
        self._process.send_signal(signal.SIGCONT)
        self._runtime.events.put(event)

        def result() -> Any:
            assert self._process.poll() is None, self._log.read_text(errors="replace")[-4000:]
            return list(self._runtime.results)

        (body,) = wait_for(result, f"an answer of the function, see {self._log}")
        self._runtime.results.clear()
        return json.loads(body)

    def freeze(self) -> None:
        """Stop the process; done for each result before it is answered."""
        self._process.send_signal(signal.SIGSTOP)
        wait_for(lambda: "\nState:\tT" in Path(f"/proc/{self._process.pid}/status").read_text(), "the frozen process")


class LambdaRuntime:
    """Serves one function at a time on a free port of 127.0.0.1; use as a context manager."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.results: list[bytes] = []
        self._function: Function | None = None
        self._closed = threading.Event()

    def __enter__(self) -> LambdaRuntime:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        self._http.shutdown()
        self._http.server_close()

    @contextmanager
    def function(
        self, handler: str, cwd: Path, env: Mapping[str, str], before: Sequence[str] = ()
    ) -> Iterator[Function]:
        """Start a function; at the end its process is killed, as Lambda ends a sandbox without extensions.

        Args:
            handler: ``module.function``, in ``cwd``.
            cwd: its directory, and where its log goes.
            env: its environment variables.
            before: a command that starts the process, such as ``opentelemetry-instrument``.
        """
        variables = {
            "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{self._http.server_port}",
            "AWS_LAMBDA_FUNCTION_NAME": "answer",
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "512",
            "AWS_REGION": "eu-central-1",
            "LAMBDA_TASK_ROOT": str(cwd),
            "_HANDLER": handler,
        }
        log = cwd / "function.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*before, sys.executable, "-m", "awslambdaric", handler],
                cwd=cwd,
                env={**env, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            self._function = Function(self, process, log)
            try:
                yield self._function
            finally:
                process.kill()
                process.wait()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        runtime = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                while not runtime._closed.is_set():
                    try:
                        event = runtime.events.get(timeout=0.2)
                    except queue.Empty:
                        continue
                    self._answer(
                        200,
                        json.dumps(event).encode(),
                        {
                            "Lambda-Runtime-Aws-Request-Id": os.urandom(8).hex(),
                            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + 900) * 1000)),
                            "Lambda-Runtime-Invoked-Function-Arn": ARN,
                            "Lambda-Runtime-Trace-Id": "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Sampled=1",
                        },
                    )
                    return

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                assert re.fullmatch(_INVOCATION + r"\w+/(response|error)", self.path), self.path
                assert runtime._function is not None
                runtime._function.freeze()
                runtime.results.append(body)
                self._answer(202, b"", {})

            def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Type": "application/json"}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
