"""GEPA: the seed, then iterations that sample a parent, reflect on it, and score a child, or merge two candidates.

GEPA's own callbacks give the purpose of each evaluation, and the verdict on each child. The verdict comes after the
evaluation, so the trial's span stays open until then.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dspy_otel import semconv
from dspy_otel.content import introspection, redaction
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.internal_errors import guard, warn_once
from dspy_otel.core.operation import Call
from dspy_otel.operations.evaluation import score_of
from dspy_otel.operations.module_tree import attributes, named_predictors
from dspy_otel.operations.texts import Texts
from dspy_otel.optimizers.doors import Doors
from dspy_otel.optimizers.engines import Engines
from dspy_otel.optimizers.phases import PhaseOperation
from dspy_otel.optimizers.run import MEAN, Run
from dspy_otel.optimizers.tracker import Evaluation, Phase, Tracker, Trial, hooks, mean_of, tracks
from dspy_otel.patching import Patches, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers


@tracks("GEPA")
class GEPATracker(Tracker):
    """Follows GEPA's events.

    Scores are means, as in ``detailed_results``. GEPA judges by sums over the minibatch: before and after are sums
    until the trial ends, and means on its span.
    """

    role = semconv.ROLE_JUDGE  # outside of proposals, GEPA asks the metric for feedback
    scale = MEAN
    deciding = frozenset({semconv.TRIAL_BASELINE, semconv.TRIAL_FULL})

    def __init__(self, run: Run, instance: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(run, instance, arguments)
        self.stage: str = semconv.TRIAL_BASELINE
        self.iteration = 0
        self.pool: dict[int, str] = {}
        self.waiting: list[Trial] = []
        self.reflect: Call | None = None
        self.front: Mapping[str, Any] = {}
        self.resumed = False
        self.phases: PhaseOperation | None = None
        self._lock = threading.Lock()
        self._new_iteration()

    def state_file(self) -> Path | None:
        folder = introspection.field(self.instance, "log_dir")
        # Of any other class, making a path of it would call its `__fspath__`.
        return Path(folder) / "gepa_state.bin" if type(folder) is str or type(folder) is type(Path()) else None

    def _new_iteration(self) -> None:
        # One entry for each sampled task, in GEPA's order: (parent's index, minibatch ids), and the parent's sum.
        self.merging = False
        self.sampled: list[tuple[int, list[str]]] = []
        self.before: list[float] = []
        self.prepared: list[int] = []
        self.proposed: list[dict[str, str]] = []
        self.children: list[list[int]] = []
        self.placed: set[int] = set()

    def copied(self, program: Any) -> Any:
        return dict(program.texts) if isinstance(program, Texts) else super().copied(program)

    # --- evaluations ------------------------------------------------------------------------------------------------
    def evaluation(self, about: Evaluation) -> Trial | Phase | None:
        texts = {
            name: attributes(predictor)["signature"].instructions for name, predictor in named_predictors(about.program)
        }
        trial = Trial(self.stage, texts=texts)
        if self.stage == semconv.TRIAL_BASELINE:
            trial.params["candidate_index"] = 0
            self.waiting.append(trial)
            return trial
        trial.params["iteration"] = self.iteration
        if self.merging:
            trial.phase = semconv.PHASE_MERGE
        if self.stage == semconv.TRIAL_SAMPLE:
            trial.phase = semconv.PHASE_SAMPLE
            # Of the tasks sampled in this iteration; two candidates of the pool may be the same program.
            own = [(index, ids) for index, ids in self.sampled if self.pool.get(index) == about.program_id]
            if own:
                trial.params["candidate_index"] = own[0][0]
            if len(own) == 1:  # Several samples of one program cannot be distinguished.
                trial.params["minibatch_ids"] = own[0][1]
            return trial
        trial.awaits_verdict = True
        if self.stage == semconv.TRIAL_MINIBATCH:
            place = self._place_of(texts)
            if place is not None:
                parents = self.children[place]
                trial.parents = [self.pool[index] for index in parents if index in self.pool]
                if place < len(self.proposed):
                    trial.params["components"] = sorted(self.proposed[place])
                    if len(self.prepared) == len(self.proposed):  # Else the task without a proposal is unknown.
                        task = self.prepared[place]
                        trial.params["minibatch_ids"] = self.sampled[task][1]
                        trial.end_attributes[semconv.TRIAL_SCORE_BEFORE] = self.before[task]
        else:
            self._accepted(about.program_id, trial)
        self.waiting.append(trial)
        return trial

    def _place_of(self, texts: Mapping[str, str]) -> int | None:
        """The place, among the children announced in this iteration, of the one with these texts."""
        if len(self.children) == 1:
            return 0
        with self._lock:  # children are evaluated side by side
            for place, proposed in enumerate(self.proposed[: len(self.children)]):
                if place not in self.placed and all(texts.get(name) == text for name, text in proposed.items()):
                    self.placed.add(place)
                    return place
        return None

    def _accepted(self, candidate: str | None, full: Trial) -> None:
        """A candidate is evaluated on the whole validation set: GEPA has accepted it after its minibatch."""
        for trial in self.waiting:
            if trial.kind == semconv.TRIAL_MINIBATCH and trial.candidate == candidate:
                full.parents = list(trial.parents)
                self._end(trial, {semconv.TRIAL_ACCEPTED: True})
                return

    def score(self, result: Any, error: BaseException | None) -> float | None:
        return mean_of(result)

    def scored(self, trial: Trial, result: Any) -> None:
        if trial.kind == semconv.TRIAL_MINIBATCH and trial.score is not None:
            scores = [score_of(row[2]) for row in introspection.items(introspection.field(result, "results"))]
            known = [score for score in scores if score is not None]
            if len(known) == len(scores):
                trial.end_attributes[semconv.TRIAL_SCORE_AFTER] = float(sum(known))

    def _end(self, trial: Trial, attributes: Attributes) -> None:
        if trial in self.waiting:
            self.waiting.remove(trial)
        trial.end_attributes.update(attributes)
        for name in (semconv.TRIAL_SCORE_BEFORE, semconv.TRIAL_SCORE_AFTER):
            total = trial.end_attributes.get(name)
            if isinstance(total, float) and trial.size:
                trial.end_attributes[name] = total / trial.size
        if trial.awaits_verdict and trial.call is not None:
            trial.call.operation.close(trial.call, None, None)

    def _end_reflect(self) -> None:
        reflect, self.reflect = self.reflect, None
        if reflect is None:
            return
        if not self.proposed:
            # The reflection failed, which GEPA only logs, or proposed nothing.
            reflect.instance.attributes.setdefault(semconv.TRIAL_REASON, "no_proposal")
        reflect.operation.close(reflect, None, None)

    def end(self) -> None:
        self._end_reflect()
        for trial in list(self.waiting):
            self._end(trial, {})

    # --- GEPA's events ----------------------------------------------------------------------------------------------
    def on_iteration_start(self, event: Mapping[str, Any]) -> None:
        self.iteration = event["iteration"]
        checkpoint = self.checkpoint
        if checkpoint is not None and checkpoint.previous is not None and not self.resumed:
            # Of the process before, GEPA knows the candidates of its last saved state.
            self.resumed = True
            saved = range(1, len(event["state"].program_candidates))
            self.pool.update({index: checkpoint.pool[index] for index in saved if index in checkpoint.pool})
        self.stage = semconv.TRIAL_FULL
        self._new_iteration()

    def on_candidate_selected(self, event: Mapping[str, Any]) -> None:
        self.sampled.append((event["candidate_idx"], []))

    def on_minibatch_sampled(self, event: Mapping[str, Any]) -> None:
        self.sampled[-1] = (self.sampled[-1][0], [str(one) for one in event["minibatch_ids"]])

    def on_evaluation_start(self, event: Mapping[str, Any]) -> None:
        if event["candidate_idx"] is not None:
            self.stage = semconv.TRIAL_SAMPLE
            return
        self._end_reflect()
        parents = list(event["parent_ids"])
        self.children.append(parents)
        self.merging = len(parents) > 1
        self.stage = semconv.TRIAL_MINIBATCH

    def on_evaluation_end(self, event: Mapping[str, Any]) -> None:
        if event["candidate_idx"] is None:
            self.stage = semconv.TRIAL_FULL
            return
        self.before.append(float(sum(event["scores"])))
        if self.reflect is None and self.phases is not None:
            phase = Phase(semconv.PHASE_REFLECT, self.role)
            phase.attributes[f"{semconv.TRIAL_PARAMS_PREFIX}iteration"] = self.iteration
            self.reflect = self.phases.open(phase, (), {})

    def on_evaluation_skipped(self, event: Mapping[str, Any]) -> None:
        if self.reflect is not None:
            self.reflect.instance.attributes[semconv.TRIAL_REASON] = str(event["reason"])

    def on_reflective_dataset_built(self, event: Mapping[str, Any]) -> None:
        first = self.prepared[-1] + 1 if self.prepared else 0
        tasks = range(first, len(self.sampled))
        self.prepared.append(next(task for task in tasks if self.sampled[task][0] == event["candidate_idx"]))

    def on_proposal_start(self, event: Mapping[str, Any]) -> None:
        if self.reflect is not None:
            self.reflect.context.role = semconv.ROLE_REFLECTION

    def on_proposal_end(self, event: Mapping[str, Any]) -> None:
        self.proposed.append(dict(event["new_instructions"]))

    def on_pareto_front_updated(self, event: Mapping[str, Any]) -> None:
        self.front = event

    def on_valset_evaluated(self, event: Mapping[str, Any]) -> None:
        candidate, index = event["candidate"], event["candidate_idx"]
        for trial in self.waiting:
            if trial.kind != semconv.TRIAL_MINIBATCH and self._is(trial, candidate):
                if trial.candidate is not None:
                    self.pool[index] = trial.candidate
                    if self.checkpoint is not None:
                        self.checkpoint.pool[index] = trial.candidate
                trial.end_attributes[f"{semconv.TRIAL_PARAMS_PREFIX}candidate_index"] = index
                if trial.awaits_verdict:
                    trial.score = float(event["average_score"])
                    self._put_front(trial, index)
                self._end(trial, {})
                return

    def _is(self, trial: Trial, candidate: Mapping[str, str]) -> bool:
        return all(trial.texts.get(name, text) == text for name, text in candidate.items())

    def _put_front(self, trial: Trial, index: int) -> None:
        """Record whether the candidate is on the Pareto front, and the candidates it displaced from there."""
        front, self.front = self.front, {}
        if not front:
            return
        trial.end_attributes[semconv.TRIAL_ON_PARETO_FRONT] = index in front["new_front"]
        shown: Attributes = {
            semconv.PARETO_FRONT: self._named(front["new_front"]),
            semconv.PARETO_DISPLACED: self._named(front["displaced_candidates"]),
            f"{semconv.TRIAL_PARAMS_PREFIX}iteration": self.iteration,
        }
        self.run.telemetry.add_event(self.run.context.span, semconv.EVENT_PARETO_FRONT, shown)

    def _named(self, indices: Iterable[int]) -> list[str]:
        """Candidates by id, each once: two of the pool may be the same program."""
        return list(dict.fromkeys(self.pool[index] for index in indices if index in self.pool))

    def on_candidate_rejected(self, event: Mapping[str, Any]) -> None:
        pending = [trial for trial in self.waiting if trial.kind == semconv.TRIAL_MINIBATCH]
        after = [
            trial for trial in pending if trial.end_attributes.get(semconv.TRIAL_SCORE_AFTER) == event["new_score"]
        ]
        both = [trial for trial in after if trial.end_attributes.get(semconv.TRIAL_SCORE_BEFORE) == event["old_score"]]
        for trial in (both or after or pending)[:1]:
            attributes: Attributes = {
                semconv.TRIAL_SCORE_BEFORE: float(event["old_score"]),
                semconv.TRIAL_SCORE_AFTER: float(event["new_score"]),
            }
            self._reject(trial, event["reason"], attributes)

    def on_merge_rejected(self, event: Mapping[str, Any]) -> None:
        for trial in [trial for trial in self.waiting if trial.kind == semconv.TRIAL_MINIBATCH][:1]:
            self._reject(trial, event["reason"], {})

    def _reject(self, trial: Trial, reason: Any, attributes: Attributes) -> None:
        text = redaction.mask(str(reason)[:1024])
        self._end(trial, {**attributes, semconv.TRIAL_ACCEPTED: False, semconv.TRIAL_REASON: text})

    def on_iteration_end(self, event: Mapping[str, Any]) -> None:
        self.end()


class GEPAWithoutEventsTracker(Tracker):
    """GEPA whose events do not reach us: its evaluations are trials, as those of any other optimizer.

    Evaluations of the whole validation set decide; all others are on minibatches.
    """

    scale = MEAN
    deciding = GEPATracker.deciding
    role = None  # Reflection cannot be distinguished from the metric's own calls.

    def kind_of(self, about: Evaluation) -> str:
        given = self.arguments.get("valset")
        whole = given if introspection.length(given) else self.arguments.get("trainset")
        if {id(row) for row in introspection.items(about.devset)} == {id(row) for row in introspection.items(whole)}:
            return super().kind_of(about)
        return semconv.TRIAL_MINIBATCH

    def score(self, result: Any, error: BaseException | None) -> float | None:
        return mean_of(result)


class OldGEPATracker(GEPAWithoutEventsTracker):
    """GEPA before 0.0.27, which has no callbacks. The warning comes when it is used: many have it installed only."""

    def begin(self) -> None:
        warn_once(("patch", "callbacks"), "this GEPA knows no callbacks; telemetry lacks %s", _LOSES)


_LOSES: Final = "GEPA's verdicts, parents and reflections"


class Observer:
    """A callback for GEPA that passes events on to the tracker, and never raises."""

    def __init__(self, tracker: GEPATracker) -> None:
        self._tracker = tracker

    def __getattr__(self, name: str) -> Any:
        method = getattr(type(self._tracker), name, None) if name.startswith("on_") else None
        if method is None:
            raise AttributeError(name)
        observe = functools.partial(guard(f"GEPA {name}")(method), self._tracker)
        setattr(self, name, observe)  # GEPA asks for it at each event
        return observe


@hooks
def patch(optimizers: Optimizers, patches: Patches) -> None:
    """``gepa.optimize`` gets one more callback, for the one call: its arguments change, so no hook will do.

    A call that no ``dspy.GEPA`` makes is an optimization of its own. Called when DSPy has been imported, and when GEPA
    has: a program may have GEPA alone.
    """

    def observed(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def optimize(*args: Any, **kwargs: Any) -> Any:
            tracker = optimizers.running(GEPATracker)
            if tracker is None or tracker.phases is not None:  # a tracker observes one call
                return doors.optimize(original, args, kwargs)
            kwargs = guard("GEPA")(observing)(tracker, kwargs) or kwargs
            return original(*args, **kwargs)

        return optimize

    def observing(tracker: GEPATracker, kwargs: dict[str, Any]) -> dict[str, Any]:
        tracker.phases = optimizers.phases
        budget = kwargs.get("max_metric_calls")
        tracker.run.planned_examples = budget if type(budget) is int else None
        added: dict[str, Any] = {"callbacks": [*(kwargs.get("callbacks") or ()), Observer(tracker)]}
        if tracker.run.context.budget is not None:
            given = kwargs.get("stop_callbacks")
            stoppers = given if isinstance(given, Sequence) else () if given is None else (given,)
            added["stop_callbacks"] = [*stoppers, lambda _: tracker.must_stop()]
            tracker.ends_itself = True
        return {**kwargs, **added}

    if sys.modules.get("gepa") is None and resolve("dspy.teleprompt.gepa.gepa", "GEPA") is None:
        return
    optimize = resolve("gepa", "optimize")
    if optimizers.follows_gepa:  # Importing it has called this.
        return
    doors = Doors(optimizers, patches, observing)
    if optimize is not None and not _takes(optimize, "callbacks"):
        optimizers.trackers["GEPA"] = OldGEPATracker
    elif not patches.wrap(resolve("gepa"), "optimize", observed, loses=_LOSES):
        optimizers.trackers["GEPA"] = GEPAWithoutEventsTracker
    else:
        optimizers.follows_gepa = True
        launcher = resolve("gepa.gepa_launcher")  # Where GEPA has one, `optimize_anything` runs any engine.
        patches.wrap(launcher or resolve("gepa.optimize_anything"), "optimize_anything", doors.wrap_anything)
        if launcher is not None:
            Engines(doors).patch(patches)


def _takes(function: Any, name: str) -> bool:
    """Whether ``function`` has a parameter of this name, or takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
