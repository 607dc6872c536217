"""What a program writes to the terminal while the display is on: whole lines go above it, unaltered.

DSPy's progress bars overwrite their own line. The current state of such a line is part of the display; only
what it was at its end goes above.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

_LONGEST: Final = 65536
"""Characters of a line without an end after which it is passed on."""
_UP: Final = "\x1b[A"


class Stream:
    """In place of ``sys.stdout`` or ``sys.stderr``. After :meth:`end`, and in a forked child, it passes everything on.

    Args:
        real: the stream it stands for.
        above: prints whole lines above the display; what it raises is ignored, and the lines are written as they are.
    """

    def __init__(self, real: Any, above: Callable[[str], object]) -> None:
        self._real = real
        self._above: Callable[[str], object] | None = above
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._bar = ""
        """The state of a line that is being overwritten."""
        self._begun = ""
        """A line without its end."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    @property
    def pending(self) -> str:
        """What the program has written of a line that it has not ended."""
        return self._begun if self._begun.strip() else self._bar

    def write(self, text: str) -> int:
        """Pass whole lines on, and keep the rest until its line has an end."""
        above = self._above
        if above is None or os.getpid() != self._process or not isinstance(text, str):
            return self._real.write(text)  # type: ignore[no-any-return]
        with self._lock:
            *ended, rest = text.split("\n")
            lines = []
            for piece in ended:
                self._add(piece)
                # A bar goes on below a log line; it is at its end when nothing else stands before the end of a line.
                lines.append(self._begun or self._bar)
                if not self._begun:
                    self._bar = ""
                self._begun = ""
            self._add(rest)
            if len(self._begun) > _LONGEST:
                lines.append(self._begun)
                self._begun = ""
        if lines:
            try:
                above("\n".join(lines))
            except Exception:  # such as a character that the terminal cannot show: the stream itself says so
                self._real.write("\n".join(lines) + "\n")
        return len(text)

    def _add(self, piece: str) -> None:
        """Add a part of a line."""
        while piece.startswith(_UP):
            piece = piece[len(_UP) :]
        _, overwritten, last = piece.rstrip("\r").rpartition("\r")
        if overwritten:
            self._bar = last
        else:
            self._begun += last

    def writelines(self, lines: Any) -> None:
        """Write each of them."""
        for text in lines:
            self.write(text)

    def flush(self) -> None:
        """Flush the stream it stands for; what is pending stays, for its line may go on."""
        self._real.flush()

    def pause(self) -> None:
        """Write lines as they are from now on; a bar waits for :meth:`go_on`, and goes on then."""
        with self._lock:
            begun, self._begun, self._above = self._begun, "", self._write_line
        if begun:
            self._real.write(begun)

    def _write_line(self, lines: str) -> None:
        self._real.write(f"{lines}\n")

    def go_on(self, above: Callable[[str], object]) -> None:
        """Pass lines on to the display again."""
        with self._lock:
            self._above = above

    def end(self) -> None:
        """Write what is pending, and pass everything on from now on."""
        with self._lock:
            self._above = None
            rest, self._begun, self._bar = self.pending, "", ""
        if rest and os.getpid() == self._process:
            self._real.write(rest)


class Redirection:
    """``sys.stdout``, ``sys.stderr`` and the log handlers that write to them, while the display is on.

    Args:
        above: prints whole lines above the display.
    """

    def __init__(self, above: Callable[[str], object]) -> None:
        self._above = above
        self._streams: dict[str, tuple[Any, Stream]] = {}
        for name in ("stdout", "stderr"):
            real = getattr(sys, name)
            if is_terminal(real):
                self._streams[name] = real, Stream(real, above)
        self._put()

    @property
    def pending(self) -> str:
        """The line that the program has begun and not ended, such as a progress bar."""
        texts = [stream.pending for _, stream in self._streams.values() if stream.pending.strip()]
        return texts[-1] if texts else ""

    def pause(self) -> None:
        """Put everything back for a while: a progress bar has the stream it began with, and writes to it meanwhile."""
        self._put_back()
        for _, stream in self._streams.values():
            stream.pause()

    def go_on(self) -> None:
        """Redirect what :meth:`pause` has put back, by the same streams."""
        for _, stream in self._streams.values():
            stream.go_on(self._above)
        self._put()

    def end(self) -> None:
        """Put everything back. A stream that somebody still has passes everything on."""
        self._put_back()
        for _, stream in self._streams.values():
            stream.end()

    def _put(self) -> None:
        for name, (real, stream) in self._streams.items():
            if getattr(sys, name) is real:
                setattr(sys, name, stream)
            _redirect_handlers(real, stream)

    def _put_back(self) -> None:
        for name, (real, stream) in self._streams.items():
            if getattr(sys, name) is stream:
                setattr(sys, name, real)
            _redirect_handlers(stream, real)


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; a closed one, or None, is none."""
    try:
        return stream is not None and bool(stream.isatty())
    except Exception:
        return False


def _redirect_handlers(old: Any, new: Any) -> None:
    """Let handlers that write to one stream write to another one. Their own code is not called."""
    loggers = [logging.root, *(item for item in list(logging.root.manager.loggerDict.values()))]
    for logger in loggers:
        for handler in list(getattr(logger, "handlers", ())):
            attributes = object.__getattribute__(handler, "__dict__")
            if isinstance(handler, logging.StreamHandler) and attributes.get("stream") is old:
                attributes["stream"] = new
