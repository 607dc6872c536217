"""Digests of models: as pydantic saves them, and never by a function of the user's."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import core_schema

from dspy_otel.content.digest import LENGTH, _Canonical, digest


class Touched(BaseException):
    """Code of the user's ran."""


def touch(value: Any) -> Any:
    raise Touched


class Written:
    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return core_schema.str_schema(serialization=core_schema.plain_serializer_function_ser_schema(touch))


class Annotations(pydantic.BaseModel):
    field: Annotated[int, pydantic.PlainSerializer(touch)] = 1


class Decorated(pydantic.BaseModel):
    field: int = 1

    @pydantic.field_serializer("field")
    def serialize(self, value: int) -> Any:
        raise Touched


class Whole(pydantic.BaseModel):
    field: int = 1

    @pydantic.model_serializer(mode="wrap")
    def serialize(self, handler: Any) -> Any:
        raise Touched


class Computed(pydantic.BaseModel):
    field: int = 1

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def more(self) -> int:
        raise Touched


class Encoded(pydantic.BaseModel):
    model_config = {"json_encoders": {datetime.date: touch}}
    field: datetime.date = datetime.date(2020, 1, 1)


class Typed(pydantic.BaseModel):
    field: Written = "a"  # type: ignore[assignment]


class Open(pydantic.BaseModel):
    model_config = {"extra": "allow"}


class Plain(pydantic.BaseModel):
    when: datetime.date = datetime.date(2020, 1, 1)
    where: Path = Path("there")
    many: deque[int] = deque([1])


ROOT: Any = pydantic.RootModel[Annotated[int, pydantic.PlainSerializer(touch)]]


@pytest.mark.parametrize(
    "value",
    [Annotations(), Decorated(), Whole(), Computed(), Encoded(), Typed(), Open(more=Decorated()), ROOT(3)],
    ids=lambda value: type(value).__name__,
)
def test_no_function_of_the_users_dumps_a_model(value: Any) -> None:
    assert digest({"row": value}) == digest({"row": value})
    assert digest([{"row": (value,)}])


def test_a_model_without_such_functions_is_what_it_is_saved_as() -> None:
    assert digest(Plain()) == digest({"when": "2020-01-01", "where": "there", "many": [1]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner),
    max_leaves=30,
)


@given(JSON)
@settings(deadline=None, max_examples=60)
def test_an_ordinary_value_is_digested_as_any_other(value: Any) -> None:
    def slowly(value: Any) -> str:
        text = json.dumps(_Canonical().of(value), sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:LENGTH]

    assert digest(value) == slowly(value)
    deep = functools.reduce(lambda inner, _: [inner], range(20), value)
    assert digest(deep) == slowly(deep)
    many = [value] * 6000
    assert digest(many) == slowly(many)


def test_a_value_that_contains_itself_has_a_digest() -> None:
    value: dict[str, Any] = {"a": 1}
    value["self"] = [value]
    assert digest(value) == digest(value)
