"""Exceptions on spans: known again further out, and redacted once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pydantic
import pytest

from dspy_otel.content.encoder import Content
from dspy_otel.core.errors import Recorded, exception_attributes


def fail(depth: int) -> None:
    if depth:
        fail(depth - 1)
    raise ValueError("text")


def caught(depth: int) -> ValueError:
    try:
        fail(depth)
    except ValueError as error:
        return error
    raise AssertionError


@contextmanager
def same_identity(recorded: Recorded, error: BaseException) -> Iterator[Recorded]:
    """As when the first exception was freed, and the second one took its place in memory."""
    yield recorded._replace(identity=id(error))


def test_an_exception_is_known_again_further_out_and_another_in_its_place_is_not() -> None:
    inner = caught(1)
    recorded = Recorded.of(inner, "module")
    with pytest.raises(ValueError, match="text"):
        raise inner
    assert recorded.is_(inner, "module")
    assert recorded.is_(inner, "example")
    for other in (caught(0), ValueError("text"), TypeError("text")):
        with same_identity(recorded, other) as reused:
            assert not reused.is_(other, "module")
            assert not reused.is_(other, "example")


def test_recursion_that_raises_its_own_at_the_same_place_is_another_exception() -> None:
    recorded, own = Recorded.of(caught(2), "module"), caught(2)
    with same_identity(recorded, own) as reused:
        assert not reused.is_(own, "module")


def test_no_exception_is_kept_alive() -> None:
    class Weak(Exception):
        pass

    error = Weak()
    gone, recorded = weakref.ref(error), Recorded.of(error, "lm")
    del error
    gc.collect()
    assert gone() is None
    assert recorded.type is Weak


def test_message_and_trace_are_redacted_once() -> None:
    def redact(text: str) -> str:
        return f"({text})"

    attributes = exception_attributes(caught(0), Content(10_000, redact=redact))
    assert attributes["exception.message"] == "(text)"
    assert str(attributes["exception.stacktrace"]).endswith("ValueError: (text)\n")
    assert "((" not in str(attributes["exception.stacktrace"])


def test_a_long_trace_stays_within_the_limit() -> None:
    attributes = exception_attributes(caught(60), Content(300))
    assert len(str(attributes["exception.stacktrace"]).encode()) <= 300


@pytest.mark.injects_faults
def test_redaction_that_raises_leaves_the_type() -> None:
    def redact(_: str) -> str:
        raise RuntimeError

    assert exception_attributes(caught(0), Content(1000, redact=redact)) == {"exception.type": "ValueError"}


def test_what_pydantic_rejects_is_not_asked_for_its_text() -> None:
    touched = []

    class Watched:
        def __repr__(self) -> str:
            touched.append(self)
            return "x"

    with pytest.raises(pydantic.ValidationError) as caught:
        pydantic.TypeAdapter(int).validate_python(Watched())
    attributes = exception_attributes(caught.value, Content(1000))
    assert touched == []
    assert "valid integer" in str(attributes["exception.message"])
