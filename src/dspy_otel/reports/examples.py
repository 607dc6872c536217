"""The result of each example: the initial program against the best one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dspy_otel.record.model import Example, Optimization, number


@dataclass(frozen=True, slots=True)
class Compared:
    """One example, with the baseline and with the best program. A score is None when the example raised."""

    before: Example
    after: Example

    @property
    def gain(self) -> float:
        """How much better the best program did; a failed example counts less than any score."""
        before, after = number(self.before.score), number(self.after.score)
        if before is None or after is None:
            return (after is not None) - (before is not None)
        return after - before


def compared(optimization: Optimization) -> list[Compared]:
    """The examples that both the baseline and the winner were scored on; the best trial so far while there is none."""
    examples = optimization.examples
    baselines = [trial.number for trial in optimization.trials if trial.kind == "baseline"]
    baseline = next((number for number in baselines if number in examples), None)
    winner = optimization.winner
    if winner is None:
        winner = next((trial.number for trial in reversed(optimization.trials) if trial.is_best), None)
    if baseline is None or winner is None or winner == baseline or winner not in examples:
        return []
    return compare(examples[baseline], examples[winner])


def compare(before: Iterable[Example], after: Iterable[Example]) -> list[Compared]:
    """The examples that are in two evaluations."""
    known = by_example(before)
    found = [Compared(known[key], one) for key, one in by_example(after).items() if key in known]
    return sorted(found, key=lambda one: -1 if one.after.index is None else one.after.index)


def by_example(examples: Iterable[Example]) -> dict[tuple[str | int, int], Example]:
    """Examples by their id, or else their place; equal examples are distinguished by their order."""
    found: dict[tuple[str | int, int], Example] = {}
    seen: dict[str | int, int] = {}
    for example in examples:
        key = example.id if example.id is not None else example.index
        if key is None:
            continue
        seen[key] = place = seen.get(key, -1) + 1
        found[key, place] = example
    return found
