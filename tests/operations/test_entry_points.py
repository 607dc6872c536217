"""Entry points of every make: plain, coroutine functions, and plain ones that return a coroutine."""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
import traceback
import warnings
import weakref
from typing import Any

import dspy
import pytest
from opentelemetry import baggage
from opentelemetry import context as otel_context

import dspy_otel
from tests.operations.common import NATIVE, dummy
from tests.support.spans import Recorder

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:dspy")


class AsyncForward(dspy.Module):
    """Called as `await program(...)`, which DSPy's plain `__call__` lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    async def forward(self, question: str) -> Any:
        if question == "bad":
            raise ValueError("bad")
        if question == "slow":
            await asyncio.sleep(60)
        return await self.answer.acall(question=question)


class AsyncCall(AsyncForward):
    async def __call__(self, question: str) -> Any:
        return await self.answer.acall(question=question)


class PlainAcall(dspy.Module):
    def acall(self, text: str) -> str:
        return text


ANSWER = {"answer": "a"}
SHAPE = "invoke_workflow {} [INTERNAL]\n  Predict answer [INTERNAL]\n    chat dummy [CLIENT]"


@pytest.mark.parametrize("program", [AsyncForward, AsyncCall])
async def test_a_program_that_is_awaited_holds_what_it_does(telemetry: Recorder, program: type[AsyncForward]) -> None:
    telemetry.instrument()
    before = otel_context.get_current()
    with dspy.context(lm=dummy(ANSWER)):
        coroutine: Any = program()(question="x")
        assert inspect.iscoroutine(coroutine)
        assert coroutine.__name__ == ("__call__" if program is AsyncCall else "forward")
        assert otel_context.get_current() is before
        assert (await coroutine).answer == "a"
    assert otel_context.get_current() is before
    assert telemetry.tree(attributes=False).strip() == SHAPE.format(program.__name__)


async def test_several_at_once_and_in_the_context_of_who_awaits(telemetry: Recorder) -> None:
    telemetry.instrument()
    seen = []

    class Looks(dspy.Module):
        async def forward(self) -> None:
            seen.append(baggage.get_baggage("from"))
            await asyncio.sleep(0)

    async def await_(coroutine: Any, name: str) -> None:
        otel_context.attach(baggage.set_baggage("from", name))
        await coroutine

    await asyncio.gather(await_(Looks()(), "one"), await_(Looks()(), "two"))
    assert seen == ["one", "two"]
    assert [span.parent for span in telemetry.named("invoke")] == [None, None]


async def test_errors_and_cancellation_of_an_awaited_program(telemetry: Recorder) -> None:
    telemetry.instrument()
    with pytest.raises(ValueError, match="bad") as caught:
        await AsyncForward()(question="bad")
    if sys.version_info >= (3, 11):  # Python 3.10 keeps the frame that hides the others: see `hide_frames`.
        assert not any("dspy_otel/core" in frame.filename for frame in traceback.extract_tb(caught.tb)[1:])
    task = asyncio.create_task(AsyncForward()(question="slow"))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [span.status.status_code.name for span in telemetry.named("invoke")] == ["ERROR", "ERROR"]


@pytest.mark.parametrize("closed", [False, True])
def test_a_coroutine_that_nobody_awaits(telemetry: Recorder, closed: bool) -> None:
    telemetry.instrument()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coroutine: Any = AsyncForward()(question="never")
        if closed:
            coroutine.close()
        del coroutine
        gc.collect()
    said = [str(warning.message) for warning in caught]
    caught.clear()  # It holds the coroutine.
    gc.collect()
    assert said == ([] if closed else ["coroutine 'AsyncForward.forward' was never awaited"])
    assert len(telemetry.named("invoke")) == 1


def test_a_plain_acall_stays_plain(telemetry: Recorder) -> None:
    telemetry.instrument()
    assert PlainAcall().acall("x") == "x"
    assert len(telemetry.named("invoke")) == 1


def test_classes_made_at_run_time_are_freed_while_instrumented(telemetry: Recorder) -> None:
    telemetry.instrument()

    def make() -> weakref.ref[type]:
        class Made(dspy.Module):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return super().__call__(*args, **kwargs)

            def forward(self) -> int:
                return 1

        assert Made()() == 1
        return weakref.ref(Made)

    freed = [make() for _ in range(3)]
    telemetry.clear()
    gc.collect()
    assert [reference() for reference in freed] == [None, None, None]
    kept = type("Kept", (dspy.Module,), {"__call__": lambda self: 2})
    ours = vars(kept)["__call__"]
    dspy_otel.uninstrument()
    assert vars(kept)["__call__"] is ours.__wrapped__


@pytest.mark.skipif(not NATIVE, reason="DSPy 3.3 has no module `execution`")
def test_internals_look_like_themselves(telemetry: Recorder) -> None:
    from dspy.clients import execution

    names = ("finalize", "_engine", "_delay")
    before = [(inspect.signature(getattr(execution, name)), getattr(execution, name).__doc__) for name in names]
    telemetry.instrument()
    assert [(inspect.signature(getattr(execution, name)), getattr(execution, name).__doc__) for name in names] == before
    assert execution.finalize.__module__ == "dspy.clients.execution"
