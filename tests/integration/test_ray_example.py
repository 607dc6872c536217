"""examples/ray_optimize.py on a real cluster of Ray: totals are those of one process; in MLflow all hangs together."""

from __future__ import annotations

import re
import sqlite3
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.support.waiting import run
from tests.switching.process import ROOT, environment
from tests.switching.test_neighbours import needs

pytestmark = [pytest.mark.integration, pytest.mark.nightly]
pytest.importorskip("mlflow")
NAMES = ["MIPROv2", "GEPA"]


@needs("ray", "ray")
def test_optimizations_on_a_cluster_that_loses_workers(tmp_path: Path) -> None:
    # Ray's sockets have long names under this; and it keeps no token in the home directory.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        own = {"XDG_STATE_HOME": str(tmp_path), "DSPY_CACHEDIR": str(tmp_path), "PYTHONPATH": f"{ROOT / 'src'}"}
        command = [sys.executable, str(ROOT / "examples/ray_optimize.py"), "--optimizer", "both"]
        done = run(command, env=environment(**ray, **own), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = re.split(r"^(MIPROv2|GEPA) .*\n", done.stdout, flags=re.MULTILINE)[1:]
    assert tables[::2] == NAMES
    for table in tables[1::2]:
        shown = re.findall(r"^  (\S+) +([\d,]+) +([\d,]+)$", table, re.MULTILINE)
        both = {name: (alone, together) for name, alone, together in shown}
        assert both.pop("unanswered_tasks") == ("0", "1")  # one worker was killed
        assert int(both.pop("worker_tasks")[1]) > 20
        assert len(both) > 10
        assert all(alone == together for alone, together in both.values()), both
    assert "worker processes: 3 at first, " in done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith("dspy-otel: ")]
    assert len(said) == 1
    assert "have handed no usage back" in said[0]
    assert_connected(tmp_path / "mlflow.db", NAMES)


def assert_connected(store: Path, names: list[str]) -> None:
    """Spans of workers are in the traces of the examples that they answered. A killed one takes its last along."""
    with sqlite3.connect(store) as database:
        spans = database.execute("select trace_id, span_id, parent_span_id, name from spans").fetchall()
    traces: defaultdict[str, dict[str, tuple[str | None, str]]] = defaultdict(dict)
    for trace, span, parent, name in spans:
        traces[trace][span] = parent, name
    roots: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for own in traces.values():
        (root,) = [name for parent, name in own.values() if parent is None]
        roots[root] += 1
        if root == "example Colours":
            inside = [name for _, name in own.values()]
            elsewhere = "on Ray" if "invoke_workflow ColourFamily" in inside else "alone"
            whole = all(parent is None or parent in own for parent, _ in own.values())
            asked = sum(name.startswith("chat ") for name in inside)
            kinds[elsewhere if whole and asked == 2 else "other"] += 1
    assert set(roots) - {"attempt Colours"} == {"example Colours", *(f"compile {name}" for name in names)}
    assert all(roots[f"compile {name}"] == 2 for name in names)
    assert kinds["other"] <= len(names)  # of the one that was killed, some spans may have been written
    assert kinds["on Ray"] + kinds["other"] == kinds["alone"] > 50
