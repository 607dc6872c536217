"""The rooms of the package: no two of its files import each other, not by way of others either."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"


def imports(path: Path, modules: dict[str, Path]) -> set[Path]:
    """The files of ours that a file imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named = [f"{node.module}.{name.name}" for name in node.names]
            found |= {modules.get(name, modules.get(node.module)) for name in named}
        elif isinstance(node, ast.Import):
            found |= {modules.get(name.name) for name in node.names}
    return {other for other in found if other is not None and other != path}


def test_no_two_files_import_each_other() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    modules = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in files
    }
    # What the package itself gives comes from its rooms, when it is asked for: `from dspy_otel import semconv`.
    graph = {path: imports(path, modules) - {modules["dspy_otel"]} for path in files}
    assert sum(map(len, graph.values())) > 500
    TopologicalSorter(graph).prepare()  # raises a CycleError, with the files
