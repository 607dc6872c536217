"""Optimizers: every ``compile`` becomes a run with phases, trials and candidates.

One small file for each optimizer that needs hooks of its own; :class:`~dspy_otel.optimizers.tracker.Tracker`
follows all others.
"""

from __future__ import annotations

from typing import Any, TypeVar

from dspy_otel.content import introspection
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.operations.program import Programs
from dspy_otel.optimizers import trackers
from dspy_otel.optimizers.compile import CompileOperation
from dspy_otel.optimizers.evaluations import CandidateEvaluation, CandidateExample
from dspy_otel.optimizers.lineage import optimization
from dspy_otel.optimizers.modules import DirectModule
from dspy_otel.optimizers.phases import PhaseOperation
from dspy_otel.optimizers.state import current_tracker
from dspy_otel.optimizers.tracker import Tracker, registered
from dspy_otel.optimizers.trials import TrialOperation
from dspy_otel.patching import Patches

_Tracker = TypeVar("_Tracker", bound=Tracker)


class Optimizers:
    """The operations that optimizers take part in.

    Attributes:
        compile: ``Teleprompter.compile``.
        evaluate: ``Evaluate.__call__``, which is a trial directly inside a compile.
        example: one example of an evaluation.
        module: ``Module.__call__``, which has a role when an optimizer calls it.
        phases: parts of an optimization.
        trials: scored candidates.
        follows_gepa: whether ``gepa.optimize`` is wrapped.
    """

    def __init__(self, telemetry: Telemetry, programs: Programs) -> None:
        self.telemetry = telemetry
        self.programs = programs
        self.phases = PhaseOperation(telemetry)
        self.trials = TrialOperation(telemetry)
        self.evaluate = CandidateEvaluation(telemetry, programs, self.phases, self.trials)
        self.example = CandidateExample(telemetry, programs)
        self.module = DirectModule(telemetry, programs, self.phases)
        trackers.load()
        self.trackers, self._hooks = registered()
        self.follows_gepa = False
        self.compile = CompileOperation(telemetry, programs, self.tracker_for)

    def tracker_for(self, optimizer: Any) -> type[Tracker]:
        """The tracker of an optimizer: the one of its class, or of the nearest base class in DSPy that has one."""
        for kind in introspection.bases_of(type(optimizer)):
            name = introspection.short_name_of(kind)
            # Of our own is what stands in for an optimizer that is not DSPy's.
            if introspection.library(kind) in ("dspy", "dspy_otel") and name in self.trackers:
                return self.trackers[name]
        return Tracker

    @guard("optimizer")
    def running(self, kind: type[_Tracker]) -> _Tracker | None:
        """The tracker of the innermost optimization that this thread works for, if it is one of this kind."""
        tracker = current_tracker(self.telemetry)
        return tracker if isinstance(tracker, kind) else None

    def patch(self, patches: Patches) -> None:
        """Put the hooks of single optimizers in force; one that this DSPy lacks costs its detail and a warning."""
        for patch in self._hooks:
            patch(self, patches)


__all__ = ["Optimizers", "optimization"]
