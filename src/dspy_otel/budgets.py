"""A limit on what a block of code spends on LM calls, whoever makes them.

A budget is carried by the call context, as running totals are: every LM call inside the block finds it, in whichever
thread or task DSPy runs it, asks before it begins whether anything is left, and reports at its end what it has used.
Code outside of such a block pays for none of it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.trace import Span, get_current_span

from dspy_otel import semconv
from dspy_otel.content.names import plain_name
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.call_context import CallContext, attach, current_call_context, current_context, with_call_context
from dspy_otel.core.internal_errors import guard, warn_once
from dspy_otel.core.operation import detach
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.core.usage import Totals, warn_of_unanswered_tasks
from dspy_otel.instrumentor import DSPyInstrumentor
from dspy_otel.operations.lm import LMCallState
from dspy_otel.optimizers.state import CompileState
from dspy_otel.optimizers.tracker import Tracker

_LOG: Final = logging.getLogger("dspy_otel")
_ALERT: Final = guard("budget alert")
COST: Final = "cost"
TOKENS: Final = "tokens"
LM_CALLS: Final = "lm_calls"
SECONDS: Final = "seconds"
_PERCENTS: Final = (50, 80, 100)
_NOT_HERE: Final = RuntimeError()
"""The error of a call that nothing may be raised in beside it."""
_ROUNDING: Final = 1e-9
"""Ten calls at $0.10 add up to a little less than $1."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What the LM calls of a budget's block have used so far.

    Attributes:
        cost: US dollars, of the calls that have a price.
        tokens: input and output tokens, of the calls that report them.
        lm_calls: LM calls that were answered, without those that DSPy's cache has answered.
        seconds: since the block began.
        unpriced_calls: how many of them have no price, and are not in ``cost``.
        uncounted_calls: how many of them report no tokens, and are not in ``tokens``.
        unanswered_tasks: how many tasks of worker processes have handed nothing back, and are in nothing here.
    """

    cost: float
    tokens: int
    lm_calls: int
    seconds: float
    unpriced_calls: int
    uncounted_calls: int
    unanswered_tasks: int = 0

    def of(self, limit: str) -> float:
        """What is spent of one limit: ``cost``, ``tokens``, ``lm_calls`` or ``seconds``."""
        return float(getattr(self, limit))


@dataclass(frozen=True, slots=True)
class BudgetAlert:
    """A limit of a budget has been used to 50, 80 or 100 percent; its text says so.

    Attributes:
        limit: ``cost``, ``tokens``, ``lm_calls`` or ``seconds``.
        percent: 50, 80 or 100.
        spent: what has been spent of it.
        allowed: the limit.
    """

    limit: str
    percent: int
    spent: float
    allowed: float

    def __str__(self) -> str:
        spent, allowed = _amount(self.limit, self.spent), _amount(self.limit, self.allowed)
        if self.percent == 100:
            return f"a budget of {allowed} is used up: {spent}"
        return f"{self.percent} % of a budget is used: {spent} of {allowed}"


class _Stopped(BaseException):
    """What ends a block, with what the optimization in it has reached."""

    def __init__(
        self,
        message: str = "",
        *,
        limit: str = "",
        spent: Spent | None = None,
        program: Any = None,
        trial: int | None = None,
        score: float | None = None,
        optimizer: str | None = None,
    ) -> None:
        super().__init__(message)
        self.limit = limit
        self.spent = spent
        self.program = program
        self.trial = trial
        self.score = score
        self.optimizer = optimizer


class BudgetExceeded(_Stopped):
    """A budget is used up, and DSPy was about to make another LM call.

    It is no ``Exception``, for the same reason as ``asyncio.CancelledError``: DSPy's ``Evaluate``, ``Parallel`` and
    most optimizers catch each ``Exception``, count it as a wrong answer, and go on.

    Attributes:
        limit: the limit that was reached: ``cost``, ``tokens``, ``lm_calls`` or ``seconds``.
        spent: what was spent; ``None`` for an exception that somebody else has made.
        program: the best program so far of the optimization that was stopped, a copy; ``None`` outside of one, or when
            no candidate had been scored.
        trial: the number of the trial that scored it.
        score: its score, the mean of the metric.
        optimizer: class name of the optimizer whose trial that was.
    """


class BudgetRefused(_Stopped):
    """A budget cannot be enforced, for what it limits is not known of an LM call: its price, or its tokens.

    It is raised as soon as the first such call has ended, and is no ``Exception``, as :class:`BudgetExceeded` is none.

    Attributes:
        limit: ``cost`` or ``tokens``.
        spent: as far as it is known.
        program, trial, score, optimizer: as of :class:`BudgetExceeded`.
    """


def budget(
    *,
    cost: float | None = None,
    tokens: int | None = None,
    lm_calls: int | None = None,
    seconds: float | None = None,
    on_warning: Callable[[BudgetAlert], object] | None = None,
) -> Budget:
    """Limit what the LM calls of a block may use: ``with dspy_otel.budget(cost=5.0):``, or ``async with``.

    All LM calls inside count: of programs, metrics, proposers and nested optimizations, in DSPy's threads and tasks.
    Answers from DSPy's cache use nothing. What a call uses is known when it has ended, so calls in flight when a limit
    is reached may exceed it. Nested budgets count each for itself.

    When a limit is reached, GEPA, MIPROv2 and BootstrapFewShotWithOptuna end after the iteration or the trial in
    flight, and return their best program as usual. In all other places the next LM call raises.

    Args:
        cost: US dollars.
        tokens: input and output tokens.
        lm_calls: answered LM calls.
        seconds: since the block began; looked at before and after each LM call.
        on_warning: called once each when 50, 80 and 100 percent of a limit are used (only for the highest, where one
            call passes several), in the thread of the LM call.

    Returns:
        A context manager for one block; its :attr:`~Budget.spent` says what has been used.

    Raises:
        ValueError: without a limit, or for a limit that is no positive number.

    Example:
        A compile that may cost five dollars::

            try:
                with dspy_otel.budget(cost=5.0) as budget:
                    program = optimizer.compile(student, trainset=rows)
            except dspy_otel.BudgetExceeded as stopped:
                program = stopped.program or student
            print(budget.spent.cost)
    """
    given: dict[str, float | None] = {COST: cost, TOKENS: tokens, LM_CALLS: lm_calls, SECONDS: seconds}
    limits = {name: allowed for name, allowed in given.items() if allowed is not None}
    if not limits:
        raise ValueError("A budget needs a limit: cost, tokens, lm_calls or seconds.")
    for name, allowed in limits.items():
        if isinstance(allowed, bool) or not isinstance(allowed, (int, float)) or not 0 < allowed < math.inf:
            raise ValueError(f"A budget's {name} must be a number above zero.")
    return Budget(limits, on_warning)


class Budget:
    """Limits of one block, and what has been used of them. Made by :func:`budget`."""

    def __init__(self, limits: dict[str, float], on_warning: Callable[[BudgetAlert], object] | None) -> None:
        """Args:
        limits: by name.
        on_warning: as :func:`budget` takes it.
        """
        self._limits = limits
        self._on_warning = on_warning
        self._totals = _Totals()
        self._alerting = threading.RLock()
        self._alerted = dict.fromkeys(limits, 0)
        self._refused: tuple[str, str] | None = None
        self._stopped = False
        self._outer: Budget | None = None
        self._started: float | None = None
        self._ended: float | None = None
        self._span: Span | None = None
        self._telemetry: Telemetry | None = None
        self._token: Token[Context] | None = None

    @property
    def spent(self) -> Spent:
        """What has been used so far, or in the whole block once that has ended."""
        now = time.monotonic() if self._ended is None else self._ended
        return self._totals.spent(0.0 if self._started is None else now - self._started)

    @property
    def exceeded(self) -> str | None:
        """The limit that has been reached: ``cost``, ``tokens``, ``lm_calls`` or ``seconds``; ``None`` if none has."""
        spent = self.spent
        return next((name for name, allowed in self._limits.items() if _percent(spent.of(name), allowed) == 100), None)

    # --- the block ----------------------------------------------------------------------------------------------------
    def __enter__(self) -> Budget:
        """Begin the block.

        Raises:
            RuntimeError: if instrumentation is off or suppressed here, for then nothing is counted; or for a second
                block.
        """
        telemetry = DSPyInstrumentor().telemetry
        if telemetry is None or not telemetry.enabled():
            raise RuntimeError(
                "A budget counts what instrumentation sees, and that is off here: "
                "call dspy_otel.instrument() or dspy_otel.configure() first."
            )
        if self._started is not None:
            raise RuntimeError("A budget is for one block: make another one.")
        surrounding = current_context()
        around = current_call_context(surrounding) or telemetry.default_call_context
        if around is None:
            telemetry.on_outermost()
        # The same call, for those inside: an Evaluate in here is still one of the optimizer's around it.
        inside = CallContext("budget", None, None) if around is None else copy.copy(around)
        outer = inside.budget
        self._outer = outer if isinstance(outer, Budget) else None
        inside.budget = self
        inside.totals = (*inside.totals, self._totals)
        self._telemetry, self._span = telemetry, get_current_span(surrounding)
        self._started = time.monotonic()
        self._token = attach(with_call_context(surrounding, inside))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        """End the block. What is raised inside goes on."""
        self._ended = time.monotonic()
        detach(self._token)
        if self._telemetry is not None and not self._telemetry.active:
            warn_once("budget", "instrumentation was switched off inside of a budget: it did not count to its end")
        with guard("budget"):
            if self._totals.unanswered_tasks > 0:
                warn_of_unanswered_tasks(self._totals)

    async def __aenter__(self) -> Budget:
        """Likewise, for ``async with``."""
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        """Likewise."""
        self.__exit__(kind, error, frames)

    # --- LM calls inside, from any thread -----------------------------------------------------------------------------
    def admit(self, call: CallContext, telemetry: Telemetry) -> None:
        """An LM call is about to begin.

        Args:
            call: its call context.
            telemetry: where alerts go.

        Raises:
            BudgetExceeded: if a limit has been reached, here or of a budget around this one, and no optimization
                inside ends by itself.
            BudgetRefused: if an earlier call has shown that the budget cannot be enforced.
        """
        if self._outer is not None:
            self._outer.admit(call, telemetry)
        if self._is_over:
            return
        self._alert(call, telemetry)  # Time passes between calls, too.
        if self._refused is not None:
            raise self._stop(BudgetRefused, *self._refused, call)
        limit = self.exceeded
        if limit is not None and self._ends_itself(call) is None:
            allowed, used = _amount(limit, self._limits[limit]), _amount(limit, self.spent.of(limit))
            raise self._stop(BudgetExceeded, limit, f"A budget of {allowed} is used up: {used}.", call)

    def settle(self, call: CallContext, telemetry: Telemetry, error: BaseException | None) -> None:
        """An LM call has ended, and the totals have what it used.

        Args:
            call: its call context.
            telemetry: where alerts go.
            error: what it raised.

        Raises:
            BudgetRefused: if its price or its tokens are limited and not known.
        """
        if self._outer is not None:
            self._outer.settle(call, telemetry, error)
        if self._is_over:
            return
        self._alert(call, telemetry)
        if self._refused is None:
            self._refused = self._unknown(call)
        if self._refused is not None and error is None:
            raise self._stop(BudgetRefused, *self._refused, call)

    # --- tasks in worker processes, where no budget holds -------------------------------------------------------------
    def admit_task(self, call: CallContext) -> None:
        """A task is about to go to a worker process: as before an LM call.

        Args:
            call: the call context that sends it.

        Raises:
            BudgetExceeded: as :meth:`admit`.
            BudgetRefused: likewise.
        """
        if self._telemetry is not None:
            self.admit(call, self._telemetry)

    def settle_task(self, call: CallContext) -> None:
        """A task has handed back what it used, in any thread: alerts are made, and what must be raised waits.

        Args:
            call: the call context that has sent it.
        """
        if self._telemetry is not None:
            self.settle(call, self._telemetry, _NOT_HERE)

    def must_stop(self) -> bool:
        """Whether a limit has been reached, here or of a budget around this one."""
        return self.exceeded is not None or (self._outer is not None and self._outer.must_stop())

    @property
    def _is_over(self) -> bool:
        """The block has ended. Calls that were waiting when it was stopped are stopped all the same."""
        return self._ended is not None and not self._stopped

    def _unknown(self, call: CallContext) -> tuple[str, str] | None:
        """The limit that cannot be enforced, and why."""
        state = call.state
        model = plain_name(state.description.model or "") if isinstance(state, LMCallState) else ""
        spent = self.spent
        if COST in self._limits and spent.unpriced_calls:
            return COST, (
                f"A budget of {_amount(COST, self._limits[COST])} cannot be enforced: DSPy knows no price of an LM call"
                f"{f' ({model})' if model else ''}. Limit tokens or lm_calls instead."
            )
        if TOKENS in self._limits and spent.uncounted_calls:
            return TOKENS, (
                f"A budget of {_amount(TOKENS, self._limits[TOKENS])} cannot be enforced: an LM call"
                f"{f' ({model})' if model else ''} reports no tokens. Limit lm_calls instead."
            )
        return None

    def _alert(self, call: CallContext, telemetry: Telemetry) -> None:
        """Say once each that 50, 80 or 100 percent of a limit are used, before any thread raises for that."""
        with self._alerting:  # The callback may call an LM, in this thread.
            spent = self.spent
            for limit, allowed in self._limits.items():
                percent = _percent(spent.of(limit), allowed)
                if percent > self._alerted[limit]:
                    self._alerted[limit] = percent
                    alert = BudgetAlert(limit, percent, spent.of(limit), allowed)
                    with _ALERT:
                        self._record(alert, call, telemetry)
                    self._call_back(alert)

    def _call_back(self, alert: BudgetAlert) -> None:
        if self._on_warning is None:
            return
        try:
            self._on_warning(alert)
        except Exception as error:
            warn_once("on_warning", "on_warning of a budget has raised %s", plain_name(type(error).__name__))

    def _record(self, alert: BudgetAlert, call: CallContext, telemetry: Telemetry) -> None:
        """Alert in the log, on the span of the optimization, or else of the outermost call, and as a metric."""
        tracker = self._ends_itself(call) if alert.percent == 100 else None
        with contextlib.suppress(Exception):  # a handler of the user's
            ends = "" if tracker is None else f"; {tracker.run.name} ends with the best program it has"
            _LOG.warning("dspy-otel: %s%s", alert, ends)
        attributes: Attributes = {semconv.BUDGET_LIMIT: alert.limit, semconv.BUDGET_PERCENT: alert.percent}
        telemetry.metrics.budget_alerts.add(1, attributes)
        inside = list(self._inside(call))
        compiles = [context for context in inside if isinstance(context.state, CompileState)]
        spans = [context.span for context in compiles or inside if context.span is not None]
        span = next((span for span in reversed(spans) if span.is_recording()), self._span)
        event: Attributes = {
            **attributes,
            semconv.BUDGET_SPENT: alert.spent,
            semconv.BUDGET_ALLOWED: float(alert.allowed),
        }
        telemetry.add_event(span, semconv.EVENT_BUDGET_ALERT, event)

    # --- optimizations inside -----------------------------------------------------------------------------------------
    def _covers(self, call: CallContext) -> bool:
        """Whether a call is inside the block."""
        around = call.budget
        while isinstance(around, Budget):
            if around is self:
                return True
            around = around._outer
        return False

    def _inside(self, call: CallContext | None) -> Iterator[CallContext]:
        """The calls inside the block, from this one to the outermost; the last may be the one around the block."""
        while call is not None and self._covers(call):
            yield call
            call = call.parent

    def _trackers(self, call: CallContext) -> list[Tracker]:
        """Of the optimizations that ``call`` is inside of, from the innermost to the outermost."""
        return [each.state.tracker for each in self._inside(call) if isinstance(each.state, CompileState)]

    def _ends_itself(self, call: CallContext) -> Tracker | None:
        """The tracker of an optimization in the block that ends by itself, with a program to return."""
        for tracker in self._trackers(call):
            if tracker.ends_itself and tracker.run.best is not None and self._covers(tracker.run.context):
                return tracker
        return None

    def _stop(self, kind: type[_Stopped], limit: str, message: str, call: CallContext) -> _Stopped:
        """What ends the block here, with the best program of the optimization that ``call`` is inside of."""
        self._stopped = True
        trackers = self._trackers(call)
        best = next((kept for tracker in reversed(trackers) if (kept := tracker.run.kept) is not None), None)
        if best is None:
            nothing = " No candidate has been scored yet." if trackers else ""
            return kind(message + nothing, limit=limit, spent=self.spent)
        trial = best.trial
        return kind(
            f"{message} The program of this exception is the best so far: "
            f"trial {trial.number}, score {trial.score:.4g}.",
            limit=limit,
            spent=self.spent,
            program=best.program,
            trial=trial.number,
            score=trial.score,
            optimizer=best.optimizer,
        )


class _Totals(Totals):
    """Sums over LM calls, as what is spent."""

    __slots__ = ()

    def spent(self, seconds: float) -> Spent:
        """The sums so far."""
        with self._lock:
            return Spent(
                cost=self.cost,
                tokens=(self.input_tokens or 0) + (self.output_tokens or 0),
                lm_calls=self.calls - self.cache_hits,
                seconds=seconds,
                unpriced_calls=self.unpriced,
                uncounted_calls=self.uncounted,
                unanswered_tasks=self.unanswered_tasks,
            )


def _percent(spent: float, allowed: float) -> int:
    """The highest of 50, 80 and 100 percent of ``allowed`` that ``spent`` has reached; 0 before the first one."""
    return max((each for each in _PERCENTS if spent >= allowed * each / 100 * (1 - _ROUNDING)), default=0)


def _amount(limit: str, amount: float) -> str:
    """An amount with its unit."""
    if limit == COST:
        return f"${amount:,.2f}" if amount >= 0.1 else f"${amount:.4g}"
    if limit == SECONDS:
        return f"{amount:.4g} s"
    unit = "token" if limit == TOKENS else "LM call"
    return f"{amount:,.0f} {unit}{'' if amount == 1 else 's'}"
