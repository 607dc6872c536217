"""Examples of DSPy from traces, in one call."""

from __future__ import annotations

import datetime
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from dspy_otel.dataset.errors import NoExamplesError
from dspy_otel.dataset.files import load, needs, read_file, save
from dspy_otel.dataset.selection import PASSING, By, Criteria, Reason, Row, Selection, select, split

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from dspy_otel.record.model import Answer

Source: TypeAlias = "str | os.PathLike[str] | Iterable[ReadableSpan] | None"
"""Where traces are; :func:`examples` says how it is named."""
Moment: TypeAlias = "datetime.datetime | datetime.timedelta | str | None"
"""A time, how long ago it is, or either as text: ``2026-11-01``, ``2026-11-01T12:00``, ``7d``, ``12h``, ``30m``."""
_PART: Final = "#"
_AGO: Final = re.compile(r"(\d{1,6})([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Examples(list):  # type: ignore[type-arg]  # of dspy.Example, which is untyped
    """A list of ``dspy.Example`` with their inputs set, which knows what it comes from.

    Args:
        selection: the examples, and what became of all other answers.

    Attributes:
        rows: one for each example, in the same order: score, session, trace, what people said.
        skipped: how many answers are no example, by reason; each is counted once.
        seen: how many answers there were.
    """

    def __init__(self, selection: Selection) -> None:
        with needs("instruments"):
            import dspy

        # As one dictionary: a field may have the name of an argument.
        super().__init__(dspy.Example({**row.inputs, **row.labels}).with_inputs(*row.inputs) for row in selection.rows)
        self._selection = selection

    @property
    def rows(self) -> tuple[Row, ...]:
        """One for each example, as they were made."""
        return self._selection.rows

    @property
    def skipped(self) -> Mapping[Reason, int]:
        """How many answers are no example, by reason."""
        return self._selection.skipped

    @property
    def seen(self) -> int:
        """How many answers there were."""
        return self._selection.seen

    def summary(self) -> str:
        """What was taken and what was not, in lines for people."""
        return self._selection.summary()

    def split(self, train: float = 0.8, by: By = "session") -> tuple[Examples, Examples]:
        """Split them, to train on the first part and to measure with the second.

        The examples of one session are in one part, and the same examples are always split alike.

        Args:
            train: share of the first part, above 0 and below 1; as near as whole sessions allow.
            by: what stays together: ``session``, ``user``, or ``example`` for nothing.

        Raises:
            NoExamplesError: another share, or another word.
        """
        first, second = split(self.rows, train, by)
        return self._part(first), self._part(second)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a file, each with its fields and, in columns that begin with ``dspy_``, what it comes from.

        Args:
            path: ending in ``.jsonl`` or ``.parquet``; :func:`load_examples` reads both.

        Raises:
            NoExamplesError: another ending, pyarrow is missing, or it cannot be written.
        """
        save(self.rows, Path(path))

    def _part(self, places: Sequence[int]) -> Examples:
        return Examples(Selection(tuple(self.rows[place] for place in places)))


def examples(
    source: Source = None,
    *,
    program: str | None = None,
    program_id: str | None = None,
    since: Moment = None,
    until: Moment = None,
    metric: str | None = None,
    min_score: float | None = None,
    max_score: float | None = None,
    feedback: bool = False,
    evaluations: bool = False,
    unlabelled: bool = False,
    failures_first: bool = True,
    passing: float = PASSING,
    limit: int | None = None,
    experiment: str | int | None = None,
    tracking_uri: str | None = None,
) -> Examples:
    """Make a dataset of what programs were asked and answered.

    The labels of an example are what a person said is right (expectations in MLflow, by field), or else the answer,
    unless that was judged wrong.

    Args:
        source: one of

            * the name of an MLflow experiment, with ``#`` and a ``dspy.program.id`` behind it or without; None for the
              one that the environment names;
            * a ``dspy.program.id``;
            * the MLflow run of an evaluation or a trial: the rows of its dataset;
            * the path of a file of OTLP, JSON or protobuf, with ``#`` and a program's or an evaluation's id or without;
            * ended spans, as an ``InMemorySpanExporter`` has them.
        program: class of the program.
        program_id: ``dspy.program.id``.
        since: answers from then on; without a zone, a time is local.
        until: answers before then.
        metric: name of the score or feedback that counts; None for the lowest of all, people's before evaluators'.
        min_score: least score; answers without one are left out.
        max_score: greatest score; likewise.
        feedback: only answers that people judged or corrected.
        evaluations: also rows of datasets, from evaluations outside of optimizations.
        unlabelled: also answers that failed and that nobody corrected, with their inputs alone.
        failures_first: failed answers, then those of which nothing is known, then right ones; else all by time.
        passing: least score of an answer that is right.
        limit: most examples.
        experiment: MLflow's experiment, name or id; default as for :class:`~dspy_otel.mlflow.MLflowSpanExporter`.
        tracking_uri: likewise.

    Returns:
        The examples, which know what was left out and why, may be split and saved.

    Raises:
        NoExamplesError: a source that is not there, or a setting that cannot be; its text says what to do.
    """
    return Examples(
        select_examples(
            source,
            criteria=Criteria(metric, min_score, max_score, feedback, unlabelled, failures_first, passing, limit),
            program=program,
            program_id=program_id,
            since=since,
            until=until,
            evaluations=evaluations,
            experiment=experiment,
            tracking_uri=tracking_uri,
        )
    )


def load_examples(path: str | os.PathLike[str]) -> Examples:
    """Read examples from a file that :meth:`Examples.save` or ``dspy-otel dataset`` has written.

    Raises:
        NoExamplesError: it is no such file, or cannot be read.
    """
    return Examples(Selection(tuple(load(Path(path)))))


def select_examples(
    source: Source,
    *,
    criteria: Criteria,
    program: str | None = None,
    program_id: str | None = None,
    since: Moment = None,
    until: Moment = None,
    evaluations: bool = False,
    experiment: str | int | None = None,
    tracking_uri: str | None = None,
) -> Selection:
    """What :func:`examples` does, without DSPy.

    Args:
        source: as there, and so are all others.
        criteria: which answers become examples.
        program: as there.
        program_id: as there.
        since: as there.
        until: as there.
        evaluations: as there.
        experiment: as there.
        tracking_uri: as there.

    Raises:
        NoExamplesError: as there.
    """
    for name in ("min_score", "max_score", "passing"):
        value = getattr(criteria, name)
        if value is not None and not math.isfinite(value):
            raise NoExamplesError(f"{name} is {value:g}: choose a number.")
    least, most = criteria.min_score, criteria.max_score
    if least is not None and most is not None and least > most:
        raise NoExamplesError(f"min_score is {least:g} and max_score {most:g}: no score is between.")
    if criteria.limit is not None and criteria.limit < 1:
        raise NoExamplesError(f"limit is {criteria.limit}: choose 1 or more.")
    first, last = _nanoseconds("since", since), _nanoseconds("until", until)
    if first is not None and last is not None and first >= last:
        raise NoExamplesError("since is not before until: no answer is between.")
    place = None if experiment is None else str(experiment)
    answers = [
        answer
        for answer in _find(source, first, last, evaluations, place, tracking_uri)
        if (first is None or answer.started >= first)
        and (last is None or answer.started < last)
        and program in (None, answer.program_name)
        and program_id in (None, answer.program)
    ]
    if not answers:
        raise NoExamplesError(
            "There is no answer of a program there: look at the source, program and time, and at evaluations if rows "
            "of datasets are meant."
        )
    return select(answers, criteria)


def _find(
    source: Source, first: int | None, last: int | None, evaluations: bool, experiment: str | None, uri: str | None
) -> list[Answer]:
    text = None if source is None else os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    if text == "":
        with needs("dataset"):
            from dspy_otel.record.answers import read_answers
        return _chosen(read_answers(source), None, evaluations)  # type: ignore[arg-type]
    place, _, part = (None, "", "") if text is None else text.rpartition(_PART)
    if text is not None and Path(text).is_file():
        return _chosen(read_file(Path(text)), None, evaluations)
    if place and Path(place).is_file():
        return _chosen(read_file(Path(place)), part, evaluations)
    if text is not None and (Path(text).suffix in (".json", ".jsonl", ".pb") or os.sep in text):
        raise NoExamplesError(f"There is no file {place or text}.")
    with needs("mlflow"):
        from dspy_otel.dataset.stored import Period, find_answers
    period = Period(*(None if when is None else when // 1_000_000 for when in (first, last)))
    return find_answers(place or text, part if place else None, period, evaluations, experiment, uri)


def _chosen(answers: Iterable[Answer], part: str | None, evaluations: bool) -> list[Answer]:
    return [
        answer
        for answer in answers
        if (part is not None and part == answer.evaluation)
        or (
            part in (None, answer.program)
            and (answer.evaluation is None or (evaluations and answer.optimization is None))
        )
    ]


def _nanoseconds(name: str, moment: Moment) -> int | None:
    """A time as nanoseconds since 1970.

    Raises:
        NoExamplesError: it is none.
    """
    if moment is None:
        return None
    if isinstance(moment, str) and (ago := _AGO.fullmatch(moment)) is not None:
        moment = datetime.timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    try:
        if isinstance(moment, datetime.timedelta):
            moment = datetime.datetime.now(datetime.timezone.utc) - moment
        elif isinstance(moment, str):
            zoned = moment.removesuffix("Z") + ("+00:00" if moment.endswith("Z") else "")
            moment = datetime.datetime.fromisoformat(zoned)
        return int(moment.timestamp() * 1_000_000) * 1000
    except (ValueError, OverflowError, OSError) as error:
        raise NoExamplesError(
            f"{name} is {moment}: use a date, a time such as 2026-11-01T12:00, or how long ago it is, such as 7d."
        ) from error
