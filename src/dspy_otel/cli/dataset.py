"""`dspy-otel dataset`: traces to examples, in a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from dspy_otel.cli.compare import add_place, many_spans
from dspy_otel.cli.files import problem_of_operand
from dspy_otel.cli.working import quiet, working

_DESCRIPTION: Final = """Makes a dataset of what programs were asked and answered. SOURCE is an MLflow experiment, a
dspy.program.id, the MLflow run of an evaluation, or a file of OTLP (JSON or protobuf); `#` and an id behind an
experiment or a file name a program, or an evaluation of the file. Labels are what people said is right (expectations in
MLflow), or else the answer, unless it was judged wrong. What was cut, masked or not recorded is left out and counted.
Without -o, only the counts are shown."""
_EPILOG: Final = """exit status: 0 there are examples; 1 every answer was left out; 2 wrong usage or nothing there"""


def add_command(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    command = commands.add_parser(
        "dataset", help="make a trainset or devset of traces", description=_DESCRIPTION, epilog=_EPILOG
    )
    command.add_argument(
        "source", nargs="?", metavar="SOURCE", help="where the traces are (default: --experiment, in MLflow)"
    )
    command.add_argument("-o", "--output", metavar="FILE", type=Path, help="write to FILE (.jsonl or .parquet)")
    command.add_argument(
        "--split",
        type=float,
        metavar="SHARE",
        help="write this share to FILE, and the rest beside it (train.jsonl and train.dev.jsonl); sessions stay whole",
    )
    command.add_argument(
        "--by", choices=("session", "user", "example"), default="session", help="what stays whole (default: session)"
    )
    command.add_argument("--program", metavar="CLASS", help="only answers of programs of this class")
    command.add_argument("--program-id", metavar="ID", help="only answers of the program with this dspy.program.id")
    command.add_argument("--since", metavar="TIME", help="from then on: 7d (ago), 12h, 2026-11-01 or 2026-11-01T12:00")
    command.add_argument("--until", metavar="TIME", help="before then")
    command.add_argument("--metric", metavar="NAME", help="the score or feedback that counts (default: the lowest)")
    command.add_argument("--min-score", type=float, metavar="S", help="least score")
    command.add_argument("--max-score", type=float, metavar="S", help="greatest score")
    command.add_argument(
        "--passing", type=float, default=0.5, metavar="S", help="least score of an answer that is right (default: 0.5)"
    )
    command.add_argument("--feedback", action="store_true", help="only answers that people judged or corrected")
    command.add_argument("--evaluations", action="store_true", help="also rows of datasets, from evaluations")
    command.add_argument(
        "--unlabelled", action="store_true", help="also failed answers that nobody corrected, with their inputs alone"
    )
    command.add_argument("--by-time", action="store_true", help="the oldest first (default: failed answers first)")
    command.add_argument("--limit", type=int, metavar="N", help="at most N examples")
    add_place(command)


def run(options: argparse.Namespace) -> int:
    """Make it, and print what was taken and what was not. Returns the exit status."""
    from dspy_otel.dataset.collect import select_examples
    from dspy_otel.dataset.errors import NoExamplesError
    from dspy_otel.dataset.files import problem_of_output, save
    from dspy_otel.dataset.selection import Criteria, split

    output: Path | None = options.output
    criteria = Criteria(
        options.metric,
        options.min_score,
        options.max_score,
        options.feedback,
        options.unlabelled,
        not options.by_time,
        options.passing,
        options.limit,
    )
    try:
        problem = None if output is None else problem_of_output(output)
        if problem is None and options.source is not None:
            problem = problem_of_operand(options.source)
        if problem is None and options.split is not None and output is None:
            problem = "--split needs a file to write to: name one with -o"
        if problem is not None:
            raise NoExamplesError(problem)
        split((), 0.8 if options.split is None else options.split)
        with quiet(), many_spans(), working(f"reading {options.source or 'MLflow'}"):
            found = select_examples(
                options.source,
                criteria=criteria,
                program=options.program,
                program_id=options.program_id,
                since=options.since,
                until=options.until,
                evaluations=options.evaluations,
                experiment=options.experiment,
                tracking_uri=options.tracking_uri,
            )
        parts = [] if output is None or not found.rows else [(output, found.rows)]
        if parts and output is not None and options.split is not None:
            places = split(found.rows, options.split, options.by)
            names = output, output.with_name(f"{output.stem}.dev{output.suffix}")
            parts = [
                (name, tuple(found.rows[place] for place in part)) for name, part in zip(names, places, strict=True)
            ]
        for name, rows in parts:
            save(rows, name)
    except NoExamplesError as error:
        print(f"dspy-otel: {error}", file=sys.stderr)
        return 2
    print(found.summary())
    for name, rows in parts:
        print(f"{name}: {len(rows):,}")
    if not found.rows:
        print("dspy-otel: every answer was left out, so nothing was written: the lines above say why", file=sys.stderr)
        return 1
    return 0
