"""Parts of the page that several sections have: tables, values, links."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from xml.etree.ElementTree import Element

from dspy_otel.record.addresses import Address
from dspy_otel.reports.markup import Child, cut, tag

MAX_VALUE: Final = 300
"""Most characters of a value that is no instruction."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where an optimization was read from, for links on the page.

    Attributes:
        run: where MLflow shows the optimization.
        in_run: the page is kept in MLflow's run itself, which has no address when the page is made.
        tracking_uri: of that MLflow, where a reader of the page needs it to load the winner.
        runs: addresses of trials, by number.
        trace_url: address of a trace, with ``{}`` for its id.
        trace_name: how the id of a trace is written there, with ``{}`` for its 32 hexadecimal digits.
        versions: of the software that recorded it.
    """

    run: Address | None = None
    in_run: bool = False
    tracking_uri: str | None = None
    runs: Mapping[int, str] = field(default_factory=dict)
    trace_url: str | None = None
    trace_name: str = "{}"
    versions: Mapping[str, str] = field(default_factory=dict)


def table(
    columns: Sequence[str], rows: Sequence[Element], numeric: set[str] | frozenset[str] = frozenset(), **options: Any
) -> Element:
    """A table.

    Args:
        columns: titles.
        rows: of cells.
        numeric: columns whose cells stand right.
        **options: attributes of the element.
    """
    head = tag("tr", [tag("th", name, class_="n" if name in numeric else None, scope="col") for name in columns])
    return tag("table", tag("thead", head), tag("tbody", rows), **options)


def link(address: str | None, text: Child, title: str | None = None) -> Element:
    """A link; text alone where the address is none that a browser should follow."""
    safe = address if address is not None and address.startswith(("http://", "https://")) else None
    return tag("a", text, href=safe, rel="noreferrer", title=title)


def trace_link(source: Source, trace_id: int | None) -> Element | None:
    """A trace by a short name; the whole id is its title."""
    if trace_id is None:
        return None
    name = source.trace_name.replace("{}", f"{trace_id:032x}")
    address = None if source.trace_url is None else source.trace_url.replace("{}", name)
    short = cut(source.trace_name.replace("{}", f"{trace_id:032x}"[:6]), 24)
    return link(address, ["trace ", tag("code", short)], title=cut(name, 80))


def candidate(names: Mapping[str, str], id_: str | None) -> Element | None:
    """A candidate by its short name."""
    return None if id_ is None else tag("span", names.get(id_, cut(id_, 16)), title=id_, class_="nw")


def chip(name: str, value: Any) -> Element:
    """A name and a value."""
    return tag("span", tag("i", f"{cut(name, 80)} "), cut(json_text(value), 120), class_="chip")


def value_of(value: Any) -> Child:
    """Inputs or an answer: a single field without its name."""
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value.values()))
    if isinstance(value, dict):
        return tag("dl", [[tag("dt", cut(name, 80)), tag("dd", plain(part))] for name, part in value.items()])
    return None if value is None else plain(value)


def plain(value: Any) -> str:
    """A value as a short text."""
    return cut(json_text(value), MAX_VALUE)


def json_text(value: Any) -> str:
    """A text as it is, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
