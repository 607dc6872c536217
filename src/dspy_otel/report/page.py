"""A report as one HTML file, of bounded size for an optimization of any size."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final
from xml.etree.ElementTree import Element

from dspy_otel.record.model import RUNNING, Example, Optimization, Predictor, Trial, Usage, number
from dspy_otel.report import charts, lineage
from dspy_otel.report.charts import score_text
from dspy_otel.report.examples import Compared, compared
from dspy_otel.report.markup import Child, cut, document, tag
from dspy_otel.report.words import differences
from dspy_otel.version import __version__

MAX_TRIALS: Final = 500
"""Most rows of the table of trials."""
MAX_CANDIDATES: Final = 40
"""Most candidates whose texts are shown."""
MAX_EXAMPLES: Final = 60
"""Most examples shown as improved, and most shown as regressed."""
MAX_DEMOS: Final = 8
"""Most demos shown for one predictor."""
MAX_TEXT: Final = 12_000
"""Most characters of one instruction."""
MAX_TEXTS: Final = 600_000
"""Most characters of all instructions and demos; candidates beyond are left out."""
MAX_VALUE: Final = 300
"""Most characters of any other value."""

NO_CONTENT: Final = (
    "Instructions, demos, inputs and answers were not recorded. Set "
    'OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT=span_only, or capture_content="span_only", to have them here.'
)
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The page needs nothing but its style. If a text ever became markup, it could load and run nothing."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where an optimization was read from, for links on the page.

    Attributes:
        runs: addresses of trials, by number.
        trace_url: address of a trace, with ``{}`` for its id.
        trace_name: how the id of a trace is written there, with ``{}`` for its 32 hexadecimal digits.
        versions: of the software that recorded it.
    """

    runs: Mapping[int, str] = field(default_factory=dict)
    trace_url: str | None = None
    trace_name: str = "{}"
    versions: Mapping[str, str] = field(default_factory=dict)


def render(report: Optimization, source: Source | None = None) -> str:
    """The report as a whole HTML file.

    Args:
        report: the optimization.
        source: where it was read from.
    """
    source = source or Source()
    names = names_of(report)
    title = f"{report.optimizer} on {report.program_name or 'program'}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", cut(title, MAX_VALUE)),
        tag("style", resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")),
    )
    body = tag(
        "body",
        _header(report, title),
        _scores(report, names),
        _lineage(report, names),
        _programs(report, names),
        _examples(report, source),
        _trials(report, names, source),
        _usage(report),
        _about(report, source),
    )
    return document(tag("html", head, body, lang="en"))


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


def _header(report: Optimization, title: str) -> list[Child]:
    outcome = {"finished": "good", "failed": "bad", "interrupted": "bad"}.get(report.outcome, "soft")
    usage = report.usage or report.spent
    when = None
    if report.started is not None:
        when = f"{datetime.datetime.fromtimestamp(report.started / 1e9, datetime.timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    subtitle = [when, f"run {report.id}" if report.id else None]
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
    return [
        tag("h1", title, " ", tag("span", report.outcome, class_=f"badge {outcome}")),
        tag("p", " · ".join(part for part in subtitle if part), class_="soft"),
        tag("div", _tiles(report), class_="tiles"),
        notices,
    ]


def _tiles(report: Optimization) -> Iterable[Element]:
    winner = report.winning
    best = "best score" if winner is None else f"best score, trial {winner.number}"
    yield _tile(score_text(report.baseline), "baseline")
    yield _tile(score_text(report.best), best if report.outcome != RUNNING else "best so far")
    if report.gain is not None:
        sign = "+" if report.gain > 0 else ""
        better = "good" if report.gain > 0 else "bad" if report.gain < 0 else None
        yield _tile(f"{sign}{report.gain:.4g}", "gain", better)
    done, planned, usage = len(report.trials), report.planned, report.usage or report.spent
    yield _tile(f"{done} of {planned}" if planned and planned > done else str(done), "trials")
    if report.accepted is not None or report.rejected is not None:
        yield _tile(f"{report.accepted or 0} / {report.rejected or 0}", "proposals accepted / rejected")
    if report.evaluated:
        yield _tile(f"{report.evaluated:,}", "examples evaluated")
    if usage.lm_calls is not None:
        yield _tile(f"{usage.lm_calls:,.0f}", "LM calls")
    if usage.tokens is not None:
        yield _tile(_short_count(usage.tokens), "tokens")
    if usage.cost is not None:
        yield _tile(_money(usage.cost), "cost")
    if report.started is not None and report.ended is not None:
        yield _tile(_duration((report.ended - report.started) / 1e9), "duration")


def _tile(value: str, name: str, class_: str | None = None) -> Element:
    return tag("div", tag("b", value, class_=class_), tag("span", name), class_="tile")


def _scores(report: Optimization, names: Mapping[str, str]) -> list[Child]:
    def label(trial: Trial) -> str:
        text = f"trial {trial.number}, {trial.kind}: {score_text(trial.score)}"
        text += "" if trial.size is None else f" on {trial.size} examples"
        text += "" if trial.candidate is None else f", candidate {names.get(trial.candidate, trial.candidate)}"
        return text + {True: ", accepted", False: ", rejected", None: ""}[trial.accepted]

    drawn = [chart for chart in (charts.by_trial(report, label), charts.by_spend(report, label)) if chart is not None]
    if not drawn:
        return []
    kinds = {trial.kind for trial in report.trials}
    caution = "Scores on some examples are not comparable with those on all of them, and do not count for the best."
    return [
        tag("h2", "Scores"),
        tag("div", drawn, class_="pair"),
        charts.legend(report),
        tag("p", caution, class_="note") if kinds & {"minibatch", "sample"} else None,
    ]


def _lineage(report: Optimization, names: Mapping[str, str]) -> list[Child]:
    graph = lineage.graph(report, names)
    if graph is None:
        return []
    caption = "From the initial program (seed), left, to the winner (ringed). Hollow: rejected."
    front = any(trial.on_front for trial in report.trials)
    caption += " Violet rim: on the Pareto front." if front else ""
    return [tag("h2", "Lineage"), tag("p", caption, class_="note"), graph]


def _programs(report: Optimization, names: Mapping[str, str]) -> list[Child]:
    initial = report.candidates.get(report.initial_id or "")
    if initial is None or len(report.candidates) < 2:
        return []
    seed = initial.predictors
    found: list[Child] = [tag("h2", "What changed in the program")]
    returned = report.candidates.get(report.returned_id or "")
    best = None if returned is None else returned.predictors
    spent = 0
    if report.returned_id == report.initial_id:
        found.append(tag("p", "The initial program was returned: no candidate was better."))
    elif best is not None:
        spent += _characters(best)
        name = names.get(report.returned_id or "", "")
        found.append(tag("p", f"The returned program ({name}) against the initial one. ", _key(), class_="note"))
        found += _changes(seed, best)
    shown = 0
    others: list[Child] = []
    for candidate, note in _ranked(report, names):
        if candidate not in report.candidates or candidate in (report.initial_id, report.returned_id):
            continue
        if shown >= MAX_CANDIDATES:
            break
        program = report.candidates[candidate].predictors
        spent += _characters(program)
        if spent > MAX_TEXTS:
            break
        shown += 1
        others.append(
            tag(
                "details",
                tag("summary", names.get(candidate, candidate), note and f": {note}"),
                _changes(seed, program),
            )
        )
    if others:
        found.append(tag("h3", "Other candidates, against the initial program"))
        found += others
    left = len(set(report.candidates) - {report.initial_id, report.returned_id}) - shown
    if left > 0:
        found.append(tag("p", f"{left} more candidates are not shown.", class_="note"))
    return found


def _examples(report: Optimization, source: Source) -> list[Child]:
    both = compared(report)
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
        tag("h2", "Examples"),
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
        cells: list[Child] = [tag("td", "-" if one.after.index is None else one.after.index, class_="nw")]
        if content:
            cells += [tag("td", _value(one.after.inputs)), tag("td", _value(one.after.expected))]
        cells += [tag("td", _side(source, side, content, feedback)) for side in (one.before, one.after)]
        rows.append(tag("tr", cells))
    more = f"{len(found) - len(shown)} more are not shown." if len(found) > len(shown) else None
    return [
        tag("h3", f"{title} ({len(found)})"),
        tag("div", _table(columns, rows), class_="wide"),
        None if more is None else tag("p", more, class_="note"),
    ]


def _side(source: Source, side: Example, content: bool, feedback: bool) -> list[Child]:
    score = number(side.score)
    found: list[Child] = [tag("b", "failed" if score is None else f"{score:.4g}")]
    if score is None and side.error is not None:
        found.append(f" {cut(str(side.error), 80)}")
    if content and side.prediction is not None:
        found += [" ", _value(side.prediction)]
    if feedback and side.feedback is not None:
        found.append(tag("div", cut(str(side.feedback), MAX_VALUE), class_="soft"))
    if side.trace_id is not None:
        trace = source.trace_name.replace("{}", f"{side.trace_id:032x}")
        code = tag("code", cut(trace, 60))
        address = None if source.trace_url is None else source.trace_url.replace("{}", trace)
        found.append(tag("div", code if address is None else _link(address, code), class_="soft"))
    return found


def _trials(report: Optimization, names: Mapping[str, str], source: Source) -> list[Child]:
    if not report.trials:
        return []
    shown = list(report.trials[:MAX_TRIALS])
    if (winner := report.winning) is not None and winner not in shown:
        shown[-1] = winner
    verdicts = any(trial.accepted is not None or trial.reason for trial in shown)
    phases = len({trial.phase for trial in shown}) > 1
    priced = any(trial.usage.cost is not None for trial in shown)
    used = any(trial.usage.tokens is not None for trial in shown)
    columns = ["trial", "kind", *(["phase"] if phases else []), "candidate", "made from", "score", "best", "examples"]
    columns += [
        *(["verdict"] if verdicts else []),
        *(["tokens"] if used else []),
        *(["cost"] if priced else []),
        "choices",
    ]
    numeric = {"score", "best", "examples", "tokens", "cost"}
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
            "candidate": _candidate(names, trial.candidate),
            "made from": [[_candidate(names, parent), " "] for parent in trial.parents],
            "score": score_text(trial.score) if trial.failure is None else _failure(trial),
            "best": None if trial.best is None else score_text(trial.best),
            "examples": trial.size,
            "verdict": _verdict(trial),
            "tokens": None if trial.usage.tokens is None else f"{trial.usage.tokens:,.0f}",
            "cost": None if trial.usage.cost is None else _money(trial.usage.cost),
            "choices": [_chip(name, value) for name, value in list(trial.params.items())[:20]],
        }
        row = [tag("td", cells[name], class_="n" if name in numeric else classes.get(name)) for name in columns]
        rows.append(tag("tr", row, class_="winner" if trial.number == report.winner else None))
    more = f"{len(report.trials) - len(shown)} more trials are not shown." if len(report.trials) > len(shown) else None
    return [
        tag("h2", "Trials"),
        tag("div", _table(columns, rows, numeric), class_="wide"),
        None if more is None else tag("p", more, class_="note"),
    ]


def _failure(trial: Trial) -> Element | None:
    return None if trial.failure is None else tag("span", trial.failure.type, class_="bad")


def _trial_name(report: Optimization, trial: Trial, source: Source) -> Child:
    name = f"{trial.number}" + (" (winner)" if trial.number == report.winner else "")
    address = source.runs.get(trial.number)
    return tag("span", name, class_="nw") if address is None else _link(address, name)


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
    names = [name for name in _USAGE_COLUMNS if any(getattr(row[2], name) is not None for row in rows)]
    timed = any(row[1] is not None for row in rows)
    columns = [first, *(_USAGE_COLUMNS[name] for name in names), *(["time"] if timed else [])]
    lines = []
    for name, seconds, used in rows:
        cells = [tag("td", cut(name, 80), class_="nw")]
        for key in names:
            value = getattr(used, key)
            text = None if value is None else _money(value) if key == "cost" else f"{value:,.0f}"
            cells.append(tag("td", text, class_="n"))
        if timed:
            cells.append(tag("td", None if seconds is None else _duration(seconds), class_="n"))
        lines.append(tag("tr", cells))
    return _table(columns, lines, set(columns[1:]))


def _about(report: Optimization, source: Source) -> list[Child]:
    found: list[Child] = [tag("h2", "Settings")]
    settings = {**report.params, **{f"{role}.model": ", ".join(names) for role, names in report.models.items()}}
    found.append(tag("div", [_chip(name, value) for name, value in sorted(settings.items())[:200]]))
    for dataset in report.datasets:
        role = {"val": "validation"}.get(dataset.role, dataset.role)
        digest = [] if dataset.digest is None else [" ", tag("code", dataset.digest)]
        found.append(tag("p", f"{role}: {dataset.size:,} examples", digest))
    if report.returned_id is not None:
        found.append(tag("p", "returned program: ", tag("code", report.returned_id)))
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items()) or f"dspy-otel {__version__}"
    found.append(tag("p", versions, class_="note"))
    return found


# --- parts ----------------------------------------------------------------------------------------------------------


def _changes(seed: Mapping[str, Predictor], program: Mapping[str, Predictor]) -> list[Child]:
    found: list[Child] = []
    same = []
    for name, predictor in list(program.items())[:50]:
        before = seed.get(name, Predictor(None))
        demos, demos_before = predictor.demos or (), before.demos or ()
        known = {_json(demo) for demo in demos_before}
        added = [demo for demo in demos if _json(demo) not in known]
        removed = len(demos_before) - sum(_json(demo) in known for demo in demos)
        text, text_before = predictor.instructions or "", before.instructions or ""
        if text_before == text and not added and removed <= 0:
            same.append(name)
            continue
        found.append(tag("h3", cut(name, MAX_VALUE)))
        if text_before != text:
            found.append(_text_changes(text_before, text))
        else:
            found.append(tag("p", "Instructions as before.", class_="note"))
        if added:
            found.append(tag("p", f"{len(added)} demo{'s' * (len(added) > 1)} added:"))
            found += [tag("div", _demo(demo), class_="text") for demo in added[:MAX_DEMOS]]
            if len(added) > MAX_DEMOS:
                found.append(tag("p", f"{len(added) - MAX_DEMOS} more", class_="note"))
        if removed > 0:
            found.append(tag("p", f"{removed} demo{'s' * (removed > 1)} removed."))
    if same:
        found.append(tag("p", f"As before: {cut(', '.join(same), 1000)}.", class_="note"))
    return found


def _text_changes(before: str, after: str) -> Element:
    pieces: list[Child] = []
    for piece in differences(cut(before, MAX_TEXT), cut(after, MAX_TEXT)):
        name = {"added": "ins", "removed": "del"}.get(piece.kind)
        pieces.append(piece.text if name is None else tag(name, piece.text))
    return tag("div", pieces, class_="text")


def _key() -> list[Child]:
    return [tag("ins", "added"), " ", tag("del", "removed")]


def _demo(demo: Any) -> Child:
    if not isinstance(demo, dict):
        return cut(_json(demo), MAX_VALUE)
    fields = [(name, value) for name, value in demo.items() if name != "augmented"]
    return tag("dl", [[tag("dt", cut(str(name), 80)), tag("dd", _plain(value))] for name, value in fields[:30]])


def _ranked(report: Optimization, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Candidates with what was found of them, those with the best comparable scores first."""
    nodes = lineage.nodes(report)
    order = sorted(nodes.values(), key=lambda node: (node.score is None, -(node.score or 0), node.accepted is False))
    found = []
    for node in order:
        made = " and ".join(names.get(parent, parent) for parent in node.parents[:5])
        parts = [
            "" if node.score is None else score_text(node.score),
            {True: "accepted", False: "rejected", None: ""}[node.accepted],
            f"made from {made}" if made and made != "seed" else "",
        ]
        found.append((node.id, ", ".join(part for part in parts if part)))
    return found


def _candidate(names: Mapping[str, str], candidate: str | None) -> Child:
    return (
        None
        if candidate is None
        else tag("span", names.get(candidate, cut(candidate, 16)), title=candidate, class_="nw")
    )


def _chip(name: str, value: Any) -> Element:
    return tag("span", tag("i", f"{cut(name, 80)} "), cut(_json(value), 120), class_="chip")


def _value(value: Any) -> Child:
    """Inputs or an answer: a single field without its name."""
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value.values()))
    if isinstance(value, dict):
        return tag("dl", [[tag("dt", cut(name, 80)), tag("dd", _plain(part))] for name, part in value.items()])
    return None if value is None else _plain(value)


def _plain(value: Any) -> str:
    return cut(_json(value), MAX_VALUE)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _table(
    columns: Sequence[str], rows: Sequence[Element], numeric: set[str] | frozenset[str] = frozenset()
) -> Element:
    head = tag("tr", [tag("th", name, class_="n" if name in numeric else None, scope="col") for name in columns])
    return tag("table", tag("thead", head), tag("tbody", rows))


def _link(address: str, text: Child) -> Element:
    return tag("a", text, href=address if address.startswith(("http://", "https://")) else None, rel="noreferrer")


def _characters(program: Mapping[str, Predictor]) -> int:
    return sum(
        min(len(one.instructions or ""), MAX_TEXT) + len(_json((one.demos or ())[:MAX_DEMOS]))
        for one in program.values()
    )


def _money(value: float) -> str:
    return f"${value:,.2f}" if value >= 1 else f"${value:.4f}" if value >= 0.0001 or not value else f"${value:.2g}"


def _short_count(value: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    seconds = number(seconds) or 0.0
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
