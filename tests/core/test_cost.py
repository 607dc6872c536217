"""How many calls of Python functions our code makes in a call of a program: a tripwire that no machine's speed moves.

Time cannot be asserted in a test, and a benchmark is run seldom. What is counted here is each function of ours that is
entered, and each function of others that is entered from ours; of DSPy and the SDK nothing else, so that their releases
do not move the numbers by much. Comprehensions are not counted, which Python has without a call from 3.12 on, nor are
functions written in C, of which each Python reports others. So the numbers are the same on every Python and machine;
`Predict` and SDK differ by a call or two between releases, which is within the limit.

A number here may be lowered by whoever makes less of it. Who raises one has measured what that costs (`make bench`).
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from types import FrameType, SimpleNamespace
from typing import Any

import dspy
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider

import dspy_otel
from dspy_otel.content import redaction
from tests.support.older import DSPY
from tests.support.spans import Recorder

OURS = os.path.dirname(dspy_otel.__file__) + os.sep
GROWTH = 1.05
MOST = {
    ("predict", "no_content"): 163,
    ("predict", "span_only"): 237,
    ("nested", "no_content"): 280,
    ("nested", "span_only"): 418,
}
if DSPY >= (3, 5):  # Instructions are a text of their own.
    MOST.update({("predict", "span_only"): 256, ("nested", "span_only"): 434})
MOST_DISABLED = {"predict": 30, "nested": 48}


class Instant(dspy.BaseLM):
    """An LM that answers at once."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        message = SimpleNamespace(content="[[ ## answer ## ]]\n42\n\n[[ ## completed ## ]]")
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        choice = SimpleNamespace(message=message, finish_reason="stop")
        return SimpleNamespace(id="x", model=self.model, choices=[choice], usage=usage)


class Around(dspy.Module):
    """A module that calls another one."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, question: str) -> Any:
        return self.inner(question=question)


PROGRAMS = {
    "predict": lambda: dspy.Predict("question -> answer"),
    "nested": lambda: Around(Around(Around(dspy.Predict("question -> answer")))),
}


def counted(call: Any) -> Counter[str]:
    """The functions that were entered, of our code or from it."""
    found: Counter[str] = Counter()

    def is_ours(frame: FrameType | None) -> bool:
        return frame is not None and frame.f_code.co_filename.startswith(OURS)

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_name
        if event != "call" or (name.startswith("<") and name != "<lambda>"):
            return
        if is_ours(frame) or is_ours(frame.f_back):
            found[f"{os.path.basename(frame.f_code.co_filename)}:{name}"] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def calls_of(program: str) -> Counter[str]:
    """What is counted in one call of a program that has been called before."""
    made = PROGRAMS[program]()
    with dspy.context(lm=Instant("instant/instant", cache=False), adapter=dspy.ChatAdapter(), disable_history=True):
        for _ in range(5):  # What is made once is made.
            made(question="what?")
        gc.collect()
        gc.disable()  # A finalizer is a call, too.
        try:
            return counted(lambda: made(question="what?"))
        finally:
            gc.enable()


def check(found: Counter[str], most: int) -> None:
    total = sum(found.values())
    assert total <= GROWTH * most, f"{total} calls, {total / most - 1:.0%} more than {most}: {found.most_common()}"


@pytest.mark.parametrize(("program", "content"), MOST)
def test_calls_that_a_program_adds(
    telemetry: Recorder, monkeypatch: pytest.MonkeyPatch, program: str, content: str
) -> None:
    monkeypatch.setattr(redaction, "refresh_environment", lambda: None)  # once a second
    telemetry.instrument(capture_content=content)
    found = calls_of(program)
    assert len(telemetry.spans) == 6 * (2 if program == "predict" else 5)
    check(found, MOST[program, content])


@pytest.mark.parametrize("program", MOST_DISABLED)
def test_calls_that_a_program_adds_where_the_sdk_is_disabled(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    dspy_otel.instrument(tracer_provider=TracerProvider(), meter_provider=MeterProvider())
    check(calls_of(program), MOST_DISABLED[program])
