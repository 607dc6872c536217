"""Values of a user's program as bounded JSON text: never raising, never longer than the limit, without secrets.

The cost is bounded by the limits and not by the size of the value: nothing is iterated, rendered or copied beyond
them, no ``__repr__``, ``__str__``, ``__eq__`` or ``__len__`` of a user's class is ever called, and a generator is never
consumed.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import json
import math
import pathlib
import re
import types
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Final

from . import secrets

MAX_DEPTH: Final = 16
MAX_ITEMS: Final = 1000
MAX_NODES: Final = 10_000
_MARK: Final = "…[cut {} {}]"
_MARK_SIZE: Final = 40
_CYCLE: Final = "…[cycle]"
_DEEPER: Final = "…[deeper]"

_AS_TEXT: Final = (
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    uuid.UUID,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    pathlib.PosixPath,
    pathlib.WindowsPath,
    complex,
    range,
)
_ARRAY_LIBRARIES: Final = frozenset({"numpy", "pandas", "polars", "torch", "tensorflow", "jax", "jaxlib", "pyarrow"})
_DATA_URI: Final = re.compile(r"data:([\w.+/-]{0,80})(?:;[\w=.+-]{0,80})*;base64,")


def _type_name(value: Any) -> str:
    kind = type(value)
    name = type.__getattribute__(kind, "__qualname__")
    module = type.__getattribute__(kind, "__module__")
    return str(name) if module == "builtins" else f"{module}.{name}"


def _opaque(value: Any) -> str:
    return f"<{_type_name(value)}>"


def _instance_dict(value: Any) -> dict[Any, Any] | None:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None


class _Walk:
    """One pass over a value: gives plain JSON values, with every string already free of secrets."""

    def __init__(self, limit: int, media: bool, redact: Callable[[str], str] | None) -> None:
        self.limit = limit
        self.media = media
        self.redact = redact
        self.nodes = 0
        self.size = 0
        self.path: set[int] = set()

    @property
    def full(self) -> bool:
        return self.nodes >= MAX_NODES or self.size >= 4 * self.limit

    def text(self, value: str) -> str:
        if type(value) is not str:
            value = str.__str__(value)
        length = len(value)
        if not self.media and value.startswith("data:", 0, 5) and (match := _DATA_URI.match(value, 0, 512)):
            value = f"{match.group(0)}<{(length - match.end()) * 3 // 4} bytes>"
        elif length > self.limit:
            value = value[: self.limit + secrets.LONGEST]
        value = secrets.mask(value)
        if self.redact is not None:
            value = self.redact(value)
        if length > self.limit and len(value) > self.limit:
            value = value[: self.limit] + _MARK.format(length - self.limit, "characters")
        self.size += len(value)
        return value

    def plain(self, value: Any, depth: int = 0) -> Any:
        self.nodes += 1
        if value is None or value is True or value is False:
            return value
        kind = type(value)
        if kind is str:
            return self.text(value)
        if kind is int:
            return value if value.bit_length() <= 1024 else f"<int of {value.bit_length()} bits>"
        if kind is float:
            return value if math.isfinite(value) else str(value)
        if depth >= MAX_DEPTH:
            return _DEEPER
        if kind is dict or kind is list or kind is tuple:
            return self.container(value, depth)
        return self.unusual(value, depth)

    def container(self, value: Any, depth: int) -> Any:
        key = id(value)
        if key in self.path:
            return _CYCLE
        self.path.add(key)
        try:
            if isinstance(value, dict):
                return self.mapping(dict.items(value), dict.__len__(value), depth)
            return self.sequence(value, depth)
        finally:
            self.path.discard(key)

    def mapping(self, items: Iterable[tuple[Any, Any]], length: int, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in list(islice(items, MAX_ITEMS)):
            if self.full:
                break
            name = self.key(key)
            result[name] = (
                secrets.MASK if value is not None and secrets.is_secret_name(name) else self.plain(value, depth + 1)
            )
        if len(result) < length:
            result["…"] = _MARK.format(length - len(result), "items")
        return result

    def key(self, key: Any) -> str:
        if isinstance(key, str):
            return self.text(key)
        if isinstance(key, tuple):
            return "(" + ", ".join(self.key(part) for part in islice(tuple.__iter__(key), 8)) + ")"
        if key is None or isinstance(key, (bool, float)) or (isinstance(key, int) and key.bit_length() <= 1024):
            return str(key) if type(key) in (bool, int, float, type(None)) else _opaque(key)
        return _opaque(key)

    def sequence(self, value: Any, depth: int) -> list[Any]:
        kind = next(base for base in (list, tuple, set, frozenset, deque) if isinstance(value, base))
        length = kind.__len__(value)
        result: list[Any] = []
        for item in list(islice(kind.__iter__(value), MAX_ITEMS)):
            if self.full:
                break
            result.append(self.plain(item, depth + 1))
        if len(result) < length:
            result.append(_MARK.format(length - len(result), "items"))
        return result

    def unusual(self, value: Any, depth: int) -> Any:
        if isinstance(value, enum.Enum):
            return self.plain(object.__getattribute__(value, "_value_"), depth + 1)
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, (bool, int, float)):
            return self.plain(int.__int__(value) if isinstance(value, int) else float.__float__(value), depth)
        if isinstance(value, (dict, list, tuple, set, frozenset, deque)):
            return self.container(value, depth)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self.binary(value)
        if type(value) in _AS_TEXT:
            return self.text(str(value))
        if isinstance(value, type):
            return (
                f"<class {type.__getattribute__(value, '__module__')}.{type.__getattribute__(value, '__qualname__')}>"
            )
        if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
            return f"<function {value.__qualname__}>"
        if type(value).__module__.partition(".")[0] in _ARRAY_LIBRARIES:
            return self.array(value)
        fields = self.fields(value)
        return _opaque(value) if fields is None else self.container(fields, depth)

    def binary(self, value: bytes | bytearray | memoryview) -> str:
        size = value.nbytes if isinstance(value, memoryview) else len(value)
        if not self.media or size > self.limit:
            return f"<{size} bytes>"
        return self.text(base64.b64encode(bytes(value)).decode("ascii"))

    def array(self, value: Any) -> Any:
        """Arrays and tables by kind and shape; a scalar of such a library as its number."""
        shape = getattr(value, "shape", None)
        if shape == () and callable(getattr(value, "item", None)):
            return self.plain(value.item(), MAX_DEPTH)
        kind = getattr(value, "dtype", "")
        return f"<{_type_name(value)} {shape} {kind}>".replace(" >", ">")

    def fields(self, value: Any) -> dict[Any, Any] | None:
        """The stored fields of a DSPy example or prediction, a pydantic model or a dataclass; else ``None``."""
        stored = _instance_dict(value)
        if stored is None:
            return None
        kind = type(value)
        if type(stored.get("_store")) is dict:  # dspy.Example, dspy.Prediction and what derives from them
            return stored["_store"]  # type: ignore[no-any-return]
        for marker in ("__pydantic_fields__", "__dataclass_fields__"):
            declared = next((vars(base)[marker] for base in kind.__mro__ if marker in vars(base)), None)
            if isinstance(declared, dict):
                return {name: stored[name] for name in islice(declared, MAX_ITEMS) if name in stored}
        return None


def _fit(value: Any, longest: int) -> Any:
    """``value`` with every string cut to ``longest`` characters, saying how much went."""
    if isinstance(value, str):
        if len(value) <= longest:
            return value
        return value[:longest] + _MARK.format(len(value) - longest, "characters")
    if isinstance(value, dict):
        return {key: _fit(item, longest) for key, item in value.items()}
    if isinstance(value, list):
        return [_fit(item, longest) for item in value]
    return value


def _lengths(value: Any, into: list[int]) -> list[int]:
    if isinstance(value, str):
        into.append(len(value))
    elif isinstance(value, dict):
        for item in value.values():
            _lengths(item, into)
    elif isinstance(value, list):
        for item in value:
            _lengths(item, into)
    return into


def _share(lengths: list[int], budget: int) -> int:
    """The longest string length at which all strings together fit: short ones stay whole, long ones share the rest."""
    rest = budget
    ordered = sorted(lengths)
    for position, length in enumerate(ordered):
        share = rest // (len(ordered) - position)
        if length > share:
            return max(share - _MARK_SIZE, 0)
        rest -= length
    return budget


def _encode(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # A lone surrogate: OTLP carries UTF-8 only.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Content:
    """How content becomes text, as one set of settings wants it.

    Args:
        limit: most bytes (UTF-8) of one text.
        media: whether binary data is kept; else it is named by type and size.
        redact: a user's function from text to text, applied to each string.
    """

    def __init__(self, limit: int, media: bool = False, redact: Callable[[str], str] | None = None) -> None:
        self.limit = limit
        self.media = media
        self.redact = redact

    def json(self, value: Any) -> str:
        """``value`` as JSON text of at most ``limit`` bytes.

        Long strings are cut and say by how many characters, containers by how many items.

        Raises:
            Exception: only what the user's ``redact`` raises; callers drop the content then.
        """
        plain = self.plain(value)
        text = _encode(plain)
        budget = self.limit
        for _ in range(4):
            size = len(text.encode("utf-8"))
            if size <= self.limit:
                return text
            lengths = _lengths(plain, [])
            # What is not string data (keys, quotes, escapes) stays; the strings get what is left.
            fixed = max(len(text) - sum(lengths), 0)
            ratio = max(size / max(len(text), 1), 1.0)
            budget = int((budget - fixed) / ratio) - 16
            text = _encode(_fit(plain, _share(lengths, max(budget, 0))))
            budget = int(budget * 0.8)
        return text if len(text.encode("utf-8")) <= self.limit else _encode(_MARK.format(len(text), "characters"))

    def plain(self, value: Any) -> Any:
        """``value`` as plain JSON values, bounded in depth, items and text, but not yet cut to the limit."""
        return _Walk(self.limit, self.media, self.redact).plain(value)

    def text(self, value: Any) -> str:
        """One piece of text (a string as it is, anything else as JSON), of at most ``limit`` bytes."""
        if not isinstance(value, str):
            return self.json(value)
        text = _Walk(self.limit, self.media, self.redact).text(value)
        data = text.encode("utf-8", "replace")
        if len(data) <= self.limit:
            return data.decode("utf-8")
        mark = _MARK.format(len(data) - self.limit + _MARK_SIZE, "bytes")
        return data[: max(self.limit - _MARK_SIZE, 0)].decode("utf-8", "ignore") + mark
