"""What a worker has spent: CPU time of its process, or, under valgrind, how many instructions it has run.

Instructions do not depend on what else the machine does, and two runs differ by half a percent. They are no time: code
that runs once in a call waits for the processor's caches, which takes longer than its instructions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

VARIABLE = "BENCHMARK_INSTRUCTIONS"
"""Set in the environment of a worker that counts instructions."""
VALGRIND = ("valgrind", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null")


def count_instructions() -> None:
    """From now on, workers count instructions. Ends the program where valgrind is not installed."""
    if shutil.which(VALGRIND[0]) is None:
        raise SystemExit("--instructions needs valgrind (apt install valgrind)")
    os.environ[VARIABLE] = "1"


def before() -> tuple[str, ...]:
    """What comes before the command of a worker."""
    return VALGRIND if VARIABLE in os.environ else ()


class Meter:
    """Counts what runs inside the ``with`` block.

    Attributes:
        cpu: seconds of CPU time of the whole process, or billions of instructions.
        wall: seconds.
    """

    cpu = 0.0
    wall = 0.0

    def __enter__(self) -> Meter:
        if VARIABLE in os.environ:
            _control("-i", "on")  # What runs before is five times as fast.
        self.wall, self.cpu = time.perf_counter(), _spent()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = _spent() - self.cpu, time.perf_counter() - self.wall
        if VARIABLE in os.environ:
            _control("-i", "off")


def _spent() -> float:
    if VARIABLE not in os.environ:
        return time.process_time()
    counts = re.findall(r"Th \d+\s+([\d,]+)", _control("-e"))
    return sum(int(count.replace(",", "")) for count in counts) / 1e9


def _control(*options: str) -> str:
    command = ["callgrind_control", *options, str(os.getpid())]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
