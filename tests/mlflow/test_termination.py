"""SIGTERM is handled while something may be lost, and is as it was before and after that, and in children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dspy_otel.mlflow import MLflowSpanExporter

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


@pytest.fixture(autouse=True)
def as_python_has_it() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


PROGRAM = """
    import os, signal
    from dspy_otel.mlflow import MLflowSpanExporter
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
def test_a_handler_is_only_there_while_it_is_needed(before: str, expected: str, own: bool) -> None:
    import textwrap

    text = textwrap.dedent(PROGRAM).format(before=before, expected=expected, own=own)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_handler_that_the_program_sets_later_stays() -> None:
    exporter = MLflowSpanExporter("http://127.0.0.1:9")

    def mine(*_: object) -> None:
        pass

    signal.signal(signal.SIGTERM, mine)
    exporter.shutdown()
    assert signal.getsignal(signal.SIGTERM) is mine
