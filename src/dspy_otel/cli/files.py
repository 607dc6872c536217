"""Files among the arguments of a command: one sentence for one that cannot be used, before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

PROTOBUF: Final = ".pb"
_ENDINGS: Final = (".json", ".jsonl", PROTOBUF, ".otlp")
_FIRST: Final = 1 << 20
"""Characters of the first line that are looked at."""


def problem_of(path: Path, *, protobuf: bool = False, directory: bool = False) -> str | None:
    """What is wrong with a file of OTLP, and what to do; None when it looks like one.

    Args:
        path: of the file.
        protobuf: it may be in protobuf, whatever its name is.
        directory: it may be a directory.
    """
    if not path.exists():
        return f"there is no {path}: name a file that exists"
    if path.is_dir():
        return None if directory else f"{path} is a directory: name a file of OTLP JSON in it"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read: you have no permission to"
    if path.stat().st_size == 0:
        return f"{path} is empty: nothing has been written to it yet"
    return (
        None
        if _is_otlp(path, protobuf or path.suffix == PROTOBUF)
        else f"{path} is no file of OTLP JSON: name one that a Collector has written"
    )


def _is_otlp(path: Path, protobuf: bool) -> bool:
    try:
        with path.open(encoding="utf-8") as lines:
            line = next((text for text in iter(lambda: lines.readline(_FIRST), "") if text.strip()), "")
    except UnicodeDecodeError:
        return protobuf
    if len(line) >= _FIRST:  # one long line: the reader itself sees what it is
        return True
    try:
        found = json.loads(line)
    except ValueError:
        return protobuf and not line.lstrip().startswith("{") and not line.strip().isprintable()
    return isinstance(found, dict) and (not found or any(str(key).startswith("resource") for key in found))


def problem_of_operand(operand: str) -> str | None:
    """The same for FILE#ID, or for what names a run, an experiment or a program: with that, nothing is wrong here."""
    name = operand.partition("#")[0]
    return problem_of(Path(name)) if name.endswith(_ENDINGS) or os.path.exists(name) else None
