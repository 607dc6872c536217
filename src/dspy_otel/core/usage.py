"""Running totals of LM calls, kept on the operations that enclose them."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from dspy_otel import semconv
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.internal_errors import warn_once


class LMUsage(NamedTuple):
    """What one LM call used. Unknown values are ``None``, never zero.

    Attributes:
        input_tokens: prompt tokens, cached ones included.
        output_tokens: completion tokens, reasoning ones included.
        cost: billed US dollars; 0 for an answer from DSPy's cache.
        cache_hit: answered from DSPy's own cache.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: float | None = None
    cache_hit: bool = False


def add_usages(first: LMUsage, second: LMUsage) -> LMUsage:
    """What both used. A number that only one of them knows is the sum so far."""

    def add(one: Any, other: Any) -> Any:
        return other if one is None else one if other is None else one + other

    return LMUsage(
        add(first.input_tokens, second.input_tokens),
        add(first.output_tokens, second.output_tokens),
        add(first.cost, second.cost),
        first.cache_hit and second.cache_hit,
    )


class Sums(NamedTuple):
    """What several LM calls used together, as numbers that another process can send.

    Attributes:
        calls: how many were answered.
        cache_hits: how many of them by DSPy's own cache.
        priced: how many have a price.
        unpriced: how many have none, and did not come from the cache.
        uncounted: how many report no tokens, and did not come from the cache.
        input_tokens: of those that report them; ``None`` if none does.
        output_tokens: likewise.
        cost: in US dollars, of those that have a price.
    """

    calls: int = 0
    cache_hits: int = 0
    priced: int = 0
    unpriced: int = 0
    uncounted: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: float = 0.0

    def as_one_call(self) -> LMUsage:
        """The same as if one call had used it."""
        cost = self.cost if self.priced else None
        return LMUsage(self.input_tokens, self.output_tokens, cost, self.cache_hits == self.calls)


class Totals:
    """Sums over LM calls, from any thread.

    Args:
        by_role: keep sums for each role (task, proposer, ...) as well.

    Attributes:
        sent_tasks: tasks inside that went to worker processes and were to hand back what they used.
        answered_tasks: how many of them have done so.
    """

    __slots__ = (
        "_lock",
        "answered_tasks",
        "cache_hits",
        "calls",
        "cost",
        "input_tokens",
        "output_tokens",
        "priced",
        "roles",
        "sent_tasks",
        "uncounted",
        "unpriced",
    )

    def __init__(self, by_role: bool = False) -> None:
        self._lock = threading.Lock()
        self.roles: dict[str, Totals] | None = {} if by_role else None
        self.calls = 0
        self.cache_hits = 0
        self.priced = 0
        self.unpriced = 0
        self.uncounted = 0
        self.sent_tasks = 0
        self.answered_tasks = 0
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.cost = 0.0

    def add(self, usage: LMUsage, role: str | None = None) -> None:
        """Count one finished LM call.

        Args:
            usage: what it used.
            role: what it was for, if that is known.
        """
        inputs, outputs, cost, cache_hit = usage
        counted: tuple[Totals, ...] = (self,)
        with self._lock:  # one for all: this runs several times for each LM call
            if self.roles is not None and role is not None:
                own = self.roles.get(role)
                counted = self, self._new_role(role) if own is None else own
            for totals in counted:
                totals.calls += 1
                if cache_hit:
                    totals.cache_hits += 1
                else:
                    if cost is None:
                        totals.unpriced += 1
                    if inputs is None and outputs is None:
                        totals.uncounted += 1
                if cost is not None:
                    totals.priced += 1
                    totals.cost += cost
                if inputs is not None:
                    totals.input_tokens = (totals.input_tokens or 0) + inputs
                if outputs is not None:
                    totals.output_tokens = (totals.output_tokens or 0) + outputs

    def add_sums(self, sums: Sums, role: str | None = None) -> None:
        """Count LM calls of another process.

        Args:
            sums: what they used.
            role: what all of them were for, if that is known.
        """
        with self._lock:
            counted: tuple[Totals, ...] = (self,)
            if self.roles is not None and role is not None:
                counted = self, self.roles.get(role) or self._new_role(role)
            for totals in counted:
                totals.calls += sums.calls
                totals.cache_hits += sums.cache_hits
                totals.priced += sums.priced
                totals.unpriced += sums.unpriced
                totals.uncounted += sums.uncounted
                totals.cost += sums.cost
                if sums.input_tokens is not None:
                    totals.input_tokens = (totals.input_tokens or 0) + sums.input_tokens
                if sums.output_tokens is not None:
                    totals.output_tokens = (totals.output_tokens or 0) + sums.output_tokens

    def sums(self) -> Sums:
        """What has been counted so far."""
        with self._lock:
            return Sums(
                self.calls,
                self.cache_hits,
                self.priced,
                self.unpriced,
                self.uncounted,
                self.input_tokens,
                self.output_tokens,
                self.cost,
            )

    def count_tasks(self, sent: int = 0, answered: int = 0) -> None:
        """Count tasks that went to worker processes, and those of which usage has come back."""
        with self._lock:
            self.sent_tasks += sent
            self.answered_tasks += answered

    @property
    def unanswered_tasks(self) -> int:
        """How many tasks that went to worker processes have handed nothing back, so far.

        Never below zero: a worker says in one record that it has sent a task, and in another, which may arrive alone,
        that this task has answered.
        """
        return max(self.sent_tasks - self.answered_tasks, 0)

    def _new_role(self, role: str) -> Totals:
        """The sums of a role that shows for the first time. Called with the lock, which they share."""
        assert self.roles is not None
        own = self.roles[role] = Totals()
        own._lock = self._lock
        return own

    def by_role(self) -> dict[str, Totals]:
        """The sums of each role that occurred."""
        with self._lock:
            return dict(self.roles or {})

    def attributes(self) -> Attributes:
        """The totals as ``dspy.usage.*`` (and ``dspy.usage.<role>.*``); nothing at all when no LM was called.

        With tasks in worker processes, their number, and how many have handed nothing back, which is logged too.
        """
        result = self._attributes(semconv.USAGE_PREFIX)
        if self.sent_tasks:
            result[semconv.USAGE_WORKER_TASKS] = self.sent_tasks
            if self.unanswered_tasks > 0:
                result[semconv.USAGE_UNANSWERED_TASKS] = self.unanswered_tasks
                warn_of_unanswered_tasks(self)
        if self.roles:
            for role, totals in self.by_role().items():
                result.update(totals._attributes(f"{semconv.USAGE_PREFIX}{role}."))
        return result

    def _attributes(self, prefix: str) -> Attributes:
        with self._lock:
            if not self.calls:
                return {}
            result: Attributes = {semconv.USAGE_LM_CALLS: self.calls, semconv.USAGE_CACHE_HITS: self.cache_hits}
            if self.input_tokens is not None:
                result[semconv.USAGE_INPUT_TOKENS] = self.input_tokens
            if self.output_tokens is not None:
                result[semconv.USAGE_OUTPUT_TOKENS] = self.output_tokens
            if self.priced:
                result[semconv.USAGE_COST] = self.cost
            if self.unpriced:
                result[semconv.USAGE_UNPRICED_CALLS] = self.unpriced
        if prefix == semconv.USAGE_PREFIX:
            return result
        own = len(semconv.USAGE_PREFIX)
        return {prefix + key[own:]: value for key, value in result.items()}


class UsageOfTask(Totals):
    """What a task has used since it was last taken, by role; ``None`` for LM calls without one."""

    __slots__ = ("_by_role",)

    def __init__(self) -> None:
        super().__init__()
        self._by_role: dict[str | None, Totals] = {}

    def add(self, usage: LMUsage, role: str | None = None) -> None:
        """Count one finished LM call."""
        with self._lock:
            self._of(role).add(usage)

    def add_sums(self, sums: Sums, role: str | None = None) -> None:
        """Count LM calls of a task that this one has sent further."""
        with self._lock:
            self._of(role).add_sums(sums)

    def _of(self, role: str | None) -> Totals:
        own = self._by_role.get(role)
        if own is None:
            own = self._by_role[role] = Totals()
        return own

    def take(self) -> tuple[dict[str | None, Sums], tuple[int, int]]:
        """What was used since the last time by role, and tasks that were sent further, and those that have answered."""
        with self._lock:
            used, self._by_role = self._by_role, {}
            tasks = self.sent_tasks, self.answered_tasks
            self.sent_tasks = self.answered_tasks = 0
        return {role: totals.sums() for role, totals in used.items()}, tasks


def warn_of_unanswered_tasks(totals: Totals) -> None:
    """Say once that tasks in worker processes have handed nothing back."""
    warn_once(
        "unanswered tasks",
        "%d of %d tasks that were sent to worker processes have handed no usage back (a worker was lost, or they still "
        "run): what they have used is missing from the totals",
        totals.unanswered_tasks,
        totals.sent_tasks,
    )
