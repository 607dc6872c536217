"""What became of everything that a program produced for MLflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

SPANS, TRACES, SCORES, RUNS, ARTIFACTS, LINKS = "spans", "traces", "scores", "runs", "artifacts", "links of traces"
KINDS: Final = (SPANS, TRACES, RUNS, SCORES, ARTIFACTS)
"""What is accounted for in full."""


@dataclass
class Account:
    """Counts by kind. For each of ``KINDS``: what is written, kept, refused and dropped is together what was produced.

    While a program runs, the difference is what waits. :attr:`kept` is set when it ends.

    Attributes:
        produced: by the program: spans that ended, traces that began with them, scores and runs that follow from them,
            and the artifacts of those runs, each time that one gets another content.
        written: MLflow has it; once the program has ended, a run counts when it lacks nothing.
        kept: is in the journal, for ``replay``.
        refused: MLflow does not take it. Spans, and the scores that follow from them, are set aside in the journal.
        dropped: is lost, for there was no room or no disk.
    """

    produced: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def leave(self, what: str, count: int, on_disk: bool) -> None:
        """The program ends, and MLflow has not got something: it is kept, or lost.

        Args:
            what: one of ``KINDS``.
            count: how many.
            on_disk: whether the journal has what it follows from.
        """
        (self.kept if on_disk else self.dropped)[what] += count

    def waiting(self, what: str) -> int:
        """How many of a kind nothing has become of yet: 0 once the program has ended."""
        return self.produced[what] - sum(part[what] for part in (self.written, self.kept, self.refused, self.dropped))

    @property
    def bad(self) -> bool:
        """Whether MLflow has not got something."""
        return any(count for part in (self.kept, self.refused, self.dropped) for count in part.values())

    def line(self, place: Path | None, set_aside: bool) -> str:
        """All of it for the log, in one line.

        Args:
            place: where the journal is, if there is one.
            set_aside: whether something that was refused is in it.
        """
        said = f"MLflow: written: {_listed(self.written) or 'nothing'}"
        # Where there are spans there are traces: what is left to deliver is named once.
        if kept := _listed({what: count for what, count in self.kept.items() if what != TRACES}):
            said += f"; not written: {kept}, kept in {place}: deliver them with `dspy-otel replay`"
        if refused := _listed(self.refused):
            said += f"; refused: {refused}" + (f", set aside in {place}" if set_aside else "")
        if dropped := _listed(self.dropped):
            said += f"; not written: {dropped}, lost"
        return said


def _listed(counts: Mapping[str, int]) -> str:
    shown = [*KINDS, *(what for what in counts if what not in KINDS)]
    return ", ".join(f"{counts[what]} {what}" for what in shown if counts.get(what))
