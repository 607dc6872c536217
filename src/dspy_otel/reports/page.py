"""A report as one HTML file, of bounded size for an optimization of any size."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Final
from xml.etree.ElementTree import Element

from dspy_otel.record.model import RUNNING, Example, Optimization, Trial, Usage, number
from dspy_otel.reports import charts, heat_map, lineage
from dspy_otel.reports.examples import Compared, compared
from dspy_otel.reports.markup import Child, cut, document, tag
from dspy_otel.reports.numbers import (
    all_cached,
    change_text,
    cost_text,
    count_text,
    duration_text,
    score_text,
    tokens_text,
)
from dspy_otel.reports.parts import MAX_VALUE, Source, candidate, chip, link, table, trace_link, value_of
from dspy_otel.reports.programs import line_of_winner, programs, what_changed
from dspy_otel.reports.reasons import reasons
from dspy_otel.reports.verdict import verdict_of
from dspy_otel.version import __version__

MAX_TRIALS: Final = 500
"""Most rows of the table of trials."""
FEW_TRIALS: Final = 20
"""Most rows that are shown at once; more are there on demand."""
MAX_EXAMPLES: Final = 60
"""Most examples shown as improved, and most shown as regressed."""

NO_CONTENT: Final = (
    "Instructions, demos, inputs and answers were not recorded. Set "
    'OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=span_only, or capture_content="span_only", to have them here. '
    "What a completion hook has stored is not read: the spans of programs and LM calls say where it is."
)
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The page needs nothing but its style. If a text ever became markup, it could load and run nothing."""


def render(report: Optimization, source: Source | None = None) -> str:
    """The report as a whole HTML file.

    Args:
        report: the optimization.
        source: where it was read from.
    """
    policy = tag("meta", http_equiv="Content-Security-Policy", content=POLICY)
    return document(tag("html", head(title_of(report), policy), tag("body", sections(report, source)), lang="en"))


def title_of(report: Optimization) -> str:
    """The title of the page."""
    return cut(f"{report.optimizer} on {report.program_name or 'program'}", MAX_VALUE)


def head(title: str, *more: Child) -> Element:
    """The head of a page.

    Args:
        title: of it.
        *more: elements.
    """
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        more,
        tag("title", title),
        tag("style", resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")),
    )


def sections(report: Optimization, source: Source | None = None) -> list[Child]:
    """The body of the page.

    Args:
        report: the optimization.
        source: where it was read from.
    """
    source = source or Source()
    names = names_of(report)
    found = lineage.nodes(report)
    both = compared(report)
    return [
        _header(report, source, both),
        _scores(report, names),
        reasons(report, names),
        line_of_winner(report, names, found),
        programs(report, names, found, source),
        _heat_map(report, names),
        _examples(report, source, both),
        _trials(report, names, source),
        _usage(report),
        _load(report, source),
        _about(report, source),
    ]


def names_of(report: Optimization) -> dict[str, str]:
    """A short name for each candidate: ids are sixteen hexadecimal digits, which are hard to distinguish."""
    return {
        candidate: "seed" if candidate == report.initial_id else f"c{place}" for place, candidate in _placed(report)
    }


def _placed(report: Optimization) -> Iterable[tuple[int, str]]:
    found = list(lineage.nodes(report))
    if report.returned_id is not None and report.returned_id not in found:
        found.append(report.returned_id)
    return enumerate(found, 0 if report.initial_id in found[:1] else 1)


# --- sections -------------------------------------------------------------------------------------------------------


def _header(report: Optimization, source: Source, both: Sequence[Compared]) -> list[Child]:
    outcome = {"finished": "good", "failed": "bad", "interrupted": "bad"}.get(report.outcome, "soft")
    usage = report.usage or report.spent
    when = None
    if report.started is not None:
        when = f"{datetime.datetime.fromtimestamp(report.started / 1e9, datetime.timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    run = None
    if source.run is not None:
        run = link(source.run.url, ["run ", tag("code", cut(source.run.run_id, 8))], title=cut(source.run.run_id, 80))
    elif report.id:
        run = tag("span", f"run {cut(report.id, 40)}")
    subtitle: list[Child] = [part for part in (when, run) if part is not None]
    notices: list[Child] = []
    if report.failure is not None:
        notices.append(tag("p", f"{report.outcome}: ", cut(str(report.failure), 2000), class_="warn"))
    if not report.content:
        notices.append(tag("p", NO_CONTENT, class_="warn"))
    if usage.unpriced_calls and usage.cost is None:
        notices.append(tag("p", "No LM call has a known price: spending is shown in tokens.", class_="note"))
    elif usage.unpriced_calls:
        calls = f"{usage.unpriced_calls:,.0f} of {usage.lm_calls or 0:,.0f} LM calls"
        notices.append(tag("p", f"{calls} have no known price: the cost is that of the other calls.", class_="note"))
    if usage.unanswered_tasks:
        tasks = f"{usage.unanswered_tasks:,.0f} of {usage.worker_tasks or 0:,.0f} tasks of worker processes"
        notices.append(tag("p", f"{tasks} have handed nothing back: what they have used is missing.", class_="warn"))
    return [
        tag("h1", title_of(report), " ", tag("span", report.outcome, class_=f"badge {outcome}")),
        tag("p", [[" · " if at else None, part] for at, part in enumerate(subtitle)], class_="soft"),
        _verdict_box(report, both),
        tag("div", _tiles(report), class_="tiles"),
        notices,
    ]


def _verdict_box(report: Optimization, both: Sequence[Compared]) -> Element | None:
    verdict = verdict_of(report, both)
    if verdict is None:
        return None
    changed = what_changed(report)
    worse = [one for one in both if one.gain < 0]
    lost: Child = None
    if worse:
        places = [str(one.after.index) for one in worse[:12] if one.after.index is not None]
        listed = f": {', '.join(places)}{' …' if len(worse) > len(places) else ''}" if places else ""
        examples = "example" if len(worse) == 1 else "examples"
        lost = tag("p", f"Worse on {len(worse)} {examples}{listed}. ", tag("a", "See them", href="#examples"))
    class_ = {True: "good", False: "bad", None: ""}[verdict.good]
    return tag(
        "div",
        tag("p", verdict.headline, class_=f"headline {class_}"),
        [tag("p", sentence) for sentence in verdict.sentences],
        None if changed is None else tag("p", changed),
        lost,
        class_="verdict-box",
    )


def _tiles(report: Optimization) -> Iterable[Element]:
    winner = report.winning
    best = "best score" if winner is None else f"best score, trial {winner.number}"
    yield _tile(score_text(report.baseline), "baseline")
    yield _tile(score_text(report.best), best if report.outcome != RUNNING else "best so far")
    if report.gain is not None:
        better = "good" if report.gain > 0 else "bad" if report.gain < 0 else None
        yield _tile(change_text(report.gain) if report.gain else "0", "gain", better)
    done, planned, usage = len(report.trials), report.planned, report.usage or report.spent
    yield _tile(f"{done} of {planned}" if planned and planned > done else str(done), "trials")
    if report.accepted is not None or report.rejected is not None:
        yield _tile(f"{report.accepted or 0} / {report.rejected or 0}", "proposals accepted / rejected")
    if report.evaluated:
        yield _tile(count_text(report.evaluated), "examples evaluated")
    if usage.lm_calls is not None:
        cached = f"LM calls, {count_text(usage.cache_hits)} cached" if usage.cache_hits else "LM calls"
        yield _tile(count_text(usage.lm_calls), cached)
    if usage.tokens is not None:
        yield _tile(count_text(usage.tokens), "tokens")
    if (cost := cost_text(usage)) is not None:
        yield _tile(cost, "cost")
    if report.started is not None and report.ended is not None:
        yield _tile(duration_text((report.ended - report.started) / 1e9), "duration")


def _tile(value: str, name: str, class_: str | None = None) -> Element:
    return tag("div", tag("b", value, class_=class_), tag("span", name), class_="tile")


def _scores(report: Optimization, names: Mapping[str, str]) -> list[Child]:
    def label(trial: Trial) -> str:
        text = f"trial {trial.number}, {trial.kind}: {score_text(trial.score)}"
        text += "" if trial.size is None else f" on {trial.size} examples"
        text += "" if trial.candidate is None else f", candidate {names.get(trial.candidate, trial.candidate)}"
        return text + {True: ", accepted", False: ", rejected", None: ""}[trial.accepted]

    drawn: list[Child] = []
    if (by_trial := charts.by_trial(report, label)) is not None:
        drawn.append(_figure("Score by trial, on all examples", by_trial))
    if (spend := charts.by_spend(report, label)) is not None:
        drawn.append(_figure(f"Score against {spend[0]}: what it took to get there", spend[1]))
    if (parts := charts.by_trial(report, label, parts=True)) is not None:
        drawn.append(_figure("On some examples only, not comparable with the above", parts))
    if (price := charts.by_price(report, label)) is not None:
        drawn.append(_figure(f"Score against the {price[0]} of 1,000 examples", price[1]))
    if not drawn:
        return []
    return [tag("h2", "Scores"), tag("div", drawn, class_="pair"), charts.legend(report)]


def _figure(title: str, chart: Element) -> Element:
    return tag("figure", tag("figcaption", title), chart)


def _heat_map(report: Optimization, names: Mapping[str, str]) -> list[Child]:
    found = heat_map.heat_map(report)
    if found is None:
        return []
    count = len(found.trials)
    caution = []
    if len(found.rows) > heat_map.MAX_ROWS:
        caution.append(f"{len(found.rows) - heat_map.MAX_ROWS} examples, the easiest, are not drawn.")
    if found.left_out:
        caution.append(f"{found.left_out} candidates with lower scores are not drawn.")
    return [
        tag("h2", "Examples by candidate"),
        tag(
            "p",
            tag("b", f"{found.failing} always fail", class_="bad"),
            f", {found.flipping} flip, ",
            tag("b", f"{found.solved} are always solved", class_="good"),
            f", over the {count} candidates that were scored on all examples. Each column is a candidate in the order "
            "of trials, each row an example, the hardest first.",
        ),
        tag("div", heat_map.drawing(found, report, names), class_="wide"),
        tag(
            "p",
            [
                tag("span", tag("svg", tag("path", d="M3 3h10v10h-10z", class_=class_), width=16, height=16), text)
                for class_, text in (("h0", "0"), ("h1", ""), ("h2", "half"), ("h3", ""), ("h4", "full score"))
            ],
            class_="legend",
        ),
        tag("p", " ".join(caution), class_="note") if caution else None,
    ]


def _examples(report: Optimization, source: Source, both: Sequence[Compared]) -> list[Child]:
    if not both:
        return []
    better = sorted((one for one in both if one.gain > 0), key=lambda one: -one.gain)
    worse = sorted((one for one in both if one.gain < 0), key=lambda one: one.gain)
    same = len(both) - len(better) - len(worse)
    summary = [
        tag("b", f"{len(better)} improved", class_="good"),
        ", ",
        tag("b", f"{len(worse)} regressed", class_="bad"),
        f", {same} stayed the same, of {len(both)} that both programs were scored on.",
    ]
    return [
        tag("h2", "Examples: initial program against the best", id="examples"),
        tag("p", summary),
        _example_table(source, "Regressed", worse),
        _example_table(source, "Improved", better),
    ]


def _example_table(source: Source, title: str, found: Sequence[Compared]) -> list[Child]:
    if not found:
        return []
    shown = found[:MAX_EXAMPLES]
    content = any(one.after.inputs is not None for one in shown)
    feedback = any(side.feedback is not None for one in shown for side in (one.before, one.after))
    columns = ["example", *(("inputs", "expected") if content else ()), "initial program", "best program"]
    rows = []
    for one in shown:
        cells: list[Child] = ["-" if one.after.index is None else one.after.index]
        if content:
            cells += [value_of(one.after.inputs), value_of(one.after.expected)]
        cells += [_side(source, side, content, feedback) for side in (one.before, one.after)]
        titled = zip(columns, cells, strict=True)
        rows.append(tag("tr", [tag("td", tag("div", cell), data_label=column) for column, cell in titled]))
    more = f"{len(found) - len(shown)} more are not shown." if len(found) > len(shown) else None
    return [
        tag("h3", f"{title} ({len(found)})"),
        tag("div", table(columns, rows, class_="cards"), class_="wide"),
        None if more is None else tag("p", more, class_="note"),
    ]


def _side(source: Source, side: Example, content: bool, feedback: bool) -> list[Child]:
    score = number(side.score)
    found: list[Child] = [tag("b", "failed" if score is None else f"{score:.4g}")]
    if score is None and side.error is not None:
        found.append(f" {cut(str(side.error), 80)}")
    if content and side.prediction is not None:
        found += [" ", value_of(side.prediction)]
    if feedback and side.feedback is not None:
        found.append(tag("div", cut(str(side.feedback), MAX_VALUE), class_="soft"))
    if side.trace_id is not None:
        found.append(tag("div", trace_link(source, side.trace_id), class_="soft"))
    return found


def _trials(report: Optimization, names: Mapping[str, str], source: Source) -> list[Child]:
    if not report.trials:
        return []
    shown = list(report.trials[:MAX_TRIALS])
    if (winner := report.winning) is not None and winner not in shown:
        shown[-1] = winner
    every = tag("div", _trial_table(report, names, source, shown), class_="wide")
    left = len(report.trials) - len(shown)
    more = tag("p", f"{left} more trials are not shown.", class_="note") if left > 0 else None
    if len(shown) <= FEW_TRIALS:
        return [tag("h2", "Trials"), every, more]
    whole = [trial for trial in shown if trial.kind in charts.WHOLE]
    best = sorted(whole, key=lambda one: (one.number != report.winner, one.kind != "baseline", -(one.score or 0.0)))
    few = sorted(best[:FEW_TRIALS], key=lambda one: one.number)
    return [
        tag("h2", "Trials"),
        tag("p", f"The best {len(few)} of those on all examples:", class_="note") if few else None,
        tag("div", _trial_table(report, names, source, few), class_="wide") if few else None,
        tag("details", tag("summary", f"All {len(report.trials):,} trials"), every, more),
    ]


def _trial_table(report: Optimization, names: Mapping[str, str], source: Source, shown: Sequence[Trial]) -> Element:
    verdicts = any(trial.accepted is not None or trial.reason for trial in shown)
    phases = len({trial.phase for trial in shown}) > 1
    priced = any(cost_text(trial.usage) is not None for trial in shown)
    reported = any(trial.reported is not None and trial.reported != trial.score for trial in shown)
    used = any(trial.usage.tokens is not None for trial in shown)
    columns = [
        "trial",
        "kind",
        "score",  # on a phone the rest is beyond the edge
        *(["reported"] if reported else []),
        "best",
        *(["phase"] if phases else []),
        "candidate",
        "made from",
        "examples",
    ]
    columns += [
        *(["verdict"] if verdicts else []),
        *(["tokens"] if used else []),
        *(["cost"] if priced else []),
        "choices",
    ]
    numeric = {"score", "reported", "best", "examples", "tokens", "cost"}
    classes = {
        **dict.fromkeys(("trial", "kind", "phase", "candidate"), "nw"),
        "choices": "choices",
        "verdict": "verdict",
    }
    rows = []
    for trial in shown:
        cells: dict[str, Child] = {
            "trial": _trial_name(report, trial, source),
            "kind": trial.kind,
            "phase": trial.phase,
            "candidate": candidate(names, trial.candidate),
            "made from": [[candidate(names, parent), " "] for parent in trial.parents],
            "score": score_text(trial.score) if trial.failure is None else _failure(trial),
            "reported": None if trial.reported is None else f"{trial.reported:.6g}",
            "best": None if trial.best is None else score_text(trial.best),
            "examples": trial.size,
            "verdict": _verdict(trial),
            "tokens": tokens_text(trial.usage),
            "cost": cost_text(trial.usage),
            "choices": [chip(name, value) for name, value in list(trial.params.items())[:20]],
        }
        row = [tag("td", cells[name], class_="n" if name in numeric else classes.get(name)) for name in columns]
        rows.append(tag("tr", row, class_="winner" if trial.number == report.winner else None))
    return table(columns, rows, numeric, class_="lines")


def _failure(trial: Trial) -> Element | None:
    return None if trial.failure is None else tag("span", trial.failure.type, class_="bad")


def _trial_name(report: Optimization, trial: Trial, source: Source) -> Child:
    name = f"{trial.number}" + (" (winner)" if trial.number == report.winner else "")
    address = source.runs.get(trial.number)
    return tag("span", name, class_="nw") if address is None else link(address, name)


def _verdict(trial: Trial) -> list[Child]:
    if trial.accepted is None:
        return [] if trial.reason is None else [cut(trial.reason, MAX_VALUE)]
    verdict = tag("span", "accepted" if trial.accepted else "rejected", class_="good" if trial.accepted else "bad")
    scores = ""
    if trial.after is not None:
        scores = f" {trial.after:.4g}" if trial.before is None else f" {trial.before:.4g} → {trial.after:.4g}"
    reason = None if trial.reason is None else tag("div", cut(trial.reason, MAX_VALUE), class_="soft")
    return [verdict, scores, reason]


def _usage(report: Optimization) -> list[Child]:
    usage = report.usage or report.spent
    by_role = [(role, None, usage.by_role[role]) for role in sorted(usage.by_role)]
    by_phase = [(phase.name, phase.seconds or None, phase.usage) for phase in report.phases]
    total = [("all", None, usage)]
    found: list[Child] = []
    if by_role:
        found.append(tag("div", tag("h3", "By role"), _usage_table("role", [*by_role, *total]), class_="wide"))
    if by_phase:
        found.append(tag("div", tag("h3", "By phase"), _usage_table("phase", by_phase), class_="wide"))
    return [tag("h2", "Usage"), tag("div", found, class_="pair")] if found else []


_USAGE_COLUMNS: Final = {
    "lm_calls": "LM calls",
    "cache_hits": "from cache",
    "input_tokens": "tokens in",
    "output_tokens": "tokens out",
    "cost": "cost",
}


def _usage_table(first: str, rows: Sequence[tuple[str, float | None, Usage]]) -> Element:
    names = [
        name
        for name in _USAGE_COLUMNS
        if any(getattr(row[2], name) is not None or (name == "cost" and all_cached(row[2])) for row in rows)
    ]
    timed = any(row[1] is not None for row in rows)
    columns = [first, *(_USAGE_COLUMNS[name] for name in names), *(["time"] if timed else [])]
    lines = []
    for name, seconds, used in rows:
        cells = [tag("td", cut(name, 80), class_="nw")]
        for key in names:
            value = getattr(used, key)
            text = None if value is None else f"{value:,.0f}"
            if key == "cost":
                text = cost_text(used)
            cells.append(tag("td", text, class_="n"))
        if timed:
            cells.append(tag("td", None if seconds is None else duration_text(seconds), class_="n"))
        lines.append(tag("tr", cells))
    return table(columns, lines, set(columns[1:]))


def _load(report: Optimization, source: Source) -> list[Child]:
    """The lines that load the winner, where it is in MLflow with its state."""
    if (
        (source.run is None and not source.in_run)
        or report.outcome == RUNNING
        or report.returned_id not in report.candidates
    ):
        return []
    program = report.program_name if report.program_name and report.program_name.isidentifier() else "YourProgram"
    place = "" if source.tracking_uri is None else f", tracking_uri={source.tracking_uri!r}"
    lines = (
        "from dspy_otel.mlflow import load_best\n\n"
        f"program = {program}()\n"
        f"load_best(program, run_id={'RUN_ID' if source.run is None else repr(source.run.run_id)}{place})"
    )
    note = tag("p", "RUN_ID is the run that has this page among its artifacts.", class_="note")
    found = [tag("h2", "Load the winner"), tag("pre", tag("code", cut(lines, 1000)))]
    return found if source.run is not None else [*found, note]


def _about(report: Optimization, source: Source) -> list[Child]:
    found: list[Child] = [tag("h2", "Settings")]
    settings = {**report.params, **{f"{role}.model": ", ".join(names) for role, names in report.models.items()}}
    found.append(tag("div", [chip(name, value) for name, value in sorted(settings.items())[:200]]))
    for dataset in report.datasets:
        role = {"val": "validation"}.get(dataset.role, dataset.role)
        digest = [] if dataset.digest is None else [" ", tag("code", dataset.digest)]
        found.append(tag("p", f"{role}: {dataset.size:,} examples", digest))
    if report.returned_id is not None:
        found.append(tag("p", "returned program: ", tag("code", report.returned_id)))
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items()) or f"dspy-otel {__version__}"
    found.append(tag("p", versions, class_="note"))
    return found
