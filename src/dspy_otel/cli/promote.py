"""`dspy-otel promote`: an alias for the result of an optimization."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dspy_otel.cli.working import quiet


def add_command(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    command = commands.add_parser(
        "promote",
        help="give the result of an optimization an alias, to load it by",
        description="Gives the program that an optimization returned, and the versions of its prompts, an alias in "
        "MLflow's registry, such as production. A program loads it with dspy_otel.mlflow.load_best(MyProgram(), "
        "alias='production').",
    )
    command.add_argument("run", metavar="RUN_ID", help="MLflow's run of the optimization")
    command.add_argument("--alias", required=True, metavar="NAME", help="letters, digits, _ and -")
    command.add_argument("--tracking-uri", metavar="URI", help="another MLflow (default: MLFLOW_TRACKING_URI)")


def run(options: argparse.Namespace) -> int:
    """Set the alias, and print what has it. Returns the exit status."""
    from dspy_otel.mlflow.promote import promote
    from dspy_otel.mlflow.retry import ExportError

    try:
        with quiet():
            done = promote(options.run, options.alias, tracking_uri=options.tracking_uri)
    except (LookupError, ValueError, ExportError) as error:
        print(f"dspy-otel: {error}", file=sys.stderr)
        return 1
    print(f"{done.name} version {done.version} (program {done.program_id}) is {options.alias} now.")
    for prompt in done.prompts:
        print(f"prompt {prompt.name} version {prompt.version} too")
    return 0
