"""GEPA in a program without DSPy. Here DSPy is there, and is said not to be."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest

from dspy_otel import DSPyInstrumentor, gepa_alone, packages
from tests.support.older import DSPY
from tests.switching.process import python


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    there = {"gepa"}
    monkeypatch.setattr(packages, "_installed", there.__contains__)
    yield there
    if DSPyInstrumentor().is_instrumented_by_opentelemetry:
        DSPyInstrumentor().uninstrument()


def loaded() -> bool:
    """Whether our entry point, as `opentelemetry-instrument` calls it, has switched instrumentation on."""
    (entry,) = entry_points(group="opentelemetry_post_instrument", name=gepa_alone.NAME)
    entry.load()()
    return DSPyInstrumentor().is_instrumented_by_opentelemetry


def test_it_is_switched_on_without_dspy(installed: set[str]) -> None:
    pytest.importorskip("gepa")
    assert DSPyInstrumentor().instrumentation_dependencies() == ("gepa >= 0.0.27",)
    assert loaded()


@pytest.mark.parametrize("there", [{"gepa", "dspy"}, {"dspy"}, set()])
def test_with_dspy_or_without_gepa_nothing_happens(installed: set[str], there: set[str]) -> None:
    installed.clear()
    installed.update(there)
    assert not loaded()
    assert DSPyInstrumentor().instrumentation_dependencies() == ("dspy >= 3.0.4, < 4",)


@pytest.mark.parametrize("disabled", ["gepa_otel", "*", "requests, gepa_otel"])
def test_it_can_be_disabled(installed: set[str], monkeypatch: pytest.MonkeyPatch, disabled: str) -> None:
    monkeypatch.setenv("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", disabled)
    assert not loaded()


def test_a_module_without_a_specification_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name}.__spec__ is None")

    monkeypatch.setattr(importlib.util, "find_spec", refuse)
    assert not packages.has_gepa_alone()


_WITHOUT_GEPA = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gepa":
            raise ModuleNotFoundError("No module named 'gepa'", name="gepa")

sys.meta_path.insert(0, Missing())
from tests.support.spans import Recorder
import dspy, dspy_otel
from dspy.utils import DummyLM
before = [dict(vars(kind)) for kind in (dspy.GEPA, dspy.LabeledFewShot)]
telemetry = Recorder()
dspy_otel.instrument(tracer_provider=telemetry.tracer_provider)
print(dspy.GEPA.__module__)
try:
    dspy.GEPA(metric=None)
except ImportError as error:
    print(str(error)[:16])
rows = [dspy.Example(question="q", answer="a").with_inputs("question")]
dspy.configure(lm=DummyLM([{"answer": "a"}]))
best = dspy.LabeledFewShot(k=1).compile(dspy.Predict("question -> answer"), trainset=rows)
print(best(question="q").answer, [span.name for span in telemetry.spans])
dspy_otel.uninstrument()
print([dict(vars(kind)) for kind in (dspy.GEPA, dspy.LabeledFewShot)] == before, "gepa" in sys.modules)
"""


@pytest.mark.skipif(DSPY < (3, 4, 1), reason="before DSPy 3.4.1, GEPA has to be there")
def test_a_stand_in_for_dspys_gepa_is_left_alone() -> None:
    """As on Python 3.15, for which there is no GEPA: `dspy.GEPA` says so when it is made."""
    finished = python(_WITHOUT_GEPA)
    assert finished.output.splitlines() == [
        "dspy.teleprompt",
        "gepa is required",
        "a ['compile LabeledFewShot', 'invoke_workflow Predict', 'chat dummy']",
        "True False",
    ]
    assert finished.warnings == []
