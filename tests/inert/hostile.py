"""Values that notice when anybody touches them, or that hurt whoever does, by kind."""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime
import tempfile
import threading
import types
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pydantic

JOURNAL: list[tuple[str, str]] = []
"""Each call of a method of a spy: (kind of spy, method)."""

_METHODS = (
    *("__repr__", "__str__", "__eq__", "__ne__", "__len__", "__hash__", "__bool__", "__iter__", "__next__"),
    *("__getitem__", "__contains__", "__call__", "__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__"),
    *("__format__", "__int__", "__float__", "__index__", "__bytes__", "__fspath__", "__lt__", "__gt__", "__le__"),
    *("__add__", "__radd__", "__mul__", "__rmul__", "__truediv__", "__enter__", "__exit__", "__sizeof__", "__dir__"),
    *("__reversed__", "keys", "values", "items", "get", "copy", "dict", "model_dump", "startswith", "encode", "strip"),
    *("split", "bit_length", "is_integer", "hex", "tobytes", "tolist", "item", "as_integer_ratio"),
)
# Of object, for a spy that behaves.
_DEFAULTS: dict[str, Callable[..., Any]] = {
    "__repr__": lambda self: "<spy>",
    "__str__": lambda self: "<spy>",
    "__eq__": lambda self, other: self is other,
    "__ne__": lambda self, other: self is not other,
    "__len__": lambda self: 3,
    "__hash__": lambda self: 7,
    "__bool__": lambda self: True,
    "__iter__": lambda self: iter((1, 2, 3)),
    "__getitem__": lambda self, key: (1, 2, 3)[key],
    "__format__": lambda self, spec: "<spy>",
    "__int__": lambda self: 1,
    "__float__": lambda self: 0.5,
    "__copy__": lambda self: self,
    "__deepcopy__": lambda self, memo: self,
    "keys": lambda self: ("a",),
    "shape": lambda self: (1, 2),
}


class Hurt(Exception):
    """What a hostile value raises."""


class HurtBadly(BaseException):
    """The same, and `except Exception` does not hold it."""


def spy(name: str, base: type = object, raises: type[BaseException] | None = None) -> type:
    """A class that writes each use of itself into the journal, and maybe raises."""

    def method(wanted: str) -> Callable[..., Any]:
        own = getattr(base, wanted, None) if base is not object else None

        def used(self: Any, *args: Any, **kwargs: Any) -> Any:
            JOURNAL.append((name, wanted))
            if raises is not None:
                raise raises(f"{name} {wanted}")
            if own is not None:
                return own(self, *args, **kwargs)
            if wanted in _DEFAULTS:
                return _DEFAULTS[wanted](self, *args)
            raise AttributeError(wanted)

        return used

    def looked_up(self: Any, wanted: str) -> Any:
        JOURNAL.append((name, f"getattr {wanted}"))
        raise (raises or AttributeError)(wanted)

    def seen_class(self: Any) -> Any:
        JOURNAL.append((name, "__class__"))
        return base if base is not object else type(self)

    body: dict[str, Any] = {
        wanted: method(wanted)
        for wanted in _METHODS
        if (base is object and wanted.startswith("__")) or hasattr(base, wanted)
    }
    if issubclass(base, BaseException):
        body.pop("__reduce_ex__", None)
        body["args"] = property(method("args"))
    body["__getattr__"] = looked_up
    body["__class__"] = property(seen_class)
    return type(name, (base,), body)


Spy = spy("Spy")
SpyText, SpyDict, SpyList = spy("SpyText", str), spy("SpyDict", dict), spy("SpyList", list)
SpyInt, SpyFloat, SpyTuple = spy("SpyInt", int), spy("SpyFloat", float), spy("SpyTuple", tuple)
SpyError = spy("SpyError", ValueError)
Raising = spy("Raising", raises=Hurt)
RaisingBadly = spy("RaisingBadly", raises=HurtBadly)
RaisingText, RaisingDict = spy("RaisingText", str, Hurt), spy("RaisingDict", dict, Hurt)
RaisingList, RaisingFloat = spy("RaisingList", list, Hurt), spy("RaisingFloat", float, Hurt)
BadText, BadDict = spy("BadText", str, HurtBadly), spy("BadDict", dict, HurtBadly)


class LazyRows(collections.abc.Sequence):
    """A sequence that makes its items when it is asked for them, and draws a random number for each."""

    def __init__(self, *items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        JOURNAL.append(("LazyRows", "__len__"))
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        JOURNAL.append(("LazyRows", "__getitem__"))
        return self._items[index]


class LazyFields(collections.abc.Mapping):
    """Likewise, a mapping."""

    def __len__(self) -> int:
        JOURNAL.append(("LazyFields", "__len__"))
        return 1

    def __iter__(self) -> Any:
        JOURNAL.append(("LazyFields", "__iter__"))
        return iter(("text",))

    def __getitem__(self, key: Any) -> Any:
        JOURNAL.append(("LazyFields", "__getitem__"))
        return "lazy"


class Plain(pydantic.BaseModel):
    """A model without any code."""

    name: str = "n"


class Model(pydantic.BaseModel):
    """With code of the user's wherever pydantic has room for it."""

    name: str = "n"
    inner: Any = None

    @pydantic.field_validator("name")
    @classmethod
    def _check(cls, value: str) -> str:
        JOURNAL.append(("Model", "validator"))
        return value

    @pydantic.field_serializer("name")
    def _write(self, value: str) -> str:
        JOURNAL.append(("Model", "serializer"))
        return value

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def computed(self) -> int:
        JOURNAL.append(("Model", "computed field"))
        return 1


@dataclasses.dataclass
class Data:
    """A dataclass with a descriptor that looks like a field."""

    name: str = "n"
    inner: Any = None

    @property
    def score(self) -> float:
        JOURNAL.append(("Data", "score"))
        return 0.5


class Properties:
    """Whatever telemetry might ask of an object, as a property."""

    def __getattribute__(self, name: str) -> Any:
        if not (name.startswith("__") and name.endswith("__")):
            JOURNAL.append(("Properties", name))
        return super().__getattribute__(name)

    @property
    def score(self) -> float:
        return 0.5

    feedback = passages = shape = status = request_id = lm_response = usage = score


def numbers() -> Any:
    JOURNAL.append(("generator", "consumed"))
    yield 1


def bomb() -> Any:
    """Small, and endless for whoever unrolls it."""
    made: Any = ["x"]
    for _ in range(60):
        made = [made, made]
    return made


def cycle() -> Any:
    made: dict[Any, Any] = {"a": []}
    made["a"] += [made, made, {"b": made}]
    return made


def deep(depth: int = 10_000) -> Any:
    made: Any = 1
    for level in range(depth):
        made = [made] if level % 2 else {"k": made}
    return made


def data_cycle() -> Any:
    made = Data()
    made.inner = [made, made]
    return made


def _numpy() -> Any:
    import numpy

    return numpy.arange(12.0).reshape(3, 4)


def _array_of_a_spy() -> Any:
    import numpy

    made = numpy.empty((), dtype=object)
    made[()] = Spy()
    return made


def _pandas() -> Any:
    import pandas

    return pandas.DataFrame({"a": [1, 2]})


def _table_of_spies() -> Any:
    """With a column that has the name of what other tables say of themselves."""
    import pandas

    return pandas.DataFrame({"a": [1, 2], "dtype": [Spy(), Spy()]})


class Zone(datetime.tzinfo):
    """A time zone that writes down what it is asked."""

    def utcoffset(self, _: Any) -> datetime.timedelta:
        JOURNAL.append(("Zone", "utcoffset"))
        return datetime.timedelta(hours=1)

    def dst(self, _: Any) -> None:
        JOURNAL.append(("Zone", "dst"))

    def tzname(self, _: Any) -> str:
        JOURNAL.append(("Zone", "tzname"))
        return "here"


class Asked(type):
    """A metaclass that writes down which attributes of its classes are asked for, but what Python asks for once."""

    def __getattribute__(cls, name: str) -> Any:
        if name not in ("__mro__", "__dict__"):
            JOURNAL.append(("Asked", name))
        return type.__getattribute__(cls, name)


class Day(datetime.date, metaclass=Asked):
    """A date of a class of the user's."""


class Member(metaclass=Asked):
    """What a class of the user's has as an attribute."""


class Holder:
    """With attributes that have the names of DSPy's and of models."""

    model = score = feedback = kwargs = _store = Member()


def _proxy() -> Any:
    import wrapt

    return wrapt.ObjectProxy(Spy())


def _mock() -> Any:
    made = MagicMock(name="mock")
    made.side_effect = lambda *_, **__: JOURNAL.append(("mock", "called"))
    return made


KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: "text",
    "number": lambda: 0.5,
    "spy": Spy,
    "spy text": lambda: str.__new__(SpyText, "0.5"),
    "spy dict": lambda: SpyDict(a=1),
    "spy list": lambda: SpyList([1]),
    "spy tuple": lambda: tuple.__new__(SpyTuple, (1, 2)),
    "spy int": lambda: int.__new__(SpyInt, 1),
    "spy float": lambda: float.__new__(SpyFloat, 0.5),
    "spy error": lambda: SpyError("boom"),
    "raising": Raising,
    "raising badly": RaisingBadly,
    "raising text": lambda: str.__new__(RaisingText, "0.5"),
    "raising dict": lambda: dict.__new__(RaisingDict),
    "raising list": lambda: list.__new__(RaisingList),
    "raising float": lambda: float.__new__(RaisingFloat, 0.5),
    "text that raises badly": lambda: str.__new__(BadText, "0.5"),
    "dict that raises badly": lambda: dict.__new__(BadDict),
    "class": lambda: Spy,
    "cycle": cycle,
    "bomb": bomb,
    "deep": deep,
    "keys": lambda: {(1, "a"): 1, None: 2, 3.5: 3, b"b": 4, frozenset((1,)): 5},
    "surrogate": lambda: "a\ud800b\udfff",
    "nan": lambda: float("nan"),
    "infinity": lambda: float("-inf"),
    "huge number": lambda: 10**5000,
    "bytes": lambda: b"\x00\xff" * 10,
    "memory": lambda: memoryview(bytearray(b"abc")),
    "generator": numbers,
    "file": tempfile.TemporaryFile,
    "lock": threading.Lock,
    "array": _numpy,
    "array of a spy": _array_of_a_spy,
    "table": _pandas,
    "table of spies": _table_of_spies,
    "model": lambda: Model(inner=[1]),
    "model in list": lambda: [{"deep": Model(inner=Model())}],
    "data": Data,
    "data cycle": data_cycle,
    "properties": Properties,
    "lazy rows": lambda: LazyRows("a", "b"),
    "lazy fields": LazyFields,
    "proxy": _proxy,
    "mock": _mock,
    "module": lambda: types,
    "date": lambda: datetime.datetime(2020, 1, 2),
    "date elsewhere": lambda: datetime.datetime(2020, 1, 2, tzinfo=Zone()),
    "time elsewhere": lambda: datetime.time(1, 2, tzinfo=Zone()),
    "date of a class": lambda: Day(2020, 1, 2),
    "holder": Holder,
    "none": lambda: None,
}
