"""Trackers: how to read one optimizer. Its evaluations become trials or phases; :class:`Tracker` suits most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.operation import Call
from dspy_otel.operations.evaluation import score_of
from dspy_otel.optimizers.resume import Checkpoint
from dspy_otel.optimizers.run import PERCENT, Run
from dspy_otel.patching import Patches


@dataclass(eq=False)
class Evaluation:
    """An ``Evaluate`` call that is about to begin directly inside a compile or one of its phases.

    Attributes:
        program: the evaluated program.
        program_id: its ``dspy.program.id``.
        devset: the examples.
        metadata: DSPy's ``callback_metadata`` of the call.
    """

    program: Any
    program_id: str | None
    devset: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int | None:
        """Number of examples."""
        return introspection.length(self.devset)


@dataclass(eq=False)
class Trial:
    """How to record an evaluation as a trial.

    Attributes:
        kind: ``baseline``, ``minibatch``, ``full``, ``sample`` or ``validation``.
        params: the optimizer's choices, as ``dspy.trial.params.*``.
        parents: ids of the candidates this one was made from.
        phase: the phase it belongs to, if no phase encloses it.
        mixed: several candidates at once; no single one is scored.
        candidate: ``dspy.program.id`` of the scored program; ``None`` for a mixture.
        program: the scored program.
        size: number of examples.
        awaits_verdict: the optimizer's verdict comes later, and the tracker ends the trial then.
        end_attributes: attributes to add at its end.
        call: set while it is open.
        score: mean of the metric; set when its evaluation has ended.
        reported: the score as the optimizer reports it; likewise.
        texts: instructions by predictor, where the tracker finds the trial by them.
    """

    kind: str
    params: Attributes = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)
    phase: str = semconv.PHASE_SEARCH
    mixed: bool = False
    candidate: str | None = None
    program: Any = None
    size: int | None = None
    awaits_verdict: bool = False
    end_attributes: Attributes = field(default_factory=dict)
    call: Call | None = None
    score: float | None = None
    reported: float | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Phase:
    """A part of an optimization that scores no candidate.

    Attributes:
        name: ``bootstrap``, ``propose``, ``search``, ...
        role: of the LM calls inside, if it differs from that around the phase.
        has_trials: evaluations directly inside are trials.
        attributes: known at the start, or added before the end.
    """

    name: str
    role: str | None = None
    has_trials: bool = False
    attributes: Attributes = field(default_factory=dict)


Hooks: TypeAlias = Callable[[Any, Patches], None]
"""Puts the hooks of one optimizer in force; given the :class:`~dspy_otel.optimizers.Optimizers` and the patches."""

_trackers: Final[dict[str, type[Tracker]]] = {}
_hooks: Final[list[Hooks]] = []
_Kind = TypeVar("_Kind", bound="type[Tracker]")


def tracks(*optimizers: str) -> Callable[[_Kind], _Kind]:
    """Register a tracker for the optimizers of DSPy with these class names, and their subclasses."""

    def register(kind: _Kind) -> _Kind:
        _trackers.update(dict.fromkeys(optimizers, kind))
        return kind

    return register


def hooks(function: Hooks) -> Hooks:
    """Register a function that wraps methods of DSPy for a tracker."""
    _hooks.append(function)
    return function


def registered() -> tuple[dict[str, type[Tracker]], list[Hooks]]:
    """The registered trackers by the class name of their optimizer, and the registered hooks: copies."""
    return dict(_trackers), list(_hooks)


class Tracker:
    """Follows one run of an optimizer. This class suits any optimizer that scores its candidates with ``Evaluate``.

    Whatever a method raises costs its detail only.
    """

    role: str | None = semconv.ROLE_PROPOSER
    """Of LM calls directly inside the compile."""

    scale = PERCENT
    """In which the optimizer reports scores, and :meth:`score` gives them."""

    failed_score: float | None = None
    """The score the optimizer gives a candidate whose evaluation raised, on its own scale."""

    program_role: str | None = semconv.ROLE_TASK
    """Of the LM calls of the program being optimized, where the optimizer itself calls it."""

    deciding: frozenset[str] = frozenset({semconv.TRIAL_BASELINE, semconv.TRIAL_FULL, semconv.TRIAL_VALIDATION})
    """Kinds of trials whose scores can be compared with each other, and so make a best one."""

    ends_itself: bool = False
    """Whether the optimizer ends, and returns its best program, once :meth:`must_stop` is true. Until then its LM calls
    are allowed although a budget is used up."""

    def __init__(self, run: Run, instance: Any, arguments: Mapping[str, Any]) -> None:
        """Args:
        run: the run.
        instance: the optimizer.
        arguments: of ``compile()``, defaults included. Never to be changed.
        """
        self.run = run
        self.instance = instance
        self.arguments = arguments
        self.checkpoint: Checkpoint | None = None
        self._trials = 0
        self._has_baseline = False

    def begin(self) -> None:
        """The compile begins; its span is open."""

    def arguments_known(self) -> None:
        """:attr:`arguments` are complete; called once more when an overridden ``compile()`` is given more of them."""

    def end(self) -> None:
        """The compile ends; its span is still open."""

    def state_file(self) -> Path | None:
        """The file from which the optimizer can continue in another process, or ``None``."""
        return None

    def must_stop(self) -> bool:
        """Whether a budget around the optimization is used up."""
        budget = self.run.context.budget
        return budget is not None and budget.must_stop()

    def copied(self, program: Any) -> Any:
        """A copy of a scored program, by DSPy's own ``deepcopy()``, that the optimizer does not change any more."""
        return program.deepcopy()

    def evaluation(self, about: Evaluation) -> Trial | Phase | None:
        """How to record an evaluation; ``None`` for an evaluation that is neither."""
        self._trials += 1
        return Trial(self.kind_of(about), self.params(about), self.parents(about))

    def kind_of(self, about: Evaluation) -> str:
        """The trial's kind: the initial program, when all examples first score it, is the baseline."""
        if about.metadata.get("metric_key") == "eval_minibatch":
            return semconv.TRIAL_MINIBATCH
        initial = about.program_id is not None and about.program_id == self.run.initial_id
        if initial and not self._has_baseline:
            self._has_baseline = True
            return semconv.TRIAL_BASELINE
        return semconv.TRIAL_FULL

    def params(self, about: Evaluation) -> Attributes:
        """The optimizer's choices for this candidate, as ``dspy.trial.params.*`` without the prefix."""
        return {}

    def parents(self, about: Evaluation) -> list[str]:
        """The candidates this one was made from; by default, the initial program."""
        initial = self.run.initial_id
        return [initial] if initial is not None and initial != about.program_id else []

    def module_phase(self, module: Any) -> Phase | None:
        """The phase that a call of this module by the optimizer itself makes up; ``None`` for no phase."""
        return None

    def score(self, result: Any, error: BaseException | None) -> float | None:
        """The score, as the optimizer reports it."""
        if error is not None:
            return (
                self.failed_score if isinstance(error, Exception) else None
            )  # After an interrupt no optimizer continues.
        return score_of(introspection.field(result, "score"))

    def scored(self, trial: Trial, result: Any) -> None:
        """The evaluation of a trial has ended; its span has not."""


def mean_of(result: Any) -> float | None:
    """The mean of an evaluation's single scores: the score of optimizers that do not use ``Evaluate``'s percent."""
    rows = list(introspection.items(introspection.field(result, "results")))
    if not rows:
        return None
    scores = [score_of(row[2]) for row in rows]
    known = [score for score in scores if score is not None]
    return sum(known) / len(scores) if len(known) == len(scores) else None
