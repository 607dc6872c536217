"""What could not be sent, on disk: ``dspy-otel replay`` delivers it later.

One directory for each process that had to leave something behind, with the owner's rights only::

    <spool>/20260131T120000-4711-9f3c/
        about.json           where it was to go
        spans-000001-512.pb  512 spans: the body of one OTLP/HTTP request, in protobuf, as any OTLP receiver takes it
        runs.json            what MLflow lacks of runs, links and scores, when the process has ended in order
        lock                 locked by the process while it lives, or by who delivers

Nothing is in it that was not on its way to MLflow: prompts and answers only if content is captured.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import platformdirs
from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel.mlflow.base import only_process
from dspy_otel.mlflow.translate import sendable_span
from dspy_otel.record.otlp import decode, encode

ENV_SPOOL: Final = "OTEL_DSPY_SPOOL"
ENV_SPOOL_LIMIT: Final = "OTEL_DSPY_SPOOL_LIMIT"
DEFAULT_LIMIT: Final = 1024 * 1024 * 1024
_OFF: Final = frozenset({"off", "false", "0", "no", "none"})
_RESERVE: Final = 0.1
"""Share of the limit that is for runs, trials and evaluations only."""
_LOCK_SECONDS: Final = 30.0
_SPANS, _REFUSED = "spans", "refused"


class SpoolError(Exception):
    """Something could not be put on disk; the message says why and where."""


def spool_directory() -> Path | None:
    """The directory that the environment names, or the default; None when spooling is off."""
    named = os.environ.get(ENV_SPOOL, "").strip()
    if named.lower() in _OFF:
        return None
    # Absolute: the program may change its directory later.
    if named:
        return Path(os.path.abspath(os.path.expanduser(named)))
    return platformdirs.user_state_path("dspy-otel") / "spool"


def spool_limit(warn: Callable[..., object]) -> int:
    """Most bytes in the spool, from the environment."""
    named = os.environ.get(ENV_SPOOL_LIMIT, "").strip()
    if not named:
        return DEFAULT_LIMIT
    try:
        limit = int(named)
    except ValueError:
        limit = 0
    if limit < 1:
        warn("dspy-otel: %s: use a whole number of bytes above zero; using %d", ENV_SPOOL_LIMIT, DEFAULT_LIMIT)
        return DEFAULT_LIMIT
    return limit


class Place:
    """What one process left behind (or leaves, right now).

    Args:
        path: its directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def acquire(self) -> bool:
        """Lock it for this process; False when another has it, or it is gone."""
        if not self.begin():
            return False
        if not (self.path / "about.json").exists():
            # Who had it has removed it in the meantime: then the lock is of a file that is no more.
            self.release()
            return False
        return True

    def begin(self) -> bool:
        """Lock it while it is being made, and nobody else can know of it."""
        try:
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        except OSError:
            return False
        if not _try_lock(handle):
            os.close(handle)
            return False
        self._lock = handle
        return True

    def release(self) -> None:
        """Unlock it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    forget = release
    """In a forked child: close the lock, which stays the parent's."""

    def about(self) -> dict[str, Any]:
        """Where its content was to go.

        Raises:
            ValueError: the file is broken.
        """
        loaded = json.loads((self.path / "about.json").read_text("utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError("about.json is no object")
        for name in ("tracking_uri", "experiment"):
            if not isinstance(loaded.get(name), str):
                raise ValueError(f"about.json does not say the {name}")
        return loaded

    def refusal(self) -> str | None:
        """Why its content must not be trusted, or ``None``: it says where credentials and files go.

        A directory that is a link, belongs to another user, or is open to others may have been put there by somebody
        else; so may a link or another user's file in it. Ours are the owner's alone.
        """
        try:
            for path in (self.path, *self.path.iterdir()):
                found = path.lstat()
                if stat.S_ISLNK(found.st_mode):
                    return f"{path.name} is a link"
                if hasattr(os, "getuid") and found.st_uid != os.getuid():
                    return f"{path.name} belongs to another user"
                if os.name == "posix" and path is self.path and found.st_mode & 0o077:
                    return f"others may read or write it: if it is yours, chmod 700 {path}"
        except OSError as error:
            return error.strerror or str(error)
        return None

    def files(self, kinds: Iterable[str] = (_SPANS, _REFUSED)) -> list[Path]:
        """Files of spans, oldest first."""
        with contextlib.suppress(OSError):
            found = [path for path in self.path.iterdir() if path.suffix == ".pb"]
            return sorted((path for path in found if path.name.partition("-")[0] in tuple(kinds)), key=_number)
        return []

    def read(self, path: Path) -> list[ReadableSpan]:
        """The spans of a file.

        Raises:
            ValueError: it is broken.
            OSError: it cannot be read.
        """
        return decode(path.read_bytes())

    def state(self) -> dict[str, Any] | None:
        """What MLflow lacks of runs; None when nothing was left, or the process was killed.

        Raises:
            ValueError: the file is broken.
        """
        try:
            loaded = json.loads((self.path / "runs.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        if not isinstance(loaded, dict):
            raise ValueError("runs.json is no object")
        return loaded

    def put_state(self, state: Mapping[str, Any]) -> None:
        """Write what MLflow lacks of runs.

        Raises:
            OSError: it cannot be written.
        """
        self.write("runs.json", json.dumps(state, ensure_ascii=False).encode("utf-8", "replace"))

    def write(self, name: str, body: bytes) -> None:
        """Write a file, all of it or nothing, for the owner's eyes only.

        Raises:
            OSError: it cannot be.
        """
        handle, temporary = tempfile.mkstemp(prefix=".", dir=self.path)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(body)
            os.replace(temporary, self.path / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def set_aside(self, path: Path, spans: Sequence[ReadableSpan]) -> None:
        """Keep the spans of a file that MLflow refuses, in place of the file: another MLflow may take them.

        Raises:
            OSError: they cannot be written.
        """
        number = path.name.split("-")[1] if path.name.count("-") > 1 else "000000"
        kept = self.path / f"{_REFUSED}-{number}-{len(spans)}.pb"
        self.write(kept.name, encode(spans))
        if kept != path:
            self.remove(path)

    def remove(self, path: Path) -> None:
        """Remove a file that has been delivered."""
        with contextlib.suppress(OSError):
            path.unlink()

    def empty(self) -> bool:
        """Whether nothing is left to deliver."""
        return not self.files() and not (self.path / "runs.json").exists()

    def discard(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path, ignore_errors=True)


def places(directory: Path) -> list[Place]:
    """What processes have left in a spool, oldest first; the directory may also be that of one process."""
    if (directory / "about.json").exists():
        return [Place(directory)]
    with contextlib.suppress(OSError):
        return [Place(path) for path in sorted(directory.iterdir()) if (path / "about.json").exists()]
    return []


class Spool:
    """The spool as one process writes it. Nothing is made before there is something to write.

    Args:
        directory: of all processes.
        limit: most bytes in it, those of other processes included.
        about: says where the content was to go.
    """

    def __init__(self, directory: Path, limit: int, about: Callable[[], Mapping[str, Any]]) -> None:
        self.directory = directory
        self._limit = limit
        self._about = about
        self._lock = threading.Lock()
        self._place: Place | None = None
        self._number = 0

    @property
    def place(self) -> Place | None:
        """The part of this process, once there is one."""
        return self._place

    def put(self, spans: Sequence[ReadableSpan], precious: Callable[[ReadableSpan], bool]) -> int:
        """Write spans to a file.

        Args:
            spans: as they ended.
            precious: whether a span must be kept even if there is hardly room.

        Returns:
            How many of them there was no room for.

        Raises:
            SpoolError: nothing could be written.
        """
        spans = [sendable_span(span) for span in spans]
        body = encode(spans)
        dropped = 0
        with self._lock, self._alone() as held:
            place = self._open()
            if held + len(body) > self._limit * (1 - _RESERVE):
                kept = [span for span in spans if precious(span)]
                dropped = len(spans) - len(kept)
                body = encode(kept)
                if not kept or held + len(body) > self._limit:
                    return len(spans)
                spans = kept
            self._write(place, self._name(_SPANS, len(spans)), body)
        return dropped

    def set_aside(self, spans: Sequence[ReadableSpan]) -> None:
        """Write spans that MLflow answers with an error, though it is there. They are not tried again by us.

        Raises:
            SpoolError: nothing could be written.
        """
        body = encode([sendable_span(span) for span in spans])
        with self._lock, self._alone() as held:
            place = self._open()
            if held + len(body) > self._limit:
                raise SpoolError(f"the spool in {self.directory} has reached its limit ({self._limit} bytes)")
            self._write(place, self._name(_REFUSED, len(spans)), body)

    def put_state(self, state: Mapping[str, Any]) -> None:
        """Write what MLflow lacks of runs. This may be above the limit: it is the last, and the most precious.

        Raises:
            SpoolError: it could not be written.
        """
        body = json.dumps(state, ensure_ascii=False).encode("utf-8", "replace")
        with self._lock:
            self._write(self._open(), "runs.json", body)

    def oldest(self) -> Path | None:
        """The file of spans that is to be sent first."""
        if self._place is None:
            return None
        return next(iter(self._place.files((_SPANS,))), None)

    def read(self, path: Path) -> list[ReadableSpan]:
        """The spans of a file; as :meth:`Place.read`."""
        assert self._place is not None
        return self._place.read(path)

    def remove(self, path: Path) -> None:
        """Remove a file that has been sent."""
        with self._lock, contextlib.suppress(OSError):
            path.unlink()

    def waiting(self) -> int:
        """Spans in files that are yet to be sent, those set aside included."""
        return 0 if self._place is None else sum(count_of(path) for path in self._place.files())

    def close(self) -> None:
        """The process ends: what is left is free for others to deliver."""
        with self._lock:
            place, self._place = self._place, None
            if place is not None:
                if place.empty():
                    place.discard()
                place.release()

    def after_fork(self) -> None:
        """In a forked child: what is there stays the parent's."""
        self._lock = threading.Lock()
        if self._place is not None:
            self._place.forget()
            self._place = None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """Write while no other program does; gives the bytes that all of them have in the spool."""
        with only_process(str(self.directory), _LOCK_SECONDS):
            held = 0
            for path in self.directory.glob("*/*.pb"):
                with contextlib.suppress(OSError):  # delivered in the meantime
                    held += path.lstat().st_size
            yield held

    def _open(self) -> Place:
        if self._place is None:
            name = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}"
            try:
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                place = Place(self.directory / name)
                place.path.mkdir(mode=0o700)
                place.begin()
                try:
                    place.write("about.json", json.dumps(dict(self._about()), indent=1).encode())
                except BaseException:
                    place.discard()
                    place.release()
                    raise
            except OSError as error:
                raise self._explained(error) from error
            self._place = place
        return self._place

    def _write(self, place: Place, name: str, body: bytes) -> None:
        try:
            place.write(name, body)
        except OSError as error:
            raise self._explained(error) from error

    def _name(self, kind: str, count: int) -> str:
        self._number += 1
        return f"{kind}-{self._number:06d}-{count}.pb"

    def _explained(self, error: OSError) -> SpoolError:
        return SpoolError(f"the spool in {self.directory} cannot be written ({error.strerror or type(error).__name__})")


def count_of(path: Path) -> int:
    """How many spans a file says that it holds."""
    count = path.stem.rpartition("-")[2]
    return int(count) if count.isdigit() else 0


def _number(path: Path) -> tuple[str, str]:
    kind, _, rest = path.name.partition("-")
    return rest, kind


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
