"""The worker rests while the program computes, and only then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dspy_otel.mlflow import threads
from dspy_otel.mlflow.threads import Throttle


class Machine:
    """A clock, and a program that uses a share of a core while the worker rests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, program: float) -> None:
        self.now = self.worker = self.process = 0.0
        self._program = program
        clocks = {
            "monotonic": lambda: self.now,
            "thread_time": lambda: self.worker,
            "process_time": lambda: self.process,
            "sleep": self._rest,
        }
        monkeypatch.setattr(threads, "time", SimpleNamespace(**clocks))

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.worker += seconds
        self.process += seconds

    def _rest(self, seconds: float) -> None:
        self.now += seconds
        self.process += seconds * self._program


def rested(monkeypatch: pytest.MonkeyPatch, program: float, *, urgent: bool = False, row: int = 1) -> float:
    """Seconds of rest for a row of pieces of work of a second each."""
    machine = Machine(monkeypatch, program)
    throttle = Throttle()
    for caller in "abc" if urgent else "":
        throttle.hurry(caller)
    throttle.relax("a")
    for _ in range(row):
        with throttle.work():
            machine.work(1.0)
    return machine.now - row


def test_it_rests_in_proportion_while_the_program_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rested(monkeypatch, program=1.0) == pytest.approx(Throttle.SHARE)


def test_a_program_that_waits_for_its_models_costs_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rested(monkeypatch, program=0.01) <= 0.1


def test_nobody_who_waits_for_the_work_waits_for_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rested(monkeypatch, program=1.0, urgent=True) == 0


def test_a_row_of_work_has_rests_for_some_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rested(monkeypatch, program=1.0, row=100) <= Throttle.MOST_SECONDS
