"""GEPA without DSPy's class: ``gepa.optimize``, ``optimize_anything``, and what calls them (MLflow).

The call is the optimization, and is followed by the tracker of ``dspy.GEPA``: the events are the same. In place of
``Evaluate`` are the adapter's ``evaluate`` and ``batch_evaluate``, which are watched at the adapter's class. An adapter
evaluates many rows at once, so an example has a span around its work only where GEPA calls a function for it
(``optimize_anything``); any other gets its span, with its score, when the adapter has returned.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from dspy_otel.content import introspection
from dspy_otel.core.call_context import (
    CallContext,
    attach,
    current_call_context,
    current_context,
    enclosing_state,
    with_call_context,
)
from dspy_otel.core.errors import hide_frames
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, detach
from dspy_otel.operations.evaluation import EvaluationState, ExampleRun, callable_name, score_of
from dspy_otel.operations.parallel import bind
from dspy_otel.operations.texts import Row, Texts
from dspy_otel.optimizers.run import Run
from dspy_otel.optimizers.state import CompileState
from dspy_otel.optimizers.tracker import Tracker
from dspy_otel.patching import Leave, Patches, argument, hooked, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers

Observing: TypeAlias = Callable[[Any, dict[str, Any]], "dict[str, Any]"]
"""Given the tracker and GEPA's keyword arguments, gives these with our callbacks beside the user's."""

_OPTIMIZE: Final = "gepa.optimize"
ANYTHING: Final = "gepa.optimize_anything"
_PROMPTS: Final = "mlflow.genai.optimize_prompts"
SINGLE_TEXT: Final = "current_candidate"
"""The name that ``optimize_anything`` gives a candidate that is one text."""
_NOT_PARAMETERS: Final = frozenset(
    {"seed_candidate", "trainset", "valset", "dataset", "config", "callbacks", "stop_callbacks", "logger"}
)
_SETTINGS: Final = ("engine", "reflection", "merge", "refiner")
"""Parts of ``GEPAConfig`` with parameters. The rest are objects, and where GEPA itself logs to."""
_LOSES: Final = "candidates, trials and examples of GEPA's adapter"


class GEPA:
    """In place of an optimizer of DSPy's: its class gives the name, and the tracker.

    Args:
        log_dir: the folder of GEPA's saved state, from which it can continue.

    Attributes:
        awaited: an engine runs it, which has yet to call the ``optimize_anything`` that is GEPA.
    """

    awaited = False

    def __init__(self, log_dir: Any) -> None:
        self.log_dir = log_dir


@dataclass(eq=False)
class Batch:
    """In place of an ``Evaluate``: one candidate on some rows.

    Attributes:
        program: the candidate.
        metric: the user's evaluator, if it is known.
        devset: the rows.
        given: the rows as GEPA has them.
        num_threads: unknown.
    """

    program: Texts
    metric: Any
    devset: list[Row]
    given: list[Any]
    num_threads: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _taken: set[int] = field(default_factory=set)

    def awaits(self, rows: list[Any]) -> bool:
        """Whether all of these rows are among those that are not evaluated yet."""
        with self._lock:
            waiting = {id(each) for place, each in enumerate(self.given) if place not in self._taken}
            return all(id(row) in waiting for row in rows)

    def place(self, row: Any) -> tuple[int, bool]:
        """The place of a row that is evaluated now, and whether it was before (a refined candidate's)."""
        with self._lock:
            places = [place for place, each in enumerate(self.given) if each is row]
            if not places:
                places = [0] if len(self.given) == 1 else [-1]  # a task without rows has one that is a stand-in
            place = next((each for each in places if each not in self._taken), None)
            if place is None:
                return places[-1], True
            self._taken.add(place)
            return place, False


@dataclass(slots=True)
class Group:
    """Several evaluations in one call of an adapter. Threads of the adapter's read it.

    Attributes:
        calls: the evaluations.
    """

    calls: list[Call]

    def call_of(self, candidate: Any, rows: list[Any]) -> Call | None:
        """The evaluation of a candidate on some rows, or on one of its rows.

        Two may be of one candidate: the first counts that has such a row which is not evaluated yet.
        """
        texts = texts_of(candidate)
        own = [call for call in self.calls if call.instance.program.texts == texts]
        return next((call for call in own if call.instance.awaits(rows)), own[0] if own else None)


class Doors:
    """Follows the calls of GEPA that DSPy does not make.

    Args:
        optimizers: the operations of an optimization.
        patches: where to replace methods of adapters, and of thread pools.
        observing: adds our callbacks.
    """

    def __init__(self, optimizers: Optimizers, patches: Patches, observing: Observing) -> None:
        self.optimizers = optimizers
        self.patches = patches
        self.observing = observing
        self._adapters = introspection.ByClass(self._watch)
        self._carries = False

    # --- the calls --------------------------------------------------------------------------------------------------
    def optimize(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of a call of ``gepa.optimize`` that is not DSPy's."""
        call = guard(_OPTIMIZE)(self._open_optimize)(original, args, kwargs)
        if call is not None:
            kwargs = guard(_OPTIMIZE)(self.observing)(call.context.state.tracker, kwargs) or kwargs
        return self._run(call, original, args, kwargs)

    def wrap_anything(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """In place of ``optimize_anything``."""

        @functools.wraps(original)
        def optimize_anything(*args: Any, **kwargs: Any) -> Any:
            begun = guard(ANYTHING)(self._begun)()
            call = guard(ANYTHING)(self._open_anything)(begun, original, args, kwargs)
            tracker = begun if call is None else call.context.state.tracker
            if tracker is not None:
                kwargs = guard(ANYTHING)(self._watched)(tracker, kwargs) or kwargs
            return self._run(call, original, args, kwargs)

        return optimize_anything

    def _begun(self) -> Tracker | None:
        """The tracker of an optimization whose engine now calls GEPA, if this is such a call."""
        tracker, context = self.tracker(), current_call_context()
        if tracker is None or context is None or context.owner is not tracker.instance or not tracker.instance.awaited:
            return None
        tracker.instance.awaited = False
        return tracker

    def _run(self, call: Call | None, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        try:
            result = original(*args, **kwargs)
        except BaseException as error:
            self.optimizers.compile.fail(call, error)
            raise
        if call is not None:
            name = call.context.state.tracker.run.program_name
            self.optimizers.compile.close(call, guard("GEPA's result")(best_of)(result, name), None)
        return result

    def _open_optimize(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        given = _bound(original, args, kwargs)
        adapter = given.get("adapter")
        kind: Any = type(adapter) if adapter is not None else resolve(_DEFAULT, "DefaultAdapter")
        name, door = introspection.short_name_of(kind), _OPTIMIZE
        if introspection.library(kind) == "mlflow":
            name, door = "optimize_prompts", _PROMPTS
        self._adapters.of(kind)
        return self.open(GEPA(given.get("run_dir")), given, door, name)

    def _open_anything(
        self, begun: Tracker | None, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call | None:
        given = _bound(original, args, kwargs)
        if not _takes_callbacks(original, given.get("config")):
            return None
        for part in _SETTINGS:
            given.update(introspection.instance_dict(introspection.field(given.get("config"), part)))
        evaluator = given.get("evaluator") if given.get("evaluator") is not None else given.get("batch_evaluator")
        given["trainset"] = given.get("dataset")
        self._adapters.of(resolve(_ADAPTER, "OptimizeAnythingAdapter"))
        # Of an optimization that has begun, these are more arguments.
        instance = GEPA(given.get("run_dir")) if begun is None else begun.instance
        return self.open(instance, given, ANYTHING, callable_name(evaluator))

    def open(self, instance: GEPA, given: dict[str, Any], door: str, name: str) -> Call | None:
        """Open an optimization of texts.

        Args:
            instance: the optimizer.
            given: ``seed_candidate``, ``trainset``, ``valset``, and what else is a parameter.
            door: which call began it.
            name: of the program.
        """
        if not self._carries:
            self._carries = True
            self.patches.wrap(ThreadPoolExecutor, "submit", self._wrap_submit)
        arguments: dict[str, Any] = {key: value for key, value in given.items() if key not in _NOT_PARAMETERS}
        arguments["door"] = door
        seed = given.get("seed_candidate")
        if type(seed) is dict or type(seed) is str:
            arguments["student"] = Texts(name, {SINGLE_TEXT: seed} if type(seed) is str else seed)
        arguments["trainset"] = _rows(given.get("trainset"))
        arguments["valset"] = _rows(given.get("valset"))
        return self.optimizers.compile.open(instance, (), arguments)

    def _watched(self, tracker: Tracker, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of ``optimize_anything`` with our callbacks, and with the evaluator watched.

        GEPA takes callbacks in the user's own configuration: it gets a copy of that.
        """
        config = kwargs.get("config")
        ours: Any = resolve(MODULE, "GEPAConfig")() if config is None else object.__new__(type(config))
        if config is not None:
            vars(ours).update(introspection.instance_dict(config))
        names = ("callbacks", "stop_callbacks")
        budget = introspection.field(introspection.field(ours, "engine"), "max_metric_calls")
        given = {"max_metric_calls": budget, **{name: introspection.field(ours, name) for name in names}}
        observed = self.observing(tracker, given)
        vars(ours).update({name: observed[name] for name in names})
        evaluator = kwargs.get("evaluator")
        watched = {} if evaluator is None else {"evaluator": hooked(evaluator, self._evaluator)}
        return {**kwargs, **watched, "config": ours}

    # --- evaluations ------------------------------------------------------------------------------------------------
    def _watch(self, adapter: type) -> None:
        """Watch the evaluations of all adapters of a class. Outside of an optimization this does nothing."""
        for name, hook in (("evaluate", self._evaluate), ("batch_evaluate", self._batch_evaluate)):
            if any(name in introspection.members_of(base) for base in introspection.bases_of(adapter)):
                self.patches.around(adapter, name, hook, loses=_LOSES)

    def tracker(self) -> Tracker | None:
        """The tracker of the innermost optimization here, if one of these calls began it."""
        tracker = self.optimizers.running(Tracker) if Run.live else None
        return tracker if tracker is not None and isinstance(tracker.instance, GEPA) else None

    def _evaluate(self, adapter: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        candidate, rows = argument(args, kwargs, 1, "candidate"), argument(args, kwargs, 0, "batch")
        return self._evaluation(candidate, rows, lambda returned: returned)

    def _batch_evaluate(self, adapter: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        items = list(introspection.items(argument(args, kwargs, 0, "items")))
        if len(items) == 1:
            candidate, rows = items[0]
            return self._evaluation(candidate, rows, lambda returned: next(introspection.items(returned), None))
        tracker = self.tracker()
        if tracker is None or not items or self.evaluating():
            return None
        opened = [self.optimizers.evaluate.open_apart(_batch(tracker, *item)) for item in items]
        calls = [call for call in opened if call is not None]
        context = CallContext("group", None, current_call_context(), Group(calls))
        token = attach(with_call_context(current_context(), context))

        def leave(returned: Any, error: BaseException | None) -> None:
            detach(token)
            answers = list(introspection.items(returned))
            for place, call in enumerate(opened):
                if call is not None:
                    token_of_call = attach(call.otel_context)
                    self.end(call, answers[place] if place < len(answers) else None, error)
                    detach(token_of_call)

        return leave

    def evaluating(self) -> bool:
        """Whether this is inside an evaluation of the innermost optimization."""
        context = current_call_context()
        return (
            isinstance(None if context is None else context.state, Group)
            or enclosing_state(context, EvaluationState, until=(CompileState,)) is not None
        )

    def _evaluation(self, candidate: Any, rows: Any, answer: Callable[[Any], Any]) -> Leave | None:
        if self.tracker() is None:
            return None
        context = current_call_context()
        if context is not None and isinstance(context.state, Group):
            # The adapter evaluates a group one by one: the evaluation is open.
            inner = context.state.call_of(candidate, list(introspection.items(rows)))
            if inner is None:
                return None
            token = attach(inner.otel_context)
            return lambda returned, error: detach(token)
        if self.evaluating():
            return None
        call = self.open_evaluation(candidate, rows)
        return None if call is None else lambda returned, error: self.end(call, answer(returned), error)

    def open_evaluation(self, candidate: Any, rows: Any, apart: bool = False) -> Call | None:
        """Open the evaluation of a candidate on some rows; ``apart``: make nothing current."""
        tracker = self.tracker()
        if tracker is None:
            return None
        batch, evaluate = _batch(tracker, candidate, rows), self.optimizers.evaluate
        return evaluate.open_apart(batch) if apart else evaluate.open(batch, (), {})

    def end(self, call: Call, returned: Any, error: BaseException | None) -> None:
        """Close it; ``returned`` has ``scores`` and ``outputs``, and maybe ``trajectories``, of the rows."""
        results: Any = None
        if error is None:
            results = guard("GEPA's evaluation")(results_of)(call.instance, returned)
            with guard("GEPA's examples"):
                self._add_examples(call, results.results, returned)
        self.optimizers.evaluate.close(call, results, error)

    # --- examples ---------------------------------------------------------------------------------------------------
    def _add_examples(self, call: Call, results: list[Any], returned: Any) -> None:
        """The spans of the examples that had none of their own."""
        state: EvaluationState = call.context.state
        if state.executing:  # DSPy has evaluated them, inside.
            return
        trajectories = list(introspection.items(introspection.field(returned, "trajectories")))
        for place, (row, output, score) in enumerate(results):
            if place in state.scored or place in state.failed:
                continue
            about = trajectories[place] if place < len(trajectories) else None
            answer = output, _verdict(score, about)
            example = self.optimizers.example.open(ExampleRun(row, place, False, call.context), (), {})
            if example is not None:
                self.optimizers.example.close(example, answer, None)

    def _evaluator(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        """One call of the evaluator of ``optimize_anything``."""
        return self.example(argument(args, kwargs, 0, "candidate"), kwargs.get("example"))

    def example(self, candidate: Any, given: Any) -> Leave | None:
        """Open the span of one row, with a candidate, of the evaluation here; in whichever thread."""
        tracker = self.tracker()
        context = current_call_context()
        if tracker is None or context is None:
            return None
        if isinstance(context.state, Group):
            found = context.state.call_of(candidate, [given])
            context = None if found is None else found.context
        if context is None or type(context.owner) is not Batch:
            return None
        batch: Batch = context.owner
        place, repeated = batch.place(given)
        row = batch.devset[place] if place >= 0 else Row(given)
        call = self.optimizers.example.open(ExampleRun(row, place, repeated, context), (), {})
        if call is None:
            return None

        def leave(returned: Any, error: BaseException | None) -> None:
            self.optimizers.example.close(call, guard("GEPA's example")(_answer)(returned), error)

        return leave

    # --- threads ----------------------------------------------------------------------------------------------------
    def _wrap_submit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Carry the context into thread pools in which adapters evaluate."""

        @functools.wraps(original)
        def submit(pool: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            if Run.live:
                fn = guard("threads of GEPA's adapter")(self._bound)(fn) or fn
            try:
                return original(pool, fn, *args, **kwargs)
            except BaseException as error:
                hide_frames(error)
                raise

        return submit

    def _bound(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        return None if self.tracker() is None else bind(function)


MODULE: Final = "gepa.optimize_anything"
_ADAPTER: Final = "gepa.adapters.optimize_anything_adapter.optimize_anything_adapter"
_DEFAULT: Final = "gepa.adapters.default_adapter.default_adapter"


# --- pure mapping ---------------------------------------------------------------------------------------------------


def _bound(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _takes_callbacks(function: Any, config: Any) -> bool:
    """Whether this GEPA's configuration has callbacks: from 0.1.2 on. Without one, what stands for it must be known."""
    if config is None and "GEPAConfig" not in str(inspect.signature(function).parameters["config"].annotation):
        return False
    kind: Any = resolve(MODULE, "GEPAConfig") if config is None else type(config)
    return kind is not None and "callbacks" in getattr(kind, "__dataclass_fields__", ())


def texts_of(candidate: Any) -> dict[str, str]:
    """A candidate's texts by name."""
    return Texts("", {SINGLE_TEXT: candidate} if type(candidate) is str else candidate).texts


def _rows(rows: Any) -> list[Row] | None:
    """The rows of a list; ``None`` for a loader, whose rows are unknown."""
    return None if introspection.length(rows) is None else [Row(row) for row in introspection.items(rows)]


def _batch(tracker: Tracker, candidate: Any, rows: Any) -> Batch:
    given = list(introspection.items(rows))
    program = Texts(tracker.run.program_name or "", texts_of(candidate))
    return Batch(program, tracker.arguments.get("evaluator"), [Row(row) for row in given], given)


def results_of(batch: Batch, returned: Any) -> SimpleNamespace:
    """What an adapter returned, in the form of what ``Evaluate`` returns.

    Args:
        batch: what was evaluated.
        returned: GEPA's ``EvaluationBatch``.
    """
    scores = list(introspection.items(introspection.field(returned, "scores")))
    outputs = list(introspection.items(introspection.field(returned, "outputs")))
    outputs += [None] * (len(scores) - len(outputs))
    known = [score for score in map(score_of, scores) if score is not None]
    mean = 100 * sum(known) / len(known) if known and len(known) == len(scores) else None
    return SimpleNamespace(score=mean, results=list(zip(batch.devset, outputs, scores, strict=False)))


def _answer(returned: Any) -> tuple[Any, Any]:
    """What an evaluator returned, a score and maybe more beside it, as ``Evaluate`` has it: more, and a verdict."""
    score, about = returned if type(returned) is tuple and len(returned) == 2 else (returned, None)
    return about, _verdict(score, about)


def _verdict(score: Any, about: Any) -> Any:
    """A score with the feedback beside it, as metrics of DSPy return both."""
    feedback = introspection.field(about, "feedback") if introspection.is_a(about, Mapping) else None
    return SimpleNamespace(score=score, feedback=feedback) if type(feedback) is str else score


def best_of(result: Any, name: str | None) -> Texts | None:
    """The best candidate of a ``GEPAResult``: the first with the highest score.

    Args:
        result: what GEPA returned.
        name: of the program.
    """
    candidates = list(introspection.items(introspection.field(result, "candidates")))
    scores = [score_of(score) for score in introspection.items(introspection.field(result, "val_aggregate_scores"))]
    ranked = [(score, -place) for place, score in enumerate(scores) if score is not None and place < len(candidates)]
    return Texts(name or "", candidates[-max(ranked)[1]]) if ranked else None
