"""Phases: the parts of an optimization that score no candidate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dspy_otel import semconv
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext
from dspy_otel.core.operation import Call, Operation, SpanStart, openinference
from dspy_otel.core.usage import Totals
from dspy_otel.optimizers.state import PhaseState, current_tracker, run_of
from dspy_otel.optimizers.tracker import Phase, Tracker
from dspy_otel.patching import Around, Leave


class PhaseOperation(Operation):
    """One phase. Called with a :class:`Phase` in place of an instance."""

    kind = "phase"
    identity = (
        semconv.OPTIMIZER_NAME,
        semconv.OPTIMIZER_RUN_ID,
        semconv.OPTIMIZER_ROOT_RUN_ID,
        semconv.OPTIMIZER_PHASE,
    )

    def start(
        self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parent: CallContext | None
    ) -> SpanStart | None:
        phase: Phase = instance
        run = run_of(parent)
        if run is None:
            return None
        run.begin_phase(phase.name)
        context = CallContext(self.kind, phase, parent)
        context.inherited = {**context.inherited, semconv.OPTIMIZER_PHASE: phase.name}
        if phase.role is not None:
            context.role = phase.role
        totals = Totals(by_role=True)
        context.totals = (*context.totals, totals)
        context.state = PhaseState(phase, totals)
        attributes = dict(phase.attributes)
        openinference(attributes, self.telemetry, semconv.KIND_CHAIN)
        return SpanStart(phase.name, context, attributes, identity=self.identity)

    def end_attributes(self, call: Call, result: Any, error: BaseException | None) -> Attributes:
        return {**call.instance.attributes, **call.context.state.totals.attributes()}

    def measure(self, call: Call, result: Any, error: BaseException | None, seconds: float) -> None:
        run = run_of(call.context)
        if run is not None:
            run.end_phase(call.instance.name)
            run.report_spending()

    def hook(self, describe: Callable[[Tracker, tuple[Any, ...], dict[str, Any]], Phase | None]) -> Around:
        """A hook for :meth:`~dspy_otel.patching.Patches.around` that makes a phase of each call of a method.

        Args:
            describe: gives the phase, from the tracker of the optimization and the arguments, without the instance.
        """

        def begin(instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leave | None:
            tracker = current_tracker(self.telemetry)
            phase = None if tracker is None else describe(tracker, args, kwargs)
            call = None if phase is None else self.open(phase, (), {})
            return None if call is None else functools.partial(self.close, call)

        return begin
