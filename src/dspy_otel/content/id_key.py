"""The key of the ids of dataset rows, while content is off.

A plain digest of a row tells it to whoever can guess it: names, labels and short questions are few. With a key that
never leaves, the id only tells that two rows are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets as random_source
import stat
import sys
import threading
from pathlib import Path
from typing import Final

from dspy_otel.content.digest import LENGTH

_LOG = logging.getLogger(__name__)
_SIZE: Final = 32
_NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)


class IdKey:
    """A key, given or the user's own: made once, then kept in the user's state directory.

    Args:
        given: a text that programs of several users or machines share; ``None`` for the user's own key.
    """

    def __init__(self, given: str | None = None) -> None:
        self._lock = threading.Lock()
        self._key = None if given is None else hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest()

    def of(self, plain: str) -> str:
        """The id in place of a plain digest: as long, and the same for the same digest and key."""
        key = self._key
        if key is None:
            with self._lock:
                key = self._key = self._key or _key_of_user()
        return hmac.new(key, plain.encode("ascii"), hashlib.sha256).hexdigest()[:LENGTH]


def _key_of_user() -> bytes:
    """The key in the user's state directory; one of this process only, with a warning, where none can be kept."""
    try:
        place = _state_directory() / "id-key"
        with contextlib.suppress(FileNotFoundError):
            return _read(place)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written beside its place, then linked there: another process finds all of the key, or none.
        draft = place.with_name(f"id-key.{os.getpid()}.{random_source.token_hex(4)}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(random_source.token_bytes(_SIZE))
            with contextlib.suppress(FileExistsError):
                os.link(draft, place)
        finally:
            draft.unlink()
        return _read(place)
    except (OSError, RuntimeError, ValueError) as problem:
        _LOG.warning(
            "dspy-otel: the key of row ids cannot be kept (%s): ids of rows differ in the next process;"
            " set OTEL_DSPY_ID_KEY for ids that stay",
            type(problem).__name__,
        )
        return random_source.token_bytes(_SIZE)


def _read(place: Path) -> bytes:
    """The key in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a file that only this user can read, or no key.
    """
    with os.fdopen(os.open(place, os.O_RDONLY | _NO_FOLLOW), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("no file")
        if os.name == "posix" and (about.st_uid != os.getuid() or about.st_mode & 0o077):
            raise ValueError("others can read it")
        key = file.read(_SIZE + 1)
    if len(key) != _SIZE:
        raise ValueError("no key")
    return key


def _state_directory() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dspy-otel"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dspy-otel"
