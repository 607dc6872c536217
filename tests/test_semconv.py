"""The registry, the names in the code, the page and what is exported say the same, and keep the registry's rules."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dspy_otel import semconv
from dspy_otel.core.metrics import Metrics
from tests.support.registry import FOLDER, MANIFEST, UPSTREAM, registry

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "semantic-conventions.md").read_text(encoding="utf-8")
KNOWN = registry()
OURS = {key: attribute for key, attribute in KNOWN.attributes.items() if key not in UPSTREAM}

# --- the registry itself ------------------------------------------------------------------------------------------
_SECTIONS = {
    "attributes": ({"key", "type", "brief", "stability"}, {"note", "examples", "annotations"}),
    "attribute_groups": ({"id", "visibility", "attributes"}, set()),
    "spans": ({"type", "kind", "name", "brief", "stability", "requirement_level", "attributes"}, set()),
    "events": ({"name", "brief", "stability", "requirement_level", "attributes"}, set()),
    "event_refinements": ({"id", "ref", "brief"}, {"attributes"}),
    "metrics": ({"name", "brief", "instrument", "unit", "stability", "requirement_level", "attributes"}, set()),
    "metric_refinements": ({"id", "ref", "brief", "attributes", "annotations"}, set()),
}
_LEVELS = {"required", "conditionally_required", "recommended", "opt_in"}
_TYPES = {"string", "int", "double", "boolean", "any", "string[]", "template[any]"}

# OpenTelemetry's rules for names forbid a name that another one begins with, which these still are.
_ALSO_A_NAMESPACE = {
    "dspy.lm.cost",
    "dspy.optimizer.initial_program.state",
    "dspy.program.state",
    "dspy.trial.score",
}


FILES = [file for file in sorted(FOLDER.glob("*.yaml")) if file != MANIFEST]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_the_registry_has_what_its_format_demands(file: Path) -> None:
    read = yaml.safe_load(file.read_text("utf-8"))
    assert read.pop("file_format") == "definition/2"
    for section, items in read.items():
        needed, allowed = _SECTIONS[section]
        for item in items:
            assert needed <= set(item) <= needed | allowed, item
            assert item.get("stability", "development") == "development"
            keys = [ref["ref"] for ref in item.get("attributes", ()) if "ref" in ref]
            assert len(set(keys)) == len(keys), item
            levels = [ref["requirement_level"] for ref in item.get("attributes", ()) if "ref" in ref]
            assert {level if isinstance(level, str) else next(iter(level)) for level in levels} <= _LEVELS
            if section == "attributes":
                enum = item["type"]["members"] if isinstance(item["type"], dict) else None
                assert enum or (item["type"] in _TYPES and item["examples"]), item
                assert item["brief"].endswith("."), item
                assert all({"id", "value", "brief", "stability"} == set(member) for member in enum or ())


def test_every_example_has_the_type_of_its_attribute() -> None:
    for file in FILES:
        for item in yaml.safe_load(file.read_text("utf-8")).get("attributes", ()):
            registered = KNOWN.attributes[item["key"]]
            assert all(registered.accepts(example) for example in item.get("examples", ())), item


def test_every_reference_leads_somewhere_and_every_attribute_is_used() -> None:
    signals = (*KNOWN.spans, *KNOWN.events.values(), *KNOWN.metrics.values())
    assert {key for signal in signals for key in signal.attributes} == set(KNOWN.attributes)


def test_names_are_lower_case_and_only_known_ones_are_namespaces_too() -> None:
    assert not [key for key in OURS if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", key)]
    spaces = {key[: place.start()] for key in OURS for place in re.finditer(r"\.", key)}
    assert spaces & set(OURS) == _ALSO_A_NAMESPACE


def test_content_is_never_sent_unless_asked_for() -> None:
    for signal in (*KNOWN.spans, *KNOWN.events.values(), *KNOWN.metrics.values()):
        levels = {key: level for key, level in signal.attributes.items() if KNOWN.attributes[key].content}
        assert set(levels.values()) <= {"opt_in"}, signal.name


# --- the code -----------------------------------------------------------------------------------------------------
CODE = {name: value for name, value in vars(semconv).items() if name.isupper() and isinstance(value, str)}
_PREFIXES = {"USAGE_PREFIX", "STATE_COMPLETE"}  # A role or a state's name stands beside them.


def test_the_code_and_the_registry_have_the_same_names() -> None:
    names = {
        value.removesuffix(".")
        for name, value in CODE.items()
        if ("." in value or name.startswith("EVENT_")) and name not in {"SCHEMA_URL", *_PREFIXES}
    }
    roles = {semconv.USAGE_PREFIX + value for name, value in CODE.items() if name.startswith("ROLE_")}
    states = {state + semconv.STATE_COMPLETE for state in (semconv.PROGRAM_STATE, semconv.INITIAL_PROGRAM_STATE)}
    assert names | roles | states == {*KNOWN.attributes, *KNOWN.events, *KNOWN.metrics}


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("dspy.lm.role", "ROLE_"),
        ("dspy.optimizer.phase", "PHASE_"),
        ("openinference.span.kind", "KIND_"),
        ("dspy.example.outcome", "OUTCOME_"),
        ("dspy.trial.outcome", "OUTCOME_"),
    ],
)
def test_the_values_of_an_enum_are_those_in_the_code(key: str, prefix: str) -> None:
    assert KNOWN.attributes[key].members == {value for name, value in CODE.items() if name.startswith(prefix)}


class Noting:
    """A meter that keeps what it is asked for."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[str, str, str]] = {}

    def __getattr__(self, method: str) -> Any:
        def create(name: str, unit: str, description: str, **_: Any) -> None:
            self.made[name] = method.removeprefix("create_"), unit, description

        return create


def test_instruments_are_made_as_they_are_registered() -> None:
    meter: Any = Noting()
    Metrics(meter, opt_in="gen_ai/dup")
    registered = {name: (each.instrument, each.unit, each.brief) for name, each in KNOWN.metrics.items()}
    del registered[semconv.METRIC_SPANS_EXPORTED]  # made by the exporter
    assert meter.made == registered


# --- the page -----------------------------------------------------------------------------------------------------
def rows(heading: str) -> list[list[str]]:
    """The rows of the tables below a heading of the page."""
    text = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in cells if len(row) > 1 and ("`" in row[0] or heading == "Spans")]


def named(cell: str) -> list[str]:
    """The attributes in a cell, as the registry has them."""
    states = [f"{key}{semconv.STATE_COMPLETE}" for key in (semconv.PROGRAM_STATE, semconv.INITIAL_PROGRAM_STATE)]
    found = re.findall(r"`(.*?)`", cell)
    return [key for name in found for key in (states if name[0] == "<" else [name.removesuffix(".*")])]


def documented() -> Iterator[tuple[str, str, bool]]:
    """Attribute, type, and whether it is content, of each row of the page."""
    for row in rows("Attributes"):
        keys, kinds = named(row[0]), re.findall(r"JSON|any|(?:string|int|double|boolean)(?:\[\])?", row[1])
        each = kinds if len(kinds) == len(keys) else ["any" if len(kinds) > 1 else kinds[0]] * len(keys)
        for key, kind in zip(keys, each, strict=True):
            yield key, kind, "*content*" in row[1]


def test_the_page_has_each_attribute_with_its_type() -> None:
    found: dict[str, str] = {}
    for key, kind, content in documented():
        registered = KNOWN.attributes[key]
        allowed = {"string", "any"} if kind == "JSON" else {kind}
        assert registered.value_type in allowed, f"{key} is {registered.type}, not {kind}"
        assert content or not registered.content, f"{key} is content"
        found[key] = kind
    of_roles = {key for key in KNOWN.attributes if key.startswith("dspy.usage.") and "template" in OURS[key].type}
    elsewhere = {key for signal in KNOWN.events.values() for key in signal.attributes}
    elsewhere |= {key for signal in KNOWN.metrics.values() for key in signal.attributes}
    assert set(KNOWN.attributes) - set(found) - of_roles <= elsewhere
    assert of_roles == {f"dspy.usage.{role}" for role in OURS["dspy.lm.role"].members}


def test_the_page_has_the_values_of_each_enum() -> None:
    for key, attribute in OURS.items():
        row = next((row for row in rows("Attributes") if key in named(row[0])), None)
        if attribute.members and row is not None and key != semconv.OPENINFERENCE_SPAN_KIND:
            assert attribute.members == set(re.findall(r'`"(.*?)"`', row[3])), key


def test_the_page_has_each_metric_with_its_instrument_and_unit() -> None:
    found = {}
    for row in rows("Metrics"):
        instrument, unit = re.split(r", | \(", row[1])[:2]
        found[named(row[0])[0]] = instrument, unit
    assert found == {name: (metric.instrument, metric.unit) for name, metric in KNOWN.metrics.items()}


def test_the_page_has_each_event_and_kind_of_span() -> None:
    assert {key for part in ("Span events", "Log events") for row in rows(part) for key in named(row[0])} == set(
        KNOWN.events
    )
    shown = " ".join(re.sub(r"{.*?}", "{}", row[1]) for row in rows("Spans"))
    phases = OURS["dspy.optimizer.phase"].members
    for span in KNOWN.spans:
        for pattern in span.patterns:
            name = re.sub(r"{.*?}", "{}", pattern.replace("{gen_ai.operation.name}", "chat"))
            assert f"`{name}`" in shown or span.name == "dspy.phase", span.name
    assert phases - {"merge"} <= set(re.findall(r"`(.*?)`", shown))


# --- what is exported ---------------------------------------------------------------------------------------------
SNAPSHOTS = sorted(TESTS.glob("**/snapshots/*.txt"))
_SHOWN_AS = {"<id>": "0" * 16, "<seconds>": 0.5, "<port>": 80, "<stack trace>": "Traceback"}


class Shown(NamedTuple):
    """A span, event, or point of a metric that a snapshot shows."""

    sort: str
    name: str
    kind: str
    attributes: dict[str, Any]


def shown(file: Path) -> Iterator[Shown]:
    """What a snapshot shows that has attributes."""
    metric = ""
    last: list[Shown] = []
    for line in file.read_text("utf-8").splitlines():
        if point := re.match(r"  ({'.*}) (value|count) ", line):
            yield Shown("metric", metric, "", ast.literal_eval(point[1].replace("'<port>'", "80")))
        elif instrument := re.match(r"(\S+) \[(Sum|Gauge|Histogram)\]", line):
            metric = instrument[1]
        elif span := re.match(r" *(\S.*) \[(INTERNAL|CLIENT)\]$", line):
            last.append(Shown("span", span[1], span[2], {}))
        elif event := re.match(r" *\* (\S+)$", line) or re.match(r"(gen_ai\.\S+)$", line):
            last.append(Shown("event", event[1], "", {}))
        elif re.match(r" *-> ", line):
            last.append(Shown("link", "", "", {}))
        elif last and (attribute := re.match(r" *\. ([\w.]+): (.*)$", line)):
            key, text = attribute.groups()
            plain = text if key == "gen_ai.response.id" else _SHOWN_AS.get(text)
            last[-1].attributes[key] = json.loads(text) if plain is None else plain
    yield from (each for each in last if each.attributes)


@pytest.mark.parametrize("file", SNAPSHOTS, ids=lambda file: file.stem)
def test_what_a_snapshot_shows_is_registered(file: Path) -> None:
    problems: list[str] = []
    for each in shown(file):
        if each.sort == "span":
            problems += KNOWN.problems_of_span(each.name, each.kind, each.attributes)
        elif each.sort == "event":
            problems += KNOWN.problems(KNOWN.events[each.name], each.attributes)
        elif each.sort == "metric":
            problems += KNOWN.problems(KNOWN.metrics[each.name], each.attributes)
    assert not problems


# Sent, and neither in a snapshot nor by this name in a test of operations or optimizers.
UNSEEN = {
    "dspy.bootstrap.round",
    "dspy.evaluation.num_threads",  # depends on the machine
    "dspy.module.outputs",
    "dspy.optimizer.initial_program.state.complete",
    "dspy.optimizer.parent_phase",
    "dspy.optimizer.previous_outcome",
    "dspy.optimizer.resumed",
    "dspy.parallel.num_threads",
    "dspy.trial.outcome",
    "dspy.trial.score.reported",
    "dspy.usage.judge",
}


def test_what_is_registered_is_in_a_snapshot_or_a_test() -> None:
    found: set[str] = set()
    for file in SNAPSHOTS:
        for each in shown(file):
            found |= {each.name, *each.attributes}
        # Pictures of optimizations have the attributes of trials as columns, and those of the compile below.
        text = file.read_text("utf-8")
        columns = re.findall(r"^trial\.number .*$", text, re.MULTILINE)
        found |= {f"dspy.{key}" for line in columns for key in line.split()}
        found |= {f"dspy.{key}" for key in re.findall(r"^((?:optimizer|usage)\.[\w.]+): ", text, re.MULTILINE)}
    for room in ("operations", "optimizers"):
        for file in (TESTS / room).glob("*.py"):
            found |= set(re.findall(r'"(dspy\.[\w.]+)"', file.read_text("utf-8")))
    registered = {key for key in (*OURS, *KNOWN.events, *KNOWN.metrics) if key.startswith("dspy.")}
    families = {key for key in registered if key in OURS and OURS[key].type.startswith("template")}
    seen = {key for key in families if any(each.startswith(f"{key}.") for each in found)}
    assert registered - found - seen == UNSEEN
