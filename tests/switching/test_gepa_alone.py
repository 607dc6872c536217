"""GEPA in a program without DSPy. Here DSPy is there, and is said not to be."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest

from dspy_otel import DSPyInstrumentor, gepa_alone


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    there = {"gepa"}
    monkeypatch.setattr(gepa_alone, "_installed", there.__contains__)
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
    assert not gepa_alone.has_gepa_alone()
