"""Answers from files of OTLP, and examples to files and back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dspy_otel.dataset.errors import NoExamplesError
from dspy_otel.dataset.selection import Row
from dspy_otel.record.model import Answer, Judgement

_PREFIX: Final = "dspy_"
"""Begins the columns that are about an example. DSPy leaves fields of such names out of prompts."""
_INPUTS: Final = "dspy_inputs"
_PARQUET: Final = ".parquet"
_JSON: Final = ".jsonl"
ENDINGS: Final = (_JSON, _PARQUET)


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports that need an extra.

    Raises:
        NoExamplesError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise NoExamplesError(f"A dataset needs {error.name}: pip install 'dspy-otel[{extra}]'.") from error


# --- examples to files ----------------------------------------------------------------------------------------------


def problem_of_output(path: Path) -> str | None:
    """What is wrong with the name of a file to write, before any work; None when nothing is."""
    if path.suffix not in ENDINGS:
        return f"{path} is no name for a dataset: end it with {' or '.join(ENDINGS)}"
    if path.is_dir() or not path.parent.is_dir():
        return f"{path} cannot be written: name a file in a directory that exists"
    return None


def save(rows: Sequence[Row], path: Path) -> None:
    """Write examples, each with its fields and what it comes from, in place of what the file may have.

    Args:
        rows: examples.
        path: ending in ``.jsonl`` or ``.parquet``.

    Raises:
        NoExamplesError: another ending, pyarrow is missing, values that Parquet cannot keep, or no rights.
    """
    problem = problem_of_output(path)
    if problem is not None:
        raise NoExamplesError(f"{problem}.")
    records = [_record(row) for row in rows]
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        if path.suffix == _PARQUET:
            _write_parquet(records, beside)
        else:
            with beside.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        os.replace(beside, path)
    except OSError as error:
        raise NoExamplesError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _record(row: Row) -> dict[str, Any]:
    about = {
        _INPUTS: list(row.inputs),
        "dspy_example_id": row.id,
        "dspy_score": row.score,
        "dspy_failed": row.failed,
        "dspy_corrected": list(row.corrected),
        "dspy_feedback": list(row.feedback),
        "dspy_program_id": row.program,
        "dspy_session": row.session,
        "dspy_user": row.user,
        "dspy_trace_id": row.trace_id,
        "dspy_started": row.started,
    }
    return {**row.inputs, **row.labels, **about}


def _write_parquet(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    with needs("dataset"):
        import pyarrow
        from pyarrow import parquet
    columns = dict.fromkeys(name for record in records for name in record)
    for name in columns:
        values = [record.get(name) for record in records]
        try:
            same = pyarrow.array(values).to_pylist() == values
        except (pyarrow.ArrowException, OverflowError, TypeError):
            same = False
        if not same:  # numbers among texts, or dictionaries with other keys
            raise NoExamplesError(f"The values of {name} have no common type for Parquet: use {_JSON}.")
    parquet.write_table(
        pyarrow.table({name: [record.get(name) for record in records] for name in columns}), path, compression="zstd"
    )


# --- and back -------------------------------------------------------------------------------------------------------


def load(path: Path) -> list[Row]:
    """Read examples that :func:`save` has written.

    Raises:
        NoExamplesError: it is no such file, or cannot be read.
    """
    try:
        if path.suffix == _PARQUET:
            records = _read_parquet(path)
        else:
            with path.open(encoding="utf-8") as lines:
                records = [json.loads(line) for line in lines if line.strip()]
        return [_loaded(record) for record in records]
    except OSError as error:
        raise NoExamplesError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, NoExamplesError):
            raise
        raise NoExamplesError(f"{path} has no examples that dspy-otel wrote.") from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    with needs("dataset"):
        from pyarrow import parquet
    if not path.exists():
        raise NoExamplesError(f"There is no file {path}.")
    found: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    # A column has a value in each row: of a label that is not there, it is null.
    return [
        {name: value for name, value in record.items() if value is not None or name in record[_INPUTS]}
        for record in found
    ]


def _loaded(record: Mapping[str, Any]) -> Row:
    inputs = record[_INPUTS]
    return Row(
        {name: record[name] for name in inputs},
        {name: value for name, value in record.items() if name not in inputs and not name.startswith(_PREFIX)},
        record["dspy_example_id"],
        record.get("dspy_score"),
        record.get("dspy_failed"),
        tuple(record["dspy_corrected"]),
        tuple(record["dspy_feedback"]),
        record.get("dspy_program_id"),
        record.get("dspy_session"),
        record.get("dspy_user"),
        record["dspy_trace_id"],
        record["dspy_started"],
    )


# --- files of OTLP --------------------------------------------------------------------------------------------------


def read_file(path: Path) -> list[Answer]:
    """The answers in a file of OTLP: protobuf (``.pb``), or JSON as the Collector's file exporter writes it.

    Raises:
        NoExamplesError: it cannot be read.
    """
    with needs("dataset"):
        from dspy_otel.record import otlp
        from dspy_otel.record.answers import read_answers
    judgements: list[Judgement] = []
    try:
        return read_answers(otlp.read_file(path, judgements), judgements)
    except (OSError, ValueError) as error:
        raise NoExamplesError(f"{path} cannot be read: {error}.") from error
