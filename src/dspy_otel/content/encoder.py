"""Values of a user's program as bounded JSON text: never raising, never longer than the limit, without secrets.

The cost is bounded by the limits and not by the size of the value: nothing is iterated, rendered or copied beyond
them. Nothing of a user's class is ever called: no ``__repr__``, ``__str__``, ``__eq__``, ``__len__``, ``__hash__``,
``__getattr__``, property or validator, and a generator is never consumed. What has fields (DSPy's examples and
predictions, pydantic models, dataclasses, attrs classes, named tuples) shows them; anything else is ``<module.Class>``.
"""

from __future__ import annotations

import base64
import collections
import datetime
import decimal
import enum
import fractions
import json
import math
import pathlib
import re
import types
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice
from typing import Any, Final

from dspy_otel.content import redaction
from dspy_otel.content.introspection import (
    arguments_of,
    bases_of,
    instance_dict,
    library,
    members_of,
    module_of,
    name_of,
    slot,
)

MAX_DEPTH: Final = 16
MAX_ITEMS: Final = 1000
MAX_NODES: Final = 10_000
MAX_BITS: Final = 128
MIN_LIMIT: Final = 64
"""Fewest bytes a limit can be: room for one mark that says what was cut."""
_MAX_KEY: Final = 256
_MARK: Final = "…[cut {} {}]"
_MARKED: Final = re.compile(r"…\[cut (\d{1,12}) characters\]\Z")
_MARKED_ITEMS: Final = re.compile(r"…\[cut (\d{1,12}) items\]")
_MARK_SIZE: Final = 48
_CYCLE: Final = "…[cycle]"
_DEEPER: Final = "…[deeper]"
_CHANGING: Final = "…[changing]"
_MORE: Final = "…"

# By identity: comparing classes may call a metaclass. Only these very classes, whose str() is Python's own.
_AS_TEXT: Final = frozenset(
    id(kind)
    for kind in (
        datetime.date,
        datetime.timedelta,
        decimal.Decimal,
        fractions.Fraction,
        uuid.UUID,
        pathlib.PurePosixPath,
        pathlib.PureWindowsPath,
        pathlib.PosixPath,
        pathlib.WindowsPath,
        complex,
        range,
    )
)
_CONTAINERS: Final = (dict, list, tuple, set, frozenset, collections.deque)
_VIEWS: Final = frozenset(map(id, (type({}.keys()), type({}.values()), type({}.items()))))
_ARRAY_LIBRARIES: Final = frozenset({"numpy", "pandas", "polars", "torch", "tensorflow", "jax", "jaxlib", "pyarrow"})
_EXAMPLES: Final = ("dspy.primitives.example", "dspy.primitives.prediction")
_BASE64_LENGTH: Final = 256
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]+")
_DATA_URI: Final = re.compile(r"data:([\w.+/-]{0,80})(?:;[\w=.+-]{0,80}){0,8};base64,")


def type_name(kind: type) -> str:
    """``module.Class`` of a class, bare for a built-in one; whatever its metaclass makes of those."""
    try:
        name, module = name_of(kind), module_of(kind)
    except AttributeError:
        return "object"
    shown = str.__getitem__(name, slice(0, 200)) if isinstance(name, str) else "object"
    if type(module) is not str or module == "builtins":
        return shown
    return f"{module[:200]}.{shown}"


def _opaque(value: Any) -> str:
    return f"<{type_name(type(value))}>"


def _exact(text: str, most: int) -> str:
    """At most the first ``most`` characters, of class ``str`` itself."""
    return str.__getitem__(text, slice(0, most))


def _is_base64(start: str) -> bool:
    """Whether a text that begins so is binary data in base64: one unbroken run of letters in both cases and digits."""
    return (
        " " not in start
        and _BASE64.fullmatch(start) is not None
        and any(map(str.islower, start))
        and any(map(str.isupper, start))
        and any(map(str.isdigit, start))
    )


def base64_size(text: str, start: int = 0) -> int:
    """How many bytes the base64 in ``text``, from ``start`` on, stands for."""
    length = str.__len__(text)
    padding = str.count(str.__getitem__(text, slice(max(start, length - 2), length)), "=")
    return (length - start) * 3 // 4 - padding


class _Walk:
    """One pass over a value: gives plain JSON values, with every string already free of secrets."""

    def __init__(self, content: Content) -> None:
        self.limit = content.limit
        self.media = content.media
        self.redact = content.redact
        self.nodes = min(MAX_NODES, content.limit // 2)
        self.path: set[int] = set()
        self.failure: Exception | None = None
        # Strings wait until all are known: only then it is clear how much of each there is room for.
        self.waiting: list[tuple[Any, Any, str]] = []

    def run(self, value: Any) -> Any:
        root: list[Any] = [None]
        self.place(root, 0, value, 0)
        if self.failure is not None:  # On a key.
            raise self.failure
        lengths = [str.__len__(text) for _, _, text in self.waiting]
        longest, room = _share(lengths, self.limit), 2 * self.limit
        for (holder, key, text), length in zip(self.waiting, lengths, strict=True):
            if room <= 0:
                holder[key] = _MARK.format(length, "characters")
                continue
            shown = self.text(text, longest)
            room -= len(shown)
            holder[key] = shown
        return root[0]

    def text(self, value: str, longest: int) -> str:
        """At most ``longest`` characters of ``value`` (and a mark), without secrets, redacted."""
        length = str.__len__(value)
        if (
            str.startswith(value, "data:")
            and (not self.media or length > longest)
            and (match := _DATA_URI.match(_exact(value, 1024)))
        ):
            return f"{match.group(0)}<{base64_size(value, match.end())} bytes>"
        if (
            length >= _BASE64_LENGTH
            and (not self.media or length > longest)
            and _is_base64(_exact(value, _BASE64_LENGTH))
        ):
            return f"<{base64_size(value)} bytes>"
        beyond = redaction.lookahead()
        piece = _exact(value, longest + beyond if length > longest else length)
        unseen = length - len(piece)
        shown = redaction.mask(piece)
        if self.redact is not None:
            try:
                shown = _exact(self.redact(shown), length + 1024)
            except Exception as error:
                self.failure = error
                raise
        if unseen:
            # Where the piece ends, half a secret may stand that nothing could recognise.
            unseen += min(beyond, len(shown))
            shown = shown[: max(len(shown) - beyond, 0)]
        if len(shown) > longest:
            unseen += len(shown) - longest
            shown = shown[:longest]
        return shown + _MARK.format(unseen, "characters") if unseen else shown

    def place(self, holder: Any, key: Any, value: Any, depth: int) -> None:
        """Put ``value`` as plain JSON into ``holder[key]``."""
        self.nodes -= 1
        kind = type(value)
        if kind is str:
            holder[key] = ""
            self.waiting.append((holder, key, value))
            return
        if value is None or kind is bool:
            holder[key] = value
            return
        try:
            if issubclass(kind, enum.Enum):
                value = instance_dict(value).get("_value_")
                kind = type(value)
            elif library(kind) == "numpy" and getattr(value, "shape", None) == ():
                value = value.item()  # A number of NumPy's, as Python's.
                kind = type(value)
            if issubclass(kind, str):
                holder[key] = ""
                self.waiting.append((holder, key, value))
            else:
                holder[key] = self.plain(value, kind, depth)
        except Exception:  # Hostile in a way nobody thought of: it has a class at least.
            holder[key] = _opaque(value)

    def plain(self, value: Any, kind: type, depth: int) -> Any:
        if kind is bool or value is None:
            return value
        if issubclass(kind, int):
            number = int.__int__(value)
            return number if number.bit_length() <= MAX_BITS else f"<int of {number.bit_length()} bits>"
        if issubclass(kind, float):
            real = float.__float__(value)
            return real if math.isfinite(real) else str(real)
        if issubclass(kind, (bytes, bytearray, memoryview)):
            return self.binary(value, kind)
        if issubclass(kind, _CONTAINERS) or id(kind) in _VIEWS:
            return self.within(value, depth, self.container, value, kind, depth)
        if id(kind) in _AS_TEXT:
            return str(value)[: self.limit]
        if issubclass(kind, (datetime.datetime, datetime.time)):
            return moment(value, kind)
        if issubclass(kind, type):
            return f"<class {type_name(value)}>"
        if kind is types.FunctionType or kind is types.BuiltinFunctionType:
            return f"<function {value.__qualname__[:200]}>"
        if kind is types.MethodType and type(value.__func__) is types.FunctionType:
            return f"<function {value.__func__.__qualname__[:200]}>"
        if library(kind) in _ARRAY_LIBRARIES:
            return array(value, kind)
        if issubclass(kind, BaseException):
            return self.within(value, depth, self.exception, value, kind, depth)
        stored = fields(value, kind)
        return _opaque(value) if stored is None else self.within(value, depth, self.mapping, stored, depth)

    def within(self, value: Any, depth: int, render: Callable[..., Any], *arguments: Any) -> Any:
        """``render(*arguments)``, unless ``value`` is being rendered already or is too deep inside."""
        key = id(value)
        if key in self.path:
            return _CYCLE
        if depth >= MAX_DEPTH:
            return _DEEPER
        self.path.add(key)
        try:
            return render(*arguments)
        finally:
            self.path.discard(key)

    def container(self, value: Any, kind: type, depth: int) -> Any:
        if issubclass(kind, dict):
            return self.mapping(value, depth)
        if issubclass(kind, tuple) and kind is not tuple:
            declared = (members_of(base).get("_fields") for base in bases_of(kind))
            names: tuple[Any, ...] = next((found for found in declared if type(found) is tuple), ())
            if names and len(names) == tuple.__len__(value):
                return self.mapping(dict(zip(names, tuple.__iter__(value), strict=True)), depth)
        base = next((base for base in _CONTAINERS if issubclass(kind, base)), kind)
        length = base.__len__(value)  # type: ignore[attr-defined]
        items = _snapshot(lambda: base.__iter__(value))  # type: ignore[attr-defined]
        if items is None:
            return _CHANGING
        if issubclass(kind, (set, frozenset)) and all(type(item) is str for item in items):
            items.sort()  # Each process has an order of its own for those.
        result: list[Any] = []
        for item in items:
            if self.nodes <= 0:
                break
            result.append(None)
            self.place(result, len(result) - 1, item, depth + 1)
        if len(result) < length:
            result.append(_MARK.format(length - len(result), "items"))
        return result

    def mapping(self, value: dict[Any, Any], depth: int) -> Any:
        length = dict.__len__(value)
        items = _snapshot(lambda: iter(dict.items(value)))
        if items is None:
            return _CHANGING
        result: dict[str, Any] = {}
        for key, item in items:
            if self.nodes <= 0:
                break
            name = self.key(key)
            while name in result:  # 1 and "1" are two keys of Python, and one of JSON.
                name += "'"
            if redaction.hides(name, item):
                result[name] = redaction.MASK
            else:
                self.place(result, name, item, depth + 1)
        if len(result) < length:
            result[_MORE] = _MARK.format(length - len(result), "items")
        return result

    def key(self, key: Any) -> str:
        kind = type(key)
        if issubclass(kind, str):
            return self.text(key, _MAX_KEY)
        if kind is tuple:
            return f"({', '.join(self.key(part) for part in islice(key, 8))})"[: 2 * _MAX_KEY]
        if key is None or kind is bool or kind is float or (kind is int and key.bit_length() <= MAX_BITS):
            return str(key)
        return _opaque(key)

    def exception(self, error: BaseException, kind: type, depth: int) -> Any:
        result: dict[str, Any] = {"type": type_name(kind)}
        arguments = arguments_of(error)
        self.place(result, "args", arguments, depth + 1)
        return result

    def binary(self, value: Any, kind: type) -> str:
        base: Any = next(base for base in (bytes, bytearray, memoryview) if issubclass(kind, base))
        size: int = value.nbytes if base is memoryview else base.__len__(value)
        if not self.media or size > self.limit:
            return f"<{size} bytes>"
        return base64.b64encode(base.__getitem__(value, slice(0, size))).decode("ascii")


class _Unusual(Exception):
    """A value that takes the long way."""


class _Copy:
    """A copy of an ordinary value: JSON's own types and DSPy's examples, short, with nothing to cut or to hide.

    Most content is like that, and is rendered in a fraction of the time that :class:`_Walk` takes, to the same text.
    """

    def __init__(self, limit: int) -> None:
        self.nodes = min(MAX_ITEMS, limit // 2)
        self.texts: list[str] = []

    def of(self, value: Any, depth: int = 0) -> Any:
        """The copy.

        Raises:
            _Unusual: ``value`` is not ordinary.
        """
        kind = type(value)
        if kind is str:
            self.texts.append(value)
            return value
        if value is None or kind is bool:
            return value
        if kind is int:
            if value.bit_length() > MAX_BITS:
                raise _Unusual
            return value
        if kind is float:
            if not math.isfinite(value):
                raise _Unusual
            return value
        if depth >= MAX_DEPTH:
            raise _Unusual
        if kind is dict:
            return self.mapping(value, depth)
        if kind is list or kind is tuple:
            self.nodes -= len(value)
            if self.nodes < 0:
                raise _Unusual
            return [self.of(item, depth + 1) for item in value]
        stored = instance_dict(value).get("_store") if _is_example(kind) else None
        if type(stored) is not dict:
            raise _Unusual
        return self.mapping(stored, depth)

    def mapping(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        self.nodes -= len(value)
        if self.nodes < 0:
            raise _Unusual
        texts, result = self.texts, dict[str, Any]()
        for key, item in value.items():
            if type(key) is not str or len(key) > _MAX_KEY or redaction.hides(key, item):
                raise _Unusual
            texts.append(key)
            if type(item) is str:
                texts.append(item)
                result[key] = item
            else:
                result[key] = self.of(item, depth + 1)
        return result

    def hides_nothing(self, limit: int) -> bool:
        """Whether all texts of the copy may be shown whole, within ``limit`` characters."""
        total = 0
        for text in self.texts:
            total += (length := len(text))
            if length >= _BASE64_LENGTH and _is_base64(text[:_BASE64_LENGTH]):
                return False
        if total > limit:
            return False
        together = "\n".join(self.texts)
        return "data:" not in together and not redaction.suspect(together)


def _is_example(kind: type) -> bool:
    """Whether ``kind`` is DSPy's own ``Example`` or ``Prediction``."""
    return type(kind) is type and module_of(kind) in _EXAMPLES


def _snapshot(iterate: Callable[[], Iterator[Any]]) -> list[Any] | None:
    """The first items of a container, or ``None`` if another thread never stops changing it."""
    for _ in range(3):
        try:
            return list(islice(iterate(), MAX_ITEMS))
        except RuntimeError:  # Changed during iteration.
            continue
    return None


def moment(value: Any, kind: type) -> str:
    """A date and time, or a time. A time zone class of the user's is not asked anything."""
    if kind is datetime.datetime or kind is datetime.time:
        zone = type(value.tzinfo)
        if zone is type(None) or zone is datetime.timezone or module_of(zone) in ("zoneinfo", "dateutil.tz.tz"):
            return str(value)
        return f"{value.replace(tzinfo=None)} <{type_name(zone)}>"
    return str(value) if library(kind) == "pandas" else f"<{type_name(kind)}>"


def array(value: Any, kind: type) -> str:
    """Arrays and tables by kind, shape and type of their elements."""
    parts = [type_name(kind)]
    for name in ("shape", "dtype"):
        found = getattr(value, name, None)
        if found is not None:
            parts.append(str(found)[:200])
    return f"<{' '.join(parts)}>"


def fields(value: Any, kind: type) -> dict[Any, Any] | None:
    """The stored fields of a DSPy example or prediction, pydantic model, dataclass or attrs class; else ``None``.

    Those that a class keeps out of its own ``repr`` are left out here as well.
    """
    if kind is types.SimpleNamespace:
        return instance_dict(value)
    declared: Any = None
    for base in bases_of(kind):
        members = members_of(base)
        if name_of(base) == "Example" and module_of(base) == "dspy.primitives.example":
            store = instance_dict(value).get("_store")
            return store if isinstance(store, dict) else None
        for marker in ("__pydantic_fields__", "__dataclass_fields__", "__attrs_attrs__"):
            if declared is None and marker in members:
                declared = members[marker]
    if isinstance(declared, tuple):
        declared = {attribute.name: attribute for attribute in islice(declared, MAX_ITEMS)}
    if not isinstance(declared, dict):
        return None
    stored, result = instance_dict(value), {}
    for name, about in islice(dict.items(declared), MAX_ITEMS):
        if getattr(about, "repr", True) is False or getattr(about, "exclude", None) is True:
            continue
        if name in stored:
            result[name] = stored[name]
        elif found := slot(value, name):
            result[name] = found[0]
    extra = slot(value, "__pydantic_extra__")
    if extra and type(extra[0]) is dict:
        result.update(islice(extra[0].items(), MAX_ITEMS))
    return result


def _share(lengths: Iterable[int], budget: int) -> int:
    """The longest length at which all strings together fit: short ones stay whole, long ones share the rest."""
    ordered = sorted(lengths)
    rest = budget
    for position, length in enumerate(ordered):
        share = rest // (len(ordered) - position)
        if length > share:
            return max(share - _MARK_SIZE, MIN_LIMIT)
        rest -= length
    return budget


# --- fitting plain values into a number of bytes -------------------------------------------------------------------


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))


def _encode(value: Any) -> str:
    return _ENCODER.encode(value)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _fit(value: Any, room: int) -> Any:
    """``value`` so that its JSON takes at most ``room`` bytes (64 or more), saying what was cut.

    Short parts stay whole, long ones share the room that is left; when there are too many, the last ones go.
    """
    if isinstance(value, str):
        return _fit_text(value, room)
    if isinstance(value, dict):
        keys, items = list(value), list(value.values())
        more = len(keys) > 0 and keys[-1] == _MORE
        fixed = [_bytes(_encode(key)) + 2 for key in keys]
    elif isinstance(value, list):
        keys, items, fixed = [], value, [1] * len(value)
        more = len(items) > 0
    else:
        return value
    sizes = [_bytes(_encode(item)) for item in items]
    room -= 2
    if sum(sizes) + sum(fixed) <= room:
        return value
    least = [min(size, MIN_LIMIT) + around for size, around in zip(sizes, fixed, strict=True)]
    kept, cut = len(items), 0
    if sum(least) > room:
        # What an earlier cut said is added to what this one says.
        said = _MARKED_ITEMS.fullmatch(items[-1]) if more and isinstance(items[-1], str) else None
        cut = int(said.group(1)) - 1 if said is not None else 0
        room -= _MARK_SIZE
        kept = sum(total <= room for total in accumulate(least))
    left = room - sum(fixed[:kept])
    share = max(_share_of(sizes[:kept], left), MIN_LIMIT)
    fitted = [
        item if size <= share else _fit(item, share) for item, size in zip(items[:kept], sizes[:kept], strict=True)
    ]
    mark = _MARK.format(len(items) - kept + cut, "items") if kept < len(items) else None
    if isinstance(value, list):
        return fitted if mark is None else [*fitted, mark]
    result = dict(zip(keys, fitted, strict=False))
    if mark is not None:
        result[_MORE] = mark
    return result


def _share_of(sizes: list[int], room: int) -> int:
    """The size to which the larger ones must shrink so that all fit."""
    ordered = sorted(sizes)
    for position, size in enumerate(ordered):
        share = room // (len(ordered) - position)
        if size > share:
            return share
        room -= size
    return room


def _fit_text(text: str, room: int) -> str:
    cut_before = _MARKED.search(text, max(len(text) - _MARK_SIZE, 0))
    shown, cut = text, 0
    while (size := _bytes(_encode(shown))) > (room - _MARK_SIZE if cut else room):
        whole = len(text) if cut_before is None else cut_before.start()
        keep = min(len(shown) * max(room - _MARK_SIZE - 2, 0) // size, len(shown) - 1, whole)
        shown, cut = shown[:keep], whole - keep + (0 if cut_before is None else int(cut_before.group(1)))
    return shown + _MARK.format(cut, "characters") if cut else shown


def _utf8(text: str) -> str:
    """``text`` with lone surrogates replaced (OTLP carries UTF-8 only), and pairs joined."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Content:
    """How content becomes text, as one set of settings wants it.

    Args:
        limit: most bytes (UTF-8) of one text; at least 64.
        media: whether binary data is kept; else it is named by type and size.
        redact: a user's function from text to text, applied to each string.
    """

    def __init__(self, limit: int, media: bool = False, redact: Callable[[str], str] | None = None) -> None:
        self.limit = max(limit, MIN_LIMIT)
        self.media = media
        self.redact = redact

    def json(self, value: Any) -> str:
        """``value`` as JSON text of at most ``limit`` bytes.

        Long strings are cut and say by how many characters, containers by how many items.

        Raises:
            Exception: only what the user's ``redact`` raises; callers drop the content then.
        """
        plain = self._ordinary(value)
        if plain is None:
            plain = self.plain(value)
        text = _encode(plain)
        # Four bytes is the most a character takes.
        if 4 * len(text) > self.limit and _bytes(text) > self.limit:
            text = _encode(_fit(plain, self.limit))
        return _utf8(text)

    def _ordinary(self, value: Any) -> Any:
        """``value`` as plain JSON values, if that takes no more than copying it; else ``None``."""
        if self.redact is not None:
            return None
        copy = _Copy(self.limit)
        try:
            plain = copy.of(value)
        except Exception:  # `_Unusual`, or it changes while it is read.
            return None
        return plain if copy.hides_nothing(self.limit) else None

    def plain(self, value: Any) -> Any:
        """``value`` as plain JSON values, bounded in depth, items and text, but not yet cut to the limit."""
        return _Walk(self).run(value)

    def text(self, value: Any) -> str:
        """One piece of text (a string as it is, anything else as JSON), of at most ``limit`` bytes."""
        if not issubclass(type(value), str):
            return self.json(value)
        text = _utf8(_Walk(self).text(value, self.limit))
        data = text.encode("utf-8")
        if len(data) <= self.limit:
            return text
        mark = _MARK.format(len(data) - self.limit + _MARK_SIZE, "bytes")
        return data[: self.limit - _MARK_SIZE].decode("utf-8", "ignore") + mark
