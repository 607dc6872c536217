"""The modules of a program and their paths, which are DSPy's own names for them.

A predictor has its name of ``named_predictors()``; any other module, and a predictor that DSPy does not name (in a
frozen module, or in a list of lists), has its name of ``named_sub_modules()`` without the leading ``self``. Where the
two write the key of a dictionary differently, the path has it as ``named_predictors()`` does: ``writers['long']``.

A key that may be data of a user's is not shown: its position stands for it (``by[*0]``). No two modules of a program
share a path.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias

from dspy_otel.content import introspection
from dspy_otel.operations.texts import Texts

_MAX_MODULES: Final = 2000
_MAX_CONTAINERS: Final = 500
_MAX_ITEMS: Final = 256
_MAX_PATH: Final = 128
_MAX_KEY: Final = 32
_MAX_NUMBER: Final = 1_000_000

# Containers without modules that may be long: of every module, and of predictors.
_LOGS: Final = frozenset({"history", "callbacks"})
_PREDICTOR_STATE: Final = frozenset({"traces", "train", "demos", "config", "fields", *_LOGS})

_HEAP: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that can be freed
_flags_of: Final[Callable[[type], int]] = type.__dict__["__flags__"].__get__
_KEYS: Final = frozenset(map(id, (str, int, bool, float, type(None))))
_CONTAINERS: Final = frozenset(map(id, (list, tuple, dict)))
_NONE: Final = frozenset[str]()
_CONTAINER: Final = 1
_MODULE: Final = 2
_PREDICTOR: Final = 3

Origins: TypeAlias = dict[tuple[int, str, str], list[str]]


_LASTING: Final[dict[int, int]] = {}
"""What :func:`_kind` says of classes that never end, by identity: Python's built-in ones, and DSPy's."""
_kept_alive: Final[list[type]] = []


def _kind(of: type) -> int:
    """What instances of a class are in a program: predictors, other modules, containers, or nothing of these (0).

    Classes of DSPy are known by name, without importing it.
    """
    bases = introspection.bases_of(of)
    names = {introspection.name_of(base) for base in bases if introspection.library(base) == "dspy"}
    if "BaseModule" in names:
        kind = _PREDICTOR if "Parameter" in names else _MODULE
    else:
        kind = _CONTAINER if issubclass(of, (dict, list, tuple)) else 0
    if not _flags_of(of) & _HEAP or introspection.library(of) == "dspy":
        _kept_alive.append(of)
        _LASTING[id(of)] = kind
    return kind


_kinds: Final = introspection.ByClass(_kind)


def _kind_of(value: Any) -> int:
    of = type(value)
    kind = _LASTING.get(id(of))
    return _kinds.of(of) if kind is None else kind


def attributes(module: Any) -> dict[str, Any]:
    """The attributes of a module. Neither DSPy's ``__getattribute__`` nor one of the user's runs."""
    stored: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return stored


class Survey(NamedTuple):
    """What a program is made of.

    Attributes:
        modules: the program, and those inside.
        structure: plain values that stay equal as long as the paths do.
        places: by identity of each module and container, when it was found. Of a copy, the identities in the structure
            are others, and these places the same.
    """

    modules: list[Any]
    structure: list[Any]
    places: dict[int, int]


def survey(root: Any) -> Survey:
    """The modules of a program, and its structure. It runs on each outermost call, and so makes no paths.

    At most 2,000 modules are found, in 500 containers, of which the first 256 items count.

    Args:
        root: the program.
    """
    modules: list[Any] = []
    structure: list[Any] = []
    containers = 0
    items = [(root, _kind_of(root))]
    places = {id(root): 0}
    lasting, kinds = _LASTING.get, _kinds.of
    for item, of in items:  # Grows meanwhile: breadth first.
        without: frozenset[str] = _NONE
        if of == _CONTAINER:
            containers += 1
            structure.append("{}" if introspection.is_a(item, dict) else "[]")
            pairs = _pairs(item) if containers <= _MAX_CONTAINERS else []
        else:
            if len(modules) >= _MAX_MODULES:
                break
            modules.append(item)
            stored = attributes(item)
            if stored.get("_compiled") is True:
                structure.append(True)
            without = _PREDICTOR_STATE if "signature" in stored else _LOGS
            pairs = list(stored.items())
        for key, value in pairs:
            kind = lasting(id(type(value)))
            if kind is None:
                kind = kinds(type(value))
            if kind and (kind != _CONTAINER or type(key) is not str or key not in without):
                identity = id(value)
                structure += (key if type(key) is str or type(key) is int else id(key), identity)
                if identity not in places:
                    places[identity] = len(items)
                    items.append((value, kind))
        structure.append(None)
    return Survey(modules, structure, places)


def _pairs(container: Any) -> list[tuple[Any, Any]]:
    """The first keys and values of a container; none if there is no module and no container among them."""
    if introspection.is_a(container, dict):
        pairs = list(islice(dict.items(container), _MAX_ITEMS))
        return pairs if _holds_modules([value for _, value in pairs]) else []
    base: Any = list if introspection.is_a(container, list) else tuple
    values = base.__getitem__(container, slice(_MAX_ITEMS))
    return list(enumerate(values)) if _holds_modules(values) else []


def _holds_modules(values: Sequence[Any]) -> bool:
    """Whether a module or container is among the values, most of which are of one class."""
    first = {id(type(value)): value for value in values}
    return any(map(_kind_of, first.values()))


class _Item(NamedTuple):
    """A module or container in a program."""

    path: str
    value: Any
    kind: int

    def inside(self) -> Iterator[_Item]:
        """The modules and containers directly inside, in DSPy's order."""
        if self.kind == _CONTAINER:
            keyed = introspection.is_a(self.value, dict)
            for position, (key, value) in enumerate(_pairs(self.value)):
                if kind := _kind_of(value):
                    subscript = _subscript(key, position) if keyed else position
                    yield _Item(f"{self.path}[{subscript}]", value, kind)
            return
        stored = attributes(self.value)
        without = _PREDICTOR_STATE if "signature" in stored else _LOGS
        for name, value in list(stored.items()):
            kind = _kind_of(value)
            if kind and (kind != _CONTAINER or name not in without):
                yield _Item(f"{self.path}.{name}" if self.path else name, value, kind)


def _subscript(key: Any, position: int) -> str:
    """A key as DSPy writes it, if it is a short name or a small number; any other may be data, or have no end."""
    if key is None or type(key) is bool or (type(key) is int and abs(key) < _MAX_NUMBER):
        return f"'{key}'"
    if type(key) is str and len(key) <= _MAX_KEY and key.replace("-", "_").isidentifier():
        return f"'{key}'"
    return f"*{position}"


def named_modules(root: Any) -> list[tuple[str, Any]]:
    """Every module of a program with its path; ``root`` itself has an empty one.

    Args:
        root: the program.
    """
    items, shared = _named_sub_modules(root)
    if shared:  # Else each module can be reached on one way only.
        items = [*_named_parameters(root), *items]
    paths: dict[int, str] = {}
    modules: list[tuple[str, Any]] = [("", root)]
    taken = set[str]()
    for item in items:
        if item.value is root or id(item.value) in paths:
            continue
        path = shown = item.path if len(item.path) <= _MAX_PATH else f"{item.path[:_MAX_PATH]}…"
        number = 1
        while path in taken:  # True and "True" are two keys, and two long paths may begin alike.
            number += 1
            path = f"{shown}~{number}"
        taken.add(path)
        paths[id(item.value)] = path
        modules.append((path, item.value))
    return modules


def places_in_digest(root: Any) -> list[tuple[str, Any]]:
    """Every module of a program with the place that stands for it in a program's digest.

    It is not its path: ids of programs are compared over months, and stay what they are. A key that may be data is
    ``*``, and of two ways to a module the last one counts.

    Args:
        root: the program.
    """
    seen = {id(root)}
    stack: list[tuple[str, Any]] = [("", root)]
    found: list[tuple[str, Any]] = []
    while stack and len(found) < _MAX_MODULES:
        place, module = entry = stack.pop()
        found.append(entry)
        stored = attributes(module)
        without = _PREDICTOR_STATE if "signature" in stored else _LOGS
        below: list[tuple[str, Any]] = []
        for name, value in list(stored.items()):
            if id(type(value)) not in _CONTAINERS or name not in without:
                below += _below(f"{place}.{name}" if place else name, value, 3)
        for each in reversed(below):
            if id(each[1]) not in seen:
                seen.add(id(each[1]))
                stack.append(each)
    return found


def _below(place: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if _kind_of(value) in (_MODULE, _PREDICTOR):
        yield place if len(place) <= _MAX_PATH else f"{place[:_MAX_PATH]}…", value
    elif id(type(value)) in _CONTAINERS and depth:
        for key, inner in islice(value.items() if type(value) is dict else enumerate(value), _MAX_ITEMS):
            if type(key) is str:
                shown = repr(key) if len(key) <= _MAX_KEY and key.isidentifier() else "*"
            else:
                shown = str(key) if type(key) is int else "*"
            yield from _below(f"{place}[{shown}]", inner, depth - 1)


def _named_parameters(root: Any) -> Iterator[_Item]:
    """The predictors that ``BaseModule.named_parameters()`` names, as it does: depth first, not in frozen modules."""
    stack = [_Item("", root, _MODULE)]
    seen: set[int] = set()
    while stack:
        item = stack.pop()
        if item.kind == _PREDICTOR:
            yield item
            continue
        inside = list(item.inside())
        if item.kind == _CONTAINER:
            inside = [each for each in inside if each.kind != _CONTAINER]
        elif id(item.value) in seen or (seen and attributes(item.value).get("_compiled") is True):
            continue
        elif len(seen) >= _MAX_MODULES:
            return
        else:
            seen.add(id(item.value))
        stack += reversed(inside)


def named_parameters(root: Any) -> list[tuple[str, Any]]:
    """What ``root.named_parameters()`` gives; no method of a user's class runs for it.

    Args:
        root: the program.

    Raises:
        RecursionError: the program contains itself.
    """
    return list(_parameters(root, ()))


def named_predictors(root: Any) -> list[tuple[str, Any]]:
    """What ``root.named_predictors()`` gives, likewise.

    Args:
        root: the program.

    Raises:
        RecursionError: the program contains itself.
    """
    if type(root) is Texts:
        return root.named_predictors()
    return [(name, each) for name, each in named_parameters(root) if _derives(each, "Predict")]


def _derives(value: Any, name: str) -> bool:
    """Whether a value is of the class of DSPy with this name, or of one that derives from it."""
    bases = introspection.bases_of(type(value))
    return any(introspection.name_of(base) == name and introspection.library(base) == "dspy" for base in bases)


def _parameters(module: Any, around: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """As DSPy does it: each parameter once, by the first of its names, and none of a frozen module."""
    if any(module is each for each in around):
        raise RecursionError("a module contains itself")
    seen: set[int] = set()
    around = (*around, module)
    if _derives(module, "Parameter"):
        seen.add(id(module))
        yield "self", module
    for name, value in list(attributes(module).items()):
        members = [(name, value)]
        if _kind_of(value) == _CONTAINER:
            keyed = list(dict.items(value)) if introspection.is_a(value, dict) else None
            if keyed is None:
                members = [(f"{name}[{place}]", item) for place, item in enumerate(introspection.items(value))]
            else:
                members = [(f"{name}['{_key(key, place)}']", item) for place, (key, item) in enumerate(keyed)]
        for path, member in members:
            found = [(path, member)]
            if not _derives(member, "Parameter"):
                if _kind_of(member) != _MODULE or attributes(member).get("_compiled", False):
                    continue
                found = [(f"{path}.{inner}", each) for inner, each in _parameters(member, around)]
            for each in found:
                if id(each[1]) not in seen:
                    seen.add(id(each[1]))
                    yield each


def _key(key: Any, position: int) -> str:
    """A key of a dictionary as DSPy writes it, if it is a plain one; its position for any other."""
    return str(key) if id(type(key)) in _KEYS else f"*{position}"


def _named_sub_modules(root: Any) -> tuple[list[_Item], bool]:
    """Every module, named as ``BaseModule.named_sub_modules()`` does: breadth first, in containers of any depth.

    Returns:
        The modules; and whether any module or container can be reached on more than one way.
    """
    queue = deque([_Item("", root, _MODULE)])
    seen = {id(root)}
    found: list[_Item] = []
    containers, shared = 0, False
    while queue and len(found) < _MAX_MODULES:
        item = queue.popleft()
        if item.kind == _CONTAINER:
            containers += 1
            if containers > _MAX_CONTAINERS:
                continue
        else:
            found.append(item)
        for each in item.inside():
            if id(each.value) in seen:
                shared = True
            else:
                seen.add(id(each.value))
                queue.append(each)
    return found, shared


def origins(modules: list[tuple[str, Any]]) -> Origins:
    """How to know a copy of a module: DSPy gives each predictor a random ``stage``, which copies keep.

    Args:
        modules: the modules of a program with their paths.

    Returns:
        By identity of a module's class, path inside it to one of its predictors, and stage of this predictor: the
        module's path, or several for modules that are copies of each other.
    """
    classes = {path: id(type(module)) for path, module in modules}
    found: Origins = {}
    for path, module in modules:
        stage = attributes(module).get("stage")
        if type(stage) is str:
            for base, inner in _splits(path):
                if base in classes:
                    found.setdefault((classes[base], inner, stage), []).append(base)
    return found


def _splits(path: str) -> Iterator[tuple[str, str]]:
    """Each way to see ``path`` as the path of a module and the rest of the way from there."""
    yield path, ""
    if path:
        yield "", path
    end = path.find(".")
    while end >= 0:
        yield path[:end], path[end + 1 :]
        end = path.find(".", end + 1)


def origin(modules: list[tuple[str, Any]], known: Origins, caller: str | None) -> str | None:
    """The path of the module of a program that another one is a copy of; ``None`` if it is no copy of one.

    Args:
        modules: the other module, first, and those inside with their paths.
        known: what :func:`origins` gave for the program.
        caller: path of the module that calls it: of several originals, one inside of this is meant.
    """
    kind = id(type(modules[0][1]))
    for inner, module in modules:
        stage = attributes(module).get("stage")
        found = known.get((kind, inner, stage)) if type(stage) is str else None
        if found:
            inside = (path for path in found if caller and path.startswith(f"{caller}."))
            return next(inside, found[0])
    return None
