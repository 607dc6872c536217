"""The one way in which values of a user's program are walked, for content as for digests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Final

CYCLE: Final = "…[cycle]"
DEEPER: Final = "…[deeper]"
CHANGING: Final = "…[changing]"


class Walker(ABC):
    """One bounded pass over a value: gives plain JSON values, and runs no code of a user's class.

    JSON's own types are walked here. What becomes of texts, numbers and keys, of all other types, and of what is too
    much, is for subclasses to say.

    Attributes:
        nodes: how many values may still be looked at.
        max_items: how many items of one container are looked at.
        max_depth: how many containers may be inside each other.
    """

    max_items: int
    max_depth: int

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self._inside: set[int] = set()

    def of(self, value: Any, depth: int = 0) -> Any:
        """``value``, which is inside ``depth`` containers, as plain JSON values."""
        self.nodes -= 1
        kind = type(value)
        if kind is str:
            return self.text(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            return self.integer(value)
        if kind is float:
            return self.real(value)
        if kind is dict:
            return self.mapping(value, value, depth)
        if kind is list or kind is tuple:
            return self.sequence(value, value[: self.max_items], len(value), depth)
        return self.other(value, kind, depth)

    def mapping(self, owner: Any, entries: dict[Any, Any], depth: int) -> Any:
        """The entries of a dictionary, or the fields of another object.

        Args:
            owner: the object, to recognise it inside of itself.
            entries: its entries.
            depth: how many containers it is in.
        """
        identity = id(owner)
        if identity in self._inside:
            return self.stop(CYCLE)
        if depth >= self.max_depth:
            return self.stop(DEEPER)
        length = dict.__len__(entries)
        items: Iterable[tuple[Any, Any]] | None
        try:
            items = tuple(dict.items(entries)) if length <= self.max_items else self.snapshot(dict.items, entries)
        except RuntimeError:  # Changed meanwhile.
            items = self.snapshot(dict.items, entries)
        if items is None:
            return self.stop(CHANGING)
        self._inside.add(identity)
        try:
            result: dict[str, Any] = {}
            taken = 0
            for key, item in items:
                if self.nodes <= 0:
                    break
                self.entry(result, key, item, depth + 1)
                taken += 1
        finally:
            self._inside.discard(identity)
        if taken < length:
            self.cut(result, taken, length)
        return result

    def sequence(self, owner: Any, items: Any, length: int, depth: int) -> Any:
        """The items of a list or another container.

        Args:
            owner: the container, to recognise it inside of itself.
            items: its first items, or ``None`` when it never stops changing.
            length: how many it has.
            depth: how many containers it is in.
        """
        identity = id(owner)
        if identity in self._inside:
            return self.stop(CYCLE)
        if depth >= self.max_depth:
            return self.stop(DEEPER)
        if items is None:
            return self.stop(CHANGING)
        self._inside.add(identity)
        try:
            result: list[Any] = []
            for item in items:
                if self.nodes <= 0:
                    break
                result.append(self.of(item, depth + 1))
        finally:
            self._inside.discard(identity)
        if len(result) < length:
            self.cut(result, len(result), length)
        return result

    def snapshot(self, iterate: Callable[[Any], Any], container: Any) -> list[Any] | None:
        """The first items of a container, or ``None`` if another thread never stops changing it."""
        for _ in range(3):
            try:
                return list(islice(iterate(container), self.max_items))
            except RuntimeError:  # Changed during iteration.
                continue
        return None

    @abstractmethod
    def text(self, value: str) -> Any:
        """A string, maybe of a class that derives from ``str``."""

    @abstractmethod
    def integer(self, value: int) -> Any:
        """An integer of class ``int`` itself."""

    @abstractmethod
    def real(self, value: float) -> Any:
        """A number of class ``float`` itself."""

    @abstractmethod
    def other(self, value: Any, kind: type, depth: int) -> Any:
        """A value of any other class, ``kind``."""

    @abstractmethod
    def entry(self, result: dict[str, Any], key: Any, item: Any, depth: int) -> None:
        """Puts one entry of a dictionary into ``result``."""

    @abstractmethod
    def cut(self, result: dict[str, Any] | list[Any], taken: int, length: int) -> None:
        """Says in ``result`` that only ``taken`` of ``length`` entries or items are in it."""

    @abstractmethod
    def stop(self, reason: str) -> Any:
        """The value in place of a container that is not walked, for one of the reasons above."""
