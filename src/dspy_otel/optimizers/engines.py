"""``optimize_anything`` of GEPA after 0.1.4: a front, an engine behind it, and a server that evaluates for the engine.

Each run of an engine is one optimization. GEPA's own engine calls the function that was ``optimize_anything`` before,
which :mod:`~dspy_otel.optimizers.doors` follows; of any other, the evaluations are followed here. The server evaluates
in threads of its own, and for processes that ask it over HTTP, where nothing of the caller's context arrives: it is
kept here for as long as the engine runs.
"""

from __future__ import annotations

import functools
import threading
from contextvars import Token
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any, Final

from opentelemetry.context import Context

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.names import class_name
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import (
    CallContext,
    attach,
    current_call_context,
    current_context,
    with_call_context,
)
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, detach
from dspy_otel.operations.evaluation import callable_name, score_of
from dspy_otel.operations.texts import Row, Texts
from dspy_otel.optimizers.doors import ANYTHING, GEPA, MODULE, SINGLE_TEXT, Batch, Doors, best_of, texts_of
from dspy_otel.optimizers.run import MEAN
from dspy_otel.optimizers.state import tracker_of
from dspy_otel.optimizers.tracker import Evaluation, Tracker, Trial, mean_of
from dspy_otel.patching import Leave, Patches, argument, resolve

_SERVER: Final = "gepa.oa.eval_server"
_RUNS: Final = "optimizations by GEPA's engines"
_LOSES: Final = "evaluations by GEPA's engines, and their parents behind HTTP"
_GUARD: Final = guard("GEPA's engine")


class Engine(GEPA):
    """In place of an optimizer of DSPy's: an engine that is not GEPA's own."""


class EngineTracker(Tracker):
    """Follows an engine by the server's evaluations: those on all rows decide, all others are on minibatches.

    What a candidate was made from is unknown.
    """

    scale = MEAN

    def kind_of(self, about: Evaluation) -> str:
        return super().kind_of(about) if about.size == self.rows() else semconv.TRIAL_MINIBATCH

    def parents(self, about: Evaluation) -> list[str]:
        return []

    def score(self, result: Any, error: BaseException | None) -> float | None:
        return mean_of(result)

    def scored(self, trial: Trial, result: Any) -> None:
        # Of rows that are evaluated one by one, nobody knew how many there would be.
        trial.end_attributes[semconv.TRIAL_SIZE] = len(result.results)

    def copied(self, program: Any) -> Any:
        return dict(program.texts)

    def rows(self) -> int:
        """How many rows an engine may evaluate on; a task without rows has one that is a stand-in."""
        return sum(introspection.length(self.arguments.get(name)) or 0 for name in ("trainset", "valset")) or 1


@dataclass(slots=True)
class RowByRow:
    """The evaluation of a candidate for which an engine asks row by row. It ends when another candidate's begins.

    Attributes:
        call: the evaluation.
        scores: of the rows so far, in the order of their beginning.
        outputs: what goes with them.
    """

    call: Call
    scores: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def add(self, row: Any) -> int:
        """Add a row, and give its place."""
        batch: Batch = self.call.instance
        batch.given.append(row)
        batch.devset.append(Row(row))
        self.scores.append(None)
        self.outputs.append(None)
        return len(self.scores) - 1


@dataclass(slots=True)
class EngineRun:
    """A run of an engine. Threads of its server read it.

    Attributes:
        call: the optimization.
        tracker: follows it.
        lock: of what follows.
        row_by_row: the evaluation of this kind that is open.
    """

    call: Call
    tracker: Tracker
    lock: threading.Lock = field(default_factory=threading.Lock)
    row_by_row: RowByRow | None = None


class Engines:
    """Follows the engines of ``optimize_anything``, and the server that evaluates for them.

    Args:
        doors: follows GEPA itself.
    """

    def __init__(self, doors: Doors) -> None:
        self.doors = doors
        self.optimizers = doors.optimizers
        self._runs: dict[int, EngineRun] = {}
        """By the server's ``id()``, while it is in use."""

    def patch(self, patches: Patches) -> None:
        """Put the hooks in force: none changes an argument."""
        self.optimizers.trackers[Engine.__name__] = EngineTracker
        front, server = resolve(MODULE), resolve(_SERVER, "EvalServer")
        patches.around(front, "_run_engine", self._run, loses=_RUNS)
        patches.around(front, "_score_test", self._score_test)
        patches.around(server, "evaluate", self._evaluate, loses=_LOSES)
        patches.around(server, "evaluate_examples", self._evaluate_examples, loses=_LOSES)
        patches.around(server, "evaluate_batch", self._evaluate_batch, loses=_LOSES)

    # --- the run ----------------------------------------------------------------------------------------------------
    def _run(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        server, engine = argument(args, kwargs, 0, "server"), argument(args, kwargs, 1, "engine")
        call = self._open(server, engine)
        if call is None:
            return None
        tracker: Tracker = call.context.state.tracker
        around = self._runs.get(id(server))  # an engine may be made of others
        run = self._runs[id(server)] = EngineRun(call, tracker)

        def leave(returned: Any, error: BaseException | None) -> None:
            if around is None:
                del self._runs[id(server)]
            else:
                self._runs[id(server)] = around
            best = None
            with _GUARD, run.lock:
                self._end_row_by_row(run)
            with _GUARD:
                best = _best(returned, tracker.run.program_name)
                call.attributes.update(_reported(tracker, returned))
            self.optimizers.compile.close(call, best, error)

        return leave

    def _open(self, server: Any, engine: Any) -> Call | None:
        task, budget = introspection.field(server, "task"), introspection.field(server, "budget")
        evaluator = _evaluator(server)
        most = introspection.field(budget, "max_evals")
        own: dict[str, Any] = {}
        if introspection.is_a(engine, resolve("gepa.oa.engines.gepa", "GepaEngine")):
            settings = introspection.field(introspection.field(engine, "gepa_config"), "engine")
            folder = introspection.field(engine, "run_dir") or introspection.field(settings, "run_dir")
            instance = GEPA(folder)
            instance.awaited = True
        else:
            own = introspection.instance_dict(engine)
            instance = _engine(class_name(type(engine)))(None)
        given = {
            **own,
            **{name: introspection.field(task, name) for name in ("seed_candidate", "objective", "background")},
            "trainset": introspection.field(task, "train_set"),
            "valset": introspection.field(task, "val_set"),
            "engine": introspection.field(engine, "name"),
            "evaluator": evaluator,
            "max_evals": most,
        }
        call = self.doors.open(instance, given, ANYTHING, callable_name(evaluator))
        if call is not None:
            with _GUARD:
                call.context.state.tracker.run.planned_examples = introspection.whole(most)
        return call

    def _score_test(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        if self.doors.tracker() is None:
            return None
        token = attach(_as_task(current_context()))
        return lambda returned, error: detach(token)

    # --- evaluations ------------------------------------------------------------------------------------------------
    def _enter(self, server: Any, rows: int) -> tuple[EngineRun, Token[Context]] | None:
        """Make the context of a server's run current, in whichever thread. ``None`` without a run, or without budget.

        In GEPA's own engine the adapter's evaluations have spans, and any other is the evaluator's work all the same.
        """
        run = self._runs.get(id(server))
        if run is None or not self.optimizers.telemetry.enabled():
            return None
        left = server.budget.remaining
        if left is not None and left < rows:
            return None  # It refuses to evaluate.
        here = tracker_of(current_call_context()) is run.tracker
        context = current_context() if here else run.call.otel_context
        if not (rows and isinstance(run.tracker, EngineTracker)) and not (here and self.doors.evaluating()):
            context = _as_task(context)
        return run, attach(context)

    def _open_evaluation(self, run: EngineRun, candidate: Any, rows: list[Any]) -> Call | None:
        if not isinstance(run.tracker, EngineTracker) or self.doors.evaluating():
            return None
        return self.doors.open_evaluation(candidate, rows)

    def _evaluate(self, server: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        candidate, row = argument(args, kwargs, 0, "candidate"), argument(args, kwargs, 1, "example")
        entered = self._enter(server, 1)
        if entered is None:
            return None
        run, token = entered
        call, several, place, leave_example = None, None, 0, None
        with _GUARD:
            if isinstance(run.tracker, EngineTracker) and run.tracker.rows() > 1 and not self.doors.evaluating():
                several, place = self._one_more(run, candidate, row)
            else:
                call = self._open_evaluation(run, candidate, [row])
            leave_example = self.doors.example(candidate, row)

        def leave(returned: Any, error: BaseException | None) -> None:
            try:
                if leave_example is not None:
                    leave_example(returned, error)
                score, about = _pair(returned)
                if several is not None:
                    several.scores[place], several.outputs[place] = score, about
                if call is not None:
                    self.doors.end(call, SimpleNamespace(scores=[score], outputs=[about]), error)
            finally:
                detach(token)

        return leave

    def _one_more(self, run: EngineRun, candidate: Any, row: Any) -> tuple[RowByRow | None, int]:
        """Make the evaluation current that this row belongs to, and give it and the row's place in it."""
        with run.lock:
            several = run.row_by_row
            if several is None or several.call.instance.program.texts != texts_of(candidate):
                self._end_row_by_row(run)
                call = self.doors.open_evaluation(candidate, [], apart=True)
                several = run.row_by_row = None if call is None else RowByRow(call)
            if several is None:
                return None, 0
            place = several.add(row)
        attach(several.call.otel_context)
        return several, place

    def _end_row_by_row(self, run: EngineRun) -> None:
        several, run.row_by_row = run.row_by_row, None
        if several is None:
            return
        several.call.attributes[semconv.EVALUATION_SIZE] = len(several.scores)
        token = attach(several.call.otel_context)
        try:
            self.doors.end(several.call, SimpleNamespace(scores=several.scores, outputs=several.outputs), None)
        finally:
            detach(token)

    def _evaluate_examples(self, server: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        if id(server) not in self._runs:
            return None
        candidate = argument(args, kwargs, 0, "candidate")
        rows = _rows(server, argument(args, kwargs, 1, "example_ids"), argument(args, kwargs, 2, "split"))
        entered = self._enter(server, len(rows)) if rows else None  # Without rows it asks `evaluate`.
        if entered is None:
            return None
        run, token = entered
        call = _GUARD(self._open_evaluation)(run, candidate, [row for _, row in rows])

        def leave(returned: Any, error: BaseException | None) -> None:
            try:
                if call is not None:
                    found = [introspection.field(_pair(returned)[1], name) for name in ("scores", "infos")]
                    scores, outputs = ([introspection.field(each, place) for place, _ in rows] for each in found)
                    self.doors.end(call, SimpleNamespace(scores=scores, outputs=outputs), error)
            finally:
                detach(token)

        return leave

    def _evaluate_batch(self, server: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        entered = self._enter(server, 0)
        return None if entered is None else lambda returned, error: detach(entered[1])


# --- pure mapping ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _engine(name: str) -> type[Engine]:
    """A stand-in for the engines of a class. Of a module of GEPA's: its name must mean no optimizer of DSPy's."""
    return type(name, (Engine,), {"__module__": MODULE})


def _evaluator(server: Any) -> Any:
    """The user's own evaluator: for one row, or if there is none, for several."""
    given = [introspection.field(introspection.field(server, name), "__wrapped__") for name in ("eval_fn", "batch_fn")]
    stand_in = type(given[0]) is FunctionType and given[0].__module__ == _SERVER
    return given[1] if stand_in else given[0]


def _pair(returned: Any) -> tuple[Any, Any]:
    """What a server's evaluation returned: a score, and what goes with it."""
    return returned if type(returned) is tuple and len(returned) == 2 else (None, None)


def _as_task(context: Context) -> Context:
    """``context``, where LM calls are the evaluator's."""
    inner = CallContext("evaluator", None, current_call_context(context))
    inner.role = semconv.ROLE_TASK
    return with_call_context(context, inner)


def _rows(server: Any, ids: Any, split: Any) -> list[tuple[str, Any]]:
    """What ``evaluate_examples`` evaluates on: rows with their ids."""
    parts = {name: list(server.iter_split(name)) for name in ("train", "val")}
    if ids is not None:
        known = {place: row for part in parts.values() for place, row in part}
        return [(place, known[place]) for place in introspection.items(ids) if place in known]
    if split == "all":
        return parts["train"] + parts["val"]
    return parts.get(split or "train", [])


def _best(result: Any, name: str | None) -> Texts | None:
    """The best candidate of an engine's ``Result``; GEPA's own has the whole pool, with all texts of a candidate."""
    pool = introspection.field(introspection.field(result, "metadata"), "gepa_result")
    best = introspection.field(result, "best_candidate")
    if pool is not None or best is None:
        return best_of(pool, name)
    return Texts(name or "", {SINGLE_TEXT: best} if type(best) is str else best)


def _reported(tracker: Tracker, result: Any) -> Attributes:
    """The best score that an engine reports, where no trial says which is best."""
    score = score_of(introspection.field(result, "best_score"))
    unknown = isinstance(tracker, EngineTracker) and tracker.run.best is None and score is not None
    return {semconv.OPTIMIZER_BEST_SCORE: score} if unknown and score is not None else {}
