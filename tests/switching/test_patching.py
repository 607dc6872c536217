"""Hooks before, after and around a function: what they see, what they cannot do, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import inspect
import logging
import types
from collections.abc import Iterator
from typing import Any

import pytest

from dspy_otel.patching import Leave, Patches, argument


class Owner:
    def method(self, first: int, *, second: int = 0) -> int:
        if first < 0:
            raise ValueError(first)
        return first + second

    async def coroutine(self, first: int) -> int:
        return self.method(first)

    @staticmethod
    def static(first: int) -> int:
        return first

    @classmethod
    def of_class(cls, first: int) -> tuple[type, int]:
        return cls, first


def function(first: int) -> int:
    return first


MODULE = types.ModuleType("stand_in")
MODULE.function = function  # type: ignore[attr-defined]


@pytest.fixture
def patches() -> Iterator[Patches]:
    made, before = Patches(), dict(vars(Owner))
    yield made
    made.restore()
    assert dict(vars(Owner)) == before
    assert MODULE.function is function


def test_hooks_see_the_call_and_its_result(patches: Patches) -> None:
    seen: list[Any] = []
    owner = Owner()

    def before(*call: Any) -> None:
        seen.append(("before", *call))

    def after(*call: Any) -> None:
        seen.append(("after", *call))

    def around(*call: Any) -> Leave:
        seen.append(("enter", *call))
        return lambda *end: seen.append(("leave", *end))

    patches.before(Owner, "method", before)
    assert owner.method(1, second=2) == 3
    patches.after(Owner, "coroutine", after)
    assert asyncio.run(owner.coroutine(1)) == 1
    patches.after(Owner, "static", after)
    assert (Owner.static(2), owner.static(3)) == (2, 3)
    patches.around(Owner, "of_class", around)
    assert owner.of_class(4) == (Owner, 4)
    patches.before(MODULE, "function", before)
    assert MODULE.function(first=5) == 5
    assert seen == [
        ("before", owner, (1,), {"second": 2}),
        ("before", owner, (1,), {}),
        ("after", owner, (1,), {}, 1),
        ("after", None, (2,), {}, 2),
        ("after", None, (3,), {}, 3),
        ("enter", Owner, (4,), {}),
        ("leave", (Owner, 4), None),
        ("before", None, (), {"first": 5}),
    ]


def test_what_is_hooked_looks_and_fails_as_before(patches: Patches) -> None:
    ends: list[Any] = []
    signature = inspect.signature(Owner.method)
    patches.around(Owner, "method", lambda *call: lambda *end: ends.append(end))
    patches.after(Owner, "coroutine", lambda *call: ends.append(call))
    patches.before(Owner, "static", lambda *call: None)
    assert inspect.signature(Owner.method) == signature
    assert inspect.iscoroutinefunction(Owner.coroutine)
    assert isinstance(vars(Owner)["static"], staticmethod)
    with pytest.raises(ValueError, match="-1") as raised:
        asyncio.run(Owner().coroutine(-1))
    ((result, error),) = ends
    assert (result, error) == (None, raised.value), "a hook after a call that raised is not called"


@pytest.mark.injects_faults
def test_hooks_that_raise_are_one_warning_and_no_more(patches: Patches, caplog: pytest.LogCaptureFixture) -> None:
    def boom(*_: Any) -> Any:
        raise RuntimeError("a secret")

    patches.before(Owner, "method", boom)
    patches.after(Owner, "static", boom)
    patches.around(Owner, "of_class", lambda *call: boom)
    with caplog.at_level(logging.WARNING, "dspy_otel"):
        for _ in range(2):
            assert Owner().method(1) == 1
            assert Owner.static(1) == 1
            assert Owner.of_class(1) == (Owner, 1)
        with pytest.raises(ValueError, match="-1"):
            Owner().method(-1)
    assert [record.getMessage() for record in caplog.records] == [
        f"dspy-otel: hook of Owner.{name} failed (RuntimeError); that detail is missing from telemetry"
        for name in ("method", "static", "of_class")
    ]


def test_a_missing_function_costs_one_warning(patches: Patches, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dspy_otel"):
        assert not patches.before(Owner, "gone", lambda *call: None, loses="a detail")
        assert not patches.after(None, "gone_too", lambda *call: None)
    assert [record.getMessage() for record in caplog.records] == [
        "dspy-otel: this DSPy has no Owner.gone; telemetry lacks a detail"
    ]


def test_an_argument_is_found_by_place_or_name() -> None:
    assert argument((1, 2), {}, 1, "b") == argument((1,), {"b": 2}, 1, "b") == 2
    assert argument((1,), {}, 1, "b", default=3) == 3
