"""Running totals of LM calls, kept on the operations that enclose them."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from dspy_otel import semconv
from dspy_otel.core.attributes import Attributes


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


class Totals:
    """Sums over LM calls, from any thread.

    Args:
        by_role: keep sums for each role (task, proposer, ...) as well.
    """

    __slots__ = (
        "_lock",
        "cache_hits",
        "calls",
        "cost",
        "input_tokens",
        "output_tokens",
        "priced",
        "roles",
        "unpriced",
    )

    def __init__(self, by_role: bool = False) -> None:
        self._lock = threading.Lock()
        self.roles: dict[str, Totals] | None = {} if by_role else None
        self.calls = 0
        self.cache_hits = 0
        self.priced = 0
        self.unpriced = 0
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
                if own is None:
                    own = self.roles[role] = Totals()
                    own._lock = self._lock
                counted = self, own
            for totals in counted:
                totals.calls += 1
                if cache_hit:
                    totals.cache_hits += 1
                elif cost is None:
                    totals.unpriced += 1
                if cost is not None:
                    totals.priced += 1
                    totals.cost += cost
                if inputs is not None:
                    totals.input_tokens = (totals.input_tokens or 0) + inputs
                if outputs is not None:
                    totals.output_tokens = (totals.output_tokens or 0) + outputs

    def by_role(self) -> dict[str, Totals]:
        """The sums of each role that occurred."""
        with self._lock:
            return dict(self.roles or {})

    def attributes(self) -> Attributes:
        """The totals as ``dspy.usage.*`` (and ``dspy.usage.<role>.*``); nothing at all when no LM was called."""
        result = self._attributes(semconv.USAGE_PREFIX)
        if self.roles:
            for role, totals in self.by_role().items():
                result.update(totals._attributes(f"{semconv.USAGE_PREFIX}{role}."))
        return result

    def _attributes(self, prefix: str) -> Attributes:
        with self._lock:
            if not self.calls:
                return {}
            known: dict[str, int | float | None] = {
                semconv.USAGE_LM_CALLS: self.calls,
                semconv.USAGE_CACHE_HITS: self.cache_hits,
                semconv.USAGE_INPUT_TOKENS: self.input_tokens,
                semconv.USAGE_OUTPUT_TOKENS: self.output_tokens,
                semconv.USAGE_COST: self.cost if self.priced else None,
                semconv.USAGE_UNPRICED_CALLS: self.unpriced or None,
            }
        if prefix == semconv.USAGE_PREFIX:
            return {key: value for key, value in known.items() if value is not None}
        own = len(semconv.USAGE_PREFIX)
        return {prefix + key[own:]: value for key, value in known.items() if value is not None}
