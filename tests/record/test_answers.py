"""What is a program's call, whichever program it is and whichever way it is called."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

from dspy_otel.mlflow.backends import base
from dspy_otel.record.answers import is_answer, read_answers

CALLED = {"next_thought": "t", "next_tool_name": "asks", "next_tool_args": '{"question": "why"}'}
ENDS = {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": "{}"}
ANSWERS = {"reasoning": "r", "answer": "so"}


class App(dspy.Module):
    """A program of one predictor."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        return self.ask(question=question)

    async def aforward(self, question: str) -> Any:
        return await self.ask.acall(question=question)


class Maker(App):
    """Calls another program and an agent that it makes on its way."""

    def forward(self, question: str) -> Any:
        App()(question=question)
        agent()(question=question)
        return super().forward(question)


class Plain(dspy.Module):
    """A program without predictors, so without an id."""

    def forward(self, question: str) -> Any:
        return dspy.Prediction(answer=dspy.settings.lm(question)[0])


class Unreachable(DummyLM):
    """An LM that never answers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("unreachable")

    __call__ = forward


def agent(*tools: Callable[..., Any]) -> dspy.ReAct:
    return dspy.ReAct("question -> answer", tools=list(tools), max_iters=2)


def asks(question: str) -> str:
    """Asks a program, and an agent that no LM answers."""
    App()(question=question)
    with contextlib.suppress(Exception), dspy.context(lm=Unreachable([])):
        agent()(question=question)
    return "asked"


def rows(count: int) -> list[dspy.Example]:
    return [dspy.Example(question=f"q{place}").with_inputs("question") for place in range(count)]


def fails() -> None:
    with contextlib.suppress(ConnectionError), dspy.context(lm=Unreachable([])):
        agent()(question="why")


def in_parallel() -> None:
    programs = (App(), Plain(), App())
    dspy.Parallel(num_threads=1, disable_progress_bar=True)(list(zip(programs, rows(3), strict=True)))


def judged(example: Any, prediction: Any, trace: Any = None) -> float:
    App()(question=prediction.answer)
    return 1.0


def evaluated() -> None:
    dspy.Evaluate(devset=rows(2), metric=judged, num_threads=1, display_progress=False)(App())


KINDS: dict[str, tuple[Callable[[], Any], list[dict[str, str]], dict[str, int]]] = {
    "a predictor": (lambda: dspy.Predict("question -> answer")(question="why"), [ANSWERS], {"Predict": 1}),
    "a program": (lambda: App()(question="why"), [ANSWERS], {"App": 1}),
    "awaited": (lambda: asyncio.run(App().acall(question="why")), [ANSWERS], {"App": 1}),
    "an agent": (lambda: agent()(question="why"), [ENDS, ANSWERS], {"ReAct": 1}),
    "an agent that no LM has answered": (fails, [], {"ReAct": 1}),
    "modules made in a call": (lambda: Maker()(question="why"), [ANSWERS, ENDS, ANSWERS, ANSWERS], {"Maker": 1}),
    "programs in a tool": (lambda: agent(asks)(question="why"), [CALLED, ANSWERS, ENDS, ANSWERS], {"ReAct": 1}),
    "no predictors": (lambda: Plain()(question="why"), [ANSWERS], {"Plain": 1}),
    "in parallel": (in_parallel, [ANSWERS] * 3, {"App": 2, "Plain": 1}),
    "a batch": (lambda: App().batch(rows(3), disable_progress_bar=True), [ANSWERS] * 3, {"App": 3}),
    "an LM alone": (lambda: dspy.settings.lm("why"), [ANSWERS], {}),
    "a program in a metric": (evaluated, [ANSWERS] * 4, {}),
}


@pytest.fixture(params=["outermost", "below a request"])
def place(request: Any, telemetry: Any) -> Iterator[None]:
    telemetry.instrument(capture_content="span_only")
    request_ = telemetry.tracer.start_as_current_span("GET /")
    with contextlib.nullcontext() if request.param == "outermost" else request_:
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_each_call_of_a_program_is_an_answer_once(telemetry: Any, place: None, kind: str) -> None:
    run, scripted, expected = KINDS[kind]
    with dspy.context(lm=DummyLM(list(scripted))):
        run()
    spans = telemetry.exporter.get_finished_spans()
    found = [answer for answer in read_answers(spans) if answer.evaluation is None]
    assert Counter(answer.program_name for answer in found) == expected
    assert {answer.error for answer in found} <= {"ConnectionError" if run is fails else None}
    # MLflow's readers look at names of attributes before they read a span, and know its scope by them.
    for span in filter(is_answer, spans):
        names = (span.attributes or {}).keys()
        assert base.is_of_program(names, ())
        assert base.scope_of(names) == span.instrumentation_scope.name
