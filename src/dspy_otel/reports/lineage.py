"""Which candidate was made from which: the winner's line, and all candidates as a graph that fits its frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from xml.etree.ElementTree import Element

from dspy_otel.record.model import Optimization
from dspy_otel.reports.markup import tag
from dspy_otel.reports.numbers import score_text

MAX_NODES: Final = 300
"""Most candidates that are drawn."""
_WIDTH, _MARGIN, _LABEL = 1120.0, 16.0, 88.0
_TALLEST: Final = 620.0
_ACROSS, _DOWN = 118.0, 34.0
"""Most room between generations, and between candidates of one."""


@dataclass
class Node:
    """A candidate: its parents, its best comparable score, and what became of it."""

    id: str
    parents: tuple[str, ...]
    score: float | None = None
    accepted: bool | None = None
    on_front: bool = False


def nodes(report: Optimization) -> dict[str, Node]:
    """Every candidate, in the order in which they came up; the initial program first."""
    found: dict[str, Node] = {}
    if report.initial_id is not None:
        found[report.initial_id] = Node(report.initial_id, ())
    for trial in report.trials:
        if trial.candidate is None:
            continue
        node = found.setdefault(trial.candidate, Node(trial.candidate, ()))
        node.parents = node.parents or tuple(parent for parent in trial.parents if parent != trial.candidate)
        if trial.kind in ("baseline", "full", "validation") and trial.score is not None:
            node.score = trial.score if node.score is None else max(node.score, trial.score)
        node.accepted = trial.accepted if trial.accepted is not None else node.accepted
        node.on_front = trial.on_front if trial.on_front is not None else node.on_front
    return found


def best_of(report: Optimization) -> str | None:
    """The returned program, or that of the best trial while there is none."""
    if report.returned_id is not None:
        return report.returned_id
    return next((trial.candidate for trial in reversed(report.trials) if trial.is_best), None)


def line(report: Optimization, found: Mapping[str, Node]) -> list[str]:
    """The winner's line: from the initial program to it, of several parents the one with the best score."""
    way: list[str] = []
    at = best_of(report)
    while at is not None and at in found and at not in way:
        way.append(at)
        known = [parent for parent in found[at].parents if parent in found]
        at = max(known, key=lambda one: (found[one].score is not None, found[one].score or 0.0)) if known else None
    return way[::-1]


def depths(found: Mapping[str, Node]) -> dict[str, int]:
    """Generation of each candidate: one more than its parents'. A circle, which no optimizer makes, ends at itself."""
    depth: dict[str, int] = {}
    for start in found:
        waiting, open_ = [start], set()
        while waiting:
            name = waiting[-1]
            open_.add(name)
            unknown = [p for p in found[name].parents if p in found and p not in depth and p not in open_]
            if unknown:
                waiting.append(unknown[0])
                continue
            depth[name] = 1 + max((depth.get(p, -1) for p in found[name].parents if p in found), default=-1)
            waiting.pop()
    return depth


def ancestors(found: Mapping[str, Node], name: str | None) -> set[str]:
    """A candidate and everything that it was made from."""
    waiting, known = [] if name is None else [name], set()
    while waiting:
        one = waiting.pop()
        if one in found and one not in known:
            known.add(one)
            waiting += found[one].parents
    return known


def graph(report: Optimization, names: Mapping[str, str]) -> Element | None:
    """All candidates, as wide as the page. None when all were made from the initial program: there is nothing to see.

    Args:
        report: the optimization.
        names: short names of candidates.
    """
    every = nodes(report)
    found = _chosen(report, every)
    depth = depths(found)
    if max(depth.values(), default=0) < 2:
        return None
    of_winner = ancestors(every, best_of(report))
    layers: list[list[str]] = [[] for _ in range(1 + max(depth.values()))]
    for name in found:
        layers[depth[name]].append(name)
    tallest = max(map(len, layers))
    across = min(_ACROSS, (_WIDTH - 2 * _MARGIN - _LABEL) / max(1, len(layers) - 1))
    down = min(_DOWN, _TALLEST / max(1, tallest))
    places = _positions(found, layers, across, down)
    named = across >= 80 and down >= 20
    edges, dots = [], []
    for name, node in found.items():
        for parent in node.parents:
            if parent in places:
                on_line = " line" if name in of_winner and parent in of_winner else ""
                edges.append(tag("path", d=_edge(places[parent], places[name]), class_=f"edge{on_line}"))
        label = named or node.id in (report.initial_id, best_of(report))
        dots.append(_dot(report, node, places[name], names, label, min(7.0, down / 2.6, across / 2.2)))
    # The winner's line comes last, on top.
    edges.sort(key=lambda edge: edge.get("class") == "edge line")
    width = 2 * _MARGIN + across * (len(layers) - 1) + _LABEL
    height = 2 * _MARGIN + down * (tallest - 1) + 10
    picture = tag(
        "svg",
        edges,
        dots,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        style=f"width:100%;max-width:{width:.0f}px;min-width:{min(width, 560):.0f}px",
        role="img",
        aria_label=f"{len(found)} candidates and what they were made from",
    )
    left_out = len(every) - len(found)
    note = tag("p", f"{left_out} candidates with lower scores are not drawn.", class_="note") if left_out else None
    return tag("div", tag("div", picture, class_="wide"), note)


def _chosen(report: Optimization, every: Mapping[str, Node]) -> dict[str, Node]:
    """Too many candidates: those of the winner's line, then the best with what they were made from."""
    if len(every) <= MAX_NODES:
        return dict(every)
    kept = ancestors(every, best_of(report)) | {report.initial_id or ""}
    ranked = sorted(every.values(), key=lambda node: (node.score is None, -(node.score or 0)))
    for node in ranked[:MAX_NODES]:
        found = ancestors(every, node.id)  # a candidate is of little use without its parents
        if len(kept | found) <= MAX_NODES:
            kept |= found
    return {name: node for name, node in every.items() if name in kept}


def _positions(
    found: Mapping[str, Node], layers: list[list[str]], across: float, down: float
) -> dict[str, tuple[float, float]]:
    """Where each candidate is drawn: generations from left to right, each candidate near the height of its parents."""
    height: dict[str, float] = {}
    tallest = max(map(len, layers))
    for layer in layers:

        def above(name: str) -> float:
            known = [height[parent] for parent in found[name].parents if parent in height]
            return sum(known) / len(known) if known else 0.0

        layer.sort(key=above)  # stable: equals stay in the order in which they came up
        start = (tallest - len(layer)) / 2
        for place, name in enumerate(layer):
            height[name] = start + place
    return {
        name: (_MARGIN + at * across, _MARGIN + 8 + height[name] * down)
        for at, layer in enumerate(layers)
        for name in layer
    }


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    (a, b), (c, d), middle = start, end, (start[0] + end[0]) / 2
    return f"M{a:.0f} {b:.0f}C{middle:.0f} {b:.0f} {middle:.0f} {d:.0f} {c:.0f} {d:.0f}"


def _dot(
    report: Optimization, node: Node, at: tuple[float, float], names: Mapping[str, str], named: bool, radius: float
) -> Element:
    kind = "seed" if node.id == report.initial_id else "rejected" if node.accepted is False else "kept"
    score = score_text(node.score)
    title = f"{names.get(node.id, node.id)} ({node.id}), {score if node.score is not None else 'not scored in full'}"
    title += ", rejected" if node.accepted is False else ", on the Pareto front" if node.on_front else ""
    x, y = f"{at[0]:.1f}", f"{at[1]:.1f}"
    text = names.get(node.id, node.id) + ("" if node.score is None else f" {score}")
    winner = node.id == best_of(report)
    return tag(
        "g",
        tag("title", title),
        tag("circle", cx=x, cy=y, r=f"{radius + 4:.1f}", class_="ring") if winner else None,
        tag("circle", cx=x, cy=y, r=f"{radius:.1f}", class_=f"node {kind}{' front' if node.on_front else ''}"),
        tag("text", text, x=f"{at[0] + radius + 2:.0f}", y=f"{at[1] - radius - 3:.0f}") if named else None,
    )
