"""Waiting for servers, processes and threads: for as long as they get on, however slow the machine is.

This is the only place with a limit of time. Nothing that works gets there: it is for what hangs.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

_Found = TypeVar("_Found")

STALLED = 240.0
"""Seconds without any progress after which a test gives up."""
LONGEST = 3600.0
"""Seconds after which a test gives up on what is busy without an end."""
_BUSY = 1.0
"""Seconds of processor time that are progress. A server that idles needs longer than ``STALLED`` for them."""


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
    """Give what ``condition()`` gives once it is true.

    Processor time that the other threads of this process and its child processes use is progress too.

    Args:
        condition: called until it gives something true.
        what: the name of what is waited for, for the message.
        progress: anything that changes while there is progress; default: what ``condition()`` gives.
        ignored: exceptions of either that mean "not yet".
        pause: seconds between two calls.

    Raises:
        Stalled: there was no progress for ``STALLED`` seconds, or no end within ``LONGEST``.
    """
    last: Any = None
    work: float | None = None
    began = changed = measured = time.monotonic()
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
        if now - measured > 2:  # not each time: it reads a file for each process
            measured, used = now, _work()
            if work is None:
                work = used
            elif abs(used - work) > _BUSY:  # less than before: a process with all it used is gone
                work, changed = used, now
        if now - changed > STALLED or now - began > LONGEST:
            raise Stalled(f"{what}: no progress for {now - changed:.0f} s of {now - began:.0f} (last: {last!r:.200})")
        time.sleep(pause)


def wait_for_event(event: threading.Event, what: str) -> None:
    """Wait until an event is set."""
    wait_for(event.is_set, what, pause=0.01)


def wait_for_exit(process: subprocess.Popen[Any], what: str) -> int:
    """Wait until a process has ended, and give its status. Its output must go to a file: nobody reads it meanwhile."""
    wait_for(lambda: process.poll() is not None, f"the end of {what}")
    return process.returncode


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait until a process has ended, and give its status and what it wrote to its pipes. Kill it if it stalls."""

    def output() -> tuple[str, str]:
        return process.communicate(timeout=0.5)

    try:
        wrote = wait_for(output, f"the end of {process.args!r:.500}", ignored=(subprocess.TimeoutExpired,))
    except BaseException:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, *wrote)


def run(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as ``subprocess.run`` does with its output captured as text; without a time limit."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return finish(subprocess.Popen(command, env=env, cwd=cwd, **pipes))


def _work() -> float:
    """Seconds of processor time: of other threads of this process, and of processes it started, as far as known."""
    times = os.times()
    mine = time.process_time() - time.thread_time()
    return mine + times.children_user + times.children_system + sum(map(_used, _descendants(os.getpid())))


def _descendants(pid: int) -> list[int]:
    """The processes below one, from /proc; none on a system without it."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := _stat(int(folder.name)):
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found = list(parents.get(pid, ()))
    for each in found:  # grows while it is read
        found += parents.get(each, ())
    return found


def _used(pid: int) -> float:
    """Seconds of processor time of a process and of its children that have ended."""
    fields = _stat(pid)
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") if fields else 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on; none when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
