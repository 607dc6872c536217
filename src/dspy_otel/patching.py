"""Replace an entry point with a plain function, and put back exactly what was there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from .telemetry.guard import warn_once

_ABSENT: Final = object()
MARK: Final = "__dspy_otel_original__"
"""Attribute of every wrapper of ours: the function it stands for."""


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


def is_wrapped(function: Any) -> bool:
    """Whether ``function`` is one of our wrappers."""
    return getattr(function, MARK, None) is not None


@dataclass
class Patches:
    """The replacements in force. Restoring walks them backwards."""

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
        if original is _ABSENT:
            if loses:
                warn_once(("patch", str(owner), name), "this DSPy has no %s; telemetry lacks %s", name, loses)
            return False
        own = vars(owner).get(name, _ABSENT)
        if is_wrapped(own):
            return False
        # A static or class method must stay one: wrap what it holds.
        descriptor = type(own) if isinstance(own, (staticmethod, classmethod)) else None
        replacement = make(own.__func__ if descriptor else original)
        setattr(replacement, MARK, original)
        installed = descriptor(replacement) if descriptor else replacement
        if self.replace(owner, name, installed):
            return True
        warn_once(("patch", str(owner), name), "cannot replace %s of %s; telemetry lacks %s", name, owner, loses)
        return False

    def replace(self, owner: Any, name: str, value: Any) -> bool:
        """Set ``owner.name`` to ``value`` until :meth:`restore`, and say whether that was possible."""
        own = vars(owner).get(name, _ABSENT)
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
