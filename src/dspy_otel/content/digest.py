"""Stable digests of values: the same before a value is saved and after it is read back."""

from __future__ import annotations

import datetime
import decimal
import enum
import hashlib
import json
import math
import uuid
from itertools import islice
from types import FunctionType, MethodType
from typing import Any, Final

from dspy_otel.content import introspection
from dspy_otel.content.introspection import LEAVES, is_a
from dspy_otel.content.walker import CHANGING, Walker

LENGTH: Final = 16
"""Hex digits of a digest: 64 bits."""

_MAX_DEPTH: Final = 64
_MAX_NODES: Final = 100_000
_MAX_CHARACTERS: Final = 1_000_000
_MAX_BITS: Final = 10_000
_MAX_OBJECTS: Final = 4096
_FIELDS: Final = frozenset({"__dataclass_fields__", "__pydantic_fields__"})


def digest(value: Any) -> str:
    """16 hex digits of SHA-256 over the canonical JSON of ``value``.

    The JSON is what saving to a file would keep, so that a value before saving and the one read back are the same. It
    is never shown: nothing is masked or cut as content is, for both would depend on more than the value. But it has an
    end: of a value with more than 100,000 parts, or of a text with more than a million characters, the rest counts by
    its length only.
    """
    plain = _plain(value, [_MOST_PLAIN, _MOST_PLAIN], 0)
    text = _encode(_Canonical().of(value) if plain is _UNUSUAL else plain)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:LENGTH]


_encode: Final = json.JSONEncoder(sort_keys=True, ensure_ascii=True, allow_nan=False).encode
_UNUSUAL: Final = object()
_MOST_PLAIN: Final = 10_000
_DEEPEST_PLAIN: Final = 16


def _plain(value: Any, room: list[int], depth: int) -> Any:
    """A copy of a value that is JSON as it is, as :class:`_Canonical` makes it, in a fraction of the time.

    Most values are: dictionaries, lists, texts and numbers of the built-in types, far from all limits.

    Args:
        value: any value.
        room: how many values and how many characters there may be yet.
        depth: how many containers it is in.

    Returns:
        The copy, or :data:`_UNUSUAL`.
    """
    kind = type(value)
    if kind is str:
        room[1] -= len(value)
        return value if room[1] >= 0 else _UNUSUAL
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**63 else _UNUSUAL
    if kind is float:
        return value if math.isfinite(value) else _UNUSUAL
    if depth >= _DEEPEST_PLAIN or (kind is not dict and kind is not list):
        return _UNUSUAL
    room[0] -= len(value)
    if room[0] < 0:
        return _UNUSUAL
    made: Any = value.copy()
    for key, item in made.items() if kind is dict else enumerate(made):
        if kind is dict:
            if type(key) is not str:
                return _UNUSUAL
            room[1] -= len(key)
        if (item is None or type(item) is str) and room[1] >= 0:
            room[1] -= 0 if item is None else len(item)
            continue
        made[key] = shown = _plain(item, room, depth + 1)
        if shown is _UNUSUAL:
            return _UNUSUAL
    return made if room[1] >= 0 else _UNUSUAL


class _Canonical(Walker):
    """A value as plain JSON values that stay the same for years: what a value is must never be written otherwise."""

    max_items = _MAX_NODES + 1
    max_depth = _MAX_DEPTH

    def __init__(self) -> None:
        super().__init__(_MAX_NODES)
        self.characters = _MAX_CHARACTERS

    def mapping(self, owner: Any, entries: dict[Any, Any], depth: int) -> Any:
        return super().mapping(owner, entries, depth) if self.nodes > 0 else "…"

    def sequence(self, owner: Any, items: Any, length: int, depth: int) -> Any:
        return super().sequence(owner, items, length, depth) if self.nodes > 0 else "…"

    def text(self, value: str) -> str:
        length = str.__len__(value)
        room = max(min(length, self.characters), 0)
        self.characters -= room
        shown = str.__getitem__(value, slice(0, room))
        return shown if room == length else f"{shown}…{length}"

    def integer(self, value: int) -> int | str:
        bits = value.bit_length()
        return value if bits <= _MAX_BITS else f"<{hash(value)} of {bits} bits>"  # Python refuses to print those.

    def real(self, value: float) -> float | None:
        return value if math.isfinite(value) else None  # as JSON files have it

    def other(self, value: Any, kind: type, depth: int) -> Any:
        if issubclass(kind, float):
            return self.real(float.__float__(value))
        if issubclass(kind, enum.Enum):
            return self.of(introspection.instance_dict(value).get("_value_"), depth + 1)
        if issubclass(kind, str):
            return self.text(value)
        if issubclass(kind, int):
            return self.integer(int.__int__(value))
        if issubclass(kind, (datetime.date, datetime.time)):  # a datetime is a date
            return self.moment(value, kind)
        if kind is uuid.UUID or kind is decimal.Decimal:
            return str(value)
        if issubclass(kind, (bytes, bytearray)):
            return self.binary(value, bytes if issubclass(kind, bytes) else bytearray)
        if issubclass(kind, dict):
            return self.mapping(value, value, depth)
        for base in (list, tuple, set, frozenset):
            if issubclass(kind, base):
                made = self.sequence(value, self.snapshot(base.__iter__, value), base.__len__(value), depth)
                if base in (list, tuple) or type(made) is not list:
                    return made
                return sorted(json.dumps(item, sort_keys=True) for item in made)
        saved = _saved(value)
        if saved is not value:
            self.nodes += 1
            return self.of(saved, depth)
        stored = introspection.store_of(value)  # dspy.Example and what derives from it
        if stored is None and any(
            _FIELDS & introspection.members_of(base).keys() for base in introspection.bases_of(kind)
        ):
            stored = introspection.instance_dict(value)
        if stored is not None:
            return self.mapping(value, stored, depth)
        return "…" if depth >= _MAX_DEPTH or self.nodes <= 0 else _name(kind)

    def moment(self, value: Any, kind: type) -> str:
        if kind is datetime.date:
            return str(value.isoformat())
        if kind is not datetime.datetime and kind is not datetime.time:
            return f"<{introspection.module_of(kind)}>"
        if introspection.has_known_zone(value):
            return str(value.isoformat())
        return f"{value.replace(tzinfo=None).isoformat()} {_name(type(value.tzinfo))}"

    def binary(self, value: Any, base: Any) -> str:
        length = base.__len__(value)
        shown = hashlib.sha256(base.__getitem__(value, slice(0, _MAX_CHARACTERS))).hexdigest()
        return shown if length <= _MAX_CHARACTERS else f"{shown}…{length}"

    def entry(self, result: dict[str, Any], key: Any, item: Any, depth: int) -> None:
        made = self.of(item, depth)  # Before the key, of which there may be no room left.
        kind = type(key)
        if issubclass(kind, str):
            name = self.text(key)
        else:
            plain = id(kind) in LEAVES or (kind is tuple and all(id(type(part)) in LEAVES for part in key))
            name = str(key) if plain else _name(kind)
        result[name] = made

    def cut(self, result: dict[str, Any] | list[Any], taken: int, length: int) -> None:
        if isinstance(result, list):
            result.append(f"…{length}")
        else:
            result["…"] = length

    def stop(self, reason: str) -> str:
        if reason == CHANGING:
            raise RuntimeError("a value is changed all the time")
        return "…"


def _name(kind: type) -> str:
    return f"<{introspection.module_of(kind)}.{introspection.name_of(kind)}>"


def _saved(value: Any) -> Any:
    """A pydantic model as DSPy saves it (its JSON values, as which it comes back); anything else as it is.

    Not where that would run code of a user's class (serializers, computed fields): such a model is known by its fields.
    """
    kind = type(value)
    if "__pydantic_fields__" not in introspection.members_of(kind) or runs_code(value):
        return value
    return kind.model_dump(value, mode="json")


def runs_code(value: Any, examples: bool = False) -> bool:
    """Whether dumping a model, or what holds one, runs code that is not pydantic's or DSPy's, or is a long job.

    Args:
        value: the model, or a dictionary, list or tuple.
        examples: DSPy's examples inside are dumped by DSPy, and not by pydantic.
    """
    waiting = [value]
    for _ in range(_MAX_OBJECTS):
        if not waiting:
            return False
        each = waiting.pop()
        store = introspection.store_of(each) if examples and introspection.library(type(each)) == "dspy" else None
        inner = _inside(each) if store is None else _entries(store)
        if inner is None:
            return True
        waiting += inner
    return True


def _inside(value: Any) -> list[Any] | None:
    """The parts of a value that pydantic dumps; ``None`` if that runs code of its class."""
    kind = type(value)
    if id(kind) in LEAVES:
        return []
    members = introspection.members_of(kind)
    if "__pydantic_fields__" in members:
        if introspection.library(kind) != "dspy" and (
            _serializes_itself(kind) or any(map(_overrides_dump, introspection.bases_of(kind)))
        ):
            return None
        more = introspection.slot(value, "__pydantic_extra__")
        extra = more[0] if more and type(more[0]) is dict else {}
        return [*introspection.instance_dict(value).values(), *_entries(extra)]
    if introspection.library(kind) not in _STANDARD and introspection.library(kind) != "dspy":
        return None  # pydantic would call code of its class.
    if is_a(value, dict):
        return _entries(value)
    return list(islice(introspection.items(value), _MAX_OBJECTS))


def _entries(entries: dict[Any, Any]) -> list[Any]:
    """The values of a dictionary, and the keys that are no plain texts: a copy of it asks each for its hash."""
    return [*dict.values(entries), *(key for key in list(dict.keys(entries)) if type(key) is not str)]


_STANDARD: Final = frozenset({"builtins", "datetime", "decimal", "uuid", "enum", "pathlib", "fractions", "collections"})


def _overrides_dump(base: type) -> bool:
    return "model_dump" in introspection.members_of(base) and introspection.library(base) not in ("pydantic", "dspy")


def _serializes_itself(kind: type) -> bool:
    """Whether pydantic calls functions of the user's to dump a model of this class.

    They come with the class (serializers, computed fields), its settings (``json_encoders``) or the type of a field
    (``Annotated``): all are in the schema that pydantic has compiled.
    """
    return _serializing.of(kind)


_serializing: Final = introspection.ByClass(
    lambda kind: _has_functions(introspection.members_of(kind).get("__pydantic_core_schema__"))
)
_MAX_SCHEMA: Final = 20_000
_MAKERS: Final = ("pydantic.", "dspy.")


def _has_functions(schema: Any) -> bool:
    """Whether a schema of pydantic's names a function that is not pydantic's or DSPy's, for dumping."""
    if type(schema) is not dict:
        return True  # not compiled yet
    waiting: list[Any] = [schema]
    for _ in range(_MAX_SCHEMA):
        if not waiting:
            return False
        each = waiting.pop()
        if type(each) is dict:
            if each.get("type") == "computed-field" or not _is_known(each.get("serialization")):
                return True
            waiting += [part for key, part in each.items() if key not in ("metadata", "default", "serialization")]
        elif type(each) is list or type(each) is tuple:
            waiting += each
    return True


def _is_known(serialization: Any) -> bool:
    """Whether a serialization of a schema runs code of pydantic or DSPy only."""
    if type(serialization) is not dict or "function" not in serialization:
        return True
    function: Any = serialization["function"]
    if type(function) is MethodType:
        function = function.__func__
    return type(function) is FunctionType and str(function.__globals__.get("__name__")).startswith(_MAKERS)
