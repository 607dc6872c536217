"""SIMBA: each step samples trajectories, builds candidates with a strategy, and scores them on the same minibatch.

It evaluates through ``dspy.Parallel``, so its trials are recognised by the pairs of program and example given to that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import current_call_context
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.operation import Call, detach
from dspy_otel.operations.evaluation import callable_name
from dspy_otel.optimizers.evaluations import CandidateRun
from dspy_otel.optimizers.run import MEAN, Run
from dspy_otel.optimizers.state import CompileState
from dspy_otel.optimizers.tracker import Evaluation, Phase, Tracker, Trial, hooks, mean_of, tracks
from dspy_otel.patching import Leave, Patches, hooked, resolve

if TYPE_CHECKING:
    from dspy_otel.optimizers import Optimizers


@tracks("SIMBA")
class SIMBATracker(Tracker):
    """Which of SIMBA's three kinds of evaluation comes next, and where each candidate came from."""

    scale = MEAN
    deciding = frozenset({semconv.TRIAL_BASELINE, semconv.TRIAL_VALIDATION})

    def __init__(self, run: Run, instance: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__(run, instance, arguments)
        self.step = -1
        self.next = semconv.TRIAL_VALIDATION
        self.made: dict[int, Attributes] = {}
        self.pool: list[str | None] = [run.initial_id]

    def begin(self) -> None:
        _strategies.observe(self.instance)

    def end(self) -> None:
        _strategies.restore(self.instance)

    def arguments_known(self) -> None:
        # An upper bound: a strategy may fail, and the same program may be chosen twice for the end.
        rows = introspection.length(self.arguments.get("trainset"))
        own = (introspection.field(self.instance, name) for name in ("bsize", "num_candidates", "max_steps"))
        size, candidates, steps = map(introspection.whole, own)
        if rows is not None and size is not None and candidates is not None and steps is not None:
            step = size * (candidates + min(size, candidates + 1))
            self.run.planned_examples = steps * step + min(steps, candidates) * rows + rows

    def new_step(self) -> None:
        """The next step begins: it samples first, then scores candidates."""
        self.step += 1
        self.next = semconv.TRIAL_SAMPLE
        self.made.clear()

    def evaluation(self, about: Evaluation) -> Trial | Phase | None:
        step: Attributes = {} if self.next == semconv.TRIAL_VALIDATION else {"step": self.step}
        if self.next == semconv.TRIAL_SAMPLE:
            return Trial(self.next, step, mixed=True)
        # Copies take the attribute `simba_idx` along, and a candidate gets its own only after it was scored.
        source = introspection.whole(introspection.field(about.program, "simba_idx"))
        if self.next == semconv.TRIAL_MINIBATCH:
            params = {**step, **self.made.get(id(about.program), {})}
            parents: list[str] = []
            if source is not None:
                params["source"] = source
                if source < len(self.pool) and self.pool[source] is not None:
                    parents = [str(self.pool[source])]
            return Trial(self.next, params, parents)
        # Several of the programs chosen for the end may be copies of the initial one.
        kind = self.kind_of(about)
        return Trial(kind if kind == semconv.TRIAL_BASELINE else semconv.TRIAL_VALIDATION)

    def score(self, result: Any, error: BaseException | None) -> float | None:
        return mean_of(result)

    def phase(self) -> Phase:
        """The phase of the evaluation that comes next."""
        phases = {semconv.TRIAL_SAMPLE: semconv.PHASE_SAMPLE, semconv.TRIAL_MINIBATCH: semconv.PHASE_SEARCH}
        role = semconv.ROLE_TASK
        return Phase(phases.get(self.next, semconv.PHASE_FINAL_EVALUATION), role, has_trials=True)

    def evaluated(self, programs: list[str | None]) -> None:
        """One kind of evaluation is over, of these candidates."""
        if self.next == semconv.TRIAL_MINIBATCH:
            self.pool += programs
            self.next = semconv.TRIAL_VALIDATION
        elif self.next == semconv.TRIAL_SAMPLE:
            self.next = semconv.TRIAL_MINIBATCH


class _Strategies:
    """SIMBA's list of strategies, each with a phase around it while a compile runs. ``rng.choice`` picks the same."""

    def __init__(self) -> None:
        self.optimizers: Optimizers | None = None
        self._lock = threading.Lock()
        self._replaced: dict[int, tuple[int, Any, Any]] = {}

    def observe(self, instance: Any) -> None:
        """Replace an optimizer's list, once for any number of compiles at the same time."""
        stored = introspection.instance_dict(instance)
        with self._lock:
            count, original, ours = self._replaced.get(id(instance), (0, stored["strategies"], None))
            if ours is None:
                ours = [self._observed(strategy) for strategy in original]
                stored["strategies"] = ours
            self._replaced[id(instance)] = (count + 1, original, ours)

    def restore(self, instance: Any) -> None:
        """Restore the list when the last compile of this optimizer ends, unless somebody has changed it since."""
        stored = introspection.instance_dict(instance)
        with self._lock:
            if id(instance) not in self._replaced:
                return
            count, original, ours = self._replaced.pop(id(instance))
            if count > 1:
                self._replaced[id(instance)] = (count - 1, original, ours)
            elif stored.get("strategies") is ours:
                stored["strategies"] = original

    def _observed(self, strategy: Callable[..., Any]) -> Callable[..., Any]:
        optimizers = self.optimizers
        if optimizers is None:
            return strategy
        name = callable_name(strategy).rstrip("_")
        prefix = semconv.TRIAL_PARAMS_PREFIX

        def begin(instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
            tracker = optimizers.running(SIMBATracker)
            if tracker is None:
                return None
            made = tracker.made[id(args[1])] = {"strategy": name}
            attributes: Attributes = {f"{prefix}step": tracker.step, f"{prefix}strategy": name}
            phase = Phase(semconv.PHASE_PROPOSE, semconv.ROLE_PROPOSER, attributes=attributes)
            call = optimizers.phases.open(phase, (), {})

            def leave(result: Any, error: BaseException | None) -> None:
                if error is None:
                    # False: the strategy found nothing to use, and the candidate is a copy with some demos dropped.
                    with guard("SIMBA strategy"):
                        applied = introspection.truth(result)
                        if applied is not None:
                            made["applied"] = phase.attributes[f"{prefix}applied"] = applied
                if call is not None:
                    optimizers.phases.close(call, result, error)

            return leave

        return hooked(strategy, before=begin)


_strategies: Final = _Strategies()


class _Observed:
    """One of SIMBA's wrapped programs, which runs one example."""

    def __init__(self, function: Callable[[Any], Any], program: Any, metric: Any) -> None:
        self.function = function
        self.program = program
        self.metric = metric
        self.call: Call | None = None
        self.examples: Any = None
        self.candidate: str | None = None
        self.index = -1
        self.runs = 0

    def __call__(self, example: Any) -> Any:
        call = self.call
        if call is None:
            return self.function(example)
        self.runs += 1
        token = otel_context.attach(call.otel_context)
        try:
            run = CandidateRun(example, self.index, self.runs > 1, call.context, self.program, self.candidate)
            return self.examples.wrap(lambda _run, given: self.function(given))(run, example)
        finally:
            detach(token)


@hooks
def patch(optimizers: Optimizers, patches: Patches) -> None:
    """Steps, the runs of each pair, and the evaluations as a whole."""
    _strategies.optimizers = optimizers
    module = resolve("dspy.teleprompt.simba")

    def step(instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tracker = optimizers.running(SIMBATracker)
        if tracker is not None:
            tracker.new_step()

    def observed(original: Callable[..., Any]) -> Callable[..., Any]:
        # The result changes, so no hook will do: each example's span is opened in the worker that runs it.
        def wrap_program(program: Any, metric: Any, *args: Any, **kwargs: Any) -> Any:
            function = original(program, metric, *args, **kwargs)
            if optimizers.running(SIMBATracker) is None:
                return function
            return guard("SIMBA program")(_Observed)(function, program, metric) or function

        return wrap_program

    def evaluation(instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
        tracker = optimizers.running(SIMBATracker)
        pairs = args[0] if args and type(args[0]) is list else None
        if tracker is None or pairs is None:
            return None
        if not pairs and _in_compile():
            tracker.evaluated([])  # Every strategy has failed: there is no candidate to score.
        if not pairs or not isinstance(pairs[0][0], _Observed):
            return None
        phase = optimizers.phases.open(tracker.phase(), (), {})
        none: list[_Group] = []
        groups = guard("SIMBA evaluation")(_open_groups)(optimizers, tracker, pairs, instance) or none

        def leave(results: Any, error: BaseException | None) -> None:
            with guard("SIMBA evaluation"):
                _close_groups(optimizers, groups, results, error)
            if phase is not None:
                optimizers.phases.close(phase, results, error)
            if error is None:
                tracker.evaluated([_candidate(call) for call, _ in groups])

        return leave

    loses = "SIMBA's trials"
    if module is None:
        return
    patches.before(module, "prepare_models_for_resampling", step, loses=loses)
    patches.wrap(module, "wrap_program", observed, loses=loses)
    patches.around(resolve("dspy.predict.parallel", "Parallel"), "__call__", evaluation, loses=loses)


_Group = tuple[Call, list[int]]


def _in_compile() -> bool:
    """Whether the optimizer itself makes this call, and not a program that it runs."""
    context = current_call_context()
    return context is not None and isinstance(context.state, CompileState)


def _candidate(call: Call) -> str | None:
    found = call.context.inherited.get(semconv.CANDIDATE_ID)
    return found if isinstance(found, str) else None


def _open_groups(optimizers: Optimizers, tracker: SIMBATracker, pairs: list[Any], parallel: Any) -> list[_Group]:
    """Open a trial and its evaluation for each candidate among ``pairs``; with the places of its pairs."""
    places: dict[int, list[int]] = {}
    mixed = tracker.next == semconv.TRIAL_SAMPLE
    for place, (observed, _) in enumerate(pairs):
        places.setdefault(0 if mixed else id(observed.program), []).append(place)
    groups: list[_Group] = []
    for own in places.values():
        first: _Observed = pairs[own[0]][0]
        program = _mixture(tracker.run.program_name) if mixed else first.program
        rows = [pairs[place][1] for place in own]
        call = optimizers.evaluate.open_for(program, first.metric, rows, parallel.num_threads)
        if call is None:
            continue
        groups.append((call, own))
        for index, place in enumerate(own):
            observed = pairs[place][0]
            observed.call, observed.index, observed.examples = call, index, optimizers.example
            source = introspection.whole(introspection.field(observed.program, "simba_idx"))
            if mixed and source is not None and source < len(tracker.pool):
                observed.candidate = tracker.pool[source]
    return groups


def _close_groups(optimizers: Optimizers, groups: list[_Group], results: Any, error: BaseException | None) -> None:
    for call, places in groups:
        outcome = None
        if error is None:
            outcome = _Outcome([results[place] for place in places])
        optimizers.evaluate.close(call, outcome, error)


class _Outcome:
    """The result of an ``Evaluate`` with the results of one candidate."""

    def __init__(self, rows: list[Any]) -> None:
        known = [row if type(row) is dict else {} for row in rows]
        self.results = [(row.get("example"), row.get("prediction"), row.get("score")) for row in known]
        mean = mean_of(self)
        self.score = None if mean is None else round(100 * mean, 2)


def _mixture(name: str | None) -> Any:
    """Stands for several candidates of the program ``name``."""
    return type(name or "Program", (), {})()
