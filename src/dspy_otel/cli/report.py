"""`dspy-otel report`: the report of an optimization as a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspy_otel.cli.working import quiet, working

if TYPE_CHECKING:
    from dspy_otel.record.model import Optimization
    from dspy_otel.reports import Source


def add_command(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    command = commands.add_parser(
        "report",
        help="write the report of an optimization as one HTML file",
        description="Makes the report of an optimization from what MLflow has of it, also while it runs, and writes it "
        "as one HTML file that needs nothing else. Without a run: of the newest optimization in the experiment. With "
        "--spans, from a file of OTLP instead, as the Collector's file exporter writes it.",
    )
    command.add_argument(
        "run", nargs="?", metavar="RUN_ID", help="MLflow's run of the optimization, or of one of its trials"
    )
    command.add_argument("--experiment", metavar="NAME", help="name or id (default: MLFLOW_EXPERIMENT_NAME or _ID)")
    command.add_argument("--spans", metavar="FILE", type=Path, help="a file of spans in place of MLflow")
    command.add_argument("--tracking-uri", metavar="URI", help="MLflow to read from (default: MLFLOW_TRACKING_URI)")
    command.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="where to write it (default: report-RUN_ID.html)"
    )


def run(options: argparse.Namespace) -> int:
    """Make the report, and print where it is. Returns the exit status."""
    from dspy_otel.reports.page import render

    try:
        with quiet(), working(f"reading {options.spans or 'MLflow'}"):
            name, optimization, source = _of_spans(options) if options.spans is not None else _of_mlflow(options)
            path = options.output or Path(f"report-{name}.html")
            text = render(optimization, source)
    except (LookupError, ValueError, OSError) as error:
        print(f"dspy-otel: {error}", file=sys.stderr)
        return 1
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"dspy-otel: {path} cannot be written ({error.strerror}): name another file with -o", file=sys.stderr)
        return 1
    print(path)
    return 0


def _of_mlflow(options: argparse.Namespace) -> tuple[str, Optimization, Source | None]:
    from dspy_otel.mlflow.read import read_optimization
    from dspy_otel.mlflow.retry import ExportError

    try:
        found = read_optimization(options.run, experiment=options.experiment, tracking_uri=options.tracking_uri)
    except ExportError as error:
        raise LookupError(str(error)) from error
    return found.run_id, found.optimization, found.source


def _of_spans(options: argparse.Namespace) -> tuple[str, Optimization, Source | None]:
    from dspy_otel.record.history import optimizations
    from dspy_otel.record.otlp import read_file

    found = optimizations(read_file(options.spans))
    chosen = [one for one in found if options.run in (None, one.id)]
    if not chosen:
        known = f": it has {', '.join(one.id for one in found)}" if found else ""
        what = "finished optimization" if options.run is None else f"optimization {options.run}"
        raise LookupError(f"{options.spans} has no {what}{known}.")
    return chosen[-1].id, chosen[-1], None
