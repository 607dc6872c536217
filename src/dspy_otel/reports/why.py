"""Why the winner is better: which step of its lineage brought each sentence and demo, and what that step gained.

:func:`explain` makes an :class:`Explanation` from the record of an optimization alone. Everything is pure and bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dspy_otel.record.model import Dataset, Optimization, Predictor, Trial
from dspy_otel.reports.charts import WHOLE
from dspy_otel.reports.leaks import Leak, find_leaks
from dspy_otel.reports.lineage import Node, ancestors, best_of, nodes
from dspy_otel.reports.parts import json_text

MAX_ANCESTORS: Final = 200
"""Most candidates of a lineage that are read, the newest."""
MAX_SENTENCES: Final = 1000
"""Most sentences of one predictor's instructions; the rest is the last one."""
MAX_LENGTHS: Final = 500
"""Most candidates whose length is compared with their score."""
_CERTAIN: Final = 2.0
"""Standard errors from which a difference is no chance."""
_FEWEST: Final = 10
"""Rollouts below which nothing is said of training against validation."""

_END: Final = re.compile(r"(?<=[.!?])\s+(?=[^a-z\s])|(?<=[\u3002\uff01\uff1f])")
"""The end of a sentence, of scripts that write without spaces too."""
_WORD: Final = re.compile(r"[^\W\d_]{2}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


# --- what is found --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """What a step changed in one part of a program.

    Attributes:
        predictor: its name.
        part: ``instructions`` or ``demos``.
        added, removed: how many sentences, or demos.
    """

    predictor: str
    part: str
    added: int
    removed: int


@dataclass(frozen=True, slots=True)
class Step:
    """A candidate of the winner's lineage, against the one that it was made from.

    Attributes:
        candidate: id of the program.
        trial: number of the first trial that scored it; None when none did.
        parents: ids of the programs that it was made from.
        changes: what none of its parents has, and what all of them have and it has not; None when not all of these
            programs are known.
        before, after: scores on all examples, of the best parent and of the candidate. None without such a score.
        part_before, part_after, part_size: means over the same ``part_size`` examples, where the optimizer compared
            both on some examples only. Never mixed with the scores on all.
        choices: what the optimizer chose for it.
    """

    candidate: str
    trial: int | None = None
    parents: tuple[str, ...] = ()
    changes: tuple[Change, ...] | None = None
    before: float | None = None
    after: float | None = None
    part_before: float | None = None
    part_after: float | None = None
    part_size: int | None = None
    choices: Mapping[str, Any] | None = None

    @property
    def gain(self) -> float | None:
        """What it gained on all examples."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def together(self) -> bool:
        """Whether it changed several things at once, so that the gain belongs to all of them."""
        changes = self.changes or ()
        return len(changes) > 1 or any(max(one.added, one.removed) > 1 for one in changes)


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of the winner's instructions.

    Attributes:
        predictor: whose instructions.
        text: the sentence.
        step: candidate of the step that brought it first; None when the initial program had it.
        certain: the programs before that step are known. Otherwise, it was there at that step at the latest.
        tried: number of the first trial of any candidate that had it, also one that led to nothing.
    """

    predictor: str
    text: str
    step: str | None
    certain: bool = True
    tried: int | None = None


@dataclass(frozen=True, slots=True)
class Demo:
    """A demo of the winner.

    Attributes:
        predictor: whose demo.
        value: its fields.
        bootstrapped: a teacher's answer that passed the metric; otherwise a labeled example as it is.
        step: candidate of the step that brought it first; None when the initial program had it.
        certain, tried: as for sentences.
    """

    predictor: str
    value: Any
    bootstrapped: bool
    step: str | None
    certain: bool = True
    tried: int | None = None


@dataclass(frozen=True, slots=True)
class Contrast:
    """Another candidate that differs from the winner in one kind of thing alone.

    Attributes:
        part: what differs: ``instructions`` or ``demos``.
        candidate: id of the other program.
        trial: number of the trial that scored it.
        score: of the other program, on all examples.
        gain: by how much the winner is better.
        initial: the other one has that part from the initial program.
    """

    part: str
    candidate: str
    trial: int
    score: float
    gain: float
    initial: bool


@dataclass(frozen=True, slots=True)
class Length:
    """How long a candidate's instructions and demos are, and its score on all examples.

    Attributes:
        candidate: id of the program.
        trial: number of the trial that has the score.
        instructions, demos: characters.
        score: of the candidate.
    """

    candidate: str
    trial: int
    instructions: int
    demos: int
    score: float

    @property
    def characters(self) -> int:
        """Of both."""
        return self.instructions + self.demos


@dataclass(frozen=True, slots=True)
class TrainAndValidation:
    """Scores on the training set and on the validation set, before and after.

    The training scores are those of rollouts that decided about nothing, so that no luck is chosen.

    Attributes:
        candidates: how many candidates of the winner's lineage were scored on training examples.
        train_before, train_after: means, of the initial program and of those candidates.
        rollouts_before, rollouts_after: training examples that these are means of.
        validation_before, validation_after: of the same programs.
        validation_size: examples of the validation set.
        error: standard error of the gap after; None when scores are not between 0 and 1.
    """

    candidates: int
    train_before: float
    train_after: float
    rollouts_before: int
    rollouts_after: int
    validation_before: float
    validation_after: float
    validation_size: int
    error: float | None

    @property
    def gap_before(self) -> float:
        """By how much the initial program scores better on the training set."""
        return self.train_before - self.validation_before

    @property
    def gap(self) -> float:
        """By how much the candidates score better on the training set."""
        return self.train_after - self.validation_after

    @property
    def parted(self) -> bool:
        """Whether the gap, and what it has grown by, are more than twice the standard error, of ten rollouts at least.

        A validation set that is harder from the start is no parting.
        """
        if self.error is None or self.rollouts_after < _FEWEST:
            return False
        return min(self.gap, self.gap - self.gap_before) > _CERTAIN * self.error


@dataclass(frozen=True, slots=True)
class Spending:
    """What a candidate took, and what it gained.

    Attributes:
        candidate: id of the program.
        trial: number of the first trial that scored it.
        spent: of all its trials, in the unit of the explanation.
        gained: by how much it raised the best score on all examples; 0 when it did not.
    """

    candidate: str
    trial: int
    spent: float
    gained: float

    @property
    def per_point(self) -> float | None:
        """What 0.01 of score took; None when nothing was gained."""
        return self.spent / (100 * self.gained) if self.gained > 0 else None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the winner of an optimization is better than the initial program, as far as that was recorded.

    Attributes:
        optimization: id of the optimization.
        optimizer, program: names.
        initial, winner: ids of the programs; while it runs, the winner is the best so far.
        winner_trial: number of the trial that scored the winner.
        baseline, best: scores on all examples.
        steps: of the lineage, in the order of their trials.
        sentences: of the winner's instructions, in their order.
        demos: of the winner.
        contrasts: candidates that differ from the winner in one kind of thing alone.
        leaks: rows of the datasets that the instructions have word for word.
        rows_searched, rows_known: rows that leaks were looked for in, and that there are.
        lengths: of candidates with a score on all examples.
        train_and_validation: None where the optimizer does not score both.
        spending: of candidates, those that took most for least first.
        unit: of the spending: ``USD``, ``tokens`` or ``seconds``; empty when nothing is known.
        elsewhere: spent on what scores no candidate: proposals, bootstrapping, rollouts to learn from.
        missing: what is not known, in sentences that say how to have it.
    """

    optimization: str
    optimizer: str
    program: str | None = None
    initial: str | None = None
    winner: str | None = None
    winner_trial: int | None = None
    baseline: float | None = None
    best: float | None = None
    steps: tuple[Step, ...] = ()
    sentences: tuple[Sentence, ...] = ()
    demos: tuple[Demo, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    leaks: tuple[Leak, ...] = ()
    rows_searched: int = 0
    rows_known: int = 0
    lengths: tuple[Length, ...] = ()
    train_and_validation: TrainAndValidation | None = None
    spending: tuple[Spending, ...] = ()
    unit: str = ""
    elsewhere: float | None = None
    missing: tuple[str, ...] = ()

    def is_left(self, step: Step) -> bool:
        """Whether something in the winner comes from a step; also where that is not known, or nothing was added."""
        brought = {one.step for one in self.sentences} | {one.step for one in self.demos}
        return not brought or step.candidate in brought or not any(one.added for one in step.changes or ())

    @property
    def step_of(self) -> dict[str, Step]:
        """Steps by their candidate."""
        return {step.candidate: step for step in self.steps}

    @property
    def shorter(self) -> Length | None:
        """The shortest candidate that is as good as the winner, and shorter."""
        own = next((one for one in self.lengths if one.candidate == self.winner), None)
        if own is None:
            return None
        found = [one for one in self.lengths if one.score >= own.score and one.characters < own.characters]
        return min(found, key=lambda one: one.characters, default=None)


NO_TEXTS: Final = (
    "The texts of programs were not recorded, so no sentence and no demo can be traced. Set "
    'OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=span_only, or capture_content="span_only".'
)
CUT_TEXTS: Final = (
    "The winner's texts were cut or masked, so its sentences and demos are not traced. OTEL_DSPY_CONTENT_LIMIT "
    "sets the limit."
)


# --- the explanation ------------------------------------------------------------------------------------------------


def explain(report: Optimization) -> Explanation:
    """Explain an optimization.

    Args:
        report: its record; it may still run.
    """
    texts = _Texts(report)
    whole = _whole(report)
    winner = best_of(report)
    found = nodes(report)
    line = _lineage(report, winner)
    steps = tuple(_step(report, one, found, texts, whole) for one in line if one != report.initial_id)
    program = texts.of(winner)
    sentences, demos = _origins(report, program, line, {step.candidate: step for step in steps}, texts)
    leaks, searched, rows = find_leaks([(one.predictor, one.text) for one in sentences], _datasets(report))
    spending, unit, elsewhere = _spending(report)
    scored = whole.get(winner or "")
    missing = []
    if program is None and winner is not None:
        missing.append(CUT_TEXTS if report.candidates else NO_TEXTS)
    if program is not None and searched < rows:
        missing.append(f"Rows of datasets were looked for in the instructions: {searched:,} of {rows:,}.")
    return Explanation(
        optimization=report.id,
        optimizer=report.optimizer,
        program=report.program_name,
        initial=report.initial_id,
        winner=winner,
        winner_trial=report.winner if report.winner is not None else None if scored is None else scored.number,
        baseline=report.baseline,
        best=report.best,
        steps=steps,
        sentences=sentences,
        demos=demos,
        contrasts=_contrasts(report, winner, texts, whole),
        leaks=leaks,
        rows_searched=searched,
        rows_known=rows,
        lengths=_lengths(texts, whole),
        train_and_validation=_train_and_validation(report, line),
        spending=spending,
        unit=unit,
        elsewhere=elsewhere,
        missing=tuple(missing),
    )


def _datasets(report: Optimization) -> list[Dataset]:
    """The datasets, validation first; one that is both is one."""
    train, val = report.train, report.val
    if train is not None and val is not None and train.digest is not None and train.digest == val.digest:
        return [train if val.text is None else val]
    return [one for one in (val, train) if one is not None]


class _Texts:
    """Predictors of candidates, each parsed once."""

    def __init__(self, report: Optimization) -> None:
        self._candidates = report.candidates
        self._found: dict[str, Mapping[str, Predictor] | None] = {}

    def of(self, id_: str | None) -> Mapping[str, Predictor] | None:
        """Those of a candidate; None when they are not known."""
        if id_ is None or id_ not in self._candidates:
            return None
        if id_ not in self._found:
            self._found[id_] = self._candidates[id_].predictors or None
        return self._found[id_]


def _whole(report: Optimization) -> dict[str, Trial]:
    """The best trial of each candidate on all examples: of one size, since others are of other examples."""
    trials = [one for one in report.trials if one.kind in WHOLE and one.score is not None and one.candidate]
    baseline = next((one for one in trials if one.kind == "baseline"), None)
    size = next((one.size for one in (baseline, report.winning) if one is not None and one.size is not None), None)
    found: dict[str, Trial] = {}
    for one in trials:
        if size is not None and one.size is not None and one.size != size:
            continue
        known = found.get(str(one.candidate))
        if known is None or (one.score or 0.0) > (known.score or 0.0):
            found[str(one.candidate)] = one
    return found


def _lineage(report: Optimization, winner: str | None) -> list[str]:
    """The winner and all that it was made from, in the order in which they came up; the initial program first."""
    found = nodes(report)
    if winner is None:
        return []
    if winner not in found:
        return [one for one in (report.initial_id, winner) if one is not None]
    known = ancestors(found, winner)
    if report.initial_id is not None:
        known.add(report.initial_id)
    line = [one for one in found if one in known]
    return line if len(line) <= MAX_ANCESTORS else [*line[:1], *line[1 - MAX_ANCESTORS :]]


# --- steps ----------------------------------------------------------------------------------------------------------


def _step(
    report: Optimization, candidate: str, found: Mapping[str, Node], texts: _Texts, whole: Mapping[str, Trial]
) -> Step:
    # The returned program may be one that no trial has scored.
    parents = found[candidate].parents if candidate in found else ()
    if not parents and report.initial_id is not None:
        parents = (report.initial_id,)
    of = [one for one in report.trials if one.candidate == candidate]
    first = of[0] if of else None
    # Where the optimizer compared it with its parent on some examples, in one and the same trial.
    part = next((one for one in of if one.before is not None and one.after is not None), None)
    scores = [whole[one].score for one in parents if one in whole]
    known = [score for score in scores if score is not None]
    after = whole.get(candidate)
    return Step(
        candidate,
        None if first is None else first.number,
        tuple(parents),
        _changes([texts.of(one) for one in parents], texts.of(candidate)),
        max(known, default=None),
        None if after is None else after.score,
        None if part is None else part.before,
        None if part is None else part.after,
        None if part is None else part.size,
        None if first is None else first.params,
    )


def _changes(
    parents: Sequence[Mapping[str, Predictor] | None], program: Mapping[str, Predictor] | None
) -> tuple[Change, ...] | None:
    """What a program has that none of its parents has, and what all of them have and it has not."""
    known = [one for one in parents if one is not None]
    if program is None or len(known) != len(parents) or not known:
        return None
    found = []
    for name, predictor in program.items():
        before = [one.get(name, Predictor(None)) for one in known]
        for part, new, old in (
            ("instructions", _keys(predictor), [_keys(one) for one in before]),
            ("demos", _demo_keys(predictor), [_demo_keys(one) for one in before]),
        ):
            added = len(new - set[str]().union(*old))
            removed = len(set.intersection(*old) - new)
            if added or removed:
                found.append(Change(name, part, added, removed))
    return tuple(found)


def _keys(predictor: Predictor) -> set[str]:
    return {_key(one) for one in sentences_of(predictor.instructions or "")}


def _demo_keys(predictor: Predictor) -> set[str]:
    return {json_text(one) for one in predictor.demos or ()}


def _key(sentence: str) -> str:
    """What is the same in equal sentences: spaces do not count."""
    return " ".join(sentence.split())


def sentences_of(text: str) -> list[str]:
    """The sentences of instructions. Each line of a list is one; a number or a sign alone belongs to what follows.

    >>> sentences_of("Name the family.  Be brief, e.g. red. 1. No guesses.")
    ['Name the family.', 'Be brief, e.g. red.', '1. No guesses.']
    """
    found: list[str] = []
    for line in text.splitlines():
        beginning, before = "", len(found)
        for piece in _END.split(line):
            beginning = f"{beginning} {piece.strip()}".strip()
            if _WORD.search(beginning):
                found.append(beginning)
                beginning = ""
        if beginning and len(found) > before:
            found[-1] = f"{found[-1]} {beginning}"
        elif beginning:
            found.append(beginning)
    if len(found) > MAX_SENTENCES:
        found[MAX_SENTENCES - 1 :] = [" ".join(found[MAX_SENTENCES - 1 :])]
    return found


def _origins(
    report: Optimization,
    program: Mapping[str, Predictor] | None,
    line: Sequence[str],
    steps: Mapping[str, Step],
    texts: _Texts,
) -> tuple[tuple[Sentence, ...], tuple[Demo, ...]]:
    """Where each sentence and demo of the winner comes from: the first of its lineage that has it."""
    if program is None:
        return (), ()
    first: dict[_Thing, str] = {}
    for candidate in line:
        for thing in _things(texts.of(candidate) or {}):
            first.setdefault(thing, candidate)
    tried: dict[_Thing, int] = {}
    seen = set[str | None]()
    for trial in report.trials:
        if trial.candidate not in seen and len(seen) < MAX_LENGTHS:
            seen.add(trial.candidate)
            for thing in _things(texts.of(trial.candidate) or {}):
                tried.setdefault(thing, trial.number)

    def origin(thing: _Thing) -> tuple[str | None, bool, int | None]:
        candidate = first[thing]
        if candidate == report.initial_id:
            return None, True, tried.get(thing)
        step = steps[candidate]
        certain = bool(step.parents) and all(texts.of(one) is not None for one in step.parents)
        return candidate, certain, tried.get(thing)

    sentences, demos = [], []
    for name, predictor in program.items():
        for text in sentences_of(predictor.instructions or ""):
            sentences.append(Sentence(name, text, *origin((name, "instructions", _key(text)))))
        for value in predictor.demos or ():
            augmented = isinstance(value, dict) and value.get("augmented") is True
            demos.append(Demo(name, value, augmented, *origin((name, "demos", json_text(value)))))
    return tuple(sentences), tuple(demos)


_Thing = tuple[str, str, str]
"""A predictor, ``instructions`` or ``demos``, and a sentence or a demo of it."""


def _things(program: Mapping[str, Predictor]) -> Iterable[_Thing]:
    for name, predictor in program.items():
        yield from ((name, "instructions", key) for key in _keys(predictor))
        yield from ((name, "demos", key) for key in _demo_keys(predictor))


def _contrasts(
    report: Optimization, winner: str | None, texts: _Texts, whole: Mapping[str, Trial]
) -> tuple[Contrast, ...]:
    """For instructions and demos, the candidate that has all but these from the winner: the initial ones if any.

    A winner that has only one of both from elsewhere than the initial program needs none: its gain is that one's.
    """
    program, seed, own = texts.of(winner), texts.of(report.initial_id), whole.get(winner or "")
    if program is None or seed is None or own is None or own.score is None:
        return ()
    if any(_parts(program)[part] == value for part, value in _parts(seed).items()):
        return ()
    found: dict[str, Contrast] = {}
    for candidate, trial in whole.items():
        other = texts.of(candidate)
        if other is None or candidate == winner or other.keys() != program.keys():
            continue
        parts = _parts(other)
        differ = [part for part, value in _parts(program).items() if parts[part] != value]
        if len(differ) != 1 or trial.score is None:
            continue
        (part,) = differ
        initial = parts[part] == _parts(seed)[part]
        one = Contrast(part, candidate, trial.number, trial.score, own.score - trial.score, initial)
        known = found.get(part)
        if known is None or (one.initial, one.score) > (known.initial, known.score):
            found[part] = one
    return tuple(found[part] for part in ("instructions", "demos") if part in found)


def _parts(program: Mapping[str, Predictor]) -> dict[str, list[Any]]:
    return {
        "instructions": [one.instructions or "" for one in program.values()],
        "demos": [list(map(json_text, one.demos or ())) for one in program.values()],
    }


# --- length, datasets, spending -------------------------------------------------------------------------------------


def _lengths(texts: _Texts, whole: Mapping[str, Trial]) -> tuple[Length, ...]:
    best = sorted(whole.items(), key=lambda one: -(one[1].score or 0.0))[:MAX_LENGTHS]
    found = []
    for candidate, trial in sorted(best, key=lambda one: one[1].number):
        program = texts.of(candidate)
        if program is not None and trial.score is not None:
            instructions = sum(len(one.instructions or "") for one in program.values())
            demos = sum(len(json_text(demo)) for one in program.values() for demo in one.demos or ())
            found.append(Length(candidate, trial.number, instructions, demos, trial.score))
    return tuple(found)


def _train_and_validation(report: Optimization, line: Iterable[str]) -> TrainAndValidation | None:
    """Gains of the winner's lineage on both sets.

    GEPA scores a parent on training examples before it changes it, which decides about nothing; ReAnchor scores each
    candidate on the training set, and some on the validation set.
    """
    train, val = report.train, report.val
    if train is None or val is None or (train.digest is not None and train.digest == val.digest):
        return None
    on_train = [one for one in report.trials if one.kind == "sample"]
    on_val = [one for one in report.trials if one.kind in ("baseline", "full")]
    if not on_train:
        on_train = [one for one in on_val if one.size == train.size]
        on_val = [one for one in report.trials if one.kind == "validation"]
    on_val = [one for one in on_val if one.size == val.size]
    programs = [one for one in line if one != report.initial_id]
    trained, validated = _means(on_train, programs), _means(on_val, programs)
    seed = _means(on_train, [report.initial_id]), _means(on_val, [report.initial_id])
    both = [one for one in programs if one in trained and one in validated]
    if report.initial_id not in seed[0] or report.initial_id not in seed[1] or not both:
        return None
    (train_before, rollouts_before), (validation_before, _) = (one[report.initial_id] for one in seed)
    rollouts = sum(trained[one][1] for one in both)
    # Each candidate counts as often on the validation set as it was scored on the training set.
    train_after = sum(trained[one][0] * trained[one][1] for one in both) / rollouts
    validation_after = sum(validated[one][0] * trained[one][1] for one in both) / rollouts
    scores = (train_after, rollouts), (validation_after, val.size)
    within = all(0 <= score <= 1 for score in (train_before, validation_before, train_after, validation_after))
    error = math.sqrt(sum(_variance(*one) for one in scores)) if within else None
    return TrainAndValidation(
        len(both),
        train_before,
        train_after,
        rollouts_before,
        rollouts,
        validation_before,
        validation_after,
        val.size,
        error,
    )


def _means(trials: Iterable[Trial], programs: Sequence[str | None]) -> dict[str | None, tuple[float, int]]:
    """Mean score of each program over its trials, and over how many examples."""
    sums: dict[str | None, tuple[float, int]] = {}
    for one in trials:
        if one.candidate in programs and one.score is not None and one.size:
            total, count = sums.get(one.candidate, (0.0, 0))
            sums[one.candidate] = total + one.score * one.size, count + one.size
    return {name: (total / count, count) for name, (total, count) in sums.items()}


def _variance(mean: float, count: int) -> float:
    """At most the variance of a mean of so many scores between 0 and 1; few of them are never taken for certain."""
    share = (mean * count + 1) / (count + 2)
    return share * (1 - share) / count


def _spending(report: Optimization) -> tuple[tuple[Spending, ...], str, float | None]:
    amounts = {
        "USD": [one.usage.cost for one in report.trials],
        "tokens": [one.usage.tokens for one in report.trials],
        "seconds": [_seconds(one) for one in report.trials],
    }
    unit = next((name for name, known in amounts.items() if any(known)), "")
    if not unit:
        return (), "", None
    used = amounts[unit]
    gained: dict[str, float] = {}
    spent: dict[str, float] = {}
    first: dict[str, int] = {}
    rollouts, best = 0.0, report.baseline
    for trial, amount in zip(report.trials, used, strict=True):
        id_ = trial.candidate
        if trial.kind == "sample" or id_ is None or id_ == report.initial_id:
            rollouts += (amount or 0.0) if trial.kind == "sample" else 0.0
            continue
        first.setdefault(id_, trial.number)
        spent[id_] = spent.get(id_, 0.0) + (amount or 0.0)
        if trial.kind in WHOLE and trial.best is not None and best is not None and trial.best > best:
            gained[id_] = gained.get(id_, 0.0) + trial.best - best
            best = trial.best
    found = [Spending(one, first[one], spent[one], gained.get(one, 0.0)) for one in spent]
    found.sort(key=lambda one: (-math.inf if one.per_point is None else -one.per_point, -one.spent))
    total = report.usage or report.spent
    whole = {"USD": total.cost, "tokens": total.tokens}.get(unit)
    inside = sum(amount or 0.0 for one, amount in zip(report.trials, used, strict=True) if one.kind != "sample")
    elsewhere = rollouts if whole is None else max(0.0, whole - inside)
    return tuple(found), unit, elsewhere


def _seconds(trial: Trial) -> float | None:
    return None if trial.started is None or trial.ended is None else (trial.ended - trial.started) / 1e9
