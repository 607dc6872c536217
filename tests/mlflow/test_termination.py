"""SIGTERM and SIGHUP are handled while something may be lost, and are as they were before, after and in children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspy_otel.mlflow import MLflowSpanExporter
from tests.mlflow.fake_server import fake_mlflow

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


@pytest.fixture(autouse=True)
def as_python_has_it() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


PROGRAM = """
    import os, signal
    from dspy_otel.mlflow import MLflowSpanExporter
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever the runner of these tests has set
    {before}
    exporters = [MLflowSpanExporter("http://127.0.0.1:9") for _ in range(2)]
    seen = [signal.getsignal(signal.SIGTERM)]
    child = os.fork()
    if child == 0:
        os._exit(signal.getsignal(signal.SIGTERM) is not {expected})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "in a child"
    exporters[0].shutdown()
    assert signal.getsignal(signal.SIGTERM) is seen[0], "one still needs it"
    exporters[1].shutdown()
    assert signal.getsignal(signal.SIGTERM) is {expected}, "afterwards"
    assert (seen[0] is {expected}) is {own}, "meanwhile"
"""


@pytest.mark.parametrize(
    ("before", "expected", "own"),
    [
        ("", "signal.SIG_DFL", False),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "signal.SIG_IGN", True),
        ("mine = lambda *_: None; signal.signal(signal.SIGTERM, mine)", "mine", True),
    ],
)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_handler_is_only_there_while_it_is_needed(before: str, expected: str, own: bool, name: str) -> None:
    text = textwrap.dedent(PROGRAM).format(before=before, expected=expected, own=own).replace("SIGTERM", name)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_handler_that_the_program_sets_later_stays() -> None:
    exporter = MLflowSpanExporter("http://127.0.0.1:9")

    def mine(*_: object) -> None:
        pass

    signal.signal(signal.SIGTERM, mine)
    exporter.shutdown()
    assert signal.getsignal(signal.SIGTERM) is mine


WORKERS = """
    import json, logging, multiprocessing, os, sys
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import util
    from opentelemetry.sdk.trace import TracerProvider
    from dspy_otel.mlflow import MLflowSpanExporter
    from dspy_otel.mlflow.exporter import track_runs
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # From Python 3.13 on, a spawned process runs atexit's functions, the provider's among them, before its finalizers.
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(MLflowSpanExporter({url!r})))
    track_runs(provider)

    def work(number):
        provider.get_tracer("dspy_otel").start_span("span").end()

    def late():
        util.Finalize(None, work, args=(0,), exitpriority=5)

    if __name__ == "__main__":
        context = multiprocessing.get_context({method!r})
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            list(pool.map(work, range(20)))
        one = context.Process(target=late)
        one.start()
        one.join()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_deliver_before_they_end(method: str, tmp_path: Path) -> None:
    with fake_mlflow() as server:
        program = tmp_path / "program.py"
        program.write_text(textwrap.dedent(WORKERS).format(url=server.url, method=method))
        done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(server.spans) == 21


def test_two_signals_end_a_program_once(tmp_path: Path) -> None:
    program = """
        import logging, os, signal, threading, time
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        from opentelemetry.sdk.trace import TracerProvider
        from dspy_otel.mlflow import MLflowSpanExporter
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor

        provider = TracerProvider()
        exporter = MLflowSpanExporter("http://127.0.0.1:9")
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        for _ in range(5):
            provider.get_tracer("dspy_otel").start_span("span").end()
        ends = [threading.Thread(target=exporter.processor.shutdown, args=(0.2,)) for _ in range(2)]
        for end in ends:
            end.start()
        for end in ends:
            end.join()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "OTEL_DSPY_SPOOL": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    accounts = [line for line in done.stderr.splitlines() if "written:" in line]
    assert len(accounts) == 1, done.stderr
    assert "5 spans" in accounts[0]
