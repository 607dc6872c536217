"""``dspy-otel replay``: deliver to MLflow what programs could not send."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """Delivers to MLflow what programs could not send while it was away: spans, runs, scores. They are in the
spool (OTEL_DSPY_SPOOL; by default the user's state directory). What is delivered is removed from it. Files of OTLP that
a Collector has written, in protobuf or lines of JSON, can be delivered too."""


def add_command(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    command = commands.add_parser("replay", help="deliver to MLflow what could not be sent", description=DESCRIPTION)
    command.add_argument("source", nargs="*", type=Path, metavar="DIR|FILE", help="default: the spool of all programs")
    command.add_argument("--to", metavar="URI", help="an MLflow other than the one it was meant for")
    command.add_argument("--experiment", metavar="NAME|ID", help="another experiment")
    command.add_argument("--list", action="store_true", help="list the contents and deliver nothing")


def run(options: argparse.Namespace) -> int:
    """Run it; the exit status is 0 when nothing is left, 1 when something is, 2 when nothing could be tried."""
    try:
        from dspy_otel.mlflow.journal import spool_directory
        from dspy_otel.mlflow.replay import replay
    except ImportError as error:
        print(f"dspy-otel: replay needs {error.name}: pip install 'dspy-otel[mlflow]'", file=sys.stderr)
        return 2
    sources: list[Path] = options.source
    if not sources:
        directory = spool_directory()
        if directory is None:
            print("dspy-otel: the spool is off (OTEL_DSPY_SPOOL): name a directory or a file", file=sys.stderr)
            return 2
        sources = [directory]
    if options.list:
        return _list(sources)
    logging.basicConfig(format="%(message)s")
    outcome = replay(sources, to=options.to, experiment=options.experiment, progress=_progress())
    if not outcome.found:
        print(f"Nothing to deliver in {', '.join(map(str, sources))}.")
        return 0
    print(f"Delivered: {outcome}.")
    for line in outcome.left:
        print(f"Left: {line}", file=sys.stderr)
    return 1 if outcome.left else 0


def _list(sources: list[Path]) -> int:
    from dspy_otel.mlflow.journal import JournalError, complete_messages, is_refused, journal_directories, read_file
    from dspy_otel.record.otlp import decode

    status = 0
    for place in (place for source in sources for place in journal_directories(source)):
        try:
            about = place.about()
            counts = {True: 0, False: 0}
            for path in place.undelivered():
                counts[is_refused(path)] += len(decode(complete_messages(read_file(path))))
            refused = f", {counts[True]:,} of them refused" if counts[True] else ""
            print(
                f"{place.path}: {sum(counts.values()):,} spans{refused} for {about['tracking_uri']}, "
                f"experiment {about['experiment']}"
            )
        except (JournalError, OSError, ValueError, KeyError) as error:
            print(f"{place.path}: {error}", file=sys.stderr)
            status = 1
    return status


def _progress() -> Any:
    """Progress in one line on a terminal; elsewhere a line for each step that matters."""
    if not sys.stderr.isatty():
        return lambda line: None if " of " in line else print(line, file=sys.stderr)
    return lambda line: print(f"\r\x1b[2K{line}", end="" if " of " in line else "\n", file=sys.stderr, flush=True)
