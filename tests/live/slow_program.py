"""An optimization that takes its time, with a live page: ``python -m tests.live.slow_program fail|wait``."""

from __future__ import annotations

import sys
import threading

import dspy_otel
from tests.optimizers.common import ColourFamily, load_examples, same_family, scripted_lm


def main(end: str) -> None:
    import dspy

    scripted_lm()
    calls = 0
    wait = threading.Event()

    def metric(example: object, prediction: object, trace: object = None) -> object:
        nonlocal calls
        calls += 1
        if calls > 24 and end == "fail":
            raise KeyboardInterrupt
        if calls > 24:
            wait.wait(120)
        return same_family(example, prediction, trace)

    dspy_otel.instrument(capture_content="span_only")
    page = dspy_otel.watch()
    print(page.url, flush=True)
    sys.stdin.readline()
    search = dspy.BootstrapFewShotWithRandomSearch(
        metric=metric, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=2, num_threads=1
    )
    try:
        search.compile(ColourFamily(), trainset=load_examples("train", 8), valset=load_examples("val", 8))
    except KeyboardInterrupt:
        sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1])
