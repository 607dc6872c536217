"""Waiting for servers and processes: for as long as they get on, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

_Found = TypeVar("_Found")

STALLED = 240.0
"""Seconds without any progress after which a test gives up. Only something that hangs gets there."""


class Stalled(AssertionError):
    """Nothing has changed for too long."""


def wait_for(
    condition: Callable[[], _Found],
    what: str,
    progress: Callable[[], Any] | None = None,
    *,
    ignored: tuple[type[BaseException], ...] = (),
    pause: float = 0.05,
) -> _Found:
    """What ``condition()`` gives once it is true.

    Args:
        condition: asked again and again.
        what: is waited for, for the message.
        progress: anything that changes while there is progress; default: what ``condition()`` gives.
        ignored: exceptions of either that mean "not yet".
        pause: seconds between two looks.

    Raises:
        Stalled: neither came true nor changed for ``STALLED`` seconds.
    """
    last: Any = None
    changed = time.monotonic()
    while True:
        try:
            found = condition()
            state: Any = found if progress is None else progress()
        except ignored as error:
            found, state = None, type(error)  # type: ignore[assignment]
        if found:
            return found
        now = time.monotonic()
        if state != last:
            last, changed = state, now
        elif now - changed > STALLED:
            raise Stalled(f"{what}: no progress for {STALLED:.0f} s (last: {last!r:.200})")
        time.sleep(pause)
