"""`dspy-otel runs` and `dspy-otel show`: what was optimized and evaluated, and what came of it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dspy_otel.cli.compare import add_place, many_spans
from dspy_otel.cli.working import quiet


def add_commands(commands: Any) -> None:
    """Add both commands to the parser's subcommands."""
    runs = commands.add_parser(
        "runs",
        help="what was optimized and evaluated, by dataset and metric",
        description="Lists optimizations and evaluations, grouped by dataset and metric, so that only what can be "
        "compared stands together; the best of each group first.",
    )
    runs.add_argument("file", nargs="?", metavar="FILE", type=Path, help="a file of OTLP in place of MLflow")
    runs.add_argument("--examples", action="store_true", help="also which examples fail in every run, or in some")
    show = commands.add_parser(
        "show",
        help="one optimization or evaluation: data, scores, spend, and whether the winner is better",
        description="Shows one optimization or evaluation: when, on which data and metric, scores, spend by role, and "
        "for an optimization whether its winner is better than its baseline, tested example by example.",
    )
    show.add_argument(
        "run", metavar="RUN", help="MLflow's run, or FILE#ID (or FILE, for the newest in it) for a file of OTLP"
    )
    show.add_argument(
        "--why",
        action="store_true",
        help="also why it got better: which trial brought each sentence and demo, and what that gained",
    )
    for command in (runs, show):
        command.add_argument("--format", choices=("table", "json"), default="table", help="(default: table)")
        add_place(command)


def run(options: argparse.Namespace) -> int:
    """Run one of both; the exit status is 0, or 2 when there is nothing to show."""
    from dspy_otel.decide import CannotCompareError

    try:
        with quiet(), many_spans():
            text = _runs(options) if options.command == "runs" else _show(options)
    except CannotCompareError as error:
        print(f"dspy-otel: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


def _runs(options: argparse.Namespace) -> str:
    from dspy_otel.decide import list_runs
    from dspy_otel.decide.listing import groups_dict, groups_text

    groups = list_runs(
        options.file, examples=options.examples, experiment=options.experiment, tracking_uri=options.tracking_uri
    )
    return groups_text(groups) if options.format == "table" else _json(groups_dict(groups))


def _show(options: argparse.Namespace) -> str:
    from dspy_otel.decide import CannotCompareError, compare, find_run, why
    from dspy_otel.decide.comparison import Comparison
    from dspy_otel.decide.listing import summary_dict, summary_text
    from dspy_otel.decide.overview import OPTIMIZATION

    place = {"experiment": options.experiment, "tracking_uri": options.tracking_uri}
    found, reference = find_run(options.run, **place)
    comparison: Comparison | None = None
    reason = None
    if found.kind == OPTIMIZATION:
        try:
            comparison = compare(f"{reference}baseline", f"{reference}best", **place)
        except CannotCompareError as error:
            reason = str(error)
    if options.why and found.kind != OPTIMIZATION:
        raise CannotCompareError(f"{options.run} is an evaluation: --why is for optimizations.")
    explained = why(reference.rstrip("#/"), **place) if options.why else None
    if options.format == "table":
        text = summary_text(found, comparison, reason)
        return text if explained is None else f"{text}\n{explained}"
    verdict = {"reason": reason} if comparison is None else comparison.to_dict()
    more = {"comparison": verdict} if found.kind == OPTIMIZATION else {}
    return _json({**summary_dict(found), **more, **({} if explained is None else {"why": explained.to_dict()})})


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
