"""Helper threads: as many calls at once as are asked for, also when there are more threads."""

from __future__ import annotations

import threading

from dspy_otel.mlflow.threads import Helpers


def test_no_more_calls_at_once_than_asked_for() -> None:
    helpers = Helpers()
    lock, together = threading.Lock(), threading.Barrier(2)
    running = most = 0

    def call(item: int) -> bool:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if item < 2:
            together.wait()  # two of them are in it at once
        with lock:
            running -= 1
        return item % 2 == 0

    try:
        assert helpers.run(lambda _: True, range(40), 8) == [True] * 40
        assert helpers.run(call, range(40), 2) == [item % 2 == 0 for item in range(40)]
        assert most == 2
    finally:
        helpers.close()
