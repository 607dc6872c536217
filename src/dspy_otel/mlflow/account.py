"""What became of everything that a program produced for MLflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

SPANS, TRACES, SCORES, RUNS, ARTIFACTS, LINKS = "spans", "traces", "scores", "runs", "artifacts", "links of traces"
EXPECTATIONS: Final = "expectations"
KINDS: Final = (SPANS, TRACES, RUNS, SCORES, EXPECTATIONS, ARTIFACTS)
"""Kinds whose counts add up."""


@dataclass
class Account:
    """Counts by kind. For each of ``KINDS``, written, kept, refused and dropped add up to produced.

    While a program runs, the difference is what is pending. :attr:`kept` is set when the program ends.

    Attributes:
        produced: by the program: spans that ended, traces that began with them, scores, expectations and runs that
            follow from them, and the artifacts of those runs, once for each content.
        written: MLflow has it; once the program has ended, only complete runs count.
        kept: it is in the journal, for ``replay``.
        refused: MLflow does not take it. Spans, and the scores and expectations that follow from them, are set
            aside in the journal.
        dropped: it is lost, because there was no room or no disk.
    """

    produced: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def add_undelivered(self, what: str, count: int, on_disk: bool) -> None:
        """Count what MLflow does not have when the program ends: it is kept, or lost.

        Args:
            what: one of ``KINDS``.
            count: how many.
            on_disk: whether the journal has what it follows from.
        """
        (self.kept if on_disk else self.dropped)[what] += count

    def waiting(self, what: str) -> int:
        """How many of a kind are pending: 0 once the program has ended."""
        return self.produced[what] - sum(part[what] for part in (self.written, self.kept, self.refused, self.dropped))

    @property
    def incomplete(self) -> bool:
        """Whether MLflow lacks something."""
        return any(count for part in (self.kept, self.refused, self.dropped) for count in part.values())

    def line(self, place: Path | None, set_aside: bool) -> str:
        """The counts in one line for the log.

        Args:
            place: where the journal is, if there is one.
            set_aside: whether something that was refused is in it.
        """
        line = f"MLflow: written: {_listed(self.written) or 'nothing'}"
        # Kept spans already stand for kept traces.
        if kept := _listed({what: count for what, count in self.kept.items() if what != TRACES}):
            line += f"; not written: {kept}, kept in {place}: deliver them with `dspy-otel replay`"
        if refused := _listed(self.refused):
            line += f"; refused: {refused}" + (f", set aside in {place}" if set_aside else "")
        if dropped := _listed(self.dropped):
            line += f"; not written: {dropped}, lost"
        return line


def _listed(counts: Mapping[str, int]) -> str:
    shown = [*KINDS, *(what for what in counts if what not in KINDS)]
    return ", ".join(f"{counts[what]} {what}" for what in shown if counts.get(what))
