"""What an optimization has used so far, from its spans, whatever becomes of the traces of its examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan

from dspy_otel import semconv as sc

_LM_OPERATIONS: Final = frozenset({sc.OPERATION_CHAT, sc.OPERATION_TEXT_COMPLETION, sc.OPERATION_EMBEDDINGS})
_PREFIX: Final = sc.USAGE_PREFIX


class Spending:
    """Running sums for each optimization that is under way, by role too.

    Trials and phases carry complete totals of what they enclose, also of examples that leave no trace; an LM call
    carries its own. What has ended is counted once: with the outermost span that has ended and has a total. The traces
    of examples themselves are not looked at. Used by one thread at a time.
    """

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._traces: set[int] = set()

    def begin(self, span: ReadableSpan) -> None:
        """A compile has started."""
        run = (span.attributes or {}).get(sc.OPTIMIZER_RUN_ID)
        if run is not None and span.context is not None:
            self._places[str(run)] = _Place(span.context.trace_id)
            self._traces = {place.trace_id for place in self._places.values()}

    def add(self, span: ReadableSpan) -> None:
        """A span of ours has ended."""
        at = span.attributes or {}
        run = at.get(sc.OPTIMIZER_RUN_ID)
        if run is None:
            return
        for key in {str(run), str(at.get(sc.OPTIMIZER_ROOT_RUN_ID, run)), str(at.get(sc.OPTIMIZER_PARENT_RUN_ID, run))}:
            place = self._places.get(key)
            if place is not None and span.context is not None and span.context.trace_id == place.trace_id:
                place.add(span, at)

    def of(self, run: str) -> dict[str, float]:
        """The sums so far."""
        place = self._places.get(run)
        return {} if place is None else place.total()

    def forget(self, run: str) -> None:
        """The optimization is over."""
        self._places.pop(run, None)
        self._traces = {place.trace_id for place in self._places.values()}

    def watches(self, span: ReadableSpan) -> bool:
        """Whether a span is part of the trace of an optimization that is under way, and not of an example's."""
        context = span.context
        return context is not None and context.trace_id in self._traces


class _Place:
    """Sums of what has ended below each span that is still open."""

    def __init__(self, trace_id: int) -> None:
        self.trace_id = trace_id
        self._below: dict[int, dict[str, float]] = {}

    def add(self, span: ReadableSpan, at: Mapping[str, Any]) -> None:
        below = self._below.pop(span.context.span_id, {})
        used = usage_of(at)
        if not used or (not _by_role(used) and used.get("lm_calls") == below.get("lm_calls")):
            used = below  # it says the same, by role
        if not used:
            return
        above = self._below.setdefault(0 if span.parent is None else span.parent.span_id, {})
        for name, value in used.items():
            above[name] = above.get(name, 0) + value

    def total(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for sums in self._below.values():
            for name, value in sums.items():
                total[name] = total.get(name, 0) + value
        return total


def usage_of(at: Mapping[str, Any]) -> dict[str, float]:
    """What a span says was used: in all it encloses, or by itself if it is an LM call; empty when it says nothing."""
    if at.get(sc.GEN_AI_OPERATION_NAME) not in _LM_OPERATIONS:
        return {key[len(_PREFIX) :]: value for key, value in at.items() if key.startswith(_PREFIX)}
    used: dict[str, float] = {"lm_calls": 1, "cache_hits": int(at.get(sc.LM_CACHE_HIT) is True)}
    for key, name in (
        (sc.GEN_AI_USAGE_INPUT_TOKENS, "input_tokens"),
        (sc.GEN_AI_USAGE_OUTPUT_TOKENS, "output_tokens"),
        (sc.LM_COST, "cost"),
    ):
        value = at.get(key)
        if isinstance(value, (int, float)):
            used[name] = value
    if "cost" not in used and not used["cache_hits"]:
        used["unpriced_calls"] = 1
    role = at.get(sc.LM_ROLE)
    return used if role is None else {**used, **{f"{role}.{name}": value for name, value in used.items()}}


def _by_role(used: Mapping[str, float]) -> bool:
    return any("." in name for name in used)
