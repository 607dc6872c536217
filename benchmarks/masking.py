"""What looking for secrets costs: CPU time per text of 20 kB, and how it grows with the text.

python benchmarks/masking.py
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable

from dspy_otel.content import redaction

SIZE = 20_000
QUESTION = "What colour is the sky? "


def texts(size: int) -> dict[str, str]:
    """One text of each kind, of ``size`` characters."""
    rows = [{"question": f"What is {n}?", "answer": "blue", "reasoning": "light is scattered"} for n in range(size)]
    kinds = {
        "prompt of programs.py": QUESTION,
        "source code": inspect.getsource(argparse),
        "JSON": json.dumps(rows[: size // 50]),
        "secrets": "password=hunter2 api_key: 0123456789abcdef0123 https://ada:hunter2@host ",
    }
    return {kind: (text * (size // len(text) + 1))[:size] for kind, text in kinds.items()}


def cost(call: Callable[[str], object], text: str) -> float:
    """The least CPU microseconds of one call."""
    call(text)
    times = []
    for _ in range(20):
        start = time.process_time()
        call(text)
        times.append(time.process_time() - start)
    return min(times) * 1e6


def main() -> None:
    print(f"{'':24}{'20 kB: mask':>14}{'scan':>10}{'200 kB: mask':>14}   us")
    longer = texts(10 * SIZE)
    for kind, text in texts(SIZE).items():
        mask, scanned = cost(redaction.mask, text), cost(redaction.scan, text)
        print(f"{kind:24}{mask:14.0f}{scanned:10.0f}{cost(redaction.mask, longer[kind]):14.0f}")


if __name__ == "__main__":
    main()
