"""CPU and wall-clock time of whole optimizations, bare and watched, and the memory that a long one takes.

``python benchmarks/compile.py`` compiles a small program with MIPROv2, GEPA, RandomSearch and SIMBA on an LM that
answers after 1 ms, without telemetry, with this package in each of its modes, with OpenInference, and with MLflow's
autolog in full: each in a worker process of its own, asked in turn, in random order. ``--memory`` measures the growth
of memory in one compile of 50,000 LM calls instead. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meter import before, count_instructions
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

OPTIMIZERS = {
    "MIPROv2": "MIPROv2",
    "GEPA": "GEPA",
    "BootstrapFewShotWithRandomSearch": "RandomSearch",
    "SIMBA": "SIMBA",
}
MOST_OF_FLOOR = 1.0
"""CPU that the default adds to a compile, as a multiple of what the example spans add that are written by hand."""
MOST_WITHOUT_TRACES = 1.25
"""CPU of a compile without example traces, as a multiple of the bare one's."""
MOST_MEMORY = 20.0
"""MB that a large compile may grow by more than the bare one, trimmed."""


@dataclass
class Row(Configuration):
    """One row of the tables: a tool in a state, and what its worker said about each optimizer, by repetition."""

    said: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: {key: {} for key in OPTIMIZERS})
    memory: dict[str, float] = field(default_factory=dict)


def configurations() -> list[Row]:
    """Every row, in the order of the tables."""
    return [
        Row("bare", "", "no telemetry"),
        Row("floor", "off", "the spans of each example, by hand"),
        Row("dspy-otel", "off/all", "default: all traces, content off"),
        Row("dspy-otel", "off/failed_and_best", "failed and best traces, content off"),
        Row("dspy-otel", "off/none", "no example traces, content off"),
        Row("dspy-otel", "on/all", "all traces, content on"),
        Row("dspy-otel", "no-sdk", "no SDK set up: our own share"),
        Row("openinference", "off", "content hidden"),
        Row("openinference", "on", "default, content on"),
        Row("mlflow", "full", "autolog in full, to sqlite"),
    ]


def start(row: Row, folder: Path) -> None:
    log = (folder / f"{row.tool}-{row.state.replace('/', '-')}.log").open("w")
    row.process = subprocess.Popen(
        [*before(), sys.executable, str(HERE / "compile_worker.py"), row.tool, row.state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=folder,
        env={**worker_environment({}, str(folder / "cache")), "TQDM_DISABLE": "1"},
    )


def begin(rows: list[Row], folder: Path) -> None:
    """Start every worker; note versions, and who cannot run."""
    for row in rows:
        progress(f"starting {row.name}")
        start(row, folder)
        assert row.process is not None
        reply = answer(row.process)
        row.skipped, row.version = reply.get("skipped", ""), reply.get("version", "")


def ask(row: Row, task: dict[str, Any]) -> dict[str, Any]:
    """One reply; a worker that has died is skipped from here on."""
    assert row.process is not None
    tell(row.process, task)
    reply = answer(row.process)
    row.skipped = reply.get("skipped", "")
    return reply


def run(rows: list[Row], options: argparse.Namespace, folder: Path) -> None:
    """Ask every worker for every optimizer, in an order shuffled anew for each repetition.

    Of two processes of the same row, one may take a tenth more than the other for as long as they live, since their
    memory lies otherwise: so each row is started several times.
    """
    order = random.Random(options.seed)
    for repetition in range(options.repetitions):
        if repetition and repetition % math.ceil(options.repetitions / options.processes) == 0:
            again = [
                row for row in rows if not row.skipped and row.tool != "mlflow"
            ]  # Its first compiles take minutes.
            end(again)
            begin(again, folder)
        for optimizer in OPTIMIZERS:
            progress(f"repetition {repetition + 1} of {options.repetitions}: {optimizer}")
            for row in order.sample(rows, len(rows)):
                if not row.skipped and (row.tool != "mlflow" or repetition % 5 == 0):  # one of those takes minutes
                    row.said[optimizer][repetition] = ask(row, {"optimizer": optimizer, "size": options.size})


def times_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: for each optimizer CPU and wall-clock time, both as multiples of the bare compile's."""
    header, cpu = ["configuration"], "billion instructions" if before() else "CPU s"
    for title in OPTIMIZERS.values():
        header += [f"{title}: {cpu}", "x bare", "wall s", "x bare", "spans"]
    lines = []
    for row in rows:
        line = [row.name]
        for optimizer in OPTIMIZERS:
            if row.skipped:
                line += ["skipped", "", "", "", ""]
                continue
            for quantity in ("cpu", "wall"):
                line.append(f"{statistics.median(reply[quantity] for reply in row.said[optimizer].values()):.2f}")
                line.append("" if row is rows[0] else f"{ratio(row, rows[0], optimizer, quantity):.2f}")
            line.append(str(row.said[optimizer][0]["spans"] or ""))
        lines.append(line)
    return header, lines


def ratio(row: Row, bare: Row, optimizer: str, quantity: str) -> float:
    """Median over the repetitions of what a compile took, as a multiple of the bare one's of the same repetition."""
    own, other = row.said[optimizer], bare.said[optimizer]
    return statistics.median(own[repetition][quantity] / other[repetition][quantity] for repetition in own)


def remarks(rows: list[Row]) -> list[str]:
    """How much work a compile is, and whether all did the same."""
    bare = rows[0]
    calls = ", ".join(f"{title} {bare.said[name][0]['calls']}" for name, title in OPTIMIZERS.items())
    said = [f"LM calls in a compile: {calls}"]
    for name, title in OPTIMIZERS.items():
        usual = {reply["program"] for reply in bare.said[name].values()}
        others = [row.name for row in rows if any(reply["program"] not in usual for reply in row.said[name].values())]
        if others:
            said.append(f"{title}: another program than the bare one made by {', '.join(others)}")
    return said


def added(row: Row, other: Row, bare: Row, optimizer: str) -> float:
    """What ``row`` adds to a compile's CPU over what ``other`` adds, from the medians of what each adds."""
    said = [each.said[optimizer] for each in (row, other, bare)]
    own, theirs = (
        statistics.median(each[repetition]["cpu"] - said[2][repetition]["cpu"] for repetition in each)
        for each in said[:2]
    )
    return own / theirs


def goals(rows: list[Row]) -> tuple[list[str], bool]:
    """The goals of the times, and whether all are met."""
    by_key = {row.key: row for row in rows if not row.skipped}
    bare, default, none = by_key["bare "], by_key.get("dspy-otel off/all"), by_key.get("dspy-otel off/none")
    floor, lines, met = by_key.get("floor off"), [], True
    judged = []
    if default is not None and floor is not None:
        ratios = {title: added(default, floor, bare, name) for name, title in OPTIMIZERS.items()}
        judged.append(("CPU added by default / by hand-written example spans", MOST_OF_FLOOR, ratios))
    if none is not None:
        ratios = {title: ratio(none, bare, name, "cpu") for name, title in OPTIMIZERS.items()}
        judged.append(("CPU without example traces / bare", MOST_WITHOUT_TRACES, ratios))
    for what, most, ratios in judged:
        good = max(ratios.values()) <= most
        met = met and good
        shown = ", ".join(f"{title} {value:.2f}" for title, value in ratios.items())
        lines.append(f"goal {'met' if good else 'missed'} ({what}, at most {most:.2f}): {shown}")
    return lines, met


def memory_goal(rows: list[Row]) -> tuple[list[str], bool]:
    """The goal of the memory, and whether it is met."""
    default = next((row for row in rows if row.key == "dspy-otel off/all" and row.memory), None)
    if default is None:
        return [], True
    bare = rows[0].memory
    more = default.memory["with_result"] - default.memory["before"] - (bare["with_result"] - bare["before"])
    met = more <= MOST_MEMORY
    return [f"goal {'met' if met else 'missed'} (MB more than bare, at most {MOST_MEMORY:.0f}): {more:+.0f}"], met


def memory_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: growth in MB, and what of it is not the bare compile's."""
    header = ["configuration", "LM calls", "at most", "more than bare", "afterwards", "more than bare"]
    lines = []
    bare = rows[0].memory
    for row in rows:
        if row.skipped or not row.memory:
            lines.append([row.name, "skipped", "", "", "", ""])
            continue
        cells = [row.name, f"{row.memory['calls']:.0f}"]
        for quantity in ("peak", "with_result"):
            growth = row.memory[quantity] - row.memory["before"]
            more = growth - (bare[quantity] - bare["before"])
            cells += [f"{growth:+.0f}", "" if row is rows[0] else f"{more:+.0f}"]
        lines.append(cells)
    return header, lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    parser.add_argument("--repetitions", type=int, default=9, help="compiles of each cell (%(default)s)")
    parser.add_argument(
        "--processes", type=int, default=3, help="in so many processes, one after the other (%(default)s)"
    )
    parser.add_argument("--size", type=float, default=1.0, help="size of the datasets, as a factor (%(default)s)")
    parser.add_argument("--memory", action="store_true", help="growth of memory in one large compile")
    parser.add_argument("--calls", type=int, default=50_000, help="LM calls for --memory (%(default)s)")
    parser.add_argument("--only", metavar="TOOL,TOOL", help="only bare and these, e.g. dspy-otel")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 repetition of small compiles")
    parser.add_argument("--instructions", action="store_true", help="count instructions under valgrind, not time")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the order of measurements")
    parser.add_argument("--here", action="store_true", help="use this Python instead of .venv-bench")
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.processes, options.size, options.calls = 1, 1, 0.3, 2000
    if options.instructions:
        options.repetitions, options.processes, options.size = 1, 1, min(options.size, 0.4)
        count_instructions()
    return options


def main() -> int:
    """Run the benchmark; the exit code."""
    options = arguments()
    if not options.here and Path(sys.prefix).resolve() != VENV:
        python = prepare_environment()
        return subprocess.run([str(python), *sys.argv], check=False).returncode
    rows = configurations()
    if options.only:
        rows = [row for row in rows if row.tool in ["bare", *options.only.split(",")]]
    with tempfile.TemporaryDirectory(prefix="compile-") as folder:
        try:
            if options.memory:
                for row in rows:  # one after the other: they would take each other's memory
                    begin([row], Path(folder))
                    progress(f"memory: {row.name}")
                    if not row.skipped:
                        row.memory = ask(row, {"memory": options.calls})
                    end([row])
            else:
                begin(rows, Path(folder))
                run(rows, options, Path(folder))
        finally:
            end([row for row in rows if row.process is not None and row.process.poll() is None])
            progress("")
    if rows[0].skipped:
        print(f"the bare program could not be compiled: {rows[0].skipped}", file=sys.stderr)
        return 2
    if options.memory:
        title, (header, lines) = "Growth of memory in one compile, MB", memory_table(rows)
        judged, met = memory_goal(rows)
        about = [*machine(rows, f"RandomSearch of about {options.calls} LM calls, one run of each"), *judged]
    else:
        title, (header, lines) = "Whole compiles", times_table(rows)
        lm = "answers at once, instructions in billions" if options.instructions else "takes 1 ms, medians"
        processes = f"{options.repetitions} compiles per cell in {options.processes} processes"
        what = f"{processes}, size {options.size:g}, LM {lm}"
        judged, met = goals(rows)
        about = [*machine(rows, what), *remarks(rows), *judged]
    about += [f"skipped: {row.name}: {row.skipped}" for row in rows if row.skipped]
    if options.markdown:
        print("  \n".join(about), markdown(header, lines), sep="\n\n")
    else:
        show(title, header, lines)
        print("\n".join(about))
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
