"""Where a backend shows the optimizations of this process: it says so here, and ``optimization(program)`` reads it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

_MOST: Final = 4096
_lock: Final = threading.Lock()
_known: Final[OrderedDict[str, Address]] = OrderedDict()


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


def address_of(optimization: str) -> Address | None:
    """Where an optimization is shown; None when that is not known, or not yet."""
    with _lock:
        return _known.get(optimization)
