"""What a command does around its work: quiet libraries, and a line on the terminal that shows that it works."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Without MLflow's log lines and downloads, which are of no use in the output of a command."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else an import may wait for a download
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show ``what`` and the seconds since, on stderr if that is a terminal, and take it away at the end."""
    if not sys.stderr.isatty():
        yield
        return
    over = threading.Event()

    def show() -> None:
        began = time.monotonic()
        while True:
            print(f"\r\x1b[2K{what} {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
            if over.wait(1):
                return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
