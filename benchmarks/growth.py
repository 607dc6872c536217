"""How the cost of being watched grows: with prompt size, depth, demos, threads, and calls already made.

    python benchmarks/growth.py                           # some five minutes
    python benchmarks/growth.py --quick                   # does it run? The numbers mean nothing

One thing grows, all else stays a ``Predict`` with a short prompt on an LM that answers at once. CPU time per call, bare
and what is added with content off and on; workers, pipeline and null exporter are those of ``overhead.py``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from overhead import (
    HERE,
    VENV,
    Configuration,
    answer,
    end,
    machine,
    markdown,
    prepare_environment,
    progress,
    show,
    tell,
    worker_environment,
)

AXES = {
    "prompt": ("characters of prompt", (100, 1_000, 10_000, 100_000, 1_000_000)),
    "depth": ("modules, one in the other", (1, 2, 4, 8, 16)),
    "demos": ("demos of the predictor", (0, 4, 16, 64)),
    "threads": ("threads that call one program", (1, 4, 16, 64)),
    "calls": ("calls already made", (0, 1_000, 10_000)),
}
Found = dict[tuple[str, int, str], list[dict[str, Any]]]
"""Replies by axis, value and way."""
WAYS = {"bare": ("bare", ""), "off": ("dspy-otel", "off"), "on": ("dspy-otel", "on")}


# --- the worker --------------------------------------------------------------------------------------------------


def serve(way: str) -> None:
    """Set one way up, then measure each point that is asked for, one JSON line each."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints to stdout must not get between the replies
    from worker import Pipeline, set_up

    tool, state = WAYS[way]
    pipeline = Pipeline(state)
    name, _ = set_up(tool, state, pipeline, {})
    replies.write(json.dumps({"version": name}) + "\n")
    for line in sys.stdin:
        task = json.loads(line)
        replies.write(json.dumps(measure(task["axis"], task["value"], task["calls"], pipeline)) + "\n")


def measure(axis: str, value: int, calls: int, pipeline: Any) -> dict[str, float]:
    """CPU microseconds per call at one point, and spans per call."""
    from programs import ANSWER, Inner, Workload

    workload = Workload("predict")
    if axis == "prompt":
        workload.question = ("What colour is the sky? " * (value // 24 + 1))[:value]
        calls = max(calls * 100 // max(value // 100, 100), 3)  # a megabyte takes its time
    if axis == "demos":
        workload.program.demos = [{"question": f"What colour is {n}?", "answer": ANSWER} for n in range(value)]
    for _ in range(value - 1 if axis == "depth" else 0):
        workload.program = Inner(workload.program)
    threads = value if axis == "threads" else 1
    workload.run(10)
    run: Callable[[], Any] = lambda: workload.run(calls)  # noqa: E731
    if threads > 1:
        pool = ThreadPoolExecutor(threads)
        share = max(calls // threads, 2)
        calls = share * threads
        run = lambda: list(pool.map(lambda _: workload.run(share), range(threads)))  # noqa: E731
        run()
    workload.forget()
    if axis == "calls" and value:
        workload.run(value)
    pipeline.flush()
    gc.collect()
    spans, began = pipeline.exporter.spans, time.process_time()
    run()
    pipeline.flush()
    spent = time.process_time() - began
    return {"us": spent / calls * 1e6, "spans": (pipeline.exporter.spans - spans) / calls}


# --- the driver --------------------------------------------------------------------------------------------------


def start(way: str, folder: str) -> Configuration:
    row = Configuration(*WAYS[way], "")
    log = (Path(folder) / f"{way}.log").open("w")
    row.process = subprocess.Popen(
        [sys.executable, str(HERE / "growth.py"), "--worker", way],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=folder,
        env=worker_environment({}, str(Path(folder) / "cache")),
    )
    row.version = answer(row.process).get("version", "")
    return row


def run(rows: dict[str, Configuration], options: argparse.Namespace) -> Found:
    """Ask every worker for every point, in an order shuffled anew for each repetition."""
    found: Found = {}
    order = random.Random(options.seed)
    for repetition in range(options.repetitions):
        for axis, (_, values) in AXES.items():
            progress(f"repetition {repetition + 1} of {options.repetitions}: {axis}")
            for value in values[:2] if options.quick else values:
                for way in order.sample(list(rows), len(rows)):
                    process = rows[way].process
                    assert process is not None
                    tell(process, {"axis": axis, "value": value, "calls": options.calls})
                    reply = answer(process)
                    if "us" not in reply:
                        raise SystemExit(f"{way}, {axis} {value}: {reply['skipped']}")
                    found.setdefault((axis, value, way), []).append(reply)
    return found


def table(found: Found) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each point, medians; what is added is the median of the differences of a repetition."""
    header = ["what grows", "to", "bare: us", "added, content off", "added, content on", "spans", "off, us per span"]
    lines = []
    for axis, value in dict.fromkeys(key[:2] for key in found):
        bare = [reply["us"] for reply in found[axis, value, "bare"]]

        def added(way: str, axis: str = axis, value: int = value, bare: list[float] = bare) -> float:
            pairs = zip(found[axis, value, way], bare, strict=True)
            return statistics.median(reply["us"] - other for reply, other in pairs)

        spans = found[axis, value, "off"][0]["spans"]
        line = [AXES[axis][0], f"{value:,}", f"{statistics.median(bare):.0f}", f"{added('off'):+.0f}"]
        lines.append([*line, f"{added('on'):+.0f}", f"{spans:g}", f"{added('off') / spans:.0f}"])
    return header, lines


def main() -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="measurements of each point (%(default)s)")
    parser.add_argument("--calls", type=int, default=200, help="calls in a measurement (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 repetition of the first points")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the order of measurements")
    parser.add_argument("--here", action="store_true", help="use this Python instead of .venv-bench")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker)
        return 0
    if not options.here and Path(sys.prefix).resolve() != VENV:
        return subprocess.run([str(prepare_environment()), *sys.argv], check=False).returncode
    options.repetitions = 1 if options.quick else options.repetitions
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        rows = {way: start(way, folder) for way in WAYS}
        try:
            found = run(rows, options)
        finally:
            end(list(rows.values()))
            progress("")
    header, lines = table(found)
    what = f"{options.repetitions} measurements of {options.calls} calls per point, medians; us of CPU per call"
    about = machine(list(rows.values()), what)
    if options.markdown:
        print("  \n".join(about), markdown(header, lines), sep="\n\n")
    else:
        show("How the cost grows", header, lines)
        print("\n".join(about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
