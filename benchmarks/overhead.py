"""CPU time that observing a DSPy program adds to each call, side by side with everything else that does it.

``python benchmarks/overhead.py`` makes ``.venv-bench`` with this package and all peers (once), runs each configuration
in a worker process of its own, kept alive, and asks them in turn, in random order, for a few calls at a time. See
README.md in this folder for the method, and ``--help`` for the options.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from meter import VARIABLE, before, count_instructions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".venv-bench"

PROGRAMS = {"predict": "Predict", "nested": "3 nested modules", "large": "Predict, 20 kB prompt"}
CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
DISABLED = {"OTEL_SDK_DISABLED": "true"}


@dataclass
class Configuration:
    """One row of the table: a tool in a state, and what its worker said. An earlier one of ours is in ``source``."""

    tool: str
    state: str
    title: str
    environment: dict[str, str] = field(default_factory=dict)
    source: Path | None = None
    process: subprocess.Popen[str] | None = None
    skipped: str = ""
    version: str = ""
    per_call: dict[str, dict[str, float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in PROGRAMS})

    @property
    def key(self) -> str:
        """Tool and state."""
        return f"{self.tool} {self.state}"

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.tool}: {self.title}" if self.title else self.tool


def configurations() -> list[Configuration]:
    """Every row, in the order of the table."""
    on, no_mlflow = {CONTENT: "SPAN_ONLY"}, {"MLFLOW_TRACE_SAMPLING_RATIO": "0"}
    return [
        Configuration("bare", "", "no telemetry"),
        Configuration("callback", "", "one empty BaseCallback"),
        Configuration("floor", "off", "spans written by hand"),
        Configuration("floor", "on", "content on"),
        Configuration("floor", "traces", "no metrics"),
        Configuration("floor", "out", "sampled out"),
        Configuration("floor", "out-traces", "sampled out, no metrics"),
        Configuration("floor", "disabled", "SDK disabled", DISABLED),
        Configuration("dspy-otel", "off", "default, content off"),
        Configuration("dspy-otel", "on", "content on"),
        Configuration("dspy-otel", "traces", "no metrics"),
        Configuration("dspy-otel", "out", "sampled out"),
        Configuration("dspy-otel", "out-traces", "sampled out, no metrics"),
        Configuration("dspy-otel", "disabled", "SDK disabled", DISABLED),
        Configuration("dspy-otel", "no-sdk", "no SDK set up"),
        Configuration("openinference", "off", "content hidden"),
        Configuration("openinference", "on", "default, content on"),
        Configuration("openinference", "out", "sampled out"),
        Configuration("openinference", "disabled", "SDK disabled", DISABLED),
        Configuration("official", "off", "default, content off"),
        Configuration("official", "on", "content on", on),
        Configuration("official", "out", "sampled out"),
        Configuration("official", "disabled", "SDK disabled", DISABLED),
        Configuration("mlflow", "on", "autolog, content on"),
        Configuration("mlflow", "sqlite", "autolog with its export to sqlite"),
        Configuration("mlflow", "out", "sampled out", no_mlflow),
        Configuration("mlflow", "disabled", "tracing disabled"),
    ]


def earlier(commit: str, folder: Path) -> list[Configuration]:
    """Rows of ours at an earlier commit, from its source, which is put into ``folder``."""
    command = ["git", "archive", commit, "src"]
    packed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    source = folder / "src"
    return [
        Configuration(f"at {commit}", row.state, row.title, {**row.environment, "PYTHONPATH": str(source)}, source)
        for row in configurations()
        if row.tool == "dspy-otel"
    ]


@dataclass(frozen=True)
class Goal:
    """What one configuration adds may be at most ``limit`` times what another adds."""

    ours: str
    other: str
    limit: float
    text: str


GOALS = [
    Goal("dspy-otel off", "official off", 0.55, "the official package"),
    Goal("dspy-otel off", "floor off", 0.9, "spans and measurements by hand"),
    Goal("dspy-otel off", "openinference on", 0.22, "OpenInference, both as they come"),
    Goal("dspy-otel on", "official on", 0.9, "the official package, content on in both"),
    Goal("dspy-otel on", "floor on", 1.3, "by hand, content on in both"),
    Goal("dspy-otel out", "callback ", 0.5, "one empty callback, ours sampled out"),
    Goal("dspy-otel disabled", "callback ", 0.25, "one empty callback, SDK disabled"),
]


# --- The environment ---------------------------------------------------------------------------------------------


def prepare_environment() -> Path:
    """Make ``.venv-bench`` with this package, DSPy, MLflow and the peers, unless it is there and up to date.

    Gives its Python; raises CalledProcessError when the installation fails.
    """
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp, wanted = VENV / ".ready", hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"setting up {VENV} (once)", file=sys.stderr)
    venv.create(VENV, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "pip>=25.1"], check=True)  # the first to know dependency groups
    subprocess.run([*pip, "-e", ".[demo]", "--group", "bench"], check=True, cwd=ROOT)
    stamp.write_text(wanted)
    return python


def worker_environment(extra: dict[str, str], cache: str) -> dict[str, str]:
    """Environment of a worker: nothing of OpenTelemetry or MLflow but what its configuration says."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "MLFLOW_"))}
    fixed = {
        "PYTHONHASHSEED": "0",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "DSPY_CACHEDIR": cache,
        "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return {**inherited, **fixed, **extra}


# --- Talking to the workers --------------------------------------------------------------------------------------


def start(configuration: Configuration, folder: Path) -> subprocess.Popen[str]:
    log = (folder / f"{configuration.tool}-{configuration.state}.log").open("w")
    tool = configuration.tool if configuration.source is None else "dspy-otel"
    return subprocess.Popen(
        [*before(), sys.executable, str(HERE / "worker.py"), tool, configuration.state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=folder,
        env=worker_environment(configuration.environment, str(folder / "cache")),
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Next reply of a worker; ``skipped`` when it has died."""
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else {"skipped": f"the worker died with exit code {process.wait()}"}


def tell(process: subprocess.Popen[str], message: Any) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # `answer` tells


def begin(rows: list[Configuration], folder: Path) -> None:
    """Record ours for the floor, start every worker, and note versions, counts and what is skipped."""
    recordings: dict[str, dict[str, Any]] = {}
    problems = {}
    for state in ("off", "on"):
        recorder = Configuration("record", state, "")
        process = start(recorder, folder)
        reply = answer(process)
        process.wait()
        recordings[state] = reply.get("recording", {})
        problems[state] = reply.get("skipped", "")
    for row in rows:
        progress(f"starting {row.name}")
        content = "on" if row.state == "on" else "off"
        row.process = start(row, folder)
        tell(row.process, recordings[content] if row.tool == "floor" else {})
        reply = answer(row.process)
        row.skipped = reply.get("skipped", "")
        if row.tool == "floor" and problems[content]:
            row.skipped = f"dspy-otel could not be recorded: {problems[content]}"
        row.version, row.per_call = reply.get("version", ""), reply.get("per_call", {})


def run(rows: list[Configuration], repetitions: int, calls: int, seed: int) -> None:
    """Ask every worker for every program, in an order shuffled anew for each repetition."""
    order = random.Random(seed)
    for repetition in range(repetitions):
        progress(f"repetition {repetition + 1} of {repetitions}")
        for program in PROGRAMS:
            for row in order.sample(rows, len(rows)):
                if row.skipped or row.process is None:
                    continue
                fewer = 10 if row.state == "sqlite" else 1  # one of those takes 20 ms
                tell(row.process, {"program": program, "calls": max(calls // fewer, 1)})
                reply = answer(row.process)
                row.skipped = reply.get("skipped", "")
                if not row.skipped:
                    row.cpu[program].append(reply["cpu"] * 1e6)


def end(rows: Sequence[Configuration]) -> None:
    for row in rows:
        if row.process is not None:
            row.process.stdin.close() if row.process.stdin else None
            try:
                row.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                row.process.kill()


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# --- Results -----------------------------------------------------------------------------------------------------


class Results:
    """Microseconds of CPU, from the repetitions of all rows."""

    def __init__(self, rows: list[Configuration]):
        self.rows = rows
        selected = {row.key for row in rows}
        self.judged = [goal for goal in GOALS if {goal.ours, goal.other} <= selected]
        self.judged += [
            Goal(f"dspy-otel {row.state}", row.key, 1.0, "an earlier commit") for row in rows if row.source is not None
        ]
        self.by_key = {row.key: row for row in rows if not row.skipped and all(row.cpu.values())}
        self.bare = self.by_key["bare "]

    def total(self, row: Configuration, program: str) -> float:
        """Median CPU of a call, in microseconds."""
        return statistics.median(row.cpu[program])

    def added(self, row: Configuration, program: str) -> float:
        """Median over the repetitions of what a call took more than the bare call of the same repetition, in us."""
        pairs = zip(row.cpu[program], self.bare.cpu[program], strict=True)
        return statistics.median(mine - bare for mine, bare in pairs)

    def ratio(self, ours: str, other: str, program: str) -> float | None:
        """What ours adds over what the other adds; None when one was not measured."""
        if ours not in self.by_key or other not in self.by_key:
            return None
        return self.added(self.by_key[ours], program) / self.added(self.by_key[other], program)

    def ratios(self, ours: str, other: str, program: str) -> tuple[float, float]:
        """Between what the middle half of such ratios lies, repetition by repetition."""
        if ours not in self.by_key or other not in self.by_key:
            return 0.0, 0.0
        rows = (self.by_key[ours].cpu[program], self.by_key[other].cpu[program], self.bare.cpu[program])
        found = [(mine - bare) / (theirs - bare) for mine, theirs, bare in zip(*rows, strict=True) if theirs != bare]
        low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else [*found, *found, *found]
        return low, high

    def spread(self) -> str:
        """How quiet the machine was."""
        if VARIABLE in os.environ:
            return "instructions, which do not depend on what else the machine does"
        low, _, high = statistics.quantiles(self.bare.cpu["predict"], n=4)
        return f"half of the bare Predicts took {low:.0f} to {high:.0f} us; a wide range means a busy machine"

    def skipped(self) -> list[str]:
        """What was not measured, and why."""
        return [f"skipped: {row.name}: {row.skipped}" for row in self.rows if row.key not in self.by_key]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: per program the CPU of a call, what was added, and that as multiple of the floor's."""
        header = ["configuration", "spans / measurements"]
        for title in PROGRAMS.values():
            header += [f"{title}: {unit()}", "added", "x floor"]
        lines = []
        for row in self.rows:
            if row.key not in self.by_key:
                lines.append([row.name, "skipped", *["-"] * (3 * len(PROGRAMS))])
                continue
            counts = row.per_call["predict"]
            told = f"{counts['spans']:g} / {counts['measurements']:g}"
            line = [row.name, told if (row.tool, row.state) != ("mlflow", "sqlite") else "not counted"]
            for program in PROGRAMS:
                factor = self.ratio(row.key, "floor off", program) if row is not self.bare else None
                line += [
                    f"{self.total(row, program):.0f}",
                    f"{self.added(row, program):+.0f}" if row is not self.bare else "",
                    f"{factor:.2f}" if factor is not None else "",
                ]
            lines.append(line)
        return header, lines

    def goals(self) -> tuple[list[str], list[list[str]], bool]:
        """Header and rows of the goals, and whether all of them are met, for every program."""
        lines, met = [], True
        for goal in self.judged:
            line = [f"added by {goal.ours} / by {goal.other.strip()}", goal.text, f"<= {goal.limit}"]
            for program in PROGRAMS:
                ratio = self.ratio(goal.ours, goal.other, program)
                good = ratio is not None and ratio <= goal.limit
                low, high = self.ratios(goal.ours, goal.other, program)
                line.append(
                    "not measured"
                    if ratio is None
                    else f"{ratio:.2f} ({low:.2f} to {high:.2f}) {'met' if good else 'missed'}"
                )
                met = met and good
            lines.append(line)
        return ["goal", "against", "limit", *PROGRAMS.values()], lines, met


def unit() -> str:
    """Of what is measured."""
    return "thousand instructions" if VARIABLE in os.environ else "us of CPU"


def machine(rows: Sequence[Configuration], what: str) -> list[str]:
    """Where, with what and when this was measured; ``what`` was."""
    cpu = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text()
        cpu = next(line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    packages = []
    for name in (
        "dspy",
        "opentelemetry-sdk",
        "openinference-instrumentation-dspy",
        "opentelemetry-instrumentation-genai-dspy",
        "mlflow",
    ):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} not installed")
    ours = next((row.version for row in rows if row.tool == "dspy-otel" and row.version), "not measured")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return [
        f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}{load}",
        f"Python {platform.python_version()}, dspy-otel {ours}, {', '.join(packages)}",
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {what}",
    ]


def markdown(header: list[str], lines: list[list[str]]) -> str:
    right = ["---" if column == 0 else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, right, *lines])


def show(title: str, header: list[str], lines: list[list[str]]) -> None:
    """Print a table: with rich when it is installed, else as Markdown."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"\n{title}\n{markdown(header, lines)}")
        return
    table = Table(title=title)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number > 1 else "left")
    for line in lines:
        table.add_row(*line)
    Console(width=max(Console().width, 160)).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15, help="measurements of each cell (%(default)s)")
    parser.add_argument("--calls", type=int, default=100, help="calls in one measurement (%(default)s)")
    parser.add_argument("--against", metavar="COMMIT", help="also ours at this commit, side by side")
    parser.add_argument("--only", metavar="TOOL,TOOL", help="only bare and these, e.g. callback,floor,dspy-otel")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 2 repetitions of 10 calls")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    parser.add_argument("--instructions", action="store_true", help="count instructions under valgrind, not time")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the order of measurements")
    parser.add_argument("--here", action="store_true", help="use this Python instead of .venv-bench")
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.calls = 2, 10
    if options.instructions:
        options.repetitions = 1
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
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        if options.against:
            rows += earlier(options.against, Path(folder))
        try:
            begin(rows, Path(folder))
            run(rows, options.repetitions, options.calls, options.seed)
        finally:
            end(rows)
            progress("")
    if rows[0].skipped:
        print(f"the bare program could not be run: {rows[0].skipped}", file=sys.stderr)
        return 2
    results = Results(rows)
    header, lines = results.table()
    goal_header, goal_lines, met = results.goals()
    what = f"{options.repetitions} repetitions of {options.calls} calls per cell, medians; {unit()} per call"
    about = machine(rows, what)
    about += [results.spread(), *results.skipped()]
    if options.markdown:
        print("  \n".join(about), markdown(header, lines), markdown(goal_header, goal_lines), sep="\n\n")
    else:
        show("CPU per call", header, lines)
        show("Goals (ratio, middle half of the repetitions)", goal_header, goal_lines)
        print("\n".join(about))
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
