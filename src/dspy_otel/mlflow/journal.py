"""The journal: finished spans on disk, encoded for sending. It is the queue to MLflow, and ``replay`` reads it.

One directory for each process, with the owner's rights only::

    <spool>/20260131T120000-4711-9f3c/
        about.json         the target
        starts.pb          optimizations, trials and evaluations as they started, so that replay can end those of a
                           process that was killed
        000001.pb          a segment: the body of one OTLP/HTTP request in protobuf, as any OTLP receiver takes it
        000002.sent.pb     a delivered one that may be needed for runs that MLflow does not have in full
        000003.refused.pb  spans that MLflow refuses
        lock               locked by the process while it lives, or by a replay

A segment grows by complete protobuf messages until the worker closes it: concatenated OTLP requests are one request.
A process that is killed may leave an incomplete message at the end, which is not read.

Only the user's own directories and files that nobody else may write are read, and links are not followed, because the
target in them decides where credentials are sent. The journal has only what is sent to MLflow: prompts and answers only
if content is captured. The limit applies to all processes together; a lock guards it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import filelock
from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel.mlflow.locks import lock_for, state_directory
from dspy_otel.mlflow.runs import Assessment
from dspy_otel.mlflow.target import working_directory
from dspy_otel.mlflow.translate import finished
from dspy_otel.record.otlp import encode

ENV_SPOOL: Final = "OTEL_DSPY_SPOOL"
ENV_SPOOL_LIMIT: Final = "OTEL_DSPY_SPOOL_LIMIT"
DEFAULT_LIMIT: Final = 1024 * 1024 * 1024
_OFF: Final = frozenset({"off", "false", "0", "no", "none"})
_RESERVE: Final = 0.1
"""Share of the limit that is reserved for optimizations, trials and evaluations."""
SEGMENT_SPANS: Final = 512
SEGMENT_BYTES: Final = 4 * 1024 * 1024
MEMORY_BYTES: Final = 64 * 1024 * 1024
"""Most bytes of segments in memory when the disk cannot be written."""
_LOCK_SECONDS: Final = 10.0
_DISK_RETRY_SECONDS: Final = 30.0
"""Seconds after a failure to write to disk before the next attempt."""
_NOFOLLOW: Final = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_NONBLOCK: Final = getattr(os, "O_NONBLOCK", 0)
"""A pipe in a file's place does not block whoever opens it."""
_STARTS: Final = "starts.pb"


class JournalError(Exception):
    """A file cannot be written, or must not be read; the message says why and where.

    Args:
        message: for the log.
        passing: another attempt may succeed, as when too many files are open.
    """

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


def spool_directory() -> Path | None:
    """The directory that the environment names, or the default; None when the spool is off."""
    named = os.environ.get(ENV_SPOOL, "").strip()
    if named.lower() in _OFF:
        return None
    if named:
        # The program may change its directory later.
        return Path(os.path.normpath(os.path.join(working_directory(), os.path.expanduser(named))))
    return state_directory() / "spool"


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


@dataclass(eq=False)
class Segment:
    """Spans that are sent together.

    Attributes:
        number: its position in the queue.
        count: number of spans.
        size: bytes.
        path: its file; None for one in memory.
        parts: OTLP requests, of one in memory.
        spans: a cache of the spans; None when they must be read back.
        groups: optimizations and evaluations whose spans are in it.
        roots: traces that begin in it.
        closed: no spans are added any more.
        applied: the worker knows its runs, links and scores.
        delivered: its spans are in MLflow, or set aside.
        links: key of a run, and id of a trace that belongs to it.
        scores: of its traces, and what was expected of them.
        failures: failed deliveries in a row.
        baseline: number of deliveries of others before it first failed.
        due: when to try again.
    """

    number: int
    count: int = 0
    size: int = 0
    path: Path | None = None
    parts: list[bytes] = field(default_factory=list)
    spans: list[ReadableSpan] | None = field(default_factory=list)
    groups: set[str] = field(default_factory=set)
    roots: int = 0
    closed: bool = False
    applied: bool = False
    delivered: bool = False
    links: list[tuple[str, str]] = field(default_factory=list)
    scores: list[Assessment] = field(default_factory=list)
    failures: int = 0
    baseline: int = 0
    due: float = 0.0

    def body(self) -> bytes:
        """The OTLP request.

        Raises:
            JournalError: it cannot be read.
        """
        if self.path is None:
            return b"".join(self.parts)
        return complete_messages(read_file(self.path))


class JournalDirectory:
    """The journal of one process, running or ended.

    Args:
        path: its directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def check(self) -> None:
        """Check that it is the user's own and that nobody else may write it.

        Raises:
            JournalError: it is not safe to read.
        """
        _check(self.path, directory=True)

    def acquire(self) -> bool:
        """Lock it for this process; False when another process has the lock, or has removed the directory.

        Raises:
            JournalError: it is not safe to read.
        """
        self.check()
        if not self.lock():
            return False
        if not (self.path / "about.json").exists():
            # Another process has delivered and removed it meanwhile.
            self.release()
            return False
        return True

    def lock(self) -> bool:
        """Take the lock; False when another process has it."""
        try:
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o600)
        except OSError:
            return False
        if not _try_lock(handle):
            os.close(handle)
            return False
        self._lock = handle
        return True

    def release(self) -> None:
        """Unlock it. In a forked child this closes the lock, which stays the parent's."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def about(self) -> dict[str, Any]:
        """The target of its spans.

        Raises:
            JournalError: it is not safe to read.
            ValueError: the file is broken.
        """
        self.check()
        try:
            loaded = json.loads(read_file(self.path / "about.json"))
        except RecursionError as error:
            raise JournalError("about.json is not readable JSON") from error
        if not isinstance(loaded, dict):
            raise ValueError("about.json is no object")
        return loaded

    def files(self) -> list[Path]:
        """Its segments, oldest first, including sent and refused ones."""
        with contextlib.suppress(OSError):
            names = [path for path in self.path.iterdir() if path.suffix == ".pb" and path.name[:1].isdigit()]
            return sorted(names, key=lambda path: path.name)
        return []

    def undelivered(self) -> list[Path]:
        """Segments that are not delivered, including refused ones."""
        return [path for path in self.files() if not is_sent(path)]

    @property
    def starts(self) -> Path:
        """The file of spans as they started."""
        return self.path / _STARTS

    def empty(self) -> bool:
        """Whether nothing is left to deliver."""
        return not self.files() and not self.starts.exists()

    def remove_all_but(self, kept: Collection[Path]) -> None:
        """Remove what was delivered, and leave the files that cannot be."""
        for path in (self.starts, *self.files()):
            if path not in kept:
                _remove(path)

    def discard(self) -> None:
        """Remove all of it. Other processes never see a part: it gets a hidden name first."""
        with contextlib.suppress(OSError):  # Windows renames no directory with open files
            self.path = self.path.rename(self.path.with_name(f".{self.path.name}"))
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                if not stat.S_ISDIR(path.lstat().st_mode):
                    path.unlink()
            self.path.rmdir()


def journal_directories(directory: Path) -> list[JournalDirectory]:
    """The journals in a spool, oldest first; the directory may also be that of one process."""
    if (directory / "about.json").exists():
        return [JournalDirectory(directory)]
    with contextlib.suppress(OSError):
        shown = [path for path in sorted(directory.iterdir()) if not path.name.startswith(".")]
        return [JournalDirectory(path) for path in shown if path.is_dir() or path.is_symlink()]
    return []


class Journal:
    """The journal as one process writes it: the queue of segments. Its directory is created by the first write.

    Its methods may be called by different threads.

    Args:
        directory: of all processes; None to keep everything in memory.
        limit: most bytes on disk, those of other processes included.
        about: gives the target.
        warn: called with a cause and a message when something fails.
    """

    def __init__(
        self,
        directory: Path | None,
        limit: int,
        about: Callable[[], Mapping[str, Any]],
        warn: Callable[[str, str], object],
    ) -> None:
        self.directory = directory
        self._limit = limit
        self._about = about
        self._warn = warn
        self._lock = threading.Lock()
        self._limit_lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self.place: JournalDirectory | None = None
        self._number = 0
        self._no_disk_until = 0.0
        self._closed = False
        self.segments: list[Segment] = []
        """Not yet delivered, oldest first."""
        self.kept: list[Segment] = []
        """Delivered, but still needed."""
        self.refused = 0
        """Spans that were set aside."""
        self.evicted: set[str] = set()
        """Optimizations and evaluations with delivered segments that were removed because the limit was reached."""
        self.lost: set[str] = set()
        """Optimizations and evaluations of which MLflow has lost what it had."""

    def append_starts(self, body: bytes) -> bool:
        """Write spans that have started; False when they are not on disk."""
        with self._lock, contextlib.suppress(OSError, JournalError):
            place = self._open()
            return place is not None and self._write(place.path / _STARTS, body, reserve=True)
        return False

    def append(
        self,
        body: bytes,
        spans: list[ReadableSpan],
        groups: set[str],
        roots: int,
        *,
        needed: bool,
        although_full: bool = False,
    ) -> Segment | None:
        """Add spans to the end of the queue.

        Args:
            body: an OTLP request.
            spans: those that are in it.
            groups: optimizations and evaluations that they belong to.
            roots: traces that begin with them.
            needed: whether they are of optimizations, trials or evaluations, which may use the reserve.
            although_full: keep them in memory when the limit of the spool is reached.

        Returns:
            The segment that has them; None when there was no room.
        """
        with self._lock:
            self._leave_removed()
            last = self.segments[-1] if self.segments else None
            if (
                last is None
                or last.closed
                or last.count + len(spans) > SEGMENT_SPANS
                or last.size > SEGMENT_BYTES
                or (needed and last.path is None and last.count)  # the reserve on disk is for these
            ):
                self._number += 1
                last = Segment(self._number)
            on_disk = (last.path is not None or not last.count) and self._put(last, body, needed)
            if on_disk is None and not although_full:
                return None
            if not on_disk:
                if last.path is not None:
                    self._number += 1
                    last = Segment(self._number)
                room = MEMORY_BYTES * (2 if needed else 1)
                if sum(segment.size for segment in self.segments if segment.path is None) + len(body) > room:
                    return None
                last.parts.append(body)
            last.count += len(spans)
            last.size += len(body)
            last.groups |= groups
            last.roots += roots
            if last.spans is not None:
                last.spans += spans
            if not self.segments or self.segments[-1] is not last:
                self.segments.append(last)
            if last.count >= SEGMENT_SPANS:
                last.closed = True
            return last

    def save(self) -> list[Segment]:
        """Try to write the segments that are only in memory, and return those that were written: the process ends."""
        saved: list[Segment] = []
        with self._lock, contextlib.suppress(OSError, JournalError):
            for segment in [one for one in self.segments if one.path is None and not one.delivered]:
                place = self._open()
                if place is None:
                    break
                path = place.path / f"{segment.number:06d}.pb"
                if not self._write(path, segment.body(), reserve=True):
                    break
                segment.path = path
                saved.append(segment)
        return saved

    def close_segment(self, segment: Segment) -> None:
        """Close a segment: no spans are added any more."""
        with self._lock:
            segment.closed = True

    def delivered(self, segment: Segment, keep: bool) -> None:
        """Remove a delivered segment, or keep it for runs that may need it again."""
        with self._lock:
            if segment in self.segments:
                self.segments.remove(segment)
            segment.spans, segment.parts = None, []
            if segment.path is None or is_refused(segment.path):
                return
            if keep:
                with contextlib.suppress(OSError):
                    if not is_sent(segment.path) and not segment.groups & self.lost:
                        segment.path = segment.path.rename(segment.path.with_suffix(".sent.pb"))
                    self.kept.append(segment)
                    return
            _remove(segment.path)

    def send_again(self, groups: set[str]) -> None:
        """Count spans of optimizations or evaluations as not delivered: MLflow has lost them. Replay sends them."""
        with self._lock, contextlib.suppress(OSError):
            self.lost |= groups
            for segment in self.kept:
                if segment.path is not None and segment.groups & groups:
                    segment.path = unsent(segment.path)

    def release(self, needed: Callable[[str], bool]) -> None:
        """Remove kept segments whose groups are not needed any more."""
        with self._lock:
            for segment in list(self.kept):
                if not any(map(needed, segment.groups)):
                    self.kept.remove(segment)
                    if segment.path is not None:
                        _remove(segment.path)

    def mark_finished(self, group: str) -> None:
        """Mark an optimization or evaluation that MLflow has in full: replay ignores its start."""
        if self.place is not None:
            self.append_starts(encode([finished(group)]))

    def remove_starts(self) -> None:
        """Remove the starts: no optimization or evaluation runs, and MLflow has all of them."""
        with self._lock:
            if self.place is not None and not self.kept:
                _remove(self.place.path / _STARTS)

    def set_aside(self, body: bytes, count: int) -> bool:
        """Write spans that MLflow refuses to a file; False when that is not possible."""
        with self._lock, contextlib.suppress(OSError, JournalError):
            place = self._open()
            if place is None:
                return False
            self._number += 1
            if not self._write(place.path / f"{self._number:06d}.refused.pb", body, reserve=True):
                return False
            self.refused += count
            return True
        return False

    def set_aside_whole(self, segment: Segment) -> bool:
        """Rename a whole segment as refused, when nothing can be written; False when it is only in memory."""
        with self._lock, contextlib.suppress(OSError):
            if segment.path is not None:
                if not is_refused(segment.path):
                    segment.path = segment.path.rename(segment.path.with_suffix(".refused.pb"))
                self.refused += 1
                return True
        return False

    def close(self, done: bool) -> None:
        """Release the journal, for others to deliver the rest: the process ends.

        Args:
            done: whether nothing is pending.
        """
        with self._lock:
            self._closed = True  # a thread that still writes makes no new directory
            place, self.place = self.place, None
            if place is not None:
                if done and not place.undelivered():
                    place.discard()
                place.release()

    def after_fork(self) -> None:
        """In a forked child: leave the segments to the parent."""
        self._lock = threading.Lock()
        self._limit_lock = contextlib.nullcontext()
        self.segments, self.kept, self.evicted = [], [], set()
        if self.place is not None:
            self.place.release()
            self.place = None

    # --- on disk ----------------------------------------------------------------------------------------------------
    def _put(self, segment: Segment, body: bytes, needed: bool) -> bool | None:
        """Whether a body was written to disk; None when the limit of the spool is reached."""
        if self.directory is None or time.monotonic() < self._no_disk_until:
            return False
        try:
            place = self._open()
            if place is None:
                return False
            path = segment.path or place.path / f"{segment.number:06d}.pb"
            if not self._write(path, body, reserve=needed):
                self._warn(
                    "spool full",
                    f"The spool in {self.directory} is full: spans wait in memory, and what is not sent when the "
                    "program ends, or is killed, is lost. `dspy-otel replay --list` shows what fills it.",
                )
                return None
            segment.path = path
        except (OSError, JournalError) as error:
            why = str(error) if isinstance(error, JournalError) else (error.strerror or str(error))
            self._no_disk_until = time.monotonic() + _DISK_RETRY_SECONDS
            self._warn(
                "spool",
                f"The spool in {self.directory} cannot be written ({why}): spans wait in memory, and what is not sent "
                "when the program ends, or is killed, is lost.",
            )
            return False
        return True

    def _leave_removed(self) -> None:
        """Begin anew when the directory was removed, as by a program that cleans up ``/tmp``."""
        if self.place is not None and _is_gone(self.place.path):
            self.place.release()
            self.place = None
            for segment in self.segments:
                segment.closed = True

    def _open(self) -> JournalDirectory | None:
        self._leave_removed()
        if self.place is None and self.directory is not None and not self._closed:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check(self.directory, directory=True, private=False)
            place = JournalDirectory(
                self.directory / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}"
            )
            place.path.mkdir(mode=0o700)
            place.lock()
            try:
                text = json.dumps(dict(self._about()), indent=1).encode()
                temporary = place.path / ".about"
                _append(temporary, text)
                temporary.rename(place.path / "about.json")
            except BaseException:
                place.discard()
                place.release()
                raise
            self._limit_lock = lock_for(str(self.directory), _LOCK_SECONDS) or contextlib.nullcontext()
            self.place = place
        return self.place

    def _write(self, path: Path, body: bytes, *, reserve: bool) -> bool:
        """Append to a file; False when all processes together reach the limit."""
        assert self.directory is not None
        limit = self._limit if reserve else self._limit * (1 - _RESERVE)
        try:
            with self._limit_lock:
                used = _used(self.directory)
                while used + len(body) > limit and self.kept:  # these are in MLflow already
                    oldest = self.kept.pop(0)
                    used -= oldest.size
                    self.evicted |= oldest.groups
                    if oldest.path is not None:
                        _remove(oldest.path)
                if used + len(body) > limit:
                    return False
                _append(path, body)
        except filelock.Timeout:
            raise JournalError("its lock is taken") from None
        return True


def is_sent(path: Path) -> bool:
    """Whether a segment was delivered."""
    return path.name.endswith(".sent.pb")


def unsent(path: Path) -> Path:
    """Rename a segment as not delivered.

    Raises:
        OSError: that is not possible.
    """
    return path.rename(path.with_name(path.name.replace(".sent.pb", ".pb"))) if is_sent(path) else path


def is_refused(path: Path) -> bool:
    """Whether a segment is of spans that MLflow refuses."""
    return path.name.endswith(".refused.pb")


def read_file(path: Path) -> bytes:
    """Read a file that is the user's own and no link.

    Raises:
        JournalError: it is not, or cannot be read.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | _NOFOLLOW | _NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or (os.name == "posix" and found.st_uid != os.getuid()):
                raise JournalError(f"{path.name} is no file of this user's")
            return file.read()
    except OSError as error:
        passing = error.errno not in (errno.ENOENT, errno.ELOOP)
        raise JournalError(f"{path.name} cannot be read ({error.strerror})", passing) from error


def complete_messages(body: bytes) -> bytes:
    """A request without an incomplete last message."""
    return body[: max(_message_ends(body), default=0)]


def _message_ends(body: bytes) -> Iterator[int]:
    """Where each field of the outermost message ends (all of them are ``resource_spans``, number 1)."""
    place = 0
    while place < len(body):
        if body[place] != 0x0A:
            if place == 0:
                raise JournalError("no OTLP request")
            return
        place, length, shift = place + 1, 0, 0
        while True:
            if place >= len(body) or shift > 56:
                return
            byte = body[place]
            length |= (byte & 0x7F) << shift
            place, shift = place + 1, shift + 7
            if byte < 0x80:
                break
        place += length
        if place > len(body):
            return
        yield place


def _append(path: Path, body: bytes) -> None:
    """Append all of a body to a file, or nothing."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NOFOLLOW, 0o600)
    try:
        found = os.fstat(handle)
        if not _is_own(found):  # Whoever owns the directory above may have put another one in its place.
            raise PermissionError(errno.EPERM, "not the user's own file", str(path))
        before = found.st_size
        try:
            rest = memoryview(body)
            while rest:
                rest = rest[os.write(handle, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, before)
            if before == 0:
                _remove(path)
            raise
    finally:
        os.close(handle)


def _is_own(file: os.stat_result) -> bool:
    """Whether a file is a regular one of this user's, that nobody else can open and that has one name."""
    if os.name != "posix":
        return stat.S_ISREG(file.st_mode)
    own = file.st_uid == os.getuid() and not file.st_mode & 0o077
    return own and stat.S_ISREG(file.st_mode) and file.st_nlink == 1


def _used(directory: Path) -> int:
    total = 0
    with os.scandir(directory) as found:
        for place in found:
            if place.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError), os.scandir(place.path) as files:
                    for file in files:
                        if file.name.endswith(".pb"):
                            with contextlib.suppress(OSError):
                                total += file.stat(follow_symlinks=False).st_size
    return total


def _check(path: Path, *, directory: bool, private: bool = True) -> None:
    """Check that a path is the user's own, no link, and, if ``private``, not accessible by others.

    Raises:
        JournalError: it is not.
    """
    try:
        found = os.lstat(path)
    except OSError as error:
        raise JournalError(f"{path} cannot be looked at ({error.strerror})") from error
    if stat.S_ISLNK(found.st_mode) or stat.S_ISDIR(found.st_mode) != directory:
        raise JournalError(f"{path} is a link, or no directory: it is not followed")
    if os.name == "posix":
        if private and found.st_uid != os.getuid():
            raise JournalError(f"{path} belongs to another user: it is not read")
        if private and found.st_mode & 0o077:
            raise JournalError(f"{path} can be reached by other users (mode {found.st_mode & 0o777:o}): it is not read")


def _is_gone(path: Path) -> bool:
    """Whether nothing is there; not so where that cannot be looked up, for rights were taken or a disk fails."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


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
