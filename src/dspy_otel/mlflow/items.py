"""Items: writing one part of a run or trace, counting it, and trying it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from dspy_otel.mlflow.account import Account
from dspy_otel.mlflow.retry import Backoff, ExportError, Verdict

ATTEMPTS_BEFORE_SPLIT: Final = 3
"""Failures of one item before the worker finds out, by its parts or by others, whether the item is the cause."""


class Items:
    """Writes links, scores, artifacts and values of runs one by one. Several threads may use it.

    Args:
        account: where items are counted.
        report: called with a cause and a message when an item is left out.
        abandoned: whether the process ends and nothing may be written any more.
        clock: seconds, monotonic.

    Attributes:
        successes: by kind.
    """

    def __init__(
        self,
        account: Account,
        report: Callable[[str, str], object],
        abandoned: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._account = account
        self._report = report
        self._abandoned = abandoned
        self._clock = clock
        self._backoffs: dict[tuple[str, str], _ItemBackoff] = {}
        self.successes: Counter[str] = Counter()

    @property
    def failing(self) -> list[Backoff]:
        """The backoffs of items that failed and are tried again."""
        return list(self._backoffs.values())

    def is_due(self, kind: str, name: str) -> bool:
        """Whether an item may be tried now."""
        backoff = self._backoffs.get((kind, name))
        return backoff is None or backoff.ready

    def failed(self, kind: str, name: str, error: ExportError) -> _ItemBackoff:
        """Record a failure of an item."""
        backoff = self._backoffs.get((kind, name))
        if backoff is None:
            backoff = self._backoffs[kind, name] = _ItemBackoff(self._clock)
        backoff.failed(error)
        return backoff

    def succeeded(self, kind: str, name: str) -> None:
        """Forget the failures of an item."""
        self._backoffs.pop((kind, name), None)

    def write(self, kind: str, name: str, call: Callable[[], object], count: int = 1) -> bool:
        """Write and count one item; False when MLflow refuses it for good.

        Raises:
            ExportError: it has to be tried again.
        """
        if self._abandoned():
            raise ExportError("ended", "The program has ended.", unavailable=True)
        try:
            call()
        except ExportError as error:
            if error.unavailable:
                raise
            item = self.failed(kind, name, error)
            if error.verdict is Verdict.LOST or (
                error.verdict is Verdict.LATER and not item.is_refused(self.successes[kind])
            ):
                raise
            self.succeeded(kind, name)
            self._account.refused[kind] += count
            self._report(f"refused {error.cause}", f"{kind}: {error} This is left out.")
            return False
        self.succeeded(kind, name)
        self.successes[kind] += count
        self._account.written[kind] += count
        return True


class _ItemBackoff(Backoff):
    """Backoff of one item, which also counts its failures while others of its kind got through."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._successes_before = -1
        self._failed_alone = 0

    def is_refused(self, others: int) -> bool:
        """Whether the item itself is the cause; called after each failure.

        Each success counts once: successes before an outage prove nothing during the outage.

        Args:
            others: how many of its kind have got through so far.
        """
        self._failed_alone += others > self._successes_before >= 0
        self._successes_before = others
        return self._failed_alone >= ATTEMPTS_BEFORE_SPLIT
