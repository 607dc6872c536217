"""Which answers become examples, with what labels and in which order, and why others do not. Pure.

Nothing is invented. A value that was cut, masked or not recorded makes no example. An answer that was judged wrong is
no label: it makes an example only where a person said what is right, or where the dataset that it came from did.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from dspy_otel.content.digest import digest
from dspy_otel.dataset.errors import NoExamplesError
from dspy_otel.record.losses import Loss, loss_of
from dspy_otel.record.model import Answer, Judgement

PASSING: Final = 0.5
"""The least score of an answer that is right."""
_ADDED: Final = frozenset({"reasoning", "trajectory"})
"""Outputs that DSPy's modules add to those of a signature: how an answer was found, and no label."""
_WHOLE: Final = frozenset({"expected", "expected_response", "expected_output"})
"""Expectations of these names are about the whole answer: ours, and those that MLflow proposes."""
By: TypeAlias = Literal["session", "user", "example"]


class Reason(enum.Enum):
    """Why an answer is no example."""

    NO_CONTENT = "inputs or outputs are not recorded (content capture was off, or spans have not arrived)"
    ERROR = "the program raised an error"
    CUT = "cut at the content limit"
    MASKED = "a secret is masked"
    NO_VALUE = "a value is known by its class only"
    NO_NAMES = "inputs or outputs have no names"
    UNCLEAR = "feedback that fits no answer or no field"
    WRONG = "judged wrong, and nobody said what is right"
    NO_FEEDBACK = "no feedback of people"
    NO_SCORE = "no score"
    SCORE = "score out of range"
    DUPLICATE = "same inputs as another one"
    LIMIT = "above the limit"


_LOST: Final = {Loss.CUT: Reason.CUT, Loss.MASKED: Reason.MASKED, Loss.NO_VALUE: Reason.NO_VALUE}


@dataclass(frozen=True, slots=True)
class Row:
    """An example, and what it comes from.

    Attributes:
        inputs, labels: values by field.
        id: ``dspy.example.id`` that it will have in an evaluation (without a key).
        score: what counts of what was said of the answer: the lowest score of people, or else of evaluators.
        failed: the answer was wrong, or there was none; None when nobody knows.
        corrected: fields whose label a person gave.
        feedback: what was said of the answer in words.
        program, session, user: of the answer.
        trace_id: 32 hexadecimal digits.
        started: nanoseconds since 1970.
    """

    inputs: Mapping[str, Any]
    labels: Mapping[str, Any]
    id: str
    score: float | None = None
    failed: bool | None = None
    corrected: tuple[str, ...] = ()
    feedback: tuple[str, ...] = ()
    program: str | None = None
    session: str | None = None
    user: str | None = None
    trace_id: str = ""
    started: int = 0


@dataclass(frozen=True, slots=True)
class Criteria:
    """Which answers are to become examples.

    Attributes:
        metric: name of the score or feedback that counts; None for all.
        min_score, max_score: range of the score.
        feedback: only answers that people judged or corrected.
        unlabelled: also answers that were judged wrong and not corrected, with their inputs alone.
        failures_first: failed answers before others, and else by time.
        passing: the least score of an answer that is right.
        limit: most examples.
    """

    metric: str | None = None
    min_score: float | None = None
    max_score: float | None = None
    feedback: bool = False
    unlabelled: bool = False
    failures_first: bool = True
    passing: float = PASSING
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Examples, and what became of all other answers.

    Attributes:
        rows: the examples.
        skipped: how many answers are none, by reason; each is counted once.
    """

    rows: tuple[Row, ...] = ()
    skipped: Mapping[Reason, int] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """How many answers there were."""
        return len(self.rows) + sum(self.skipped.values())

    def summary(self) -> str:
        """What was taken and what was not, in lines for people."""
        failed = sum(row.failed is True for row in self.rows)
        corrected = sum(bool(row.corrected) for row in self.rows)
        unlabelled = sum(not row.labels for row in self.rows)
        parts = [(failed, "of failed answers"), (corrected, "corrected by people"), (unlabelled, "without labels")]
        about = ", ".join(f"{count:,} {what}" for count, what in parts if count)
        lines = [f"{len(self.rows):,} examples of {self.seen:,} answers" + (f": {about}" if about else "")]
        lines += [
            f"  {self.skipped[reason]:>7,} skipped: {reason.value}" for reason in Reason if reason in self.skipped
        ]
        return "\n".join(lines)


# --- choosing -------------------------------------------------------------------------------------------------------


def select(answers: Iterable[Answer], criteria: Criteria) -> Selection:
    """Make examples of answers.

    Args:
        answers: in any order.
        criteria: which.
    """
    skipped: Counter[Reason] = Counter()
    made: list[tuple[Answer, Row]] = []
    for answer in answers:
        found = _row(answer, criteria)
        if isinstance(found, Row):
            made.append((answer, found))
        else:
            skipped[found] += 1
    unique = _unique(made)
    skipped[Reason.DUPLICATE] += len(made) - len(unique)
    unique.sort(key=_by_failure if criteria.failures_first else _by_time)
    rows = unique[: criteria.limit]
    skipped[Reason.LIMIT] += len(unique) - len(rows)
    return Selection(tuple(rows), {reason: count for reason, count in skipped.items() if count})


def _by_time(row: Row) -> Any:
    return row.started, row.trace_id, row.id


def _by_failure(row: Row) -> Any:
    order = {True: 0, None: 1, False: 2}[row.failed]
    return order, not row.corrected, 0.0 if row.score is None else row.score, _by_time(row)


def _unique(made: Sequence[tuple[Answer, Row]]) -> list[Row]:
    """One row of each example of a dataset, and one for the same inputs elsewhere: the one that most is known of."""

    def rank(one: tuple[Answer, Row]) -> Any:
        answer, row = one
        human = any(each.human for each in answer.judgements)
        return not row.corrected, not row.labels, not human, row.score is None, -row.started, row.trace_id

    ids: set[str] = set()
    inputs: dict[str, bool] = {}
    """Digests of inputs, and whether they are of production."""
    found: list[Row] = []
    for answer, row in sorted(made, key=rank):
        same = digest(dict(row.inputs))
        row_id = answer.example_id
        if same in inputs if row_id is None else row_id in ids or inputs.get(same, False):
            continue
        found.append(row)
        inputs[same] = inputs.get(same, False) or row_id is None
        if row_id is not None:
            ids.add(row_id)
    return found


# --- one answer -----------------------------------------------------------------------------------------------------


def _row(answer: Answer, criteria: Criteria) -> Row | Reason:
    said = [one for one in answer.judgements if criteria.metric in (None, one.name) or one.expectation]
    corrections = _newest(one for one in said if one.expectation and one.human)
    if answer.unclear:
        return Reason.UNCLEAR
    if criteria.feedback and not any(one.human for one in said):
        return Reason.NO_FEEDBACK
    score = _score(said)
    if criteria.min_score is not None or criteria.max_score is not None:
        if score is None:
            return Reason.NO_SCORE
        least, most = criteria.min_score, criteria.max_score
        if (least is not None and score < least) or (most is not None and score > most):
            return Reason.SCORE
    inputs = _inputs(answer)
    if isinstance(inputs, Reason):
        return inputs
    outputs = Reason.ERROR if answer.error is not None else _fields(answer.outputs)
    known = _without_steps(outputs) if isinstance(outputs, dict) else {}
    corrected = _corrected(corrections, inputs, known)
    if corrected is None:
        return Reason.UNCLEAR
    differs = {name for name, value in corrected.items() if name not in known or known[name] != value}
    failed = answer.error is not None or bool(differs & known.keys())
    right = None if score is None else score >= criteria.passing
    given = None if answer.expected is None else _fields(answer.expected)
    labels: dict[str, Any] | Reason
    if given:  # a row of a dataset has labels of its own
        labels = given if isinstance(given, Reason) else {**given, **corrected}
    elif corrected:
        labels = {**known, **corrected}
    elif isinstance(outputs, Reason):
        labels = outputs
    else:
        labels = Reason.WRONG if right is False else known or Reason.NO_NAMES
    if isinstance(labels, Reason) and criteria.unlabelled and labels in (Reason.WRONG, Reason.ERROR):
        labels = {}
    if isinstance(labels, Reason):
        return labels
    lost = loss_of(inputs) or loss_of({name: value for name, value in labels.items() if name not in corrected})
    if lost is not None:
        return _LOST[lost]
    if inputs.keys() & labels.keys():
        return Reason.UNCLEAR
    texts = dict.fromkeys(one.text for one in said if one.text)
    return Row(
        inputs,
        labels,
        digest({**inputs, **labels}),
        score,
        True if failed else None if right is None else not right,
        tuple(sorted(corrected)),
        tuple(text for text in texts if text is not None),
        answer.program,
        answer.session,
        answer.user,
        f"{answer.trace_id:032x}",
        answer.started,
    )


def _newest(judgements: Iterable[Judgement]) -> dict[str, Any]:
    return {one.name: _plain(one.value) for one in sorted(judgements, key=lambda one: one.when)}


def _score(said: Iterable[Judgement]) -> float | None:
    """The lowest score of people; where they gave none, of evaluators. Of each name, the newest counts."""
    ordered = sorted(said, key=lambda one: one.when)
    for human in (True, False):
        newest = {one.name: score for one in ordered if one.human is human and (score := one.score) is not None}
        if newest:
            return min(newest.values())
    return None


def _inputs(answer: Answer) -> dict[str, Any] | Reason:
    found = _fields(answer.inputs)
    if isinstance(found, Reason):
        return found
    if answer.fields is not None:  # a predictor takes settings of its own beside the fields of its signature
        names = {name.strip() for name in answer.fields.partition("->")[0].split(",")}
        found = {name: value for name, value in found.items() if name in names} or found
    return Reason.NO_NAMES if "args" in found or not found else found


def _fields(recorded: Any) -> dict[str, Any] | Reason:
    """Values by field, from what was recorded of inputs or outputs."""
    if recorded is None:
        return Reason.NO_CONTENT
    if isinstance(recorded, str):
        try:
            recorded = json.loads(recorded)
        except (ValueError, RecursionError):
            return Reason.CUT  # by a limit of the SDK or the backend, which leaves no mark
    return _plain(recorded) if isinstance(recorded, Mapping) else Reason.NO_NAMES


def _plain(value: Any) -> Any:
    """A value with the containers that JSON has: OTLP's are tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _without_steps(outputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in outputs.items() if name not in _ADDED} or outputs


def _corrected(
    corrections: Mapping[str, Any], inputs: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Labels that people gave, by field; None when it is not clear what they are of."""
    found: dict[str, Any] = {}
    for name, value in corrections.items():
        if name not in _WHOLE or name in known:
            found[name] = value
        elif isinstance(value, dict) and (not known or value.keys() <= known.keys()):
            found.update(value)
        elif len(known) == 1:
            found[next(iter(known))] = value
        else:
            return None
    return None if found.keys() & inputs.keys() else found


# --- splitting ------------------------------------------------------------------------------------------------------


def split(rows: Sequence[Row], train: float = 0.8, by: By = "session") -> tuple[list[int], list[int]]:
    """Which rows are to train on and which are not, as their places.

    Rows of one session (or user) are on one side. The same rows are always split alike, in whichever order they are.

    Args:
        rows: examples.
        train: share of the first part, above 0 and below 1.
        by: what stays together.

    Raises:
        NoExamplesError: another share, or another word.
    """
    if not 0 < train < 1:
        raise NoExamplesError(f"train is {train:g}: choose a share above 0 and below 1, such as 0.8.")
    keys: dict[str, Callable[[Row], str | None]] = {
        "session": lambda row: row.session,
        "user": lambda row: row.user,
        "example": lambda row: None,
    }
    if by not in keys:
        raise NoExamplesError(f"by is {by!r}: choose session, user or example.")
    groups: dict[tuple[bool, str], list[int]] = {}
    for place, row in enumerate(rows):
        key = keys[by](row)
        groups.setdefault((key is None, row.id if key is None else key), []).append(place)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: hashlib.sha256(repr(key).encode()).digest())]
    first: list[list[int]] = []
    second: list[list[int]] = []
    goal, taken = train * len(rows), 0
    for group in ordered:
        nearer = abs(taken + len(group) - goal) < abs(taken - goal)
        (first if nearer else second).append(group)
        taken += len(group) if nearer else 0
    if not second and len(first) > 1:  # both have one, where there are two
        second.append(first.pop())
    if not first and len(second) > 1:
        first.append(second.pop())
    return sorted(place for group in first for place in group), sorted(place for group in second for place in group)
