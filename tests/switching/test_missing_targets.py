"""DSPy without one of the places we patch, as another version may be: one warning at most, and nothing else changes."""

from __future__ import annotations

import sys
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

import dspy_otel
from dspy_otel.instrumentor import apply, programs_of
from dspy_otel.optimizers import Optimizers
from dspy_otel.patching import Patches
from tests.support.spans import Recorder


class Program(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reply = dspy.Predict("question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        return self.reply(question=question)


def same(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    return float(example.answer == prediction.answer)


class Recording(Patches):
    """Patches that also say what they were asked to replace."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[tuple[Any, str]] = []
        self.loses: dict[tuple[Any, str], str] = {}

    def wrap(self, owner: Any, name: str, make: Any, *, loses: str = "") -> bool:
        done = super().wrap(owner, name, make, loses=loses)
        if done:
            self.places.append((owner, name))
            if loses:
                self.loses[owner, name] = loses
        return done


def replaced() -> Recording:
    """All that apply() replaces in this DSPy, once each."""
    instrumentor = dspy_otel.DSPyInstrumentor()
    instrumentor.instrument(adapter_spans=True)
    telemetry = instrumentor._telemetry
    instrumentor.uninstrument()
    recording = Recording()
    try:
        apply(telemetry, recording, Optimizers(telemetry, programs_of(telemetry)))
    finally:
        recording.restore()
    return recording


RECORDED = replaced()
PLACES = RECORDED.places
WHAT_EACH_LOSES = RECORDED.loses
CLASSES = list(dict.fromkeys(owner for owner, _ in PLACES if isinstance(owner, type)))
# Where telemetry loses something, in each DSPy version that has the place, it must say so.
SAID = {
    *("Module", "BaseLM", "Tool", "Adapter", "Embedder", "Retrieve", "Embeddings", "KNN", "ColBERTv2", "Evaluate"),
    *("PythonInterpreter", "Teleprompter", "ParallelExecutor"),
    *("finalize", "_engine", "_delay", "stream_emitted", "_process_lm_response", "execute", "_call_postprocess"),
}


def label(value: Any) -> str:
    return value if isinstance(value, str) else value.__name__


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``hidden(owner, name)``: for us, and only for us, there is no such attribute."""
    gone: set[tuple[int, str]] = set()

    def lookup(owner: Any, name: str, *default: Any) -> Any:
        if (id(owner), name) in gone:
            if default:
                return default[0]
            raise AttributeError(name)
        return getattr(owner, name, *default)

    monkeypatch.setattr(dspy_otel.patching, "getattr", lookup, raising=False)
    return lambda owner, name: gone.add((id(owner), name))


def runs(telemetry: Recorder) -> None:
    """A program, an evaluation and a compile give what they give without us."""
    with dspy.context(lm=DummyLM([{"answer": "blue"}] * 20)):
        assert Program()(question="?").answer == "blue"
        devset = [dspy.Example(question=f"q{i}", answer="blue").with_inputs("question") for i in range(2)]
        evaluate = dspy.Evaluate(devset=devset, metric=same, num_threads=2)
        assert evaluate(Program()).score == 100.0
        compiled = dspy.LabeledFewShot(k=1).compile(Program(), trainset=devset)
        assert len(compiled.reply.demos) == 1


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("dspy_otel")]


def test_nothing_is_missing_here(telemetry: Recorder, caplog: pytest.LogCaptureFixture):
    telemetry.instrument(adapter_spans=True)
    runs(telemetry)
    assert said(caplog) == []
    assert {*(owner.__name__ for owner in CLASSES), *(name for _, name in PLACES)} >= {"Module", "__call__", "execute"}


@pytest.mark.parametrize("owner", CLASSES, ids=label)
def test_a_class_is_missing(telemetry: Recorder, hidden: Any, caplog: pytest.LogCaptureFixture, owner: type):
    hidden(sys.modules[owner.__module__], owner.__name__)
    telemetry.instrument(adapter_spans=True)
    runs(telemetry)
    warnings = said(caplog)
    assert all("telemetry lacks " in warning for warning in warnings)
    assert len(warnings) == len(set(warnings))
    if owner.__name__ in SAID:
        assert f"no {owner.__name__};" in warnings[0] or owner.__name__ == "ParallelExecutor"
    assert telemetry.spans


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=label)
def test_a_function_is_missing(
    telemetry: Recorder, hidden: Any, caplog: pytest.LogCaptureFixture, owner: Any, name: str
):
    hidden(owner, name)
    telemetry.instrument(adapter_spans=True)
    runs(telemetry)
    warnings = said(caplog)
    assert len(warnings) <= 1
    assert all(name in warning and "telemetry lacks " in warning for warning in warnings)
    entry_point = owner.__name__ in SAID and name in ("__call__", "acall", "execute", "compile")
    if entry_point or name in SAID - {"execute"}:
        assert len(warnings) == 1
    assert telemetry.spans


@pytest.mark.injects_faults
def test_a_part_that_fails_costs_itself_only(
    telemetry: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: Any) -> None:
        raise RuntimeError("of ours")

    monkeypatch.setattr(dspy_otel.instrumentor, "apply", broken)
    telemetry.instrument()
    runs(telemetry)
    assert len(said(caplog)) == 1
    dspy_otel.uninstrument()
    runs(telemetry)
