"""Replace an entry point with a plain function, and put back exactly what was there."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, cast

from dspy_otel.core.errors import hide_frames
from dspy_otel.core.internal_errors import failed, guard, warn_once

_Arguments: TypeAlias = "tuple[Any, ...]"
_Keywords: TypeAlias = "dict[str, Any]"
Before: TypeAlias = Callable[[Any, _Arguments, _Keywords], None]
"""Hook before a call: instance (``None`` for a function), its other arguments, its keyword arguments."""
After: TypeAlias = Callable[[Any, _Arguments, _Keywords, Any], None]
"""Hook after a call that has returned: likewise, and the result."""
Leave: TypeAlias = Callable[[Any, "BaseException | None"], None]
"""The end of a call: its result, or ``None`` and what it raised."""
Around: TypeAlias = Callable[[Any, _Arguments, _Keywords], "Leave | None"]
"""Hook around a call: sees what a hook before it sees, and gives what is called at its end, if anything is."""

_ABSENT: Final = object()
_MARK: Final = "__dspy_otel__"
"""Attribute of every wrapper of ours: itself, the function it wraps, the number of its patches, what to put back."""


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


def _mark_of(function: Any) -> tuple[Any, ...] | None:
    """The mark of one of our wrappers. A copy of it, as ``functools.wraps`` puts on others' wrappers, is none."""
    mark = getattr(function, _MARK, None)
    return mark if isinstance(mark, tuple) and mark[0] is function else None


_numbers: Final = itertools.count(1)


@dataclass(eq=False)
class _Replaced:
    """What ``owner`` had under ``name``, and what it has instead."""

    owner: Callable[[], Any]
    name: str
    own: Any
    installed: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, ()  # A class that is pickled by value takes its wrappers along: nothing is to be put back there.


@dataclass
class Patches:
    """The replacements in force. Restoring walks them backwards.

    The wrapper keeps what its class had before; this object has only a weak reference to that. So a class that is made
    at run time can be garbage-collected.
    """

    _number: int = field(default_factory=lambda: next(_numbers))
    _undo: dict[int, Callable[[], _Replaced | None]] = field(default_factory=dict)
    _places: Iterator[int] = field(default_factory=itertools.count)

    def wrap(self, owner: Any, name: str, make: Callable[[Any], Any], *, loses: str = "") -> bool:
        """Replace ``owner.name`` by ``make(original)``.

        Args:
            owner: class or module. ``None`` means one that this DSPy does not have.
            name: attribute of it.
            make: given the original function, gives its replacement.
            loses: what telemetry lacks without this patch; for a warning, once, if it cannot be made.

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
        # A static or class method must stay one: wrap the function inside.
        descriptor = type(own) if isinstance(own, (staticmethod, classmethod)) else None
        function = own.__func__ if descriptor else original
        mark = _mark_of(function)
        if mark is not None:
            # Reached the class by another way than ours: copied from a class that was wrapped (`acall = Base.acall`,
            # `dataclass(slots=True)`), maybe before an uninstrument().
            _, function, number, *_ = mark
            own = descriptor(function) if descriptor else function
            if number == self._number:
                self._remember(owner, name, own)
                return False
        replacement = make(function)
        if getattr(replacement, "__wrapped__", None) is not function:
            functools.update_wrapper(replacement, cast(Callable[..., Any], function))
        setattr(replacement, _MARK, (replacement, function, self._number))
        installed = descriptor(replacement) if descriptor else replacement
        if self._replace(owner, name, installed, own, replacement):
            return True
        warn_once(("patch", shown), "cannot replace %s; telemetry lacks %s", shown, loses or "what it records")
        return False

    # --- hooks: they see what DSPy is called with and gives, change nothing, and cannot raise into it -----------------
    def before(self, owner: Any, name: str, hook: Before, *, loses: str = "") -> bool:
        """Call ``hook(instance, args, kwargs)`` before each call of ``owner.name``.

        Args:
            owner: class or module, as for :meth:`wrap`; the instance is ``None`` for a function of a module.
            name: attribute of it: a function, a coroutine function, a static or a class method; it stays one.
            hook: a plain function. What it raises becomes one warning.
            loses: as for :meth:`wrap`.

        Returns:
            Whether the hook is in force.
        """
        return self._hook(owner, name, loses, before=hook)

    def after(self, owner: Any, name: str, hook: After, *, loses: str = "") -> bool:
        """Call ``hook(instance, args, kwargs, result)`` when a call of ``owner.name`` has returned.

        Arguments and result are as for :meth:`before`. A call that raises is not seen: :meth:`around` sees it.
        """
        return self._hook(owner, name, loses, after=hook)

    def around(self, owner: Any, name: str, hook: Around, *, loses: str = "") -> bool:
        """Call ``hook(instance, args, kwargs)`` before each call of ``owner.name``, and what that returns at its end.

        Arguments and result are as for :meth:`before`.

        Example:
            A span around a method::

                def phase(instance, args, kwargs):
                    call = phases.open(Phase("propose"), (), {})
                    return None if call is None else functools.partial(phases.close, call)

                patches.around(owner, "_propose_instructions", phase, loses="the propose phase")
        """
        return self._hook(owner, name, loses, before=hook)

    def _hook(
        self, owner: Any, name: str, loses: str, before: Around | None = None, after: After | None = None
    ) -> bool:
        bound = isinstance(owner, type) and not isinstance(vars(owner).get(name), staticmethod)
        where = f"hook of {name if owner is None else f'{owner.__name__}.{name}'}"
        return self.wrap(owner, name, lambda original: _hooked(original, bound, where, before, after), loses=loses)

    def replace(self, owner: Any, name: str, value: Any) -> bool:
        """Set ``owner.name`` to ``value`` until :meth:`restore`, if that is possible, and give whether it was."""
        return self._replace(owner, name, value, vars(owner).get(name, _ABSENT))

    def _replace(self, owner: Any, name: str, value: Any, own: Any, keeper: Any = None) -> bool:
        try:
            setattr(owner, name, value)
        except (AttributeError, TypeError):
            return False
        self._remember(owner, name, own, keeper)
        return True

    def _remember(self, owner: Any, name: str, own: Any, keeper: Any = None) -> None:
        """Remember what to put back, as long as ``keeper`` (a wrapper) lives, if there is one."""
        # What is stored may differ from what was set (descriptors): compare with that when restoring.
        place, installed = next(self._places), vars(owner).get(name)
        replaced = _Replaced(weakref.ref(owner), name, own, installed)
        if keeper is None or not isinstance(owner, type):
            self._undo[place] = lambda: replaced
            return
        setattr(keeper, _MARK, (*getattr(keeper, _MARK), replaced))
        undo = self._undo
        undo[place] = weakref.ref(replaced, lambda _: undo.pop(place, None))

    def restore(self) -> None:
        """Put every original back. A wrapper that others put around ours stays, and ours then passes calls through."""
        while self._undo:
            replaced = self._undo.popitem()[1]()
            owner = replaced.owner() if replaced is not None else None
            if replaced is None or owner is None or vars(owner).get(replaced.name, _ABSENT) is not replaced.installed:
                continue
            if replaced.own is _ABSENT:
                delattr(owner, replaced.name)
            else:
                setattr(owner, replaced.name, replaced.own)


def hooked(function: Callable[..., Any], before: Around) -> Callable[..., Any]:
    """``function`` with a hook around each call: for a function that is no attribute of a class or a module.

    Args:
        function: a function, or a coroutine function.
        before: as for :meth:`Patches.around`; its instance is ``None``.
    """
    return _hooked(function, False, f"hook of {getattr(function, '__name__', 'a function')}", before, None)


def _hooked(
    original: Callable[..., Any], bound: bool, where: str, before: Around | None, after: After | None
) -> Callable[..., Any]:
    """A function in place of ``original``, a coroutine function if that is one, with hooks around each call.

    Args:
        original: the function.
        bound: the first argument is the instance.
        where: for the warning when a hook raises.
        before: is called first; what it returns is called at the end.
        after: is called when the function has returned.
    """

    def enter(before: Around, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        try:
            return before(args[0], args[1:], kwargs) if bound else before(None, args, kwargs)
        except Exception as error:
            failed(where, error)
            return None

    def returned(leave: Leave | None, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        try:
            if leave is not None:
                leave(result, None)
            elif after is None:
                return
            elif bound:
                after(args[0], args[1:], kwargs, result)
            else:
                after(None, args, kwargs, result)
        except Exception as error:
            failed(where, error)

    def raised(leave: Leave | None, error: BaseException) -> None:
        if leave is not None:
            with guard(where):
                leave(None, error)
        hide_frames(error)

    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def coroutine_wrapper(*args: Any, **kwargs: Any) -> Any:
            leave = None if before is None else enter(before, args, kwargs)
            try:
                result = await original(*args, **kwargs)
            except BaseException as error:
                raised(leave, error)
                raise
            if leave is not None or after is not None:
                returned(leave, args, kwargs, result)
            return result

        return coroutine_wrapper

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        leave = None if before is None else enter(before, args, kwargs)
        try:
            result = original(*args, **kwargs)
        except BaseException as error:
            raised(leave, error)
            raise
        if leave is not None or after is not None:
            returned(leave, args, kwargs, result)
        return result

    return wrapper


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str, default: Any = None) -> Any:
    """One argument of a call, which may be given by place or by name.

    Args:
        args: positional arguments, as a hook sees them (without the instance).
        kwargs: keyword arguments.
        index: its place among ``args``.
        name: its name.
        default: what it is when the call does not give it.
    """
    return kwargs[name] if name in kwargs else args[index] if index < len(args) else default
