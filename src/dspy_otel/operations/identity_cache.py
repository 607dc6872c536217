"""Results that belong to an object of the user's and are worked out once, until the object changes."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable
from typing import Any, Final

from dspy_otel.content.introspection import LEAVES

_CONTAINERS: Final = frozenset(map(id, (list, dict, set)))


class IdentityCache:
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
        with contextlib.suppress(TypeError):  # The result for an object without weak references is made each time.
            handle = weakref.ref(owner, lambda _: self._kept.pop(key, None))
            self._kept[key] = (handle, shape, [_handle(each) for each in objects], result)
        return result

    def of_same(self, owner: Any, objects: list[Any]) -> Any:
        """The result kept for ``owner``, if it was made with these very objects, all plain ones; else ``None``."""
        kept = self._kept.get(id(owner))
        if kept is None or kept[0]() is not owner or len(kept[2]) != len(objects):
            return None
        return kept[3] if all(map(operator.is_, kept[2], objects)) else None


class _Identity(int):
    """Where a container is. It cannot be weakly referenced."""


def _handle(each: Any) -> Any:
    kind = type(each)
    if id(kind) in LEAVES or issubclass(kind, type):
        return each
    if id(kind) in _CONTAINERS:
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
