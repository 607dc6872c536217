"""Running totals of LM calls, kept on the operations that enclose them."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from .. import semconv as names
from .attributes import Attributes


@dataclass(frozen=True)
class LMUsage:
    """What one LM call used. ``None`` is "not known", never zero.

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


class Totals:
    """Sums over LM calls, from any thread."""

    __slots__ = ("_lock", "cache_hits", "calls", "cost", "input_tokens", "output_tokens", "priced", "unpriced")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls = 0
        self.cache_hits = 0
        self.priced = 0
        self.unpriced = 0
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.cost = 0.0

    def add(self, usage: LMUsage) -> None:
        """Count one finished LM call."""
        with self._lock:
            self.calls += 1
            if usage.cache_hit:
                self.cache_hits += 1
            elif usage.cost is None:
                self.unpriced += 1
            if usage.cost is not None:
                self.priced += 1
                self.cost += usage.cost
            if usage.input_tokens is not None:
                self.input_tokens = (self.input_tokens or 0) + usage.input_tokens
            if usage.output_tokens is not None:
                self.output_tokens = (self.output_tokens or 0) + usage.output_tokens

    def attributes(self) -> Attributes:
        """The totals as ``dspy.usage.*``; nothing at all when no LM was called."""
        with self._lock:
            if not self.calls:
                return {}
            result: Attributes = {names.USAGE_LM_CALLS: self.calls, names.USAGE_CACHE_HITS: self.cache_hits}
            if self.input_tokens is not None:
                result[names.USAGE_INPUT_TOKENS] = self.input_tokens
            if self.output_tokens is not None:
                result[names.USAGE_OUTPUT_TOKENS] = self.output_tokens
            if self.priced:
                result[names.USAGE_COST] = self.cost
            if self.unpriced:
                result[names.USAGE_UNPRICED_CALLS] = self.unpriced
            return result
