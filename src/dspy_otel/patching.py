"""Replace an entry point with a plain function, and put back exactly what was there."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from .telemetry.guard import warn_once

_ABSENT: Final = object()
_MARK: Final = "__dspy_otel__"
"""Attribute of every wrapper of ours: the wrapper itself, the function it stands for, and whose patch it is."""


def resolve(module: str, qualname: str = "") -> Any:
    """The object ``qualname`` (dotted) of ``module``, or ``None`` when this DSPy does not have it.

    ``sys.modules`` decides which module is meant: DSPy rebinds some submodule names to objects of its own
    (``dspy.dsp.utils.settings`` is a Settings instance when reached as an attribute).
    """
    try:
        importlib.import_module(module)
        found: Any = sys.modules[module]
        for part in qualname.split(".") if qualname else ():
            found = getattr(found, part)
    except Exception:
        return None
    return found


def _mark_of(function: Any) -> tuple[Any, Any, int] | None:
    """The mark of one of our wrappers. A copy of it, as ``functools.wraps`` puts on others' wrappers, is none."""
    mark = getattr(function, _MARK, None)
    return mark if isinstance(mark, tuple) and mark[0] is function else None


def is_wrapped(function: Any) -> bool:
    """Whether ``function`` is one of our wrappers."""
    return _mark_of(function) is not None


_numbers: Final = itertools.count(1)


@dataclass
class Patches:
    """The replacements in force. Restoring walks them backwards."""

    _number: int = field(default_factory=lambda: next(_numbers))
    _undo: list[tuple[Any, str, Any, Any]] = field(default_factory=list)

    def wrap(self, owner: Any, name: str, make: Callable[[Any], Any], *, loses: str = "") -> bool:
        """Replace ``owner.name`` by ``make(original)``.

        Args:
            owner: class or module. ``None`` stands for one that this DSPy does not have.
            name: attribute of it.
            make: given the original function, gives its replacement.
            loses: what telemetry lacks without this patch; said in a warning, once, if it cannot be made.

        Returns:
            Whether the patch is in force.
        """
        original = getattr(owner, name, _ABSENT) if owner is not None else _ABSENT
        shown = name if owner is None else f"{owner.__name__}.{name}"
        if original is _ABSENT:
            if loses:
                warn_once(("patch", shown), "this DSPy has no %s; telemetry lacks %s", shown, loses)
            return False
        own = vars(owner).get(name, _ABSENT)
        # A static or class method must stay one: wrap what it holds.
        descriptor = type(own) if isinstance(own, (staticmethod, classmethod)) else None
        function = own.__func__ if descriptor else original
        mark = _mark_of(function)
        if mark is not None:
            # Reached the class by another way than ours: copied from a class that was wrapped (`acall = Base.acall`,
            # `dataclass(slots=True)`), maybe before an uninstrument().
            _, function, number = mark
            own = descriptor(function) if descriptor else function
            if number == self._number:
                self._undo.append((owner, name, own, vars(owner).get(name)))
                return False
        replacement = make(function)
        setattr(replacement, _MARK, (replacement, function, self._number))
        installed = descriptor(replacement) if descriptor else replacement
        if self._replace(owner, name, installed, own):
            return True
        warn_once(("patch", shown), "cannot replace %s; telemetry lacks %s", shown, loses or "what it tells")
        return False

    def replace(self, owner: Any, name: str, value: Any) -> bool:
        """Set ``owner.name`` to ``value`` until :meth:`restore`, and say whether that was possible."""
        return self._replace(owner, name, value, vars(owner).get(name, _ABSENT))

    def _replace(self, owner: Any, name: str, value: Any, own: Any) -> bool:
        try:
            setattr(owner, name, value)
        except (AttributeError, TypeError):
            return False
        # What is stored may differ from what was set (descriptors): compare with that when restoring.
        self._undo.append((owner, name, own, vars(owner).get(name)))
        return True

    def restore(self) -> None:
        """Put every original back. What somebody else has wrapped since is left in place, and our part goes quiet."""
        while self._undo:
            owner, name, own, installed = self._undo.pop()
            if vars(owner).get(name, _ABSENT) is not installed:
                continue
            if own is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
