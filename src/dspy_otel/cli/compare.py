"""`dspy-otel compare`: is one program better than another, and a gate for CI."""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from dspy_otel.cli.files import problem_of_operand
from dspy_otel.cli.working import quiet

_DESCRIPTION: Final = """Compares two programs by the examples that both were scored on: scores with a paired test and
an interval, cost, tokens, latency, failures, the examples that changed, and what differs in the programs. A and B are:
an MLflow run (of an optimization, a trial or an evaluation), an MLflow experiment (its best), a dspy.program.id
(answers in production that have scores), or a file of OTLP. `#` and `baseline`, `best` or a trial's number behind
an optimization name one of its trials; `#` and an id behind a file or an experiment, what has that id in there."""
_EPILOG: Final = """exit status: 0 compared, and with --fail-on-regression not worse; 1 worse; 2 cannot be compared"""
FORMATS: Final = ("table", "markdown", "json", "junit")


def add_command(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    command = commands.add_parser(
        "compare", help="is program B better than program A, or worse?", description=_DESCRIPTION, epilog=_EPILOG
    )
    command.add_argument("a", metavar="A", help="what B is compared with")
    command.add_argument("b", metavar="B", help="what may be better, or worse")
    command.add_argument(
        "--metric", action="append", metavar="NAME", help="a metric; may be repeated (default: all that both have)"
    )
    command.add_argument(
        "--alpha",
        type=_share,
        default=0.05,
        metavar="P",
        help="how often a difference may be shown where there is none (default: 0.05); 1 takes every drop as one",
    )
    command.add_argument(
        "--failed",
        choices=("zero", "skip"),
        default="zero",
        help="a failed example counts as 0, as dspy.Evaluate has it, or not at all (default: zero)",
    )
    command.add_argument("--fail-on-regression", action="store_true", help="exit with status 1 when B is worse")
    command.add_argument(
        "--max-drop", type=float, default=0.0, metavar="D", help="drop of a score that is no regression (default: 0)"
    )
    command.add_argument("--format", choices=FORMATS, default="table", help="(default: table)")
    add_place(command)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"use a number above 0 and at most 1, not {text}")
    return value


def add_place(command: Any) -> None:
    """Add the arguments that say which MLflow is read."""
    command.add_argument("--experiment", metavar="NAME", help="name or id (default: MLFLOW_EXPERIMENT_NAME or _ID)")
    command.add_argument("--tracking-uri", metavar="URI", help="MLflow to read from (default: MLFLOW_TRACKING_URI)")


def run(options: argparse.Namespace) -> int:
    """Compare, and print the result. Returns the exit status."""
    from dspy_otel.decide import CannotCompareError, compare
    from dspy_otel.decide.show import ERRORS
    from dspy_otel.decide.show import FORMATS as RENDERERS

    try:
        for operand in (options.a, options.b):
            if (problem := problem_of_operand(operand)) is not None:
                raise CannotCompareError(problem)
        with quiet(), many_spans():
            found = compare(
                options.a,
                options.b,
                metric=options.metric,
                alpha=options.alpha,
                max_drop=options.max_drop,
                failed_score=None if options.failed == "skip" else 0.0,
                experiment=options.experiment,
                tracking_uri=options.tracking_uri,
            )
    except CannotCompareError as error:
        print(f"dspy-otel: {error}", file=sys.stderr)
        if options.format in ERRORS:
            print(ERRORS[options.format](str(error)), end="")
        return 2
    print(RENDERERS[options.format](found), end="")
    return 1 if options.fail_on_regression and found.regression else 0


@contextmanager
def many_spans() -> Iterator[None]:
    """Without the garbage collector, which would look through all spans repeatedly: a fifth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
