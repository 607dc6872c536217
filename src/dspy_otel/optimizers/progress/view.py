"""What is shown of one optimization, and the words for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dspy_otel.optimizers.run import Run
from dspy_otel.record.addresses import Address, address_of

RUNNING: Final = "running"
FINISHED: Final = "finished"
_BAR: Final = 8
_SHORTEST_NAME: Final = 8
_MARKS: Final = {FINISHED: "✓"}


@dataclass(frozen=True, slots=True)
class View:
    """An optimization as it is shown.

    Attributes:
        id: of the run.
        name: of the optimizer.
        outcome: ``running``, ``finished``, ``failed`` or ``interrupted``.
        phase: what it is doing; empty when it is over.
        trials: scored trials.
        planned: trials that it is going to make; None when that is not known.
        examples: evaluated examples.
        planned_examples: the most that it may evaluate; None when that is not known.
        share: how much of it is done, from 0 to 1; None when that is not known.
        baseline: score of the initial program.
        best: the best score that decides.
        calls: LM calls.
        cost: US dollars; None when no call has a price.
        elapsed: seconds since it began.
        left: seconds that are left, at the same rate; None when that is not known.
        address: where a backend shows it.
    """

    id: str
    name: str
    outcome: str
    phase: str
    trials: int
    planned: int | None
    examples: int
    planned_examples: int | None
    share: float | None
    baseline: float | None
    best: float | None
    calls: int
    cost: float | None
    elapsed: float
    left: float | None
    address: Address | None


def view_of(run: Run, innermost: Run, elapsed: float, outcome: str = RUNNING) -> View:
    """What is shown of a run.

    Args:
        run: an outermost one.
        innermost: the one that is running inside it, or itself.
        elapsed: seconds since it began.
        outcome: how it ended.
    """
    running = outcome == RUNNING
    inside = next(reversed(list(innermost.phases)), None) or (innermost.name if innermost is not run else None)
    share = share_done(run)
    return View(
        run.id,
        run.name,
        outcome,
        (inside or ("search" if run.finished else "start")) if running else "",
        len(run.finished),
        run.planned,
        run.examples,
        run.planned_examples,
        share,
        run.baseline,
        None if run.best is None else run.best.score,
        run.totals.calls,
        run.totals.cost if run.totals.priced else None,
        elapsed,
        seconds_left(elapsed, share) if running else None,
        address_of(run.id),
    )


def share_done(run: Run) -> float | None:
    """How much of a run is done, from 0 to 1; ``None`` if unknown. Trials of earlier processes do not count."""
    if run.planned is not None:
        done, planned = len(run.finished) - run.restored_trials, run.planned - run.restored_trials
    elif run.planned_examples is not None:
        done, planned = run.examples - run.restored_examples, run.planned_examples - run.restored_examples
    else:
        return None
    return min(done / planned, 1.0) if planned > 0 else None


def seconds_left(elapsed: float, share: float | None) -> float | None:
    """Time left if the rest goes on at the same rate; ``None`` if the share done is unknown or zero."""
    return elapsed * (1 - share) / share if share else None


# --- words ------------------------------------------------------------------------------------------------------------
def line(view: View, width: int, unicode: bool = True) -> str:
    """One line of at most ``width`` characters: what matters less is left out where there is no room.

    Args:
        view: a running optimization.
        width: characters.
        unicode: whether more than ASCII can be shown.
    """
    best = "" if view.best is None else f"best {score_text(view.best)}"
    better = view.best is not None and view.baseline is not None and view.best > view.baseline
    gain = f"{best} (from {score_text(view.baseline)})" if better and view.baseline is not None else ""
    left = "" if view.left is None else f"{clock(view.left)} left"
    done = progress_text(view) if view.trials or view.share is not None else ""
    filled = bar_text(view.share, unicode)
    head = " ".join(part for part in (view.name, done) if part)
    with_bar = " ".join(part for part in (view.name, filled, done) if part)
    spend = spend_text(view)
    ways = (
        (with_bar, view.phase, gain or best, spend, left),
        (head, view.phase, gain or best, spend, left),
        (head, view.phase, gain or best, left),
        (head, view.phase, best, left),
        (head, best, left),
        (head, best or view.phase),
        (head,),
    )
    return _first_that_fits(ways, width, unicode)


def _first_that_fits(ways: Sequence[Sequence[str]], width: int, unicode: bool) -> str:
    between = " · " if unicode else " | "
    texts = [between.join(part for part in parts if part) for parts in ways]
    return next((text for text in texts if len(text) <= width), texts[-1][:width])


def closing(view: View, width: int, unicode: bool = True) -> str:
    """The line that stays, of at most ``width`` characters: score, gain, trials, spend, time."""
    found = score_and_gain(view)
    room = max(width - len(found) - 4, _SHORTEST_NAME)  # what was found matters more than the whole name
    name = view.name if len(view.name) <= room else view.name[: room - 1] + ("…" if unicode else ".")
    if view.outcome == FINISHED:
        text = f"{name}: {found}" if found else f"{name}: finished"
    else:
        text = f"{name} {view.outcome} after {progress_text(view)}" + (f": {found}" if found else "")
    text = f"{_MARKS.get(view.outcome, '✗') if unicode else '*'} {text}"
    trials = progress_text(view) if view.outcome == FINISHED else ""
    spend, time = spend_text(view), clock(view.elapsed)
    ways = ((text, trials, spend, time), (text, spend, time), (text, spend), (text,))
    return _first_that_fits(ways, width, unicode)


def score_and_gain(view: View) -> str:
    """The best score, and how much better than the baseline it is."""
    if view.best is None:
        return "" if view.baseline is None else f"baseline {score_text(view.baseline)}"
    if view.baseline is None:
        return score_text(view.best)
    gain = view.best - view.baseline
    verdict = f"{gain:+.2f} from {score_text(view.baseline)}" if gain > 0 else "not better than at its start"
    return f"{score_text(view.best)}, {verdict}"


def link(view: View) -> str:
    """Where it can be seen: an address, or the command that opens it; empty when that is not known."""
    return "" if view.address is None else view.address.url or view.address.command or ""


def progress_text(view: View) -> str:
    """Trials done, of the planned ones if their number is known, else examples of the budgeted ones."""
    if view.planned is not None:
        return f"{view.trials}/{view.planned}" if view.outcome == RUNNING else _trials(view.trials)
    if view.planned_examples is not None and view.outcome == RUNNING:
        return f"{view.examples}/{view.planned_examples} examples"
    return _trials(view.trials)


def _trials(count: int) -> str:
    return f"{count} trial{'s' * (count != 1)}"


def spend_text(view: View) -> str:
    """Cost, or LM calls where nothing has a price."""
    if view.cost is None:
        return f"{view.calls:,} call{'s' * (view.calls != 1)}" if view.calls else ""
    return f"${view.cost:,.2f}" if view.cost >= 0.00995 or not view.cost else f"${view.cost:.4f}"


def score_text(score: float) -> str:
    """A score, rounded for people."""
    return f"{score:.2f}"


def bar_text(share: float | None, unicode: bool = True) -> str:
    """A bar of eight characters; empty when the share is not known."""
    if share is None:
        return ""
    done = round(share * _BAR)
    full, rest = ("▇", "▁") if unicode else ("#", "-")
    return full * done + rest * (_BAR - done)


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
