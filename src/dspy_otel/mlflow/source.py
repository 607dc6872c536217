"""Who ran what: the tags for user, source file and git commit that MLflow's own client gives its runs.

MLflow finds the commit with GitPython, which may start ``git``. This module reads the repository's own files.
"""

from __future__ import annotations

import functools
import getpass
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from dspy_otel.mlflow.retry import clean

ENV_SOURCE: Final = "OTEL_DSPY_MLFLOW_SOURCE"
OFF: Final = frozenset({"false", "0", "no", "off"})
"""Values of our variables that switch something off."""
_USER: Final = "mlflow.user"
_NAME: Final = "mlflow.source.name"
_COMMIT: Final = "mlflow.source.git.commit"
_TYPE: Final = "mlflow.source.type"
_TAGS: Final = (_USER, _NAME, _COMMIT, _TYPE)
_LONGEST: Final = 500
_MOST_DIRECTORIES: Final = 40
_MOST_BYTES: Final = 4 * 1024 * 1024
_HASH: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_REFERENCE: Final = re.compile(r"ref: (refs/[\w./@+-]+)")


def source_tags() -> dict[str, str]:
    """Tags of the runs of this process; none when ``OTEL_DSPY_MLFLOW_SOURCE`` is off."""
    return {} if os.environ.get(ENV_SOURCE, "").strip().lower() in OFF else dict(_found())


def saved_tags(saved: Any) -> dict[str, str]:
    """Tags of another process's runs, as :func:`source_tags` gave them there; what is none of those is left out."""
    given = saved if isinstance(saved, dict) else {}
    return {name: given[name][:_LONGEST] for name in _TAGS if isinstance(given.get(name), str)}


@functools.cache
def _found() -> Mapping[str, str]:
    script = sys.argv[0] if sys.argv and type(sys.argv[0]) is str else ""
    found = {_TYPE: "LOCAL", _USER: _user(), _NAME: script, _COMMIT: _commit(_directory_of(script))}
    return MappingProxyType({name: clean(value, _LONGEST) for name, value in found.items() if value})


def _user() -> str | None:
    try:
        return getpass.getuser()
    except Exception:  # an id without a name, as in some containers
        return None


def _directory_of(script: str) -> Path | None:
    """Where the program is: of ``python -c`` and of a prompt, the working directory."""
    try:
        return Path(script).absolute().parent if os.path.isfile(script) else Path.cwd()
    except (OSError, ValueError):
        return None


def _commit(directory: Path | None) -> str | None:
    """The commit that is checked out in a directory's repository."""
    try:
        for place in [] if directory is None else [directory, *directory.parents][:_MOST_DIRECTORIES]:
            git = place / ".git"
            if git.is_file():  # a worktree or a submodule
                git = place / (_read(git) or "").removeprefix("gitdir:").strip()
            if (head := _read(git / "HEAD")) is not None:
                return _commit_of(git, head.strip())
    except (OSError, ValueError):
        pass
    return None


def _commit_of(git: Path, head: str) -> str | None:
    if _HASH.fullmatch(head):
        return head
    reference = _REFERENCE.fullmatch(head)
    if reference is None or ".." in head:
        return None
    name = reference[1]
    common = git / (_read(git / "commondir") or ".").strip()
    for place in (git, common):
        text = (_read(place / name) or "").strip()
        if _HASH.fullmatch(text):
            return text
    for line in (_read(common / "packed-refs") or "").splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name and _HASH.fullmatch(commit):
            return commit
    return None


def _read(path: Path) -> str | None:
    """The beginning of a file; None when there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(_MOST_BYTES).decode("utf-8", "replace")
