"""Our own spans, read back: what an optimization or an evaluation was, as immutable records.

Ids are in OTLP's own form (a trace id is a number of 128 bits), times in nanoseconds since 1970. Unknown values are
None, never zero. Texts of programs, datasets and examples are there with content capture on only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from html import escape
from typing import Any, Final, TypeAlias

from dspy_otel import semconv

RUNNING: Final = "running"
FINISHED: Final = "finished"
FAILED: Final = "failed"
INTERRUPTED: Final = "interrupted"

ON_VALIDATION: Final = frozenset({semconv.TRIAL_BASELINE, semconv.TRIAL_FULL, semconv.TRIAL_VALIDATION})
"""Kinds of trials on the whole validation set, when the size is the same too."""

_INTERRUPTIONS: Final = frozenset({"KeyboardInterrupt", "SystemExit", "CancelledError", "GeneratorExit"})


# --- usage ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usage:
    """Totals of LM calls.

    Attributes:
        lm_calls, cache_hits: how many calls, and how many of them were answered from a cache.
        input_tokens, output_tokens: of all calls.
        cost: in USD, of the calls that have a known price.
        unpriced_calls: calls without a known price.
        worker_tasks: tasks that were sent to worker processes.
        unanswered_tasks: those of them that have handed nothing back; what they have used is missing here.
        by_role: the same for each role of LMs.
    """

    lm_calls: float | None = None
    cache_hits: float | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None
    cost: float | None = None
    unpriced_calls: float | None = None
    worker_tasks: float | None = None
    unanswered_tasks: float | None = None
    by_role: Mapping[str, Usage] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Usage:
        """Usage from values named as :meth:`flat` names them; other names and values that are no number are left out.

        >>> Usage.of({"lm_calls": 2, "task.lm_calls": 2}).by_role["task"].lm_calls
        2.0
        """
        own: dict[str, float] = {}
        roles: dict[str, dict[str, float]] = {}
        for key, value in values.items():
            role, _, name = key.rpartition(".")
            if name in _TOTALS and (found := number(value)) is not None:
                (roles.setdefault(role, {}) if role else own)[name] = found
        by_role = {role: cls(**found) for role, found in roles.items()}  # type: ignore[arg-type]
        return cls(by_role=by_role, **own)

    def flat(self) -> dict[str, float]:
        """The known values by name; those of roles as ``task.lm_calls``."""
        found = {name: value for name in _TOTALS if (value := getattr(self, name)) is not None}
        for role, usage in self.by_role.items():
            found.update((f"{role}.{name}", value) for name, value in usage.flat().items())
        return found

    @property
    def tokens(self) -> float | None:
        """Input and output tokens together."""
        known = [value for value in (self.input_tokens, self.output_tokens) if value is not None]
        return sum(known) if known else None

    def plus(self, other: Usage) -> Usage:
        """The sum of both; a value that only one of them knows is that one's."""
        return _combined(self, other, 1)

    def minus(self, other: Usage) -> Usage:
        """What is left without ``other``; at least zero, since differences of sums are not quite exact."""
        return _combined(self, other, -1)

    def __bool__(self) -> bool:
        return bool(self.by_role) or any(getattr(self, name) is not None for name in _TOTALS)


_TOTALS: Final = tuple(one.name for one in fields(Usage) if one.name != "by_role")


def _combined(one: Usage, other: Usage, sign: int) -> Usage:
    values: dict[str, float | None] = {}
    for name in _TOTALS:
        a, b = getattr(one, name), getattr(other, name)
        if a is not None or b is not None:
            a = (a or 0.0) + sign * (b or 0.0)
            a = a if sign > 0 else round(max(a, 0.0), 12)
        values[name] = a
    roles = {
        role: _combined(one.by_role.get(role, _NO_USAGE), other.by_role.get(role, _NO_USAGE), sign)
        for role in (*one.by_role, *(role for role in other.by_role if role not in one.by_role))
    }
    return Usage(**values, by_role=roles)


_NO_USAGE: Final = Usage()


# --- programs and data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Predictor:
    """A predictor of a program, as the program's saved state describes it."""

    instructions: str | None
    demos: tuple[Any, ...] | None = None


WHOLE_PROGRAM: Final = "self"
"""DSPy's name of a predictor that is a program itself; the state of such a program has no names."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A program with a certain state.

    Attributes:
        id: ``dspy.program.id``.
        state: its saved state, as JSON.
        altered: something in the state was cut, masked or redacted.
    """

    id: str
    state: str | None = None
    altered: bool = False

    @property
    def complete(self) -> bool:
        """Whether the state can be loaded. The SDK cuts texts too, and then it is no JSON any more."""
        return not self.altered and isinstance(load_json(self.state), dict)

    @property
    def predictors(self) -> dict[str, Predictor]:
        """Predictors by name, from the state: none when it is not known, or cut. Parsed at each call."""
        loaded = load_json(self.state)
        found: dict[str, Predictor] = {}
        if not isinstance(loaded, dict):
            return found
        signature = loaded.get("signature")
        if isinstance(signature, dict) and "instructions" in signature:
            loaded = {WHOLE_PROGRAM: loaded}
        for name, part in loaded.items():
            if not isinstance(part, dict) or not isinstance(part.get("signature"), dict):
                continue
            instructions, demos = part["signature"].get("instructions"), part.get("demos")
            found[str(name)] = Predictor(
                None if instructions is None else str(instructions), tuple(demos) if isinstance(demos, list) else None
            )
        return found


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset of an optimization.

    Attributes:
        role: ``train`` or ``val``.
        size: how many examples it has.
        digest: of the ids of its examples.
        text: its examples as JSON.
    """

    role: str
    size: int
    digest: str | None = None
    text: str | None = None

    @property
    def rows(self) -> list[dict[str, Any]] | None:
        """The examples, as far as the content limit let them through. Parsed at each call."""
        loaded = load_json(self.text)
        # The marker with the number of rows that were cut is not a row.
        return [row for row in loaded if isinstance(row, dict)] if isinstance(loaded, list) else None


@dataclass(frozen=True, slots=True)
class Example:
    """An example that was evaluated.

    Attributes:
        index: its place in the dataset.
        id: digest of its content.
        inputs, expected, prediction: what went in, what should have come out, what came out.
        score: of the metric; None when the program or the metric raised.
        feedback: of the metric.
        error: type of what was raised.
        message: of what was raised, with content capture on only.
        trace_id: of the trace that it is in.
        seconds: how long the program and the metric took.
        size: characters of its content.
    """

    index: int | None = None
    id: str | None = None
    inputs: Any = None
    expected: Any = None
    prediction: Any = None
    score: float | None = None
    feedback: str | None = None
    error: str | None = None
    message: str | None = None
    trace_id: int | None = None
    seconds: float | None = None
    size: int = field(default=0, compare=False, repr=False)


# --- what happened --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something did not finish.

    Attributes:
        type: of the error; None when nothing was raised, as when the program ended before.
        message: of the error, with content capture on only.
        example: the first example that failed, where an evaluation was given up because of failing examples.
    """

    type: str | None
    message: str | None = None
    example: Example | None = None

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped from outside, and did not fail by itself."""
        return self.type is None or self.type.rpartition(".")[2] in _INTERRUPTIONS

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.type, self.message) if part)
        if self.example is None:
            return text
        place = "An example" if self.example.index is None else f"Example {self.example.index}"
        reason = ": ".join(part for part in (self.example.error, self.example.message) if part)
        return f"{text}\n\n{place} failed: {reason}"


@dataclass(frozen=True, slots=True)
class LMCall:
    """One call of a language model or an embedder.

    Attributes:
        model: that was asked for.
        role: what the call was for.
        cache_hit: it was answered from a cache.
        input_tokens, output_tokens: that it used.
        optimization, root, evaluation: ids of the optimization that it belongs to, of the outermost one around that,
            and of the evaluation.
    """

    model: str | None = None
    role: str = "task"
    cache_hit: bool = False
    input_tokens: int | None = None
    output_tokens: int | None = None
    optimization: str | None = None
    root: str | None = None
    evaluation: str | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of an optimization: how often it came, how long it took in all, and what it used, its trials included.

    Attributes:
        optimization: id of the optimization.
        name: such as ``bootstrap`` or ``propose``.
        times: how often it came.
        seconds: in all.
        usage: in all.
    """

    name: str
    times: int = 0
    seconds: float = 0.0
    usage: Usage = _NO_USAGE
    optimization: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """One scored candidate.

    Attributes:
        number: its number, from 1.
        kind: ``baseline``, ``minibatch``, ``full``, ``sample`` or ``validation``.
        candidate: id of the program that was scored; None when several were mixed.
        parents: ids of the programs it was made from.
        made_from: numbers of the first trials that scored those.
        score: mean of the metric.
        reported: the score as the optimizer reports it, where that is not the mean.
        best: best score so far, of those that can be compared.
        is_best: it has that score, and is the first that has.
        size: examples it was scored on.
        accepted: the optimizer's verdict, where it gives one.
        reason: of the verdict.
        before, after: what a proposal was compared by: means of the metric over the same examples.
        on_front: whether it is on the Pareto front.
        phase: part of the optimization.
        params: what the optimizer chose for it.
        usage: of its own LM calls.
        spent: of all LM calls of the optimization when it ended.
        failure: why it has no score.
        optimization, optimizer, program_name: ids and names of what it is part of.
        changes: what distinguishes the candidate from its parent, as JSON.
        program: the candidate with its state, while the trial is new. Those in :attr:`Optimization.trials` go
            without: states are in :attr:`Optimization.candidates`.
        dataset: the dataset that it was scored on as a whole, when that is known; of outermost optimizations.
        evaluation: id of its own evaluation.
        threads, evaluated: threads and examples of that evaluation.
        examples_so_far, accepted_so_far, rejected_so_far: counts of the optimization when it ended.
        service: name of the service that did it.
        started, ended: nanoseconds since 1970.
    """

    number: int
    kind: str = ""
    candidate: str | None = None
    parents: tuple[str, ...] = ()
    made_from: tuple[int, ...] = ()
    score: float | None = None
    reported: float | None = None
    best: float | None = None
    is_best: bool | None = None
    size: int | None = None
    accepted: bool | None = None
    reason: str | None = None
    before: float | None = None
    after: float | None = None
    on_front: bool | None = None
    phase: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    usage: Usage = _NO_USAGE
    spent: Usage = _NO_USAGE
    failure: Failure | None = None
    optimization: str = ""
    optimizer: str | None = None
    program_name: str | None = None
    changes: str | None = None
    program: Candidate | None = None
    dataset: Dataset | None = None
    evaluation: str | None = None
    threads: int | None = None
    evaluated: int | None = None
    examples_so_far: int | None = None
    accepted_so_far: int | None = None
    rejected_so_far: int | None = None
    service: str | None = None
    started: int | None = None
    ended: int | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of a program.

    Attributes:
        id: ``dspy.evaluation.id``.
        optimization, trial: what it is part of, if anything.
        own: it is not the evaluation of a trial.
        program_name, program_id: of the program that is evaluated.
        metric: name of the metric.
        size, threads: examples and threads.
        score: mean of the metric over all examples.
        failures: examples that raised.
        parse_failures: answers of a model that an adapter could not read, among the spans that were recorded.
        usage: of its LM calls.
        models: names of the models that answered, by role.
        examples: those that have been evaluated, in the order of the dataset; once it is over.
        without_content: how many of the examples lost their content to the limit.
        failure: why it did not finish.
        service: name of the service that did it.
        started, ended: nanoseconds since 1970.
    """

    id: str
    optimization: str | None = None
    trial: int | None = None
    own: bool = True
    program_name: str | None = None
    program_id: str | None = None
    metric: str | None = None
    size: int | None = None
    threads: int | None = None
    score: float | None = None
    failures: int | None = None
    parse_failures: int | None = None
    usage: Usage = _NO_USAGE
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    without_content: int = 0
    failure: Failure | None = None
    service: str | None = None
    started: int | None = None
    ended: int | None = None


@dataclass(frozen=True, slots=True)
class Optimization:
    """One optimization.

    Attributes:
        id: ``dspy.optimizer.run.id``.
        optimizer, program_name: names of the optimizer and of the program.
        parent, root: ids of the optimization that it is a step of, and of the outermost one around it.
        parent_phase: the phase of the parent that it is in.
        inference_time: a program compiles as part of its own answer.
        attempt: of an optimization that was taken up by another process; the first is 1.
        resumed: it was taken up from an attempt before.
        outcome: ``finished``, ``failed``, ``interrupted`` or ``running``.
        failure: why it did not finish.
        scale: in which the optimizer itself reports scores, ``percent`` or ``mean``.
        baseline, best, gain: scores, as means of the metric.
        winner: number of the trial that made the program that was returned.
        initial, returned: the program before and after, with its state if that is known.
        params: of the optimizer and its compile.
        metric: name of the metric.
        train, val: the datasets.
        planned, done, accepted, rejected, evaluated: how many trials there should be and were, how many proposals
            were accepted and rejected, and how many examples were evaluated.
        usage: of all its LM calls; once it is over.
        spent: as far as trials and phases have reported it.
        models: names of the models that answered, by role; once it is over.
        trials: those that have ended, in their order.
        phases: what went where; together they are the usage.
        candidates: the programs whose states are known, by id.
        examples: by number of the trial, of trials on the whole dataset and of rollouts to learn from: those of the
            baseline, of the best trial and of rollouts shortened, of the others the scores alone.
        service: name of the service that did it.
        started, ended: nanoseconds since 1970.
    """

    id: str = ""
    optimizer: str = "optimizer"
    program_name: str | None = None
    parent: str | None = None
    root: str | None = None
    parent_phase: str | None = None
    inference_time: bool | None = None
    attempt: int | None = None
    resumed: bool = False
    outcome: str = RUNNING
    failure: Failure | None = None
    scale: str | None = None
    baseline: float | None = None
    best: float | None = None
    gain: float | None = None
    winner: int | None = None
    initial: Candidate | None = None
    returned: Candidate | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None
    train: Dataset | None = None
    val: Dataset | None = None
    planned: int | None = None
    done: int | None = None
    accepted: int | None = None
    rejected: int | None = None
    evaluated: int | None = None
    usage: Usage = _NO_USAGE
    spent: Usage = _NO_USAGE
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()
    phases: tuple[Phase, ...] = ()
    candidates: Mapping[str, Candidate] = field(default_factory=dict)
    examples: Mapping[int, tuple[Example, ...]] = field(default_factory=dict)
    service: str | None = None
    started: int | None = None
    ended: int | None = None

    @property
    def initial_id(self) -> str | None:
        """Id of the program before."""
        return None if self.initial is None else self.initial.id

    @property
    def returned_id(self) -> str | None:
        """Id of the program after."""
        return None if self.returned is None else self.returned.id

    @property
    def whole_kind(self) -> str:
        """The kind of trials, beside the baseline, that score a candidate on the whole dataset."""
        # SIMBA does so at its end alone.
        return "full" if any(trial.kind == "full" for trial in self.trials) else "validation"

    @property
    def content(self) -> bool:
        """Whether content was recorded, as far as the spans show."""
        return bool(self.candidates) or not self.trials

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """The datasets that are known."""
        return tuple(one for one in (self.train, self.val) if one is not None)

    @property
    def winning(self) -> Trial | None:
        """The trial that made the returned program."""
        return next((trial for trial in self.trials if trial.number == self.winner), None)


Record: TypeAlias = Optimization | Phase | Trial | Evaluation
"""What an optimization or an evaluation consists of."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace, or an example in the middle of one, and what it belongs to.

    Attributes:
        trace_id: of the trace.
        span_id: of the example's span; None when that is the root: then the whole trace is the example's.
        root: it is a trace of its own.
        optimization, trial, evaluation: what it belongs to. The evaluation only if it is not a trial's.
        metric: name of the metric that scored the example.
        example: it, if it is one.
    """

    trace_id: int
    span_id: int | None
    root: bool
    optimization: str | None
    trial: int | None
    evaluation: str | None
    metric: str | None
    example: Example | None


@dataclass(frozen=True, slots=True)
class Origin:
    """The optimization that made a program.

    Attributes:
        run_id: ``dspy.optimizer.run.id`` of the compile that made it.
        optimizer: the optimizer's class name.
        program_id: ``dspy.program.id`` of the program.
        trial: number of the trial that scored it, or ``None`` if none did (an optimizer without trials).
        score: of that trial: the mean of the metric.
        winner: the compile returned it. Otherwise it was a candidate.
        mlflow_run_id: the MLflow run of the optimization; None until MLflow has it, which takes a moment.
        url: of that run's page; None for a store without a server (``dspy-otel ui`` opens that).
    """

    run_id: str
    optimizer: str
    program_id: str
    trial: int | None
    score: float | None
    winner: bool
    mlflow_run_id: str | None = None
    url: str | None = None

    def _repr_html_(self) -> str:
        """For notebooks: a table, with a link to the run's page."""
        what = "winner" if self.winner else "candidate"
        rows = {
            "optimizer": f"{escape(self.optimizer)} ({what})",
            "score": "" if self.score is None else f"{self.score:.2f}",
            "trial": "" if self.trial is None else str(self.trial),
            "program": f"<code>{escape(self.program_id)}</code>",
            "run": f"<code>{escape(self.mlflow_run_id or self.run_id)}</code>",
        }
        if self.url is not None:
            rows["run"] = f'<a href="{escape(self.url)}" target="_blank" rel="noopener">{escape(self.url)}</a>'
        cell = '<td style="text-align:left">'
        lines = (f"<tr>{cell}{name}</td>{cell}{value}</td></tr>" for name, value in rows.items() if value)
        return f"<table>{''.join(lines)}</table>"


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a person or an evaluator said of an answer.

    Attributes:
        trace_id: of the answer.
        span_id: of the answer; None for the whole trace.
        name: of a metric or a feedback; of an expectation, the field that it is about.
        value: a score, a word, or what was expected.
        human: a person said it.
        expectation: it is what the answer should have been.
        text: why, in words.
        when: seconds since 1970; 0 where it is not known.
    """

    trace_id: int
    span_id: int | None
    name: str
    value: Any
    human: bool = False
    expectation: bool = False
    text: str | None = None
    when: float = 0

    @property
    def score(self) -> float | None:
        """The value as a number, if it is one."""
        return None if self.expectation else score_of(self.value)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a program.

    Attributes:
        program, program_name: its ``dspy.program.id`` and class.
        fields: ``question -> answer``, where the program is a predictor.
        inputs, outputs, expected: as recorded: text of JSON, or the value of it; None where it was not recorded.
        error: type of the exception that it ended with.
        session, user: from OpenTelemetry's baggage.
        example_id: ``dspy.example.id`` of a row of a dataset.
        evaluation, optimization: what it is a part of.
        trace_id, span_id: of its span.
        started: nanoseconds since 1970.
        judgements: what was said of it.
        unclear: something was said of its trace, which has other answers too.
    """

    program: str | None = None
    program_name: str | None = None
    fields: str | None = None
    inputs: Any = None
    outputs: Any = None
    expected: Any = None
    error: str | None = None
    session: str | None = None
    user: str | None = None
    example_id: str | None = None
    evaluation: str | None = None
    optimization: str | None = None
    trace_id: int = 0
    span_id: int = 0
    started: int = 0
    judgements: tuple[Judgement, ...] = ()
    unclear: bool = False


# --- values ---------------------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A value as a finite number; None for anything else, truth values among it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def score_of(value: Any) -> float | None:
    """A verdict as a number: right and wrong are 1 and 0, also as MLflow's judges write them."""
    if isinstance(value, str):
        value = {"yes": True, "no": False}.get(value.lower())
    return float(value) if isinstance(value, bool) else number(value)


def load_json(value: Any) -> Any:
    """The value of a text of JSON; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
