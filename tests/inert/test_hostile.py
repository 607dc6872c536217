"""Whatever values a program holds, telemetry touches none of them, and loses none of the spans."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
import threading
import tracemalloc
from collections import Counter
from types import SimpleNamespace as Bag
from typing import Any

import dspy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import context as otel_context

import dspy_otel
from dspy_otel.content import digest
from tests.inert import hostile
from tests.inert.hostile import JOURNAL, KINDS, HurtBadly

pytestmark = pytest.mark.injects_faults


class ResponseLM(dspy.BaseLM):
    """Answers with whatever it is told to put into its response."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(model="acme/hostile")
        self.parts = parts

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        parts = {"text": "[[ ## answer ## ]]\n7\n\n[[ ## completed ## ]]", **self.parts}
        message = Bag(content=parts["text"], tool_calls=parts.get("calls"), reasoning_content=None)
        usage = parts.get("usage", {"prompt_tokens": 3, "completion_tokens": 4})
        choice = Bag(message=message, finish_reason=parts.get("reason", "stop"), index=0)
        return Bag(id=parts.get("id", "one"), model=parts.get("model", "large"), choices=[choice], usage=usage)


class Holder(dspy.Module):
    """Does one thing with a value; holds another."""

    def __init__(self, held: Any, action: Any) -> None:
        super().__init__()
        self.held = held
        self.inside = {"held": [held]}
        self.predict = dspy.Predict("question -> answer")
        self._act = action

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._act(self, *args, **kwargs)


def raiser(value: Any) -> Any:
    if isinstance(value, Exception) and type(value) is not hostile.Raising:
        raise value
    raise LookupError(value, {"k": value}) from ValueError(value)


class OwnError(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__("own")
        self.status = self.request_id = self.lm_response = self.value = value


def own_error(value: Any) -> Any:
    raise OwnError(value)


def rows(value: Any) -> list[Any]:
    return [
        dspy.Example(question=value, answer=value, more=[value]).with_inputs("question"),
        dspy.Example(question="q").with_inputs("question"),
    ]


def evaluate(program: Any, devset: Any, metric: Any) -> Any:
    result = dspy.Evaluate(devset=devset, metric=metric, num_threads=1, max_errors=10, display_progress=False)(program)
    return [type(result.score).__name__, len(result.results)]


def fresh(action: Any = lambda self, **inputs: dspy.Prediction(answer="7"), held: Any = None) -> Any:
    return Holder(held, action)


def demo_program(value: Any) -> Any:
    program = dspy.Predict("question -> answer")
    program.demos = [dspy.Example(question=value, answer="a"), {"question": "q", "answer": value}]
    return program


class CallableMetric:
    def __init__(self, value: Any) -> None:
        self.__name__ = value

    def __call__(self, *_: Any, **__: Any) -> float:
        return 1.0


class Optimizer(dspy.teleprompt.Teleprompter):
    def __init__(self, setting: Any) -> None:
        self.setting = setting

    def compile(self, student: Any, *, trainset: Any, other: Any = None) -> Any:
        return student


# Each place of a value: what is done with it.
PLACES: dict[str, Any] = {
    "input": lambda value: fresh()(question=value),
    "positional input": lambda value: fresh(lambda self, *args: None)(value, value),
    "input of a predictor": lambda value: dspy.Predict("question -> answer")(question=value),
    "input of a coroutine": lambda value: asyncio.run(fresh().acall(question=value)),
    "signature and demos of a call": lambda value: dspy.Predict("question -> answer")(question="q", demos=value),
    "config of a call": lambda value: dspy.Predict("question -> answer")(
        question="q", config={"temperature": value, "stop": value, "n": value, "extra": value}
    ),
    "output": lambda value: fresh(lambda self: value)(),
    "output field": lambda value: fresh(lambda self: dspy.Prediction(answer=value, more=[value]))(),
    "held": lambda value: fresh(held=value)(question="q"),
    "demo": lambda value: demo_program(value)(question="q"),
    "tool argument": lambda value: dspy.Tool(lambda x: "r", name="t", args={"x": {}})(x=value),
    "tool result": lambda value: dspy.Tool(lambda: value, name="t")(),
    "tool error": lambda value: dspy.Tool(lambda: raiser(value), name="t")(),
    "error": lambda value: fresh(lambda self: raiser(value))(),
    "own error": lambda value: fresh(lambda self: own_error(value))(),
    "own error of an LM": lambda value: ErrorLM(value)("prompt"),
    "prompt": lambda value: dspy.settings.lm(value),
    "message": lambda value: dspy.settings.lm(messages=[{"role": "user", "content": value}]),
    "message part": lambda value: dspy.settings.lm(
        messages=[{"role": "user", "content": [{"type": "text", "text": value}, value]}]
    ),
    "message list": lambda value: dspy.settings.lm(messages=value),
    "tools of a call": lambda value: dspy.settings.lm("p", tools=value),
    "lm setting": lambda value: dspy.settings.lm(
        "p", temperature=value, headers={"X": value}, api_base=value, rollout_id=value
    ),
    "lm text": lambda value: ResponseLM(text=value)("p"),
    "lm text in a program": lambda value: with_lm(ResponseLM(text=value)),
    "lm usage": lambda value: ResponseLM(usage={"prompt_tokens": value, "completion_tokens": 2})("p"),
    "lm whole usage": lambda value: ResponseLM(usage=value)("p"),
    "lm names": lambda value: ResponseLM(id=value, model=value, reason=value)("p"),
    "lm tool calls": lambda value: ResponseLM(calls=[Bag(function=Bag(name=value, arguments=value), id=value)])("p"),
    "metric result": lambda value: evaluate(fresh(), rows("q"), lambda *_: value),
    "metric score": lambda value: evaluate(fresh(), rows("q"), lambda *_: dspy.Prediction(score=value, feedback=value)),
    "metric name": lambda value: evaluate(fresh(), rows("q"), CallableMetric(value)),
    "metric error": lambda value: evaluate(fresh(), rows("q"), lambda *_: raiser(value)),
    "dataset row": lambda value: evaluate(fresh(), rows(value), lambda *_: 1.0),
    "dataset": lambda value: evaluate(fresh(), hostile.LazyRows(*rows(value)), lambda *_: 1.0),
    "batch": lambda value: len(fresh().batch(rows(value), num_threads=1, disable_progress_bar=True)),
    "lazy batch": lambda value: len(
        fresh().batch(hostile.LazyRows(*rows(value)), num_threads=1, disable_progress_bar=True)
    ),
    "query": lambda value: retrieve(value, ["passage"]),
    "passage": lambda value: retrieve("q", [dspy.Example(long_text=value)]),
    "passages": lambda value: Passages(value)("q"),
    "embedded": lambda value: dspy.Embedder(lambda texts: [[1.0]] * len(texts), caching=False)(value),
    "embedding": lambda value: dspy.Embedder(lambda texts: value, caching=False)(["t"]),
    "optimizer setting": lambda value: type(
        Optimizer(value).compile(fresh(), trainset=rows("q"), other=value)
    ).__name__,
    "training rows": lambda value: type(
        dspy.LabeledFewShot(k=1).compile(dspy.Predict("question -> answer"), trainset=rows(value))
    ).__name__,
    "student": lambda value: type(Optimizer("s").compile(demo_program(value), trainset=rows("q"))).__name__,
}


class ErrorLM(ResponseLM):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any, **__: Any) -> Any:
        own_error(self.value)


class Passages(dspy.Retrieve):
    def __init__(self, value: Any) -> None:
        super().__init__(k=1)
        self._value = value

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._value


def retrieve(query: Any, passages: Any) -> Any:
    with dspy.context(rm=lambda query, k: passages):
        return dspy.Retrieve(k=1)(query)


def with_lm(lm: Any) -> Any:
    with dspy.context(lm=lm):
        return dspy.Predict("question -> answer")(question="q")


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet() -> Any:
    names = ("dspy", "opentelemetry")
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    yield
    for name in names:
        logging.getLogger(name).setLevel(logging.NOTSET)


def observe(place: str, kind: str) -> dict[str, Any]:
    """What a user sees of it: how it ends, each use of the value, and the random numbers."""
    value = KINDS[kind]()
    JOURNAL.clear()
    random.seed(5)
    surrounding = otel_context.get_current()
    with dspy.context(lm=ResponseLM(), disable_history=True, trace=None):
        try:
            made = PLACES[place](value)
            ended: Any = type(made).__name__
        except (Exception, HurtBadly) as error:
            ended = (type(error).__name__, type(error.__cause__).__name__, type(error.__context__).__name__)
    assert otel_context.get_current() is surrounding
    return {"ended": ended, "touched": list(JOURNAL), "random": random.getstate()}


# Where DSPy itself unrolls what is nested, or asks a mock for things without end.
ENDLESS = {
    *((place, "bomb") for place in ("input of a predictor", "demo", "prompt", "message", "message part")),
    *((place, "bomb") for place in ("message list", "lm usage", "metric error", "embedding", "student")),
    ("lm text in a program", "mock"),
}
PAIRS = [(place, kind) for place in PLACES for kind in KINDS if (place, kind) not in ENDLESS]


def is_allowed(place: str, kind: str, content: bool) -> bool:
    """Where user's code runs on purpose: a class of exceptions with a message of its own is asked for it."""
    return kind == "spy error" and place.endswith("error") and content


def assert_untouched(place: str, kind: str, content: str, telemetry: Any, warned: list[str]) -> None:
    bare = observe(place, kind)
    assert observe(place, kind) == bare, "DSPy itself is not the same twice"
    warned.clear()
    telemetry.clear()
    telemetry.instrument(capture_content=content, adapter_spans=True)
    try:
        if is_allowed(place, kind, content != "no_content"):
            if "badly" not in kind:
                watched = observe(place, kind)
                assert watched["ended"] == bare["ended"]
                assert len(warned) == len(set(warned)), warned
            return
        watched = observe(place, kind)
    finally:
        dspy_otel.uninstrument()
    names = [span.name for span in telemetry.spans]
    more = Counter(watched["touched"])
    more.subtract(Counter(bare["touched"]))
    assert not {use: count for use, count in more.items() if count}, "the value was touched"
    assert watched == bare
    assert not warned
    assert names, "nothing was recorded"


@pytest.fixture
def warned() -> Any:
    """What we warn of."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("dspy_otel"), Keep()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


CONTENTS = st.sampled_from(["no_content", "span_and_event"])
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(QUIET, max_examples=80)
@given(pair=st.sampled_from(PAIRS), content=CONTENTS)
def test_no_value_is_touched(telemetry: Any, warned: list[str], pair: tuple[str, str], content: str) -> None:
    assert_untouched(*pair, content, telemetry, warned)


@pytest.mark.slow
@pytest.mark.parametrize("place", sorted(PLACES))
def test_no_value_is_touched_anywhere(telemetry: Any, warned: list[str], place: str) -> None:
    for kind in (kind for where, kind in PAIRS if where == place):
        for content in ("no_content", "span_and_event"):
            try:
                assert_untouched(place, kind, content, telemetry, warned)
            except BaseException as error:
                raise AssertionError(f"{kind}, {content}: {error}") from error


# --- cost: counted, not timed -------------------------------------------------------------------------------------


def calls_of_ours(place: str, size: int) -> Counter[str]:
    """How often Python calls something in our code, while a value of this many parts is in this place."""
    value = [{"role": "user", "content": "a b", "text": "x"} for _ in range(size)]
    seen: Counter[str] = Counter()

    def count(frame: Any, event: str, _: Any) -> None:
        if "/src/dspy_otel/" in frame.f_code.co_filename:
            seen[frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name] += 1

    with dspy.context(lm=ResponseLM(), disable_history=True, trace=None):
        threading.setprofile(count)
        sys.setprofile(count)
        try:
            with contextlib.suppress(Exception):
                PLACES[place](value)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize("place", sorted(set(PLACES) - {"held", "student", "metric name"}))
def test_describing_is_bounded_by_the_limits(place: str, telemetry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parts a value has, as many are looked at."""
    monkeypatch.setattr(digest, "_MAX_NODES", 1000)
    telemetry.instrument(capture_content="span_and_event", content_limit=4096)
    calls_of_ours(place, 5)
    large, larger = calls_of_ours(place, 2000), calls_of_ours(place, 8000)
    larger.subtract(large)
    assert sum(larger.values()) < 1000, larger.most_common(5)


def test_digests_are_bounded_by_the_limits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_MAX_NODES", 10_000)
    text = "x" * 5_000_000
    tracemalloc.start()
    for value in (text, {text: 1}, [text] * 1000, text.encode(), hostile.bomb(), hostile.cycle(), hostile.data_cycle()):
        assert len(digest.digest({"field": value})) == 16
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60_000_000
    assert digest.digest([text]) != digest.digest([text + "x"])
