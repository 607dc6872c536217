"""A DSPy program is the same program, watched or not: every result, exception, event, pickle and random number."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from opentelemetry import trace

import dspy_otel
from tests.inert.programs import SHAPES, Shape, observe

QUIET = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def assert_same(shape: Shape, telemetry: Any) -> None:
    bare = observe(shape)
    # DSPy itself is not quite the same twice (the context of an exception, rarely).
    assume(bare == observe(shape))
    for content in ("no_content", "span_and_event"):
        telemetry.instrument(capture_content=content)
        try:
            with telemetry.tracer.start_as_current_span("application") as span:
                watched = observe(shape)
                assert trace.get_current_span() is span
        finally:
            dspy_otel.uninstrument()
        assert telemetry.spans, "nothing was watched"
        telemetry.clear()
        assert_equal(bare, watched, f"instrumented, {content}")
    assert_equal(bare, observe(shape), "after uninstrument()")
    assert not telemetry.spans


def assert_equal(one: Any, other: Any, when: str) -> None:
    for part in dataclasses.fields(one):
        left, right = getattr(one, part.name), getattr(other, part.name)
        if left != right:
            shown = "\n".join(difference(left, right))
            pytest.fail(f"{when}: {part.name} differs:\n{shown}", pytrace=False)


def difference(one: Any, other: Any) -> list[str]:
    """The first places at which two pictures differ."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [
            line for left, right in zip(one, other, strict=True) if left != right for line in difference(left, right)
        ]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [f"{key}: {line}" for key in one if one[key] != other[key] for line in difference(one[key], other[key])]
    if isinstance(one, (str, bytes)) and type(one) is type(other):
        start = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
        return [f"at {start}: {one[max(start - 60, 0) : start + 60]!r} / {other[max(start - 60, 0) : start + 60]!r}"]
    return [f"{one!r:.500} / {other!r:.500}"]


@QUIET
@given(shape=SHAPES)
def test_any_program_is_the_same(telemetry: Any, shape: Shape) -> None:
    assert_same(shape, telemetry)


@pytest.mark.nightly
@settings(QUIET, max_examples=400)
@given(shape=SHAPES)
def test_many_programs_are_the_same(telemetry: Any, shape: Shape) -> None:
    assert_same(shape, telemetry)
