"""Locks between processes of one user: files in the user's state directory, not beside a store or spool."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import filelock
import platformdirs


def lock_for(what: str, seconds: float) -> filelock.FileLock | None:
    """A lock for a path or address.

    Args:
        what: the path or address.
        seconds: most time to wait for it; then ``filelock.Timeout`` is raised.

    Returns:
        The lock, not yet taken; None where no file can be made.
    """
    name = hashlib.sha256(what.encode("utf-8", "replace")).hexdigest()[:32] + ".lock"
    user = os.getuid() if os.name == "posix" else 0
    state = Path(platformdirs.user_state_dir("dspy-otel", appauthor=False))
    for place in (state / "locks", Path(tempfile.gettempdir()) / f"dspy-otel-locks-{user}"):
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            own = place.lstat().st_uid == user if os.name == "posix" else True
            if own and not place.is_symlink() and os.access(place, os.W_OK):
                return filelock.FileLock(place / name, timeout=seconds, mode=0o600)
    return None
