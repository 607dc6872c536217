"""What it takes that worker processes hand back what they have used: for each task, and for 10,000 of them.

The same tasks go to a pool of forked processes as they are, with a carrier, and delegated; in turn, in one run. Times
are processor time, of this process and of the workers. ``--help`` has the options.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import pickle
import resource
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import dspy
from opentelemetry.sdk.trace import TracerProvider

import dspy_otel

PROVIDER = TracerProvider(shutdown_on_exit=False)
TRACER = PROVIDER.get_tracer("benchmark")
WAYS = ("as it is", "inject, attach", "inject, attach, usage", "delegate")
IN_FLIGHT = 64


class Instant(dspy.BaseLM):
    """An LM that answers at once."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """The same answer."""
        message = SimpleNamespace(content="[[ ## answer ## ]]\n42\n\n[[ ## completed ## ]]")
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        choice = SimpleNamespace(message=message, finish_reason="stop")
        return SimpleNamespace(id="x", model=self.model, choices=[choice], usage=usage)


LM = Instant("instant/instant", cache=False)
PREDICT = dspy.Predict("question -> answer")


# --- tasks ----------------------------------------------------------------------------------------------------------
def nothing(number: int) -> int:
    return number


def predict(number: int) -> int:
    with dspy.context(lm=LM, disable_history=True):
        PREDICT(question=f"question {number}")
    return number


def attached(work: Callable[[int], int], number: int, carrier: dict[str, str]) -> int:
    with dspy_otel.attach(carrier):
        return work(number)


def with_usage(work: Callable[[int], int], number: int, carrier: dict[str, str]) -> tuple[int, str]:
    with dspy_otel.attach(carrier) as inside:
        result = work(number)
    return result, inside.usage()


TASKS = {"an empty task": nothing, "a Predict": predict}


# --- measuring ------------------------------------------------------------------------------------------------------
def cpu() -> float:
    """Processor time of this process and of the workers that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def send(pool: ProcessPoolExecutor, way: str, work: Callable[[int], int], count: int) -> None:
    """Have ``count`` tasks done, some of them waiting."""
    free = threading.Semaphore(IN_FLIGHT)
    futures = []
    for number in range(count):
        free.acquire()
        if way == "as it is":
            future: Any = pool.submit(work, number)
        elif way == "inject, attach":
            future = pool.submit(attached, work, number, dspy_otel.inject())
        elif way == "inject, attach, usage":
            future = pool.submit(with_usage, work, number, dspy_otel.inject(usage=True))
        else:
            future = pool.submit(dspy_otel.delegate(work), number)
        future.add_done_callback(lambda _: free.release())
        futures.append(future)
    for number, future in enumerate(futures):
        result = future.result()
        if way == "inject, attach, usage":
            result, usage = result
            dspy_otel.add_usage(usage)
        assert result == number


def measure(way: str, work: Callable[[int], int], count: int, processes: int) -> float:
    """Microseconds of processor time for each task, with a pool of its own."""
    gc.collect()
    before = cpu()
    with (
        TRACER.start_as_current_span("request"),
        dspy_otel.budget(tokens=10**12) as budget,
        ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool,
    ):
        send(pool, way, work, count)
    took = cpu() - before
    spent = budget.spent
    if way in WAYS[2:]:
        assert (spent.lm_calls, spent.unanswered_tasks) == (count if work is predict else 0, 0)
    return took / count * 1e6


def sizes() -> dict[str, int]:
    """Bytes that a delegated task has more than the function itself, and its result more than that itself."""
    with (
        TRACER.start_as_current_span("request"),
        dspy_otel.budget(tokens=10**12),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool,
    ):
        sent = pickle.dumps(dspy_otel.delegate(predict))
        reply = pool.submit(reply_to, sent).result()
        pickle.loads(reply)
    return {"task": len(sent) - len(pickle.dumps(predict)), "result": len(reply) - len(pickle.dumps(1))}


def reply_to(sent: bytes) -> bytes:
    return pickle.dumps(pickle.loads(sent)(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=10_000, help="of each kind, in each way, in all repetitions")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions, each with its share of the tasks")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    count = max(given.tasks // given.repeat, 1)
    dspy_otel.instrument(tracer_provider=PROVIDER)
    for work in TASKS.values():
        measure("delegate", work, 50, given.processes)  # what is made once is made
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for repetition in range(given.repeat):
        for name, work in TASKS.items():
            for way in WAYS if repetition % 2 else reversed(WAYS):
                found[name, way].append(measure(way, work, count, given.processes))
    print(f"{'us of CPU time for a task':<26} {'':<24} {'median':>8} {'added':>8} {'x':>6}")
    for name in TASKS:
        bare = found[name, WAYS[0]]
        for way in WAYS:
            own = found[name, way]
            added = statistics.median(one - other for one, other in zip(own, bare, strict=True))
            ratio = statistics.median(one / other for one, other in zip(own, bare, strict=True))
            print(f"{name:<26} {way:<24} {statistics.median(own):>8.0f} {added:>8.0f} {ratio:>6.2f}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"memory of this process: {grown:+.0f} MB after {given.tasks * len(WAYS) * len(TASKS):,} tasks")
    print("bytes more:", sizes())


if __name__ == "__main__":
    main()
