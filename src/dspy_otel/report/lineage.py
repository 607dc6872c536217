"""Which candidate was made from which, as a small graph: generations from left to right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from xml.etree.ElementTree import Element

from dspy_otel.record.model import Optimization
from dspy_otel.report.charts import score_text
from dspy_otel.report.markup import tag

MAX_NODES: Final = 60
_ACROSS, _DOWN, _MARGIN = 110, 34, 24


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


def ancestors(found: Mapping[str, Node], candidate: str | None) -> set[str]:
    """A candidate and all it was made from."""
    seen: set[str] = set()
    waiting = [] if candidate is None else [candidate]
    while waiting:
        name = waiting.pop()
        if name in found and name not in seen:
            seen.add(name)
            waiting += found[name].parents
    return seen


def graph(report: Optimization, names: Mapping[str, str]) -> Element | None:
    """The graph, or None when every candidate was made from the initial program: then there is nothing to see."""
    every = nodes(report)
    if max(depths(every).values(), default=0) < 2:
        return None
    line = ancestors(every, report.returned_id)
    found = _selected(every, line)
    at = _positions(found)
    edges = [
        tag("path", d=_edge(at[parent], at[name]), class_="edge line" if {name, parent} <= line else "edge")
        for name, node in found.items()
        for parent in node.parents
        if parent in at
    ]
    dots = [_dot(report, found[name], at[name], names) for name in found]
    size = {
        "width": max(x for x, _ in at.values()) + _MARGIN + 70,
        "height": round(max(y for _, y in at.values())) + _MARGIN,
    }
    description = f"{len(found)} candidates and what they were made from"
    picture = tag(
        "svg", edges, dots, viewBox=f"0 0 {size['width']} {size['height']}", role="img", aria_label=description, **size
    )
    left_out = len(every) - len(found)
    note = tag("p", f"{left_out} candidates with lower scores are not drawn.", class_="note") if left_out else None
    return tag("div", tag("div", picture, class_="wide"), note)


def _selected(every: Mapping[str, Node], line: set[str]) -> dict[str, Node]:
    """The candidates that are drawn: those of ``line`` and those with the best scores, with their ancestors."""
    ranked = sorted(
        every.values(),
        key=lambda node: (node.id not in line, node.score is None, -(node.score or 0), node.accepted is False),
    )
    kept = {node.id for node in ranked[:MAX_NODES]}
    for node in ranked[: MAX_NODES // 2]:  # a candidate is of little use without its parents
        if len(kept) < MAX_NODES * 2:
            kept |= ancestors(every, node.id)
    return {name: node for name, node in every.items() if name in kept}


def _positions(found: Mapping[str, Node]) -> dict[str, tuple[int, float]]:
    """Where each candidate is drawn: generations from left to right, each candidate near the height of its parents."""
    depth = depths(found)
    height: dict[str, float] = {}
    layers: list[list[str]] = [[] for _ in range(1 + max(depth.values()))]
    for name in found:
        layers[depth[name]].append(name)
    tallest = max(map(len, layers))
    for layer in layers:

        def above(name: str) -> float:
            known = [height[parent] for parent in found[name].parents if parent in height]
            return sum(known) / len(known) if known else 0.0

        layer.sort(key=above)  # stable: equals stay in the order in which they came up
        start = (tallest - len(layer)) / 2
        for place, name in enumerate(layer):
            height[name] = start + place
    return {name: (_MARGIN + depth[name] * _ACROSS, _MARGIN + height[name] * _DOWN) for name in found}


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    (a, b), (c, d), middle = start, end, (start[0] + end[0]) / 2
    return f"M{a:.0f} {b:.0f}C{middle:.0f} {b:.0f} {middle:.0f} {d:.0f} {c:.0f} {d:.0f}"


def _dot(report: Optimization, node: Node, at: tuple[float, float], names: Mapping[str, str]) -> Element:
    kind = "seed" if node.id == report.initial_id else "rejected" if node.accepted is False else "kept"
    score = score_text(node.score)
    title = f"{names.get(node.id, node.id)} ({node.id}), {score if node.score is not None else 'not scored in full'}"
    title += ", rejected" if node.accepted is False else ", on the Pareto front" if node.on_front else ""
    x, y = f"{at[0]:.0f}", f"{at[1]:.0f}"
    text = names.get(node.id, node.id) + ("" if node.score is None else f" {score}")
    return tag(
        "g",
        tag("title", title),
        tag("circle", cx=x, cy=y, r=12, class_="ring") if node.id == report.returned_id else None,
        tag("circle", cx=x, cy=y, r=7, class_=f"node {kind}{' front' if node.on_front else ''}"),
        tag("text", text, x=f"{at[0] + 9:.0f}", y=f"{at[1] - 9:.0f}"),
    )
