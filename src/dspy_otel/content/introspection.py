"""Looking at a user's values without touching them: no method, property or lookup of their classes ever runs.

A value's true class decides what it is (``isinstance`` would ask its ``__class__``), built-in types are read by their
own methods (an override in a subclass is passed by), and fields are read where they are stored.
"""

from __future__ import annotations

import datetime
import types
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final, Generic, TypeVar

# The slots of `type` itself: a metaclass cannot stand in between, as it can with `kind.__name__`.
name_of: Final[Callable[[type], Any]] = type.__dict__["__qualname__"].__get__
short_name_of: Final[Callable[[type], str]] = type.__dict__["__name__"].__get__
module_of: Final[Callable[[type], Any]] = type.__dict__["__module__"].__get__
bases_of: Final[Callable[[type], tuple[type, ...]]] = type.__dict__["__mro__"].__get__
members_of: Final[Callable[[type], Any]] = type.__dict__["__dict__"].__get__
arguments_of: Final[Callable[[BaseException], tuple[Any, ...]]] = BaseException.__dict__["args"].__get__
cause_of: Final[Callable[[BaseException], Any]] = BaseException.__dict__["__cause__"].__get__
context_of: Final[Callable[[BaseException], Any]] = BaseException.__dict__["__context__"].__get__

_DICT_SLOTS: Final = frozenset(map(id, (types.GetSetDescriptorType, types.MemberDescriptorType)))
# What DSPy hands around is of these packages: their properties are no code of the user's.
_TRUSTED: Final = frozenset({"dspy", "litellm", "openai", "pydantic"})
# Classes by identity: a set of them would ask the metaclass of what is looked for (`__hash__`, `__eq__`).
LEAVES: Final = frozenset(map(id, (str, int, float, bool, type(None), bytes)))
"""Identities of the classes whose values have no parts."""
_PLAIN: Final = LEAVES.union(map(id, (list, tuple, dict, set, frozenset)))
_ABSENT: Final = object()

_T = TypeVar("_T")


class ByClass(Generic[_T]):
    """Answers that belong to a class, each worked out once and kept for as long as the class lives.

    Keyed by identity: any dictionary of classes, also one of weak references, would ask a metaclass.

    Args:
        make: works out the answer for a class.
    """

    def __init__(self, make: Callable[[type], _T]) -> None:
        self._make = make
        self._kept: dict[int, tuple[weakref.ref[type], _T]] = {}

    def of(self, kind: type) -> _T:
        """The answer for a class."""
        identity = id(kind)
        kept = self._kept.get(identity)
        if kept is not None and kept[0]() is kind:
            return kept[1]
        answer = self._make(kind)
        self._kept[identity] = weakref.ref(kind, lambda _: self._kept.pop(identity, None)), answer
        return answer


def is_a(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """Whether the class of ``value`` is one of ``kinds`` or derives from one, whatever its ``__class__`` says."""
    return issubclass(type(value), kinds)


def library(kind: type) -> str:
    """The package a class was defined in."""
    module = module_of(kind)
    return module.partition(".")[0] if type(module) is str else ""


def instance_dict(value: Any) -> dict[Any, Any]:
    """What ``vars(value)`` gives, read past any ``__dict__`` or ``__getattribute__`` of the user's."""
    for base in bases_of(type(value)):
        found = members_of(base).get("__dict__")
        if found is not None:
            stored = found.__get__(value) if id(type(found)) in _DICT_SLOTS else None
            return stored if type(stored) is dict else {}
    return {}


def slot(value: Any, name: str) -> tuple[Any, ...]:
    """The value in a slot, as a tuple of one, or ``()``."""
    for base in bases_of(type(value)):
        found = members_of(base).get(name)
        if type(found) is types.MemberDescriptorType:
            try:
                return (found.__get__(value),)
            except AttributeError:
                return ()
    return ()


def store_of(value: Any) -> dict[Any, Any] | None:
    """The fields of one of DSPy's examples and predictions; ``None`` for anything else."""
    store = instance_dict(value).get("_store")
    return store if issubclass(type(store), dict) else None


def fields(value: Any, *names: str) -> list[Any]:
    """Several fields, as :func:`field` gives them. Of DSPy's own objects at once: theirs are no code of the user's."""
    if library(type(value)) == "dspy":
        return [getattr(value, name, None) for name in names]
    return [field(value, name) for name in names]


def field(value: Any, name: str, default: Any = None) -> Any:
    """A field of an object, an entry of a dictionary, or a plain attribute of a class; never a user's property."""
    if issubclass(type(value), dict):
        return dict.get(value, name, default)
    stored = instance_dict(value)
    if name in stored:
        return stored[name]
    store = stored.get("_store")
    if type(store) is dict and name in store:
        return store[name]
    kept = slot(value, name)
    if kept:
        return kept[0]
    for base in bases_of(type(value)):
        found = members_of(base).get(name, _ABSENT)
        if found is _ABSENT:
            continue
        if library(base) in _TRUSTED and not _looks_up_itself(type(value)):
            return getattr(value, name, default)
        return default if has_method(found, "__get__") else found
    # pydantic keeps apart what a model has beyond its fields.
    for place in ("__pydantic_extra__", "__pydantic_private__"):
        kept = slot(value, place)
        if kept and type(kept[0]) is dict and name in kept[0]:
            return kept[0][name]
    return default


def _looks_up_itself(kind: type) -> bool:
    """Whether a class of the user's brings its own way of looking up attributes."""
    lookups = {"__getattribute__", "__getattr__"}
    bases = (base for base in bases_of(kind) if base is not object and library(base) not in _TRUSTED)
    return any(lookups & members_of(base).keys() for base in bases)


def length(value: Any) -> int | None:
    """How long a list or tuple is; ``None`` for anything else."""
    kind = type(value)
    if issubclass(kind, list):
        return list.__len__(value)
    return tuple.__len__(value) if issubclass(kind, tuple) else None


def items(value: Any) -> Iterator[Any]:
    """The items of a list or tuple; none of anything else."""
    kind = type(value)
    if issubclass(kind, list):
        return list.__iter__(value)
    return tuple.__iter__(value) if issubclass(kind, tuple) else iter(())


def text(value: Any, most: int = 1024) -> str | None:
    """At most the first ``most`` characters of a string, of class ``str`` itself; ``None`` for anything else."""
    if type(value) is str:
        return value if len(value) <= most else value[:most]
    return str.__getitem__(value, slice(0, most)) if issubclass(type(value), str) else None


def whole(value: Any) -> int | None:
    """A whole number of class ``int`` itself that telemetry has room for (64 bits); ``None`` for anything else."""
    kind = type(value)
    if kind is bool or not issubclass(kind, int):
        return None
    number: int = value if kind is int else int.__int__(value)
    return number if -(2**63) <= number < 2**63 else None


def real(value: Any) -> float | None:
    """A number (also a boolean) of class ``float`` itself; ``None`` for anything else and what has no room in one."""
    if value is None:
        return None
    kind = type(value)
    if issubclass(kind, float):
        return float.__float__(value)
    if issubclass(kind, int):
        try:
            return float(int.__int__(value))
        except OverflowError:
            return None
    if library(kind) in ("decimal", "fractions") or _is_number_of_numpy(value):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            return None
    return None


def truth(value: Any) -> bool | None:
    """What ``bool(value)`` gives, where that runs no code of a user's class; ``None`` where it would."""
    if id(type(value)) in _PLAIN:
        return bool(value)
    store = store_of(value)
    if store is not None:  # DSPy's examples and predictions are as long as they have fields.
        return bool(store) if library(type(value)) == "dspy" else None
    return bool(value) if _is_number_of_numpy(value) else None


def _is_number_of_numpy(value: Any) -> bool:
    """Whether it is one real number, or an array of no dimensions with one: not a masked one, no object of a user's."""
    module = module_of(type(value))
    if type(module) is not str or module.partition(".")[0] != "numpy" or module.startswith("numpy.ma"):
        return False
    return getattr(value, "shape", None) == () and value.dtype.kind in "biuf"


def has_known_zone(moment: Any) -> bool:
    """Whether no code of a user's time zone class runs when a ``datetime`` or ``time`` becomes text."""
    zone = type(moment.tzinfo)
    return zone is type(None) or zone is datetime.timezone or library(zone) in ("zoneinfo", "dateutil", "pytz")


def has_method(value: Any, name: str) -> bool:
    """Whether the class of ``value`` has ``name``; ``hasattr`` would ask its ``__getattr__``."""
    return any(name in members_of(base) for base in bases_of(type(value)))


def bounded(value: Any, most: int) -> tuple[list[Any], list[Any]]:
    """The first ``most`` items of a list or tuple, and the rest as they are."""
    iterator = items(value)
    return list(islice(iterator, most)), list(iterator)
