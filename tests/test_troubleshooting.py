"""Every message of ours is on the page on troubleshooting."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
LOGGED = {"warning", "error", "warn_once", "log_safely", "report", "_report"}
RAISED = {"CannotCompareError", "ExportError", "JournalError", "LookupError", "NoExamplesError"}
RAISED |= {"RuntimeError", "TypeError"}
# Raised for what catches them, and never shown.
INTERNAL = {
    *("an answer that does not end", "a value is changed all the time"),
    *("mlflow missing", "mlflow skinny", "its lock is taken", "no OTLP request"),
}
SHORTEST = 12


def words(node: ast.AST) -> str | None:
    """The text of a message, with a NUL where something is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[.\d]*[a-z]", "\0", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words(value) or "\0" for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (words(node.left) or "\0") + (words(node.right) or "\0")
    return None


def messages() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "src/dspy_otel").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in LOGGED | RAISED:
                texts = [text for text in map(words, node.args) if text and " " in text]
                if texts and texts[-1] not in INTERNAL:
                    yield f"{path.name}:{node.lineno}", texts[-1]


@pytest.mark.parametrize(("place", "text"), [pytest.param(*found, id=found[0]) for found in messages()])
def test_a_message_is_on_the_page(place: str, text: str) -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    starts = [" ".join(part.removeprefix("dspy-otel: ").strip(" :;,'\"").split()[:6]) for part in text.split("\0")]
    assert any(len(start) >= SHORTEST and start in page for start in starts) or not max(map(len, starts)) >= SHORTEST, (
        f"{place}: {text!r} is not on {PAGE.name}"
    )
