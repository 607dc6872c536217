"""A terminal: at most two lines below what the program writes, and one that stays for each optimization that ends."""

from __future__ import annotations

import builtins
import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from dspy_otel.core.internal_errors import failed, guard, warn_once
from dspy_otel.optimizers.progress.streams import Redirection, is_terminal
from dspy_otel.optimizers.progress.view import View, closing, line, link
from dspy_otel.record.addresses import Address, mark_shown, when_known

_PER_SECOND: Final = 4
_LINES: Final = 2
_INSTALL: Final = "pip install 'dspy-otel[progress]'"


class Terminal:
    """The display on stderr.

    Args:
        views: gives the running optimizations.
    """

    def __init__(self, views: Callable[[], Sequence[View]]) -> None:
        self._views = views
        self._error: Exception | None = None
        self._console: Any = None
        self._live: Any = None
        self._redirection: Redirection | None = None
        self._drawing = threading.RLock()
        """Held for all that is printed: Rich lets two threads print at once, and one erases a line of the other."""
        self._over = threading.Event()
        self._asking = threading.RLock()  # a signal handler may ask while somebody is asked
        self._input: Callable[..., str] = builtins.input
        self._on = False
        self._process = os.getpid()

    @staticmethod
    def usable() -> bool:
        """Whether stderr is a terminal. Without rich there is one warning instead."""
        if not is_terminal(sys.stderr):
            return False
        try:
            import rich.live  # noqa: F401
        except ImportError:
            warn_once(("progress", "rich"), "the progress display needs rich; install it with: %s", _INSTALL)
            return False
        return True

    def start(self) -> None:
        """Show it."""
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        # A program that is killed leaves its terminal as it is then: the cursor stays visible.
        self._console.show_cursor = lambda show=True: False
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        # First of all: where no thread can be started, nothing has been replaced.
        threading.Thread(target=self._refresh, name="dspy-otel-progress", daemon=True).start()
        self._live.start()
        self._redirection = Redirection(self._above)
        # A prompt goes to the terminal past any stream, and the display would overwrite it.
        self._input, builtins.input = builtins.input, self._ask
        self._on = True

    def _refresh(self) -> None:
        """Draw it again a few times each second."""
        while not self._over.wait(1 / _PER_SECOND):
            with self._drawing:
                if self._redirection is None:
                    continue  # somebody is asked
                try:
                    self._live.refresh()
                except Exception as error:
                    self._error = self._error or error
                    return

    def _ask(self, *prompt: Any) -> str:
        """In place of ``input()``, which debuggers use too: the display is away while somebody is asked."""
        if not self._on or os.getpid() != self._process:
            return self._input(*prompt)
        with self._asking:
            paused = self._pause()
            try:
                return self._input(*prompt)
            finally:
                if paused is not None:
                    self._resume(paused)

    def _pause(self) -> Redirection | None:
        with self._drawing:
            redirection, self._redirection = self._redirection, None
            if redirection is not None:
                try:
                    self._live.stop()  # it takes itself away from where the cursor is: nothing may be written before
                    redirection.pause()
                except Exception as error:
                    self._error = self._error or error
            return redirection

    def _resume(self, redirection: Redirection) -> None:
        with self._drawing:
            try:
                if not self._on:  # it has been stopped meanwhile
                    redirection.end()
                    return
                self._live.start()
                redirection.go_on()
                self._redirection = redirection
            except Exception as error:
                self._error = self._error or error

    def begin(self, view: View) -> None:
        """An optimization begins: it is shown at once, however short it is."""
        mark_shown(view.id)
        with self._drawing:
            self._live.refresh()

    def end(self, view: View) -> None:
        """Leave the line of an optimization that has ended."""
        from rich.text import Text

        style = "green" if view.outcome == "finished" else "red"
        mark, _, rest = closing(view, self._console.width, self._unicode).partition(" ")
        self._print(Text.assemble((mark, style), " ", rest))
        if view.address is not None:
            self._print(Text(f"  {link(view)}", style="dim"))
        else:  # a backend may know it only when the program ends
            when_known(view.id, lambda address: self._add_link(view, address))

    def _add_link(self, view: View, address: Address) -> None:
        with guard("progress display"):
            if os.getpid() == self._process:
                from rich.text import Text

                where = link(dataclasses.replace(view, address=address))
                self._print(Text(f"  {view.name}: {where}", style="dim"))

    def stop(self) -> None:
        """Take it away, and give the streams back."""
        self._over.set()
        if self._on and builtins.input == self._ask:
            builtins.input = self._input
        self._on = False  # whoever has put a function of his own around ours still gets to the one that was there
        with self._drawing:
            redirection, self._redirection = self._redirection, None
            try:
                if self._live is not None:
                    self._live.stop()
            finally:
                if redirection is not None:
                    redirection.end()
        if self._error is not None:
            failed("progress display", self._error)

    @property
    def _unicode(self) -> bool:
        return str(self._console.encoding).lower().startswith("utf")

    def _above(self, lines: str) -> None:
        from rich.text import Text

        self._print(Text.from_ansi(lines))

    def _print(self, text: Any) -> None:
        with self._drawing:
            self._console.print(text)

    def _render(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        shown: list[Any] = []
        try:
            width = self._console.width - 1
            redirection = self._redirection
            if redirection is not None and (pending := redirection.pending):
                shown.append(Text.from_ansi(pending, no_wrap=True, overflow="ellipsis", end="\n"))
            for view in self._views()[: _LINES - len(shown)]:
                name, _, rest = line(view, width, self._unicode).partition(" ")
                shown.append(Text.assemble((name, "bold"), " ", rest, no_wrap=True, overflow="ellipsis"))
        except (
            Exception
        ) as error:  # Raised in rich's thread, it would be printed to the terminal; logged, be in its way.
            self._error = self._error or error
        return Group(*shown)
