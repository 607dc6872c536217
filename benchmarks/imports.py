"""CPU time that importing an instrumentation and switching it on add to the start of a DSPy program.

``python benchmarks/imports.py [--repeat 15] [--check 40]``. Each measurement is a fresh process that has imported DSPy
and the OpenTelemetry API before; rows take turns, and their first run, which compiles bytecode, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "dspy-otel": ("import dspy_otel", "dspy_otel.instrument()"),
    "of it, OpenTelemetry's base class of instrumentations": (
        "from opentelemetry.instrumentation.instrumentor import BaseInstrumentor",
        "pass",
    ),
    "of it, modules of DSPy that any LM call imports": ("import dspy.clients.execution", "pass"),
    "openinference": (
        "from openinference.instrumentation.dspy import DSPyInstrumentor",
        "DSPyInstrumentor().instrument()",
    ),
    "official": (
        "from opentelemetry.instrumentation.genai.dspy import DSPyInstrumentor",
        "DSPyInstrumentor().instrument()",
    ),
}
MEASURE = """
import json, sys, time
import dspy
from opentelemetry import _logs, context, metrics, trace
first = time.process_time()
{load}
second = time.process_time()
{switch}
print(json.dumps([second - first, time.process_time() - second]))
"""


def measure(row: str, environment: dict[str, str]) -> tuple[float, float] | None:
    """Milliseconds of CPU time for the import and for switching on; ``None`` if it is not installed."""
    code = MEASURE.format(load=ROWS[row][0], switch=ROWS[row][1])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    load, switch = json.loads(done.stdout.splitlines()[-1])
    return load * 1000, switch * 1000


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=15, help="fresh processes for each row")
    parser.add_argument("--check", type=float, metavar="MS", help="exit code 1 when dspy-otel takes more, in all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "MLFLOW_"))}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment |= {
            "PYTHONPYCACHEPREFIX": place,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "DSPY_CACHEDIR": os.path.join(place, "dspy-cache"),
        }
        rows = [row for row in ROWS if measure(row, environment) is not None]
        found: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
        for _ in range(options.repeat):
            for row in random.sample(rows, len(rows)):
                one = measure(row, environment)
                if one is not None:
                    found[row].append(one)
    print(f"OpenTelemetry SDK {version('opentelemetry-sdk')}\n")
    print("| ms of CPU time, median | import | switch on | both | smallest |\n|---|---:|---:|---:|---:|")
    total = 0.0
    for row, pairs in found.items():
        both = [load + switch for load, switch in pairs]
        middle = [statistics.median(column) for column in (*zip(*pairs, strict=True), both)]
        total = middle[2] if row == "dspy-otel" else total
        print(f"| {row} | {' | '.join(f'{value:.1f}' for value in (*middle, min(both)))} |")
    for row in ROWS.keys() - found.keys():
        print(f"not installed: {row}")
    if "dspy-otel" not in found:
        return 1
    return int(options.check is not None and total > options.check)


if __name__ == "__main__":
    sys.exit(main())
