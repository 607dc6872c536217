"""A notebook: a table in the output of the cell, brought up to date while the optimization runs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, Final

from dspy_otel.core.internal_errors import failed
from dspy_otel.optimizers.progress.view import (
    FINISHED,
    RUNNING,
    View,
    clock,
    closing,
    line,
    progress_text,
    score_and_gain,
    score_text,
    spend_text,
)
from dspy_otel.record.addresses import address_of

_SECONDS: Final = 0.5
_LINK_SECONDS: Final = 60
"""How long the link is waited for, in the background, after the end."""
_QUIET: Final = ("dspy.teleprompt", "dspy.evaluate")
_MOST_WARNINGS: Final = 1_000
"""Warnings that are kept to know them again."""
_CELL: Final = "text-align:left;padding:2px 14px 2px 0;background:none"


class Notebook:
    """The display in a notebook: a table for each outermost optimization.

    DSPy's own account of its progress, log lines below WARNING, is left out meanwhile, and so is a warning that has
    been shown: its optimizers give some with each proposal.

    Args:
        views: gives the running optimizations.
    """

    def __init__(self, views: Callable[[], Sequence[View]]) -> None:
        self._views = views
        self._tables: dict[str, _Table] = {}
        self._without_link: list[tuple[_Table, View]] = []
        self._over = threading.Event()
        self._quiet = _Quiet()

    @staticmethod
    def usable() -> bool:
        """Whether this is a Jupyter kernel."""
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        return hasattr(shell, "kernel")

    def start(self) -> None:
        """Bring tables up to date from now on."""
        self._quiet.start()
        threading.Thread(target=self._refresh, name="dspy-otel-progress", daemon=True).start()

    def begin(self, view: View) -> None:
        """Show the table of an optimization that begins, in the output of the cell that runs."""
        self._tables[view.id] = _Table(view)

    def end(self, view: View) -> None:
        """Show what came of it."""
        table = self._tables.pop(view.id)
        table.update(view)
        if view.address is None:
            self._without_link.append((table, view))

    def stop(self) -> None:
        """End the updates."""
        self._over.set()
        self._quiet.end()

    def _refresh(self) -> None:
        while not self._over.wait(_SECONDS):
            try:
                for view in self._views():
                    if (table := self._tables.get(view.id)) is not None:
                        table.update(view)
            except Exception as error:
                failed("progress display", error)
                return
        self._add_links()

    def _add_links(self) -> None:
        """A backend may know where an optimization is shown only when that has ended."""
        for _ in range(int(_LINK_SECONDS / _SECONDS)):
            for item in list(self._without_link):
                table, view = item
                address = address_of(view.id)
                if address is not None:
                    self._without_link.remove(item)
                    with contextlib.suppress(Exception):
                        table.update(dataclasses.replace(view, address=address))
            if not self._without_link:
                return
            time.sleep(_SECONDS)


class _Table:
    """One table, in its own output."""

    def __init__(self, view: View) -> None:
        from IPython.display import display

        self._lock = threading.Lock()
        self._ended = False
        self._shown = html(view)
        self._handle: Any = display(_bundle(view, self._shown), raw=True, display_id=True)

    def update(self, view: View) -> None:
        """Show another state; nothing comes after the end."""
        with self._lock:
            text = html(view)
            ended = view.outcome != RUNNING
            if text == self._shown or (self._ended and not ended):
                return
            self._ended, self._shown = ended, text
            self._handle.update(_bundle(view, text), raw=True)


def _bundle(view: View, text: str) -> dict[str, str]:
    return {"text/html": text, "text/plain": line(view, 200) if view.outcome == RUNNING else closing(view, 200)}


def html(view: View) -> str:
    """The table of one optimization, for light and dark pages."""
    running = view.outcome == RUNNING
    cells = {
        "phase": view.phase if running else view.outcome,
        "progress": _bar(view),
        "done": progress_text(view),
        "baseline": "" if view.baseline is None else score_text(view.baseline),
        "best": "" if view.best is None else score_text(view.best),
        "spend": spend_text(view),
        "time": clock(view.elapsed),
        "left": "" if view.left is None else clock(view.left),
    }
    cells = {name: value for name, value in cells.items() if value or name in ("baseline", "best")}
    head = "".join(f'<th style="{_CELL};opacity:.65;font-weight:normal">{name}</th>' for name in cells)
    row = "".join(
        f'<td style="{_CELL}">{value if name == "progress" else escape(value)}</td>' for name, value in cells.items()
    )
    found = score_and_gain(view)
    result = f": {found}" if found and view.outcome == FINISHED else ""
    mark = "" if running else "✓ " if view.outcome == FINISHED else "✗ "
    return (
        f'<div style="margin:4px 0"><b>{mark}{escape(view.name + result)}</b>'
        f'<table style="border:0;margin:2px 0"><tr>{head}</tr><tr style="background:none">{row}</tr></table>'
        f"{_link(view)}</div>"
    )


def _bar(view: View) -> str:
    if view.share is None or view.outcome != RUNNING:
        return ""
    return (
        '<div style="width:140px;height:8px;border-radius:4px;background:#8884">'
        f'<div style="width:{view.share:.0%};height:8px;border-radius:4px;background:#2a9d6f"></div></div>'
    )


def _link(view: View) -> str:
    address = view.address
    if address is None or not (address.url or address.command):
        return ""
    if address.url is not None:
        return f'<a href="{escape(address.url)}" target="_blank" rel="noopener">{escape(address.url)}</a>'
    return f"<code>{escape(address.command or '')}</code>"


class _Quiet(logging.Filter):
    """At DSPy's own handler, leaves out its account of its progress, and warnings that say the same again."""

    def __init__(self) -> None:
        super().__init__()
        self._handlers: list[logging.Handler] = []
        self._warnings: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        if record.levelno < logging.WARNING:
            return not record.name.startswith(_QUIET)
        if record.levelno > logging.WARNING or record.exc_info or len(self._warnings) >= _MOST_WARNINGS:
            return True
        try:
            text = f"{record.name}: {record.getMessage()}"
        except Exception:  # the handler reports it
            return True
        again = text in self._warnings
        self._warnings.add(text)
        return not again

    def start(self) -> None:
        """From now on."""
        self._handlers = [item for item in logging.getLogger("dspy").handlers if item.name == "dspy_handler"]
        for handler in self._handlers:
            handler.addFilter(self)

    def end(self) -> None:
        """No more."""
        for handler in self._handlers:
            with contextlib.suppress(Exception):
                handler.removeFilter(self)
