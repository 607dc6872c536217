"""Locks between processes of one user: files in the user's state directory, not beside a store or spool."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import filelock
import platformdirs

_importing = threading.Lock()
_FORK_SECONDS: Final = 60.0


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import in this thread what no fork may interrupt: a child would have a lock of Python's that nobody releases."""
    with _importing:
        yield


def _before_fork() -> None:
    _owned.append(_importing.acquire(timeout=_FORK_SECONDS))


def _after_fork() -> None:
    if _owned.pop():
        _importing.release()


_owned: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def state_directory() -> Path:
    """The directory for what this user's programs keep; below that for temporary files for a user without a home.

    A container may run as a number that no user has. ``platformdirs`` raises then, or returns ``~`` as it stands.
    """
    with contextlib.suppress(RuntimeError):
        found = Path(platformdirs.user_state_dir("dspy-otel", appauthor=False))
        if found.is_absolute():
            return found
    return Path(tempfile.gettempdir()) / f"dspy-otel-{_user()}"


def _user() -> int:
    return os.getuid() if os.name == "posix" else 0


def lock_for(what: str, seconds: float) -> filelock.FileLock | None:
    """A lock for a path or address.

    Args:
        what: the path or address.
        seconds: most time to wait for it; then ``filelock.Timeout`` is raised.

    Returns:
        The lock, not yet taken; None where no file can be made.
    """
    name = hashlib.sha256(what.encode("utf-8", "replace")).hexdigest()[:32] + ".lock"
    user = _user()
    for place in (state_directory() / "locks", Path(tempfile.gettempdir()) / f"dspy-otel-locks-{user}"):
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            own = place.lstat().st_uid == user if os.name == "posix" else True
            if own and not place.is_symlink() and os.access(place, os.W_OK):
                return filelock.FileLock(place / name, timeout=seconds, mode=0o600)
    return None
