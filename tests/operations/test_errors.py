"""Failures: on the innermost span once, whatever the program makes of them, and whatever becomes of the content."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import dspy
import pytest
from opentelemetry.trace import StatusCode

from tests.support.spans import Recorder


class Broken(dspy.BaseLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("the LM's")


class Swallows(dspy.Module):
    """Fails with an error of its own, after another that it has caught (and that is freed by then)."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        with contextlib.suppress(ValueError):
            self.answer(question=question)
        raise ValueError("the program's")


class Recursive(dspy.Module):
    def forward(self, depth: int, own: bool) -> Any:
        if depth:
            try:
                return self(depth=depth - 1, own=own)
            except ValueError:
                if not own:
                    raise
        raise ValueError(str(depth))


def events(telemetry: Recorder) -> list[list[str]]:
    return [[event.name for event in span.events] for span in telemetry.spans]


def test_an_error_of_its_own_after_one_that_it_swallowed(telemetry: Recorder) -> None:
    telemetry.instrument(capture_content="span_only")
    with dspy.context(lm=Broken("p/m")):
        for _ in range(10):
            with pytest.raises(ValueError, match="the program's"):
                Swallows()(question="x")
    for program in telemetry.named("invoke"):
        (event,) = program.events
        assert event.attributes["exception.message"] == "the program's"


def test_the_same_error_is_told_once_and_each_of_a_recursion_on_its_own(telemetry: Recorder) -> None:
    telemetry.instrument()
    for own in (False, True):
        telemetry.clear()
        with pytest.raises(ValueError, match="4" if own else "0"):
            Recursive()(depth=4, own=own)
        told = [["exception"] if own or depth == 0 else [] for depth in (4, 3, 2, 1, 0)]
        assert events(telemetry) == told


@pytest.mark.injects_faults
def test_redaction_that_raises_takes_nothing_but_content(telemetry: Recorder) -> None:
    def redact(_: str) -> str:
        raise RuntimeError("no")

    telemetry.instrument(capture_content="span_and_event", redact=redact)
    with pytest.raises(ValueError, match="the LM's"):
        Broken("p/m")("Hi")
    span = telemetry.only("chat")
    assert span.status.status_code is StatusCode.ERROR
    (event,) = span.events
    assert dict(event.attributes) == {"exception.type": "ValueError"}
    (details,) = telemetry.events
    assert details.attributes["gen_ai.request.model"] == "m"
    assert "gen_ai.input.messages" not in details.attributes


@pytest.mark.skipif("engine" not in inspect.signature(dspy.LM).parameters, reason="before DSPy 3.4 there is one engine")
@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_a_connection_that_is_refused_has_no_http_status(telemetry, engine):
    telemetry.instrument()
    lm = dspy.LM("openai/x", api_base="http://127.0.0.1:9/v1", api_key="k", cache=False, num_retries=0, engine=engine)
    with pytest.raises(Exception, match=r"(?i)connect"):
        lm("hi")
    span = telemetry.only("chat")
    assert span.status.status_code.name == "ERROR"
    assert "http.response.status_code" not in span.attributes
