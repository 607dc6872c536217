"""How many bytecodes watching adds to one call, and in which functions: a profile that no machine's speed moves.

``python benchmarks/bytecodes.py`` runs a program under Python's tracing, bare and watched, and counts. It shows what is
entered how often in a call, and how much of a function runs. Bytecodes are no time: in a program, where DSPy's own work
lies between two calls, those that run once take 10 to 15 ns, those of a loop a third of that; what functions written in
C take (searches, JSON) is not in them. What a change saves is measured (``overhead.py --against``). ``--help`` has the
options.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from programs import PROGRAMS, Workload
from worker import Pipeline, set_up

CALLS = 64
"""What is counted; measurements that wait for each other are counted in one of them."""


def counted(run: Callable[[], Any]) -> tuple[Counter[tuple[CodeType, int]], Counter[CodeType]]:
    """Bytecodes by function and line, and how often each function was entered, while ``run`` runs."""
    bytecodes: Counter[tuple[CodeType, int]] = Counter()
    entered: Counter[CodeType] = Counter()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            entered[frame.f_code] += 1
        elif event == "opcode":
            bytecodes[frame.f_code, frame.f_lineno] += 1
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return bytecodes, entered


def place(code: CodeType) -> str:
    """Function and file, as it is shown."""
    return f"{getattr(code, 'co_qualname', code.co_name)} ({'/'.join(code.co_filename.split('/')[-3:])})"


def main() -> None:
    """Count, and print functions by their bytecodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", choices=list(PROGRAMS), default="predict")
    parser.add_argument("--tool", choices=["bare", "callback", "dspy-otel", "openinference", "official"])
    parser.add_argument("--state", default="off", help="off, on, out (sampled out), traces (no metrics)")
    parser.add_argument("--lines", action="store_true", help="by line, not by function")
    parser.add_argument("--most", type=int, default=60, help="how many")
    options = parser.parse_args()
    if options.tool is None:  # Each switches itself on for good: in a process of its own.
        for tool in ("bare", "dspy-otel"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--tool", tool], check=True)
        return
    pipeline = Pipeline(options.state)
    set_up(options.tool, options.state, pipeline, {})
    workload = Workload(options.program)
    workload.run(100)
    pipeline.flush()
    bytecodes, entered = counted(lambda: workload.run(CALLS))
    total = sum(bytecodes.values()) / CALLS
    print(f"{options.tool}, {PROGRAMS[options.program]}: {total:,.0f} bytecodes in a call")
    found: Counter[tuple[CodeType, int]] = Counter()
    for (code, line), count in bytecodes.items():
        if "dspy_otel" in code.co_filename or "opentelemetry" in code.co_filename:
            found[code, line if options.lines else 0] += count
    for (code, line), count in found.most_common(options.most):
        shown = f"{place(code)}:{line}" if line else f"{entered[code] / CALLS:6.1f} calls  {place(code)}"
        print(f"{count / CALLS:8.1f}  {shown}")


if __name__ == "__main__":
    main()
