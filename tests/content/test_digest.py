"""Digests of models: as pydantic saves them, and never by a function of the user's."""

from __future__ import annotations

import datetime
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import pydantic
import pytest
from pydantic_core import core_schema

from dspy_otel.content.digest import digest


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
