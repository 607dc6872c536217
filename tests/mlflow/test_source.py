"""Who ran what, as MLflow's own client says it."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspy_otel.mlflow import source

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture(autouse=True)
def not_cached() -> Iterator[None]:
    source._found.cache_clear()
    yield
    source._found.cache_clear()


def repository(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = root / "project" / "src" / "app.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text("")
    return script


BRANCH = {"project/.git/HEAD": "ref: refs/heads/main\n"}


@pytest.mark.parametrize(
    ("files", "commit"),
    [
        ({**BRANCH, "project/.git/refs/heads/main": f"{COMMIT}\n"}, COMMIT),
        ({"project/.git/HEAD": f"{COMMIT}\n"}, COMMIT),
        ({**BRANCH, "project/.git/packed-refs": f"# pack\n{OTHER} refs/heads/x\n{COMMIT} refs/heads/main\n"}, COMMIT),
        (
            {
                "project/.git": "gitdir: ../own/.git/worktrees/w\n",
                "own/.git/worktrees/w/HEAD": "ref: refs/heads/main\n",
                "own/.git/worktrees/w/commondir": "../..\n",
                "own/.git/refs/heads/main": COMMIT,
            },
            COMMIT,
        ),
        (BRANCH, None),  # nothing is committed yet
        ({"project/.git/HEAD": "ref: refs/../../secret\n", "project/secret": COMMIT}, None),
        ({"project/.git/HEAD": "no commit at all"}, None),
        ({}, None),
    ],
)
def test_the_commit_is_that_of_the_scripts_repository(
    files: dict[str, str], commit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = repository(tmp_path, files)
    monkeypatch.setattr(sys, "argv", [str(script), "--api-key", "hidden"])
    found = source.source_tags()
    assert found.get("mlflow.source.git.commit") == commit
    assert found["mlflow.source.name"] == str(script)
    assert found["mlflow.user"] == getpass.getuser()
    assert "hidden" not in str(found)
    assert source.saved_tags({**found, "other": "x", "mlflow.user": 3}) == {
        name: value for name, value in found.items() if name != "mlflow.user"
    }


def test_it_is_what_mlflows_client_says(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = pytest.importorskip("mlflow.tracking.context.registry")
    monkeypatch.setattr(sys, "argv", [__file__])
    theirs, ours = registry.resolve_tags(), source.source_tags()
    for name in ("mlflow.user", "mlflow.source.name", "mlflow.source.type"):
        assert ours[name] == theirs[name]
    if "mlflow.source.git.commit" in theirs:
        assert ours["mlflow.source.git.commit"] == theirs["mlflow.source.git.commit"]


def test_it_is_found_once_and_can_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-c"])
    first = source.source_tags()
    monkeypatch.setattr(sys, "argv", ["another"])
    assert source.source_tags() == first
    monkeypatch.setenv(source.ENV_SOURCE, "off")
    assert source.source_tags() == {}


def test_a_user_without_a_name_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert "mlflow.user" not in source.source_tags()
