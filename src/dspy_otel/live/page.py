"""The report with a line on top that says what runs, and the few lines of JavaScript that swap it in."""

from __future__ import annotations

import base64
import datetime
import hashlib
from importlib import resources
from typing import Final
from xml.etree.ElementTree import Element

from dspy_otel.live.feeds import View, seconds_left
from dspy_otel.record.model import RUNNING, Optimization
from dspy_otel.reports.markup import Child, document, tag
from dspy_otel.reports.numbers import cost_text, count_text, duration_text
from dspy_otel.reports.page import head, sections, title_of

SCRIPT: Final = resources.files(__package__).joinpath("live.js").read_text(encoding="utf-8")
_HASH: Final = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY: Final = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page may run this one script, and ask this server. If a text ever became markup, it could run nothing."""


def page(view: View, name: str, silent: float | None = None) -> str:
    """The whole page.

    Args:
        view: the optimization.
        name: what is watched.
        silent: seconds without anything new, when that is long.
    """
    title = "dspy-otel watch" if view.optimization is None else title_of(view.optimization)
    body = tag(
        "body",
        tag("p", id="connection", class_="warn", hidden="hidden", role="status"),
        tag("main", content(view, name, silent)),
        tag("script", SCRIPT),
    )
    return document(tag("html", head(title), body, lang="en"))


def content(view: View, name: str, silent: float | None = None) -> list[Child]:
    """What is swapped in; the arguments are those of :func:`page`."""
    found: list[Child] = [_state(view, name)]
    if view.waiting is not None:
        found.append(tag("p", view.waiting, class_="warn"))
    if view.optimization is not None and view.optimization.outcome == RUNNING and silent is not None:
        text = f"Nothing new for {duration_text(silent)}. The program may have ended without saying so."
        found.append(tag("p", text, class_="warn"))
    if view.optimization is not None:
        found += sections(view.optimization, view.source)
    return found


def _state(view: View, name: str) -> Element:
    """What runs: phase, trials, spending, time."""
    optimization = view.optimization
    if optimization is None:
        return tag("p", f"Watching {name}.", class_="soft")
    usage = optimization.usage or optimization.spent
    parts = [f"Live: {name}"]
    if optimization.outcome != RUNNING:
        parts = [f"{optimization.outcome.capitalize()}: {name}"]
    elif view.phase:
        parts.append(f"phase {view.phase}")
    done, planned = len(optimization.trials), optimization.planned
    going = planned is not None and planned > done
    parts.append(f"{done} of {planned} trials" if going else f"{done} trial{'s' * (done != 1)}")
    if (cost := cost_text(usage)) is not None:
        parts.append(f"{cost} spent")
    elif usage.tokens is not None:
        parts.append(f"{count_text(usage.tokens)} tokens spent")
    if optimization.outcome == RUNNING:
        last = _last(optimization)
        left = None if last is None else seconds_left(optimization, last)
        if left is not None:
            parts.append(f"about {duration_text(left)} left")
        if last is not None:
            when = datetime.datetime.fromtimestamp(last, datetime.timezone.utc)
            parts.append(f"last trial at {when:%H:%M:%S} UTC")
    return tag("p", " · ".join(parts), class_="live", id="state")


def _last(optimization: Optimization) -> float | None:
    """When the last trial ended: a rate is that of what has been done by then."""
    ends = [trial.ended for trial in optimization.trials if trial.ended is not None]
    return max(ends) / 1e9 if ends else None
