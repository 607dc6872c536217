"""What each part of this package takes of one call: a profile by time, where a profiler's own cost would hide it.

``python benchmarks/parts.py`` calls a program once with every function of the list below recorded, and then repeats
each of them with the arguments it had, in a loop. So the times are those of warm code: in a program, where DSPy's own
work lies between two calls, the same code takes two to three times as long. Times of a function contain those of the
functions that it calls. Texts are searched for secrets as if each were new. ``--help`` has the options.
"""

from __future__ import annotations

import argparse
import contextvars
import functools
import gc
import logging
import time
import timeit
from collections.abc import Callable
from typing import Any

import dspy
from programs import PROGRAMS, Workload
from worker import Pipeline

import dspy_otel
from dspy_otel.content import encoder
from dspy_otel.content.encoder import Content
from dspy_otel.core import spans
from dspy_otel.core.metrics import BoundedInstrument
from dspy_otel.operations import lm, module, program
from dspy_otel.operations.adapter import AdapterOperation

PARTS: list[tuple[Any, str]] = [
    *((module.ModuleOperation, name) for name in ("start", "start_attributes", "end_attributes", "measure")),
    (program.Programs, "find"),
    *((lm.LMOperation, name) for name in ("start", "start_attributes", "end_attributes", "measure")),
    *((lm.LMOperation, name) for name in ("record_engine", "record_result")),
    (AdapterOperation, "serves"),
    (spans.LightTracer, "begin_span"),
    (spans.LightSpan, "set_light_attributes"),
    (spans.LightSpan, "end"),
    (BoundedInstrument, "record"),
    (Content, "json"),
]
"""What is measured: owner and name. A span can end once, so that of its end is the time of one whole span less."""


def recorded(workload: Workload) -> dict[str, list[tuple[Callable[[], Any], contextvars.Context]]]:
    """Each call of a part in one call of the program, with the context it was made in."""
    calls: dict[str, list[tuple[Callable[[], Any], contextvars.Context]]] = {}
    originals = [(owner, name, vars(owner)[name]) for owner, name in PARTS]
    for owner, name, original in originals:

        def record(*args: Any, original: Any = original, key: str = f"{owner.__name__}.{name}", **kwargs: Any) -> Any:
            repeat = functools.partial(original, *args, **kwargs)
            calls.setdefault(key, []).append((repeat, contextvars.copy_context()))
            return repeat()

        setattr(owner, name, record)
    try:
        workload.run(1)
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
    return calls


def lowest(function: Callable[[], Any], context: contextvars.Context) -> float:
    """Microseconds of one call: the lowest of several means."""
    return min(context.run(timeit.repeat, function, timer=time.process_time, number=300, repeat=15)) / 300 * 1e6


def span_parts(calls: dict[str, list[tuple[Callable[[], Any], contextvars.Context]]]) -> dict[str, float]:
    """Microseconds of the parts that change a span, each time on a new one."""
    starts = calls.pop("LightTracer.begin_span")
    changes, ends = calls.pop("LightSpan.set_light_attributes"), calls.pop("LightSpan.end")
    begun = [lowest(*start) for start in starts]
    took = {"LightTracer.begin_span": sum(begun), "LightSpan.set_light_attributes": 0.0, "LightSpan.end": 0.0}
    start, context = starts[0]
    for key, found in ("LightSpan.set_light_attributes", changes), ("LightSpan.end", ends):
        for change, _ in found:

            def changed(change: Any = change) -> None:
                change.func(start(), *change.args[1:])

            took[key] += lowest(changed, context) - begun[0]
    return took


search = encoder._Harmless.are


def are_harmless(harmless: encoder._Harmless, texts: list[str]) -> bool:
    """What content does with texts that it has not seen before."""
    return search(encoder._Harmless(), texts)


def main() -> None:
    """Measure, and print the parts by time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", choices=list(PROGRAMS), default="predict")
    parser.add_argument("--content", action="store_true", help="with content on")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the queue of spans runs over
    pipeline = Pipeline("on" if options.content else "off")
    dspy_otel.instrument(
        tracer_provider=pipeline.tracer_provider,
        meter_provider=pipeline.meter_provider,
        capture_content="span_only" if options.content else "no_content",
    )
    workload = Workload(options.program)
    workload.run(20)
    encoder._Harmless.are = are_harmless  # type: ignore[method-assign]
    calls = recorded(workload)
    gc.collect()
    counts = {key: len(found) for key, found in calls.items()}
    took = span_parts(calls)
    took.update((key, sum(lowest(*call) for call in found)) for key, found in calls.items())
    print(f"{PROGRAMS[options.program]}, content {'on' if options.content else 'off'}, DSPy {dspy.__version__}")
    for key, microseconds in sorted(took.items(), key=lambda each: -each[1]):
        print(f"{microseconds:8.1f} us  {counts[key]} calls  {key}")


if __name__ == "__main__":
    main()
