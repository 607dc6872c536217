"""Memory over a long time: what this package keeps while a program runs for a day, or compiles with long prompts.

    python benchmarks/endurance.py                        # both, each way; some fifteen minutes
    python benchmarks/endurance.py --quick                # does it run? The numbers mean nothing

``compile`` is one RandomSearch of 50,000 LM calls with prompts of 20 kB. ``day`` is a service that answers a request a
second for 24 hours, compressed: 86,400 requests, from threads, by a program that stays and by programs made for one
request, with LMs of their own and calls that fail. Each runs in a process of its own, bare and watched with content on,
once with an exporter that drops what it gets and once with MLflow's (an embedded sqlite store).

A row of a table is one moment: memory, objects of ours that are alive, what our caches hold, spans that wait.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from overhead import (
    HERE,
    VENV,
    Configuration,
    machine,
    markdown,
    prepare_environment,
    progress,
    show,
    worker_environment,
)

WAYS = {"bare": "no telemetry", "null": "dspy-otel, an exporter that drops", "mlflow": "dspy-otel, to MLflow in sqlite"}
SCENARIOS = {"compile": "one compile of {:,} LM calls, 20 kB prompts", "day": "a day: {:,} requests"}
MOMENTS = 12
"""Rows of a table: in how many parts a run is looked at."""
PROMPT = 20_000
MOST_GROWTH = 100.0
"""MB that a watched run may hold more than the bare one at its end, beyond what it held more at its start."""


# --- the worker: one scenario, one way ---------------------------------------------------------------------------


def set_up(way: str, folder: Path) -> tuple[Callable[[], int], Callable[[], Any]]:
    """Switch telemetry on; give what counts the waiting spans, and what flushes."""
    if way == "bare":
        return (lambda: 0), (lambda: None)
    import dspy_otel

    if way == "null":
        from worker import Pipeline

        pipeline = Pipeline("on")
        dspy_otel.instrument(
            tracer_provider=pipeline.tracer_provider,
            meter_provider=pipeline.meter_provider,
            capture_content="span_only",
        )
        processor: Any = pipeline.tracer_provider._active_span_processor._span_processors[0]
        return (lambda: len(processor._batch_processor._queue)), pipeline.flush
    dspy_otel.configure(mlflow=f"sqlite:///{folder / 'mlflow.db'}", capture_content="span_only")
    from opentelemetry import trace

    from dspy_otel.mlflow.journal import Segment

    def waiting() -> int:
        return sum(each.count for each in gc.get_objects() if type(each) is Segment)

    provider: Any = trace.get_tracer_provider()
    return waiting, lambda: provider.force_flush(600_000)


def look(done: int, waiting: Callable[[], int]) -> dict[str, Any]:
    """One moment: calls so far, memory, and what of ours is alive or kept."""
    from compile_worker import resident

    moment: dict[str, Any] = {"done": done, "MB": resident(), "open": 0, "kept": 0, "waiting": waiting()}
    if "dspy_otel" not in sys.modules:
        return moment
    from dspy_otel.content import redaction
    from dspy_otel.core import internal_errors
    from dspy_otel.core.call_context import CallContext
    from dspy_otel.core.operation import Call
    from dspy_otel.operations.identity_cache import IdentityCache

    alive = Counter(map(type, gc.get_objects()))
    moment["open"] = alive[Call] + alive[CallContext]
    kept = sum(len(each._kept) for each in gc.get_objects() if type(each) is IdentityCache)
    moment["kept"] = (
        kept + len(redaction._known) + len(internal_errors._seen) + redaction.name_kind.cache_info().currsize
    )
    return moment


def run(scenario: str, way: str, calls: int) -> list[dict[str, Any]]:
    """Run one scenario; the moments looked at, the last two after everything was sent.

    The very last one is taken when the allocator has given back what is free: what is left is held by somebody.
    """
    import dspy
    from compile_worker import HashLM

    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
        waiting, flush = set_up(way, Path(folder))
        HashLM.seconds = 0
        lm = HashLM()
        dspy.configure(lm=lm)
        long_day(lm, 8, lambda _: None)  # what is loaded once is loaded
        flush()
        gc.collect()
        moments = [look(0, waiting)]
        lm.calls = 0
        lock = threading.Lock()

        def note(done: int) -> None:
            """Look when the next twelfth is done."""
            if done * MOMENTS < calls * len(moments):
                return
            with lock:
                if done * MOMENTS >= calls * len(moments):
                    moments.append(look(done, waiting))
                    print(json.dumps({"progress": f"{done:,} of {calls:,}"}), file=sys.__stdout__, flush=True)

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            (long_compile if scenario == "compile" else long_day)(lm, calls, note)
        flush()
        gc.collect()
        moments.append(look(calls, waiting))
        with contextlib.suppress(OSError, AttributeError):  # glibc: what is free goes back to the system
            ctypes.CDLL(None).malloc_trim(0)
        moments.append(look(calls, waiting))
        return moments


def long_compile(lm: Any, calls: int, note: Callable[[int], None]) -> None:
    """One RandomSearch: 25 candidates, two LM calls for each example."""
    import dspy
    from compile_worker import THREADS, Digits, high

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        note(lm.calls)
        return high(example, prediction, trace)

    text = "What follows is long. " * (PROMPT // 22)
    rows = [dspy.Example(question=f"{text} {n}").with_inputs("question") for n in range(calls // 50)]
    search = dspy.BootstrapFewShotWithRandomSearch(
        metric=metric, max_bootstrapped_demos=1, max_labeled_demos=1, num_candidate_programs=22, num_threads=THREADS
    )
    short = [dspy.Example(question=f"question {n}").with_inputs("question") for n in range(10)]  # for demos
    search.compile(Digits(), trainset=short, valset=rows)


def long_day(lm: Any, calls: int, note: Callable[[int], None]) -> None:
    """Requests from eight threads, in an application's baggage; every seventh makes a program and an LM of its own."""
    import dspy
    from compile_worker import Digits, HashLM
    from opentelemetry import baggage, context

    class Failing(HashLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise ConnectionError("nobody there")

    program = Digits()
    failing = dspy.Predict("question -> first")
    failing.set_lm(Failing())
    done = Counter[str]()

    def request(number: int) -> None:
        token = context.attach(baggage.set_baggage("session.id", f"session {number}"))
        try:
            if number % 7 == 0:
                own = Digits()
                own.set_lm(HashLM())
                own(question=f"question {number}")
            elif number % 1001 == 0:
                with contextlib.suppress(Exception):
                    failing(question="?")
            else:
                program(question=f"question {number}")
        finally:
            context.detach(token)
        done["requests"] += 1  # a lost count does no harm
        note(done["requests"])

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, calls, 10_000):  # a pool's queue is no part of what is measured
            list(pool.map(request, range(start, min(start + 10_000, calls))))


# --- the driver --------------------------------------------------------------------------------------------------


def ask(scenario: str, way: str, calls: int, folder: str) -> list[dict[str, Any]]:
    """Run a worker to its end, and tell how far it is."""
    command = [sys.executable, str(HERE / "endurance.py"), "--worker", scenario, way, "--calls", str(calls)]
    environment = {**worker_environment({}, folder), "TQDM_DISABLE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if "progress" not in said:
                found: list[dict[str, Any]] = said["moments"]
                return found
            progress(f"{scenario}, {WAYS[way]}: {said['progress']}")
    raise SystemExit(f"{scenario}, {way}: ended with {process.returncode}")


def table(found: dict[str, list[dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one moment each, the memory of every way, and what the watched ones hold."""
    watched = [way for way in found if way != "bare"]
    header = ["done", *(f"MB: {way}" for way in found)]
    header += [f"{title}: {way}" for way in watched for title in ("open", "kept", "waiting")]
    lines = []
    for place in range(max(map(len, found.values()))):
        moments = {way: moments[min(place, len(moments) - 1)] for way, moments in found.items()}
        line = [f"{next(iter(moments.values()))['done']:,}", *(f"{each['MB']:.0f}" for each in moments.values())]
        line += [str(moments[way][title]) for way in watched for title in ("open", "kept", "waiting")]
        lines.append(line)
    lines[-2][0], lines[-1][0] = "all sent", "and trimmed"
    return header, lines


def verdicts(found: dict[str, list[dict[str, Any]]]) -> tuple[list[str], bool]:
    """What each watched run has grown by beyond the bare one, what it left open, and whether the goal is met."""
    said, met = [], True
    growth = {way: moments[-1]["MB"] - moments[0]["MB"] for way, moments in found.items()}
    for way, grown in growth.items():
        if way != "bare":
            more, last = grown - growth["bare"], found[way][-1]
            good = more <= MOST_GROWTH and not last["open"] and not last["waiting"]
            met = met and good
            said.append(
                f"{WAYS[way]}: holds {more:+.0f} MB more than the bare program in the end (goal {MOST_GROWTH:.0f}); "
                f"then {last['open']} calls open, {last['waiting']} spans unsent: {'met' if good else 'missed'}"
            )
    return said, met


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="default: both")
    parser.add_argument("--only", metavar="WAY,WAY", default=",".join(WAYS), help="beside bare; of %(default)s")
    parser.add_argument("--calls", type=int, help="LM calls of a compile (50,000), requests of a day (86,400)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 2,000 of each")
    parser.add_argument("--check", action="store_true", help="exit code 1 when memory grows without bound")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--here", action="store_true", help="use this Python instead of .venv-bench")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; the exit code."""
    options = arguments()
    if options.worker:
        scenario, way = options.worker
        moments = run(scenario, way, options.calls)
        print(json.dumps({"moments": moments}), flush=True)
        return 0
    if not options.here and Path(sys.prefix).resolve() != VENV:
        return subprocess.run([str(prepare_environment()), *sys.argv], check=False).returncode
    import dspy_otel

    all_met = True
    for scenario in options.scenario or SCENARIOS:
        calls = options.calls or (2_000 if options.quick else 50_000 if scenario == "compile" else 86_400)
        with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
            ways = {"bare", *options.only.split(",")}
            found = {way: ask(scenario, way, calls, folder) for way in WAYS if way in ways}
        progress("")
        header, lines = table(found)
        title = SCENARIOS[scenario].format(calls)
        said, met = verdicts(found)
        all_met = all_met and met
        about = [*machine([Configuration("dspy-otel", "", "", version=dspy_otel.__version__)], title), *said]
        if options.markdown:
            print("  \n".join(about), markdown(header, lines), sep="\n\n", end="\n\n")
        else:
            show(title, header, lines)
            print("\n".join(about))
    return 0 if all_met or not options.check else 1


if __name__ == "__main__":
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    sys.exit(main())
