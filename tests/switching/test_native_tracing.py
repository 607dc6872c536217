"""DSPy's own OpenTelemetry tracing, should it come: no call shows twice, and nothing of it is changed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

import dspy_otel
from tests.support.native import made, native_tracing
from tests.support.spans import Recorder


@pytest.fixture
def callback() -> Iterator[type[Any]]:
    with native_tracing() as kind:
        yield kind


class Agent(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reply = dspy.Predict("question -> answer")
        self.look = dspy.Tool(lambda place: place, name="look")

    def forward(self, question: str) -> Any:
        return self.reply(question=self.look(place=question))

    async def aforward(self, question: str) -> Any:
        return await self.reply.acall(question=await self.look.acall(place=question))


def run(callbacks: list[Any]) -> None:
    """A program, once in each way, and an evaluation of it."""
    rows = [dspy.Example(question="q", answer="blue").with_inputs("question")]
    with dspy.context(lm=DummyLM([{"answer": "blue"}] * 3), callbacks=callbacks):
        assert Agent()(question="?").answer == "blue"
        assert asyncio.run(Agent().acall(question="?")).answer == "blue"
        assert dspy.Evaluate(devset=rows, metric=lambda *_: 1.0, num_threads=1)(Agent()).score == 100.0
    for each in callbacks:
        assert each._open == {}


def scopes(telemetry: Recorder) -> dict[str, Counter[str]]:
    """The kinds of spans of each scope, counted."""
    counted: dict[str, Counter[str]] = {}
    for span in telemetry.spans:
        counted.setdefault(span.instrumentation_scope.name, Counter())[span.name.split()[0]] += 1
    return counted


OURS = {"invoke_workflow": 3, "Predict": 3, "chat": 3, "execute_tool": 3, "evaluate": 1, "example": 1}
THEIRS = {"module": 6, "lm": 3, "tool": 3, "evaluate": 1, "adapter_format": 3, "adapter_parse": 3}


def test_each_call_has_one_span(telemetry: Recorder, callback: type[Any], caplog: pytest.LogCaptureFixture) -> None:
    telemetry.instrument()
    run([callback(telemetry.tracer_provider)])
    assert scopes(telemetry) == {"dspy_otel": OURS, "dspy": {"adapter_format": 3, "adapter_parse": 3}}
    by_id = {span.context.span_id: span.name for span in telemetry.spans}
    for span in telemetry.spans:
        if span.instrumentation_scope.name == "dspy":
            assert by_id[span.parent.span_id] in ("Predict reply", "example Agent")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("dspy_otel")] == []


def test_adapters_have_one_span_too(telemetry: Recorder, callback: type[Any]) -> None:
    telemetry.instrument(adapter_spans=True)
    run([callback(telemetry.tracer_provider)])
    assert scopes(telemetry) == {"dspy_otel": {**OURS, "ChatAdapter.format": 3, "ChatAdapter.parse": 3}}


def test_alone_it_records_everything(telemetry: Recorder, callback: type[Any]) -> None:
    before = dict(vars(callback))
    telemetry.instrument()
    assert dict(vars(callback)) != before
    dspy_otel.uninstrument()
    assert dict(vars(callback)) == before
    run([callback(telemetry.tracer_provider)])
    assert scopes(telemetry) == {"dspy": THEIRS}


def test_what_goes_elsewhere_is_left_alone(telemetry: Recorder, callback: type[Any]) -> None:
    elsewhere = Recorder()
    telemetry.instrument()
    run([callback(elsewhere.tracer_provider), callback(telemetry.tracer_provider)])
    assert scopes(telemetry)["dspy_otel"] == OURS
    assert scopes(elsewhere) == {"dspy": THEIRS}
    elsewhere.shutdown()


def test_what_we_do_not_record_stays_with_it(telemetry: Recorder, callback: type[Any]) -> None:
    from opentelemetry.instrumentation.utils import suppress_instrumentation

    telemetry.instrument()
    with suppress_instrumentation():
        run([callback(telemetry.tracer_provider)])
    assert scopes(telemetry) == {"dspy": THEIRS}


def test_another_one_of_dspys_is_told(telemetry: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    """It may come under another name: then its spans show twice, and one warning says so."""
    dspy.configure(callbacks=[made("dspy.tracing")(telemetry.tracer_provider)])
    telemetry.instrument()
    run(dspy.settings.callbacks)
    run(dspy.settings.callbacks)
    said = [record.getMessage() for record in caplog.records if "is active too" in record.getMessage()]
    assert len(said) == 1
    assert "DSPy's own OpenTelemetry tracing is active too: modules, LM calls and tools will show twice" in said[0]
