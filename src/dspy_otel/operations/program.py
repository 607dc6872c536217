"""Programs: their identity, and where each of their modules sits."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import hashlib
import json
import math
import operator
import uuid
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final

from dspy_otel.content import introspection
from dspy_otel.content.introspection import is_a
from dspy_otel.core.call_context import Program
from dspy_otel.core.internal_errors import guarded

ID_LENGTH: Final = 16
"""Hex digits of ``dspy.program.id`` and of an example's id: 64 bits."""

_MAX_MODULES: Final = 2000
_MAX_ITEMS: Final = 256
_MAX_OBJECTS: Final = 4096

_MAX_PATH: Final = 128
_MAX_KEY: Final = 32

# Containers that hold no modules and may be long: of every module, and of predictors.
_LOGS: Final = frozenset({"history", "callbacks"})
_PREDICTOR_STATE: Final = frozenset({"traces", "train", "demos", "config", "fields", *_LOGS})
_LEAVES: Final = frozenset({str, int, float, bool, type(None), bytes})

_MAX_DEPTH: Final = 64
_MAX_NODES: Final = 100_000
_MAX_CHARACTERS: Final = 1_000_000
_MAX_BITS: Final = 10_000
_FIELDS: Final = frozenset({"__dataclass_fields__", "__pydantic_fields__"})


_MODULE: Final = 1
_CONTAINER: Final = 2


class _Kinds(dict[type, int]):
    """What a class is in a program: a module, a container of some, or neither (0). From memory.

    A kind of ``dspy.Module`` is told by its bases' names, without importing DSPy.
    """

    def __missing__(self, kind: type) -> int:
        is_module = any(base.__name__ == "BaseModule" and base.__module__.startswith("dspy.") for base in kind.__mro__)
        answer = _MODULE if is_module else _CONTAINER if kind in (list, tuple, dict) else 0
        if len(self) < 4096:
            self[kind] = answer
        return answer


_KINDS: Final = _Kinds()


def walk(root: Any) -> list[tuple[str, Any]]:
    """Every module below ``root`` with its path, as ``named_predictors()`` would write it; ``root`` itself is ``""``.

    Faster than DSPy's own ``named_sub_modules()``, and bounded: 2,000 modules, 256 items of a container.
    """
    seen = {id(root)}
    stack: list[tuple[str, Any]] = [("", root)]
    found: list[tuple[str, Any]] = []
    while stack and len(found) < _MAX_MODULES:
        path, module = entry = stack.pop()
        found.append(entry)
        stored = module.__dict__
        without = _PREDICTOR_STATE if "signature" in stored else _LOGS
        children: list[tuple[str, Any]] = []
        for name, value in list(stored.items()):
            kind = _KINDS[type(value)]
            if kind == _MODULE:
                children.append((_short(f"{path}.{name}" if path else name), value))
            elif kind and value and name not in without:
                children.extend(_items(f"{path}.{name}" if path else name, value, 2))
        for child in reversed(children):
            if id(child[1]) not in seen:
                seen.add(id(child[1]))
                stack.append(child)
    return found


def _items(path: str, container: Any, depth: int) -> Iterator[tuple[str, Any]]:
    pairs = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in islice(pairs, _MAX_ITEMS):
        kind = _KINDS[type(value)]
        if kind == _MODULE:
            yield _short(f"{path}[{_key(key)}]"), value
        elif kind and depth:
            yield from _items(f"{path}[{_key(key)}]", value, depth - 1)


def _key(key: Any) -> str:
    """A position or a name as it is. Any other key may be data (an address, a question), and has no end: ``*``."""
    if type(key) is int:
        return str(key)
    return repr(key) if type(key) is str and len(key) <= _MAX_KEY and key.isidentifier() else "*"


def _short(path: str) -> str:
    return path if len(path) <= _MAX_PATH else f"{path[:_MAX_PATH]}…"


def _add_state(module: Any, shape: list[Any], objects: list[Any]) -> None:
    """Add what a module's state consists of: as long as shape and objects stay the same, so does the state.

    A demo changed in place (``demo["answer"] = ...``) shows, because its keys are in the shape and its values among the
    objects.
    """
    stored = module.__dict__
    signature = stored.get("signature")
    if signature is None:
        source = stored.get("_module_src")  # dspy.Flex
        if source is not None:
            objects.append(source)
        return
    # `instructions` is a property that makes a new string each time; the text lives in `__doc__`.
    objects.append(signature)
    if isinstance(signature, type):
        objects.append(vars(signature).get("__doc__"))
        for field in getattr(signature, "__pydantic_fields__", {}).values():
            extra = field.json_schema_extra
            if type(extra) is dict:
                objects.append(extra.get("desc"))
                objects.append(extra.get("prefix"))
    demos = stored.get("demos")
    count = introspection.length(demos)
    if count is not None:
        shape.append(count)
        for demo in introspection.items(demos):
            values = demo if is_a(demo, dict) else introspection.store_of(demo)
            if values is None:
                objects.append(demo)
                continue
            for key, value in dict.items(values):
                shape.append(key if type(key) is str else id(key))
                objects.append(value)
                if type(value) not in _LEAVES:
                    _add_parts(value, objects, 3)
            shape.append(len(objects))
    decisions = stored.get("fields")
    if decisions:
        _add_parts(decisions, objects, 3)
        shape.append(len(objects))


def _add_parts(value: Any, objects: list[Any], depth: int) -> None:
    """Add what a list, dictionary or model holds: it may be changed in place."""
    parts: Any = introspection.items(value)
    if introspection.length(value) is None:
        parts = dict.values(value if is_a(value, dict) else introspection.instance_dict(value))
    for part in islice(parts, _MAX_ITEMS):
        if len(objects) >= _MAX_OBJECTS:  # Looked at on each call.
            return
        objects.append(part)
        if depth and type(part) not in _LEAVES:
            _add_parts(part, objects, depth - 1)


def program_digest(program: Any) -> str | None:
    """A stable digest of a program's state: instructions, field texts, demos and decision settings of every predictor,
    by name, and the source of every ``dspy.Flex``.

    The same before ``save()`` and after ``load()``, and for an optimizer's candidate and the program it returns.

    Args:
        program: a ``dspy.Module``.

    Returns:
        16 hex digits, or ``None`` for a program with neither.
    """
    state: dict[str, Any] = {name: _predictor_state(predictor) for name, predictor in program.named_predictors()}
    for path, module in walk(program):
        source = module.__dict__.get("_module_src")
        if isinstance(source, str):  # dspy.Flex: its predictors are in its source.
            state[f"{path}:source"] = source
    return digest(state) if state else None


def _predictor_state(predictor: Any) -> dict[str, Any]:
    signature = predictor.signature
    state = {
        "instructions": signature.instructions,
        "fields": [
            [name, (field.json_schema_extra or {}).get("prefix"), (field.json_schema_extra or {}).get("desc")]
            for name, field in signature.fields.items()
        ],
        "demos": [_demo_state(demo) for demo in introspection.items(predictor.demos)],
    }
    decisions = predictor.__dict__.get("fields")
    if decisions:  # DSPy 3.4: thresholds, cuts and weights of decision outputs, which ReAnchor fits
        state["decisions"] = decisions
    return state


def _demo_state(demo: Any) -> Any:
    values = demo if is_a(demo, dict) else introspection.store_of(demo)
    if values is None:
        return demo
    # What DSPy itself saves of a value is its JSON form, so that is what must be compared.
    return {
        key: _saved(value)
        for key, value in dict.items(values)
        if not (introspection.text(key) or "").startswith("dspy_")
    }


def _saved(value: Any) -> Any:
    """A pydantic model as DSPy saves it (its JSON values, as which it comes back); anything else as it is.

    Not where that would run code of a user's class (serializers, computed fields): such a model is known by its fields.
    """
    kind = type(value)
    if "__pydantic_fields__" not in introspection.members_of(kind) or _runs_code(value):
        return value
    return kind.model_dump(value, mode="json")


def _runs_code(model: Any) -> bool:
    """Whether dumping a model, or one that it holds, runs code that is not pydantic's or DSPy's, or is a long job."""
    waiting = [model]
    for _ in range(_MAX_OBJECTS):
        if not waiting:
            return False
        inner = _inside(waiting.pop())
        if inner is None:
            return True
        waiting += inner
    return True


def _inside(value: Any) -> list[Any] | None:
    """What a value that pydantic dumps holds; ``None`` if that runs code of its class."""
    kind = type(value)
    if kind in _LEAVES:
        return []
    members = introspection.members_of(kind)
    if "__pydantic_fields__" in members:
        decorators: Any = members.get("__pydantic_decorators__")
        own = (decorators.field_serializers, decorators.model_serializers, decorators.computed_fields)
        if introspection.library(kind) != "dspy" and (
            any(own) or any(map(_overrides_dump, introspection.bases_of(kind)))
        ):
            return None
        return list(introspection.instance_dict(value).values())
    if is_a(value, dict):
        return list(dict.values(value))
    if introspection.length(value) is not None:
        return list(islice(introspection.items(value), _MAX_OBJECTS))
    # Anything else that pydantic does not know would be asked by it for what it is.
    return [] if introspection.library(kind) in _STANDARD else None


_STANDARD: Final = frozenset({"builtins", "datetime", "decimal", "uuid", "enum", "pathlib", "fractions", "collections"})


def _overrides_dump(base: type) -> bool:
    return "model_dump" in introspection.members_of(base) and introspection.library(base) not in ("pydantic", "dspy")


def digest(value: Any) -> str:
    """16 hex digits of SHA-256 over the canonical JSON of ``value``.

    The JSON is what saving to a file would keep, so that a value before saving and the one read back are the same. It
    is never shown: nothing is masked or cut as content is, for both would depend on more than the value. But it has an
    end: of a value with more than 100,000 parts, or of a text with more than a million characters, the rest counts by
    its length only.
    """
    text = json.dumps(_Canonical().of(value, 0), sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:ID_LENGTH]


class _Canonical:
    """One value as plain JSON values: bounded, without asking anything of a user's class."""

    def __init__(self) -> None:
        self.nodes = _MAX_NODES
        self.characters = _MAX_CHARACTERS
        self.path: set[int] = set()

    def of(self, value: Any, depth: int) -> Any:
        self.nodes -= 1
        kind = type(value)
        if value is None or kind is bool:
            return value
        if issubclass(kind, float):
            number = float.__float__(value)
            return number if math.isfinite(number) else None  # as JSON files have it
        if issubclass(kind, enum.Enum):
            return self.of(introspection.instance_dict(value).get("_value_"), depth + 1)
        if issubclass(kind, str):
            return self.text(value)
        if issubclass(kind, int):
            whole = int.__int__(value)
            # Python refuses to print very long ones.
            return whole if whole.bit_length() <= _MAX_BITS else f"<{hash(whole)} of {whole.bit_length()} bits>"
        if issubclass(kind, (datetime.date, datetime.time)):  # a datetime is a date
            return value.isoformat() if kind.__module__ == "datetime" else f"<{introspection.module_of(kind)}>"
        if kind is uuid.UUID or kind is decimal.Decimal:
            return str(value)
        if issubclass(kind, (bytes, bytearray)):
            return self.binary(value, bytes if issubclass(kind, bytes) else bytearray)
        if depth >= _MAX_DEPTH or id(value) in self.path or self.nodes <= 0:
            return "…"
        self.path.add(id(value))
        try:
            return self.container(value, kind, depth)
        finally:
            self.path.discard(id(value))

    def text(self, value: str) -> str:
        length = str.__len__(value)
        room = max(min(length, self.characters), 0)
        self.characters -= room
        shown = str.__getitem__(value, slice(0, room))
        return shown if room == length else f"{shown}…{length}"

    def binary(self, value: Any, base: Any) -> str:
        length = base.__len__(value)
        shown = hashlib.sha256(base.__getitem__(value, slice(0, _MAX_CHARACTERS))).hexdigest()
        return shown if length <= _MAX_CHARACTERS else f"{shown}…{length}"

    def container(self, value: Any, kind: type, depth: int) -> Any:
        if issubclass(kind, dict):
            return self.fields(value, depth)
        if issubclass(kind, (list, tuple)):
            base = list if issubclass(kind, list) else tuple
            return self.each(base.__iter__(value), base.__len__(value), depth)
        if issubclass(kind, (set, frozenset)):
            unordered = set if issubclass(kind, set) else frozenset
            made = self.each(unordered.__iter__(value), unordered.__len__(value), depth)
            return sorted(json.dumps(item, sort_keys=True) for item in made)
        stored = introspection.store_of(value)  # dspy.Example and what derives from it
        if stored is None and any(
            _FIELDS & introspection.members_of(base).keys() for base in introspection.bases_of(kind)
        ):
            stored = introspection.instance_dict(value)
        return (
            f"<{introspection.module_of(kind)}.{introspection.name_of(kind)}>"
            if stored is None
            else self.fields(stored, depth)
        )

    def each(self, items: Iterator[Any], length: int, depth: int) -> list[Any]:
        made: list[Any] = []
        for item in items:
            if self.nodes <= 0:
                made.append(f"…{length}")
                break
            made.append(self.of(_saved(item), depth + 1))
        return made

    def fields(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, item in list(dict.items(value)):
            if self.nodes <= 0:
                made["…"] = dict.__len__(value)
                break
            made[self.key(key)] = self.of(_saved(item), depth + 1)
        return made

    def key(self, key: Any) -> str:
        kind = type(key)
        if issubclass(kind, str):
            return self.text(key)
        plain = kind in _LEAVES or (kind is tuple and all(type(part) in _LEAVES for part in key))
        return str(key) if plain else f"<{introspection.module_of(kind)}.{introspection.name_of(kind)}>"


class ByObject:
    """Results kept for as long as the object they belong to lives, and only while it has not changed.

    Keyed by identity with a weak reference: a user's class may lack ``__hash__`` or have a hostile ``__eq__``.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Any], list[Any], list[Any], Any]] = {}

    def get(self, owner: Any, shape: list[Any], objects: list[Any], make: Callable[[], Any]) -> Any:
        """The result kept for ``owner``, or ``make()``, which is kept from now on.

        Args:
            owner: the object the result belongs to.
            shape: plain values; the kept result counts only while they are equal.
            objects: likewise, but they must be the very same objects. Only plain ones are kept alive: others may refer
                to ``owner``. Of a container what it holds should follow, for its identity may be taken by another.
            make: works the result out.
        """
        key = id(owner)
        kept = self._kept.get(key)
        if (
            kept is not None
            and kept[0]() is owner
            and kept[1] == shape
            and len(kept[2]) == len(objects)
            and (all(map(operator.is_, kept[2], objects)) or all(map(_stands_for, kept[2], objects)))
        ):
            return kept[3]
        result = make()
        with contextlib.suppress(TypeError):  # An object that cannot be weakly referenced is asked anew each time.
            handle = weakref.ref(owner, lambda _: self._kept.pop(key, None))
            self._kept[key] = (handle, shape, [_handle(each) for each in objects], result)
        return result


class _Identity(int):
    """Where a container is. It cannot be weakly referenced."""


def _handle(each: Any) -> Any:
    kind = type(each)
    if kind in _LEAVES or issubclass(kind, type):
        return each
    if kind in (list, dict, set):
        return _Identity(id(each))
    try:
        return weakref.ref(each)
    except TypeError:  # Of a class that has no room for one: tuples, dates, decimals, slots.
        return each


def _stands_for(handle: Any, found: Any) -> bool:
    if handle is found:
        return True
    kind = type(handle)
    return handle() is found if kind is weakref.ref else kind is _Identity and handle == id(found)


class Programs:
    """Knows the programs that were called: their name, id, and the paths of their modules."""

    def __init__(self) -> None:
        self._programs = ByObject()
        self._examples = ByObject()
        self._signatures = ByObject()

    @guarded("program paths")
    def find(self, root: Any) -> Program:
        """The program whose outermost module is ``root``. Cheap when nothing changed since the last call.

        Reads the program's structure and the identity of its state on each call, because both may change between
        calls; paths and digest are only worked out anew when they did.
        """
        modules = walk(root)
        shape: list[Any] = []
        objects: list[Any] = []
        for path, module in modules:
            # Ids, not the modules: a kept reference to a module that knows its parent would never end.
            shape += (id(module), path)
            _add_state(module, shape, objects)
            shape.append(len(objects))
        found: Program = self._programs.get(root, shape, objects, lambda: self._make(root, modules))
        return found

    def _make(self, root: Any, modules: list[tuple[str, Any]]) -> Program:
        name = type(root).__name__
        paths = {id(module): path for path, module in modules}
        return Program(name, _safe_digest(root), paths)

    @guarded("example id")
    def example_id(self, example: Any) -> str | None:
        """A stable id of a dataset row: a digest of its fields, the same in every evaluation that uses the row."""
        values = introspection.store_of(example)
        if values is None:
            return None
        found: str = self._examples.get(example, [], list(dict.values(values)), lambda: digest(values))
        return found

    @guarded("signature fields")
    def signature_fields(self, signature: Any) -> str:
        """``"question -> answer"``: the signature's field names, kept per signature class."""
        found: str = self._signatures.get(signature, [], [], lambda: _field_names(signature))
        return found


@guarded("program id")
def _safe_digest(root: Any) -> str | None:
    return program_digest(root)


def _field_names(signature: Any) -> str:
    return f"{', '.join(signature.input_fields)} -> {', '.join(signature.output_fields)}"
