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
import math
import pathlib
import re
import types
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final

from dspy_otel.content import redaction
from dspy_otel.content.introspection import (
    arguments_of,
    bases_of,
    has_known_zone,
    has_method,
    instance_dict,
    library,
    members_of,
    module_of,
    name_of,
    slot,
)
from dspy_otel.content.truncation import MARK, MARK_SIZE, MIN_LIMIT, MORE, encode, fit, repaired, size_of
from dspy_otel.content.walker import Walker

MAX_DEPTH: Final = 16
MAX_ITEMS: Final = 1000
MAX_NODES: Final = 10_000
MAX_BITS: Final = 128
_MAX_KEY: Final = 256
_MOST_ARGUMENTS: Final = 128
"""Longest list that may be a command line."""

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
_MOST_HARMLESS: Final = 2**18
"""Characters of all texts that are known to be harmless."""
_LONG: Final = 4096
_HEAD: Final = 256
"""Texts of at least that length are known by so many of their first characters, and looked for in others by those."""
_MOST_LINES: Final = 64
"""At the beginnings of so many lines."""
_BASE64_LENGTH: Final = 256
_LINE_LENGTH: Final = 56
_LINES_LENGTH: Final = 4 * 60 + 3
_BEGINNING: Final = 512
"""Binary data in a text is recognised by so many characters of it."""
_MOST_DASHES: Final = 24
"""Of so many characters at most this many are dashes in URL-safe base64: words joined by dashes have more."""
_LINE: Final = r"[A-Za-z0-9+/]{60,76}"
_LINE_END: Final = r"(?:\r?\n|(?:\\r)?\\n)"  # also escaped, as in JSON
# In groups of four: what follows a last line that is full may be a word.
_LAST_LINE: Final = (
    r"(?:[A-Za-z0-9+/]{4}){0,19}(?:[A-Za-z0-9+/]{4}|[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)(?=[\s\"'\\`]|\Z)"
)
_QUOTED_URL: Final = re.compile(r"data:[\w.+-]{1,40}/[\w.+-]{1,80}[;,]")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]+")
_UP_TO_OTHER: Final = re.compile(r".*[^A-Za-z0-9+/_-]", re.DOTALL)
# Binary data inside a text: a data URL, or base64 alone, also in lines or URL-safe. DSPy writes an image of a demo, a
# history or a tool's result into a text that way when it saves a program or makes a prompt.
_MEDIA: Final = re.compile(
    r"(data:[\w.+/-]{0,80}(?:;[\w=.+-]{0,80}){0,8};base64,)[A-Za-z0-9+/_-]*={0,2}"
    rf"|(data:[\w.+-]{{1,40}}/[\w.+-]{{1,80}}(?:;[\w=.+-]{{1,40}}){{0,3}},)[^\s\"<>\\`]{{{_BASE64_LENGTH},}}"
    rf"|(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{{{_BASE64_LENGTH},}}={{0,2}}"
    rf"|(?<![A-Za-z0-9+/]){_LINE}(?:{_LINE_END}{_LINE}){{3,}}(?:{_LINE_END}{_LAST_LINE})?"
    rf"|(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{{{_BASE64_LENGTH},}}={{0,2}}"
)


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
    """Whether a run that begins so is binary data in base64: letters in both cases and digits, not many words."""
    return (
        any(map(str.islower, start))
        and any(map(str.isupper, start))
        and any(map(str.isdigit, start))
        and start.count("-") + start.count("_") <= _MOST_DASHES
    )


def _has_base64(text: str) -> bool:
    """Whether a run of at least ``_BASE64_LENGTH`` characters of base64, or some lines of it, may be in a text."""
    start, length = 0, len(text)
    in_lines = "\n" in text or "\\" in text
    least = _LINES_LENGTH if in_lines else _BASE64_LENGTH
    while start + least <= length:
        end = start + least
        # Behind the last character that belongs to no such run; a space is found faster.
        space = text.rfind(" ", start, end)
        if space >= 0:
            start = space + 1
        elif (found := _UP_TO_OTHER.match(text, start, end)) is not None:
            # In lines, such a run is before the last end of a line; CR and escapes take two characters more at most.
            line = max(text.rfind("\n", start, end), text.rfind("\\", start, end)) - 2 if in_lines else start
            if line - _LINE_LENGTH > start and _BASE64.fullmatch(text, line - _LINE_LENGTH, line) is not None:
                return True
            start = found.end()
        else:
            return True
    return False


def _has_media(text: str) -> bool:
    return _has_data_url(text) or _has_base64(text)


def _has_data_url(text: str) -> bool:
    """Whether a data URL may be in a text. One character is found much faster, and many texts lack it."""
    return (";" in text and ";base64," in text) or ("%" in text and _QUOTED_URL.search(text) is not None)


def without_media(text: str, most: int) -> tuple[str, int]:
    """``text`` with the size of binary data in place of it, and how many characters of it were not looked at.

    Args:
        text: any text; of a long one no more is copied than what comes back.
        most: about how many characters may come back.
    """
    length, position, room = str.__len__(text), 0, most
    parts: list[str] = []
    while room > 0 and position < length:
        stop = min(position + room, length)
        # One that begins before `stop` shows at its first characters; how long it is, only where it ends.
        found = _MEDIA.search(text, position, stop + _BEGINNING)
        if found is not None:
            found = _MEDIA.match(text, found.start()) if found.start() < stop else None
        if found is None:
            parts.append(str.__getitem__(text, slice(position, stop)))
            position = stop
        else:
            parts.append(str.__getitem__(text, slice(position, found.start())) + _described_media(text, found))
            position = found.end()
        room -= len(parts[-1])
    return "".join(parts), length - position


def _described_media(text: str, found: re.Match[str]) -> str:
    start, end = found.span()
    if found.start(2) >= 0:
        data = found.end(2)
        size = end - data - 2 * str.count(text, "%", data, end)
        return f"{str.__getitem__(text, slice(start, data))}<{size} bytes>"
    data = start if found.start(1) < 0 else found.end(1)
    if data == start and not _is_base64(str.__getitem__(text, slice(start, start + _BASE64_LENGTH))):
        return str.__getitem__(text, slice(start, end))
    breaks = str.count(text, "\n", data, end) + str.count(text, "\r", data, end) + 2 * str.count(text, "\\", data, end)
    padding = str.count(text, "=", max(data, end - 2), end)
    return f"{str.__getitem__(text, slice(start, data))}<{(end - data - breaks) * 3 // 4 - padding} bytes>"


def base64_size(text: str, start: int = 0) -> int:
    """How many bytes the base64 in ``text``, from ``start`` on, stands for."""
    length = str.__len__(text)
    padding = str.count(str.__getitem__(text, slice(max(start, length - 2), length)), "=")
    return (length - start) * 3 // 4 - padding


class _Shown(str):
    """A text that stays as it is: one of ours, or one of the user's that is masked already."""

    __slots__ = ()


_MASKED: Final = _Shown(redaction.MASK)


class _ContentWalker(Walker):
    """Gives plain JSON values in which every string is free of secrets.

    The value is copied first, with its strings as they are, because only all of them together show how much of each
    there is room for. Most content is short and without secrets. One look at all its strings together shows that, and
    the copy is the result.
    """

    max_items = MAX_ITEMS
    max_depth = MAX_DEPTH

    longest = room = 0
    failure: Exception | None = None
    only_str = True

    def __init__(self, content: Content) -> None:
        super().__init__(content.max_nodes)
        self.content = content
        self.strings: list[str] = []

    def run(self, value: Any) -> Any:
        """``value`` as plain JSON values.

        Raises:
            Exception: what the user's ``redact`` raises.
        """
        copy = self.of(value)
        if self.failure is not None:  # On a key.
            raise self.failure
        if self.is_harmless():
            return copy
        self.longest = _share(_lengths(copy), self.content.limit)
        self.room = 2 * self.content.limit
        return self.masked(copy)

    def is_harmless(self) -> bool:
        """Whether all strings together fit into the limit, and none needs to be masked or shortened."""
        return self.only_str and self.content.is_harmless(self.strings)

    def masked(self, copy: Any) -> Any:
        """The copy, with its strings as they may be shown."""
        kind = type(copy)
        if kind is dict:
            result: dict[str, Any] = {}
            for key, item in copy.items():
                name = key if type(key) is _Shown else self.show(key, _MAX_KEY)
                while name in result:
                    name = _other_name(name)
                result[name] = self.masked(item)
            return result
        if kind is list:
            return [self.masked(item) for item in copy]
        if kind is _Shown or not issubclass(kind, str):
            return copy
        if self.room <= 0:
            return MARK.format(str.__len__(copy), "characters")
        shown = self.show(copy, self.longest)
        self.room -= len(shown)
        return shown

    def show(self, value: str, longest: int) -> str:
        """At most ``longest`` characters of ``value`` (and a mark), without secrets, redacted."""
        length = str.__len__(value)
        if type(value) is str and length <= longest and self.content.is_harmless([value]):
            return value
        beyond = redaction.lookahead()
        most, unseen = longest + beyond, 0
        if (not self.content.media or length > longest) and _has_media(_exact(value, most + _BEGINNING)):
            value, unseen = without_media(value, most)
            length = len(value)
        piece = _exact(value, most if length > longest else length)
        unseen += length - len(piece)
        shown = redaction.mask(piece)
        if self.content.redact is not None:
            try:
                shown = _exact(self.content.redact(shown), length + 1024)
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
        return shown + MARK.format(unseen, "characters") if unseen else shown

    def text(self, value: str) -> str:
        self.strings.append(value)
        return value

    def integer(self, value: int) -> int | str:
        bits = value.bit_length()
        return value if bits <= MAX_BITS else _Shown(f"<int of {bits} bits>")

    def real(self, value: float) -> float | str:
        return value if math.isfinite(value) else _Shown(value)

    def other(self, value: Any, kind: type, depth: int) -> Any:
        try:
            if (
                type(kind) is type
                and module_of(kind) in _EXAMPLES
                and type(store := instance_dict(value).get("_store")) is dict
            ):
                return self.mapping(value, store, depth)
            if issubclass(kind, enum.Enum):
                value = instance_dict(value).get("_value_")
                kind = type(value)
            elif library(kind) == "numpy" and getattr(value, "shape", None) == ():
                value = value.item()  # A number of NumPy's, as Python's.
                kind = type(value)
            return self.plain(value, kind, depth)
        except Exception:  # Hostile in an unforeseen way: it has a class at least.
            return _Shown(_opaque(value))

    def plain(self, value: Any, kind: type, depth: int) -> Any:
        if kind is bool or value is None or kind is _Shown:
            return value
        if issubclass(kind, str):
            self.only_str = self.only_str and kind is str
            return self.text(value)
        if issubclass(kind, int):
            return self.integer(int.__int__(value))
        if issubclass(kind, float):
            return self.real(float.__float__(value))
        if issubclass(kind, (bytes, bytearray, memoryview)):
            return _Shown(self.binary(value, kind))
        if issubclass(kind, _CONTAINERS) or id(kind) in _VIEWS:
            return self.container(value, kind, depth)
        if issubclass(kind, BaseException):
            about = {_Shown("type"): _Shown(type_name(kind)), _Shown("args"): arguments_of(value)}
            return self.mapping(value, about, depth)
        shown = _described(value, kind)
        if shown is not None:
            return _Shown(shown[: self.content.limit])
        stored = fields(value, kind)
        return _Shown(_opaque(value)) if stored is None else self.mapping(value, stored, depth)

    def container(self, value: Any, kind: type, depth: int) -> Any:
        if issubclass(kind, dict):
            return self.mapping(value, value, depth)
        if issubclass(kind, tuple) and kind is not tuple:
            declared = (members_of(base).get("_fields") for base in bases_of(kind))
            names: tuple[Any, ...] = next((found for found in declared if type(found) is tuple), ())
            if names and len(names) == tuple.__len__(value):
                return self.mapping(value, dict(zip(names, tuple.__iter__(value), strict=True)), depth)
        base: Any = next((base for base in _CONTAINERS if issubclass(kind, base)), kind)
        items = self.snapshot(base.__iter__, value)
        if items is not None and base in (set, frozenset) and all(type(item) is str for item in items):
            items.sort()  # Each process has an order of its own for those.
        return self.sequence(value, items, base.__len__(value), depth)

    def mapping(self, owner: Any, entries: dict[Any, Any], depth: int) -> Any:
        result = super().mapping(owner, entries, depth)
        if type(result) is dict and not redaction.NAMING.isdisjoint(result):
            key = redaction.named(result)
            if key is not None:
                result[key] = _MASKED  # {"name": "api_key", "value": ...}
        return result

    def sequence(self, owner: Any, items: Any, length: int, depth: int) -> Any:
        if (type(items) is not list and type(items) is not tuple) or not 2 <= len(items) <= _MOST_ARGUMENTS:
            return super().sequence(owner, items, length, depth)
        if type(items[0]) is not str and type(items[0]) is not bytes:
            return super().sequence(owner, items, length, depth)
        hidden = [place + 1 for place, item in enumerate(items[:-1]) if redaction.hides_next(item, items[place + 1])]
        if not hidden and length == len(items) == 2 and redaction.hides_pair(*items):
            hidden = [1]  # ("Authorization", ...)
        if not hidden:
            return super().sequence(owner, items, length, depth)
        shown = [None if place in hidden else item for place, item in enumerate(items)]
        result = super().sequence(owner, shown, length, depth)
        for place in hidden if type(result) is list else ():
            if place < len(result):
                result[place] = _MASKED
        return result

    def entry(self, result: dict[str, Any], key: Any, item: Any, depth: int) -> None:
        if type(key) is str and len(key) <= _MAX_KEY:
            name = key
            self.strings.append(key)
        else:
            name = key if type(key) is _Shown else _Shown(self.key(key))
        while name in result:
            name = _other_name(name)
        known_as = key.decode("latin-1") if type(key) is bytes and len(key) <= _MAX_KEY else name
        if redaction.name_kind(known_as) and redaction.hides(known_as, item):
            result[name] = _MASKED
        elif type(item) is str:  # As `of` does it; most entries are texts.
            self.nodes -= 1
            self.strings.append(item)
            result[name] = item
        else:
            result[name] = self.of(item, depth)

    def key(self, key: Any) -> str:
        kind = type(key)
        if issubclass(kind, str):
            return self.show(key, _MAX_KEY)
        if kind is tuple:
            return f"({', '.join(self.key(part) for part in islice(key, 8))})"[: 2 * _MAX_KEY]
        if key is None or kind is bool or kind is float or (kind is int and key.bit_length() <= MAX_BITS):
            return str(key)
        return _opaque(key)

    def cut(self, result: dict[str, Any] | list[Any], taken: int, length: int) -> None:
        mark = _Shown(MARK.format(length - taken, "items"))
        if isinstance(result, list):
            result.append(mark)
        else:
            result[_Shown(MORE)] = mark

    def stop(self, reason: str) -> str:
        return _Shown(reason)

    def binary(self, value: Any, kind: type) -> str:
        base: Any = next(base for base in (bytes, bytearray, memoryview) if issubclass(kind, base))
        size: int = value.nbytes if base is memoryview else base.__len__(value)
        if not self.content.media or size > self.content.limit:
            return f"<{size} bytes>"
        return base64.b64encode(base.__getitem__(value, slice(0, size))).decode("ascii")


_UNUSUAL: Final = object()
_TEXT: Final = frozenset({id(str)})
_MOST_SHAPES: Final = 256


def _ordinary(value: Any, strings: list[str], nodes: list[int], depth: int, harmless: _Harmless) -> Any:
    """A copy of an ordinary value, as the walker makes it, in a third of the time; of another, :data:`_UNUSUAL`.

    Most content is ordinary: dictionaries, lists, texts and numbers of the built-in types, or one of DSPy's predictions
    of those, within all limits, with no name that might be one of a secret.

    Args:
        value: any value.
        strings: all texts in it are added.
        nodes: how many values there may be yet, as a list of one.
        depth: how many containers it is in.
        harmless: what is known to be harmless.
    """
    kind = type(value)
    if kind is not dict and kind is not list:
        if kind is str:
            strings.append(value)
            return value
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if value.bit_length() <= MAX_BITS else _UNUSUAL
        if kind is float:
            return value if math.isfinite(value) else _UNUSUAL
        store = instance_dict(value).get("_store") if type(kind) is type and module_of(kind) in _EXAMPLES else None
        if type(store) is not dict:
            return _UNUSUAL
        value, kind = store, dict
    length = len(value)
    nodes[0] -= length
    if length > MAX_ITEMS or nodes[0] <= 0 or depth >= MAX_DEPTH:
        return _UNUSUAL
    if kind is list:
        items = value[:]
        if len(items) > 1 and type(items[0]) is str and _may_name_secrets(items):
            return _UNUSUAL
        if _TEXT.issuperset(map(id, map(type, items))):
            strings += items
            return items
        for place, item in enumerate(items):
            items[place] = shown = _ordinary(item, strings, nodes, depth + 1, harmless)
            if shown is _UNUSUAL:
                return _UNUSUAL
        return items
    entries: dict[Any, Any] = value.copy()
    keys = tuple(entries)
    if not _TEXT.issuperset(map(id, map(type, keys))):
        return _UNUSUAL
    naming = harmless.shapes.get(keys)
    if naming is None and (naming := harmless.add_shape(keys)) is None:
        return _UNUSUAL
    if _TEXT.issuperset(map(id, map(type, entries.values()))):
        strings += entries.values()
    else:
        for key, item in entries.items():
            if type(item) is str:
                strings.append(item)
                continue
            entries[key] = shown = _ordinary(item, strings, nodes, depth + 1, harmless)
            if shown is _UNUSUAL:
                return _UNUSUAL
    return _UNUSUAL if naming and redaction.named(entries) is not None else entries


def _may_name_secrets(items: list[Any]) -> bool:
    """Whether a list that begins with a text may be the arguments of a command line, or a name and its value."""
    if len(items) == 2 and redaction.hides_pair(*items):
        return True
    return any(type(item) is str and item.startswith("--") for item in items)


def _lengths(copy: Any) -> Iterator[int]:
    """The length of each string of a copy that is not shown yet."""
    kind = type(copy)
    if kind is dict or kind is list:
        for item in copy.values() if kind is dict else copy:
            yield from _lengths(item)
    elif kind is not _Shown and issubclass(kind, str):
        yield str.__len__(copy)


def _other_name(name: str) -> str:
    """1 and "1" are two keys of Python, and one of JSON."""
    return type(name)(f"{name}'")


def _described(value: Any, kind: type) -> str | None:
    """A value of the standard library or of a library for arrays as one text; ``None`` for any other."""
    if id(kind) in _AS_TEXT:
        return str(value)
    if issubclass(kind, (datetime.datetime, datetime.time)):
        return moment(value, kind)
    if issubclass(kind, type):
        return f"<class {type_name(value)}>"
    if kind is types.FunctionType or kind is types.BuiltinFunctionType:
        return f"<function {value.__qualname__[:200]}>"
    if kind is types.MethodType and type(value.__func__) is types.FunctionType:
        return f"<function {value.__func__.__qualname__[:200]}>"
    return array(value, kind) if library(kind) in _ARRAY_LIBRARIES else None


def moment(value: Any, kind: type) -> str:
    """A date and time, or a time. No code of a user's time zone class runs."""
    if kind is datetime.datetime or kind is datetime.time:
        if has_known_zone(value):
            return str(value)
        return f"{value.replace(tzinfo=None)} <{type_name(type(value.tzinfo))}>"
    return str(value) if library(kind) == "pandas" else f"<{type_name(kind)}>"


def array(value: Any, kind: type) -> str:
    """Arrays and tables by kind, shape and type of their elements.

    Only what the class itself has: a table may have a column of that name, and a lazy array may record what is asked.
    """
    parts = [type_name(kind)]
    for name in ("shape", "dtype"):
        found = getattr(value, name, None) if has_method(value, name) else None
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
            return max(share - MARK_SIZE, MIN_LIMIT)
        rest -= length
    return budget


class _Harmless:
    """Texts in which nothing is to be masked or described, as far as they were looked at lately.

    Instructions and demos come with each call, and a question goes through several modules: each is searched once. A
    text with a secret in it is never kept, nor more than 256 k characters.

    Attributes:
        remembered: how many secrets were known by their value. Of one more, the texts are not known to be free.
        shapes: the keys of dictionaries, of which none has to be masked nor may be the name of a secret, and whether
            one of the entries may name another one.
    """

    def __init__(self, remembered: int = 0) -> None:
        self.remembered = remembered
        self.shapes: dict[tuple[str, ...], bool] = {}
        self._texts: dict[str, None] = {}
        # To hash a long one would take as long as to search it for some sign: by beginning and length, and of each
        # beginning the newest.
        self._long: dict[tuple[str, int], str] = {}
        self._newest: dict[str, str] = {}
        self._room = _MOST_HARMLESS

    def are(self, texts: list[str]) -> bool:
        """Whether none of these texts, of class ``str`` itself, needs to be masked or described."""
        known = self._texts
        new = [text for text in texts if (text not in known if len(text) < _LONG else not self._knows(text))]
        if not new:
            return True
        together = "\n".join([text if len(text) < _LONG else self._unseen(text) for text in new])
        scanned = redaction.scan(together)
        if scanned.suspect or _has_data_url(together):
            return False
        # Base64 is a long run, unless one of two signs breaks it.
        if (scanned.runs or "/" in together or "+" in together) and _has_base64(together):
            return False
        self._room -= sum(map(len, new))
        if self._room < 0:
            self._texts, self._long, self._newest = {}, {}, {}
            self._room = _MOST_HARMLESS - sum(map(len, new))
        for text in new:
            if len(text) < _LONG:
                self._texts[text] = None
            else:
                head = text[:_HEAD]
                self._long[head, len(text)] = self._newest[head] = text
        return True

    def _knows(self, text: str) -> bool:
        return self._long.get((text[:_HEAD], len(text))) == text

    def _unseen(self, text: str) -> str:
        """A text without the inside of long ones that are known: a prompt has the long input of a module in it.

        They are looked for at the beginnings of lines. As far from their ends as :func:`redaction.lookahead` tells,
        nothing around them makes them secrets, but for an element of XML, which ends as it has begun.
        """
        if "<" in text and "</" in text:  # One character is found faster than two.
            return text
        around = redaction.lookahead()
        pieces: list[str] = []
        start = done = 0
        for _ in range(_MOST_LINES):
            known = self._newest.get(text[start : start + _HEAD])
            if known is not None and len(known) > 2 * around and text.startswith(known, start):
                pieces.append(text[done : start + around])
                start += len(known)
                done = start - around
            start = text.find("\n", start) + 1
            if not start:
                break
        return "\n".join((*pieces, text[done:]))

    def add_shape(self, keys: tuple[str, ...]) -> bool | None:
        """What is to be kept in ``shapes``; ``None`` if one of the keys is long, or no harmless name."""
        if any(len(key) > _MAX_KEY or redaction.name_kind(key) for key in keys) or not self.are([*keys]):
            return None
        found = not redaction.NAMING.isdisjoint(keys)
        if len(self.shapes) < _MOST_SHAPES:
            self.shapes[keys] = found
        return found


_harmless = _Harmless()


def _known_harmless() -> _Harmless:
    global _harmless  # noqa: PLW0603
    if _harmless.remembered != redaction.remembered:
        _harmless = _Harmless(redaction.remembered)
    return _harmless


class Content:
    """How content becomes text, with one set of settings.

    Args:
        limit: most bytes (UTF-8) of one text; at least 64.
        media: whether binary data is kept; else it is named by type and size.
        redact: a user's function from text to text, applied to each string.
    """

    def __init__(self, limit: int, media: bool = False, redact: Callable[[str], str] | None = None) -> None:
        self.limit = max(limit, MIN_LIMIT)
        self.max_nodes = min(MAX_NODES, self.limit // 2)
        self.media = media
        self.redact = redact

    def json(self, value: Any) -> str:
        """``value`` as JSON text of at most ``limit`` bytes.

        Long strings are cut and say by how many characters, containers by how many items.

        Raises:
            Exception: only what the user's ``redact`` raises; callers drop the content then.
        """
        strings: list[str] = []
        harmless = _known_harmless()
        plain = _UNUSUAL if self.redact is not None else _ordinary(value, strings, [self.max_nodes - 1], 0, harmless)
        length = sum(map(len, strings))
        if plain is _UNUSUAL or length > self.limit or not harmless.are(strings):
            plain = _ContentWalker(self).run(value)
        text = encode(plain)
        # A character of ASCII takes one byte, and no other more than four.
        size = len(text) if text.isascii() else 4 * len(text)
        if size > self.limit and size_of(text) > self.limit:
            text = encode(fit(plain, self.limit))
        return text if text.isascii() else repaired(text)

    def is_harmless(self, strings: list[str]) -> bool:
        """Whether these strings together fit into the limit, and none needs to be masked or shortened."""
        return self.redact is None and sum(map(len, strings)) <= self.limit and _known_harmless().are(strings)

    def text(self, value: Any) -> str:
        """One piece of text (a string as it is, anything else as JSON), of at most ``limit`` bytes."""
        if not issubclass(type(value), str):
            return self.json(value)
        if type(value) is not str or not self.is_harmless([value]):
            value = _ContentWalker(self).show(value, self.limit)
        text = repaired(value)
        data = text.encode("utf-8")
        if len(data) <= self.limit:
            return text
        mark = MARK.format(len(data) - self.limit + MARK_SIZE, "bytes")
        return data[: self.limit - MARK_SIZE].decode("utf-8", "ignore") + mark
