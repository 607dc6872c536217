"""Where a backend shows the optimizations of this process: it says so here, and ``optimization(program)`` reads it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_MOST: Final = 4096
_lock: Final = threading.Lock()
_known: Final[OrderedDict[str, Address]] = OrderedDict()
_waiting: Final[OrderedDict[str, Callable[[Address], object]]] = OrderedDict()
_shown: Final[OrderedDict[str, None]] = OrderedDict()


@dataclass(frozen=True, slots=True)
class Address:
    """The place of an optimization in MLflow.

    Attributes:
        run_id: of its MLflow run.
        url: of the run's page; None for a store without a server.
        command: what opens such a store.
    """

    run_id: str
    url: str | None = None
    command: str | None = None


def add_address(optimization: str, address: Address) -> None:
    """Keep where an optimization is shown, by its ``dspy.optimizer.run.id``; the last 4,096 are kept."""
    with _lock:
        _known[optimization] = address
        _known.move_to_end(optimization)
        while len(_known) > _MOST:
            _known.popitem(last=False)
        waiting = _waiting.pop(optimization, None)
    if waiting is not None:
        waiting(address)


def when_known(optimization: str, tell: Callable[[Address], object]) -> None:
    """Call a function with the address of an optimization as soon as a backend has said it, once.

    Args:
        optimization: its ``dspy.optimizer.run.id``.
        tell: what is called, in a thread of the backend's, or at once; it raises nothing.
    """
    with _lock:
        known = _known.get(optimization)
        if known is None:
            _waiting[optimization] = tell
            while len(_waiting) > _MOST:
                _waiting.popitem(last=False)
    if known is not None:
        tell(known)


def address_of(optimization: str) -> Address | None:
    """Where an optimization is shown; None when that is not known, or not yet."""
    with _lock:
        return _known.get(optimization)


def mark_shown(optimization: str) -> None:
    """Keep that a display shows an optimization, with its address at the end: nobody else needs to."""
    with _lock:
        _shown[optimization] = None
        while len(_shown) > _MOST:
            _shown.popitem(last=False)


def is_shown(optimization: str) -> bool:
    """Whether a display shows an optimization."""
    with _lock:
        return optimization in _shown
