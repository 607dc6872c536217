"""The `dspy-otel` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from dspy_otel.cli import compare, dataset, promote, replay, report, runs, ui, watch
from dspy_otel.cli.files import problem_of, problem_of_operand
from dspy_otel.version import __version__

_PACKAGES_OF_DEMO = {
    "dspy": "dspy",
    "mlflow": "mlflow",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "optuna": "optuna",
    "rich": "rich",
}
_PACKAGES_OF_REPORT = {
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
    "requests": "requests",
    "packaging": "packaging",
}
"""Packages for a server. A store without one needs MLflow, and raises an error that says so."""
_KEYS = {
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
    "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    "groq": ("GROQ_API_KEY",),
    "mistral": ("MISTRAL_API_KEY",),
    "openrouter": ("OPENROUTER_API_KEY",),
}
"""Variables that each hosted provider reads its key from; other providers raise errors of their own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 failed (or worse, with
    `compare --fail-on-regression`), 2 wrong usage or something missing.

    `argv` are the arguments without the program's name; None takes `sys.argv[1:]`.
    """
    parser = argparse.ArgumentParser(prog="dspy-otel", description="OpenTelemetry instrumentation for DSPy.")
    parser.add_argument("--version", action="version", version=f"dspy-otel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="run, evaluate and optimize a small program with telemetry on",
        description="Runs, evaluates and optimizes a small DSPy program with telemetry on, stores it in MLflow and "
        "shows what was recorded. By default on an embedded model: no key, no network.",
    )
    demo.add_argument("--model", metavar="PROVIDER/NAME", help="a real model, for example openai/gpt-4o-mini")
    demo.add_argument("--optimizer", choices=("mipro", "gepa", "both"), default="both")
    demo.add_argument("--tracking-uri", metavar="URI", help="MLflow to write to (default: sqlite in ./demo-mlflow/)")
    demo.add_argument(
        "--content",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="record prompts and answers (default: yes, the data is public)",
    )
    demo.add_argument("--open", action="store_true", help="then open MLflow on it, in the browser, until Ctrl-C")
    demo.add_argument("--quick", action="store_true", help="less data and fewer trials")
    replay.add_command(commands)
    report.add_command(commands)
    compare.add_command(commands)
    dataset.add_command(commands)
    ui.add_command(commands)
    promote.add_command(commands)
    runs.add_commands(commands)
    watch.add_command(commands)
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 0
    if (problem := _problem_of_files(options)) is not None:
        return _refuse(problem)
    if options.command == "replay":
        return replay.run(options)
    if options.command == "compare":
        return compare.run(options)
    if options.command == "dataset":
        return dataset.run(options)
    if options.command in ("ui", "promote"):
        needed = [package for module, package in _PACKAGES_OF_REPORT.items() if not _installed(module)]
        if needed:
            return _refuse(
                f"{options.command} needs {', '.join(needed)}. Install it with: pip install 'dspy-otel[mlflow]'"
            )
        return ui.run(options) if options.command == "ui" else promote.run(options)
    if options.command in ("runs", "show"):
        return runs.run(options)
    if options.command in ("report", "watch"):
        modules = ["opentelemetry.sdk"] if options.spans is not None else list(_PACKAGES_OF_REPORT)
        needed = [_PACKAGES_OF_REPORT[module] for module in modules if not _installed(module)]
        if needed:
            return _refuse(f"the report needs {', '.join(needed)}. Install it with: pip install 'dspy-otel[mlflow]'")
        return report.run(options) if options.command == "report" else watch.run(options)

    missing = [package for module, package in _PACKAGES_OF_DEMO.items() if not _installed(module)]
    if missing:
        return _refuse(f"the demo needs {', '.join(missing)}. Install it with: pip install 'dspy-otel[demo]'")
    keys = _KEYS.get((options.model or "").split("/")[0], ())
    if keys and not any(os.environ.get(key) for key in keys):
        return _refuse(f"{options.model} needs an API key: set {' or '.join(keys)} in the environment.")

    from dspy_otel.cli.demo.run import run_demo

    return run_demo(
        model=options.model,
        optimizer=options.optimizer,
        tracking_uri=options.tracking_uri,
        content=options.content,
        quick=options.quick,
        open_it=options.open,
    )


def _problem_of_files(options: argparse.Namespace) -> str | None:
    """What is wrong with the first file that cannot be used. `compare` says so in its own formats."""
    if options.command == "replay":
        problems = [problem_of(path, protobuf=True, directory=True) for path in options.source]
    elif options.command == "show":
        problems = [problem_of_operand(options.run)]
    else:
        path = {"report": "spans", "runs": "file"}.get(options.command, "")
        file = getattr(options, path, None)
        problems = [None if file is None else problem_of(file)]
    return next((problem for problem in problems if problem is not None), None)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return False


def _refuse(reason: str) -> int:
    print(f"dspy-otel: {reason}", file=sys.stderr)
    return 2
