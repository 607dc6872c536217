"""The registry of our conventions (`docs/registry`), read as OpenTelemetry Weaver reads it, and its rules.

Weaver itself resolves references into the registries that ours depends on; here, `UPSTREAM` has what we use of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent.parent.parent / "docs" / "registry"
MANIFEST = FOLDER / "manifest.yaml"

# Type of each attribute in the registries that ours depends on, at the versions that the manifest names.
UPSTREAM: Mapping[str, str] = {
    "error.type": "string",
    "exception.type": "string",
    "exception.message": "string",
    "exception.stacktrace": "string",
    "http.response.status_code": "int",
    "otel.component.name": "string",
    "otel.component.type": "string",
    "server.address": "string",
    "server.port": "int",
    "session.id": "string",
    "user.id": "string",
    "gen_ai.agent.name": "string",
    "gen_ai.conversation.id": "string",
    "gen_ai.data_source.id": "string",
    "gen_ai.embeddings.dimension.count": "int",
    "gen_ai.evaluation.explanation": "string",
    "gen_ai.evaluation.name": "string",
    "gen_ai.evaluation.score.value": "double",
    "gen_ai.input.messages": "any",
    "gen_ai.operation.name": "string",
    "gen_ai.output.messages": "any",
    "gen_ai.output.type": "string",
    "gen_ai.prompt.name": "string",
    "gen_ai.prompt.version": "string",
    "gen_ai.provider.name": "string",
    "gen_ai.request.choice.count": "int",
    "gen_ai.request.frequency_penalty": "double",
    "gen_ai.request.max_tokens": "int",
    "gen_ai.request.model": "string",
    "gen_ai.request.presence_penalty": "double",
    "gen_ai.request.reasoning.level": "string",
    "gen_ai.request.seed": "int",
    "gen_ai.request.stop_sequences": "string[]",
    "gen_ai.request.stream": "boolean",
    "gen_ai.request.temperature": "double",
    "gen_ai.request.top_k": "int",
    "gen_ai.request.top_p": "double",
    "gen_ai.response.finish_reasons": "string[]",
    "gen_ai.response.id": "string",
    "gen_ai.response.model": "string",
    "gen_ai.response.time_to_first_chunk": "double",
    "gen_ai.retrieval.documents": "any",
    "gen_ai.retrieval.query.text": "string",
    "gen_ai.retrieval.top_k": "int",
    "gen_ai.system_instructions": "any",
    "gen_ai.token.modality": "string",
    "gen_ai.token.type": "string",  # of version 1.41.0, as the metric that has it
    "gen_ai.tool.call.arguments": "any",
    "gen_ai.tool.call.result": "any",
    "gen_ai.tool.definitions": "any",
    "gen_ai.tool.description": "string",
    "gen_ai.tool.name": "string",
    "gen_ai.tool.type": "string",
    "gen_ai.usage.cache_read.input_tokens": "int",
    "gen_ai.usage.cache_write.input_tokens": "int",
    "gen_ai.usage.input_tokens": "int",
    "gen_ai.usage.output_tokens": "int",
    "gen_ai.usage.reasoning.output_tokens": "int",
    "gen_ai.workflow.name": "string",
}
_PYTHON = {"string": str, "int": int, "double": float, "boolean": bool}


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute as it is registered; `members` are the values of an enum."""

    key: str
    type: str
    brief: str
    members: frozenset[str] = frozenset()
    content: bool = False

    @property
    def value_type(self) -> str:
        """The type of its values: for a template, of each attribute that begins so."""
        return re.sub(r"^template\[(.*)\]$", r"\1", self.type)

    def accepts(self, value: Any) -> bool:
        """Whether an exported value has the registered type. Enums are open, but ours send what they register."""
        kind = self.value_type
        if kind == "any":
            return True
        if kind.endswith("[]"):
            single = _PYTHON[kind.removesuffix("[]")]
            return isinstance(value, (tuple, list)) and all(type(each) is single for each in value)
        return type(value) is _PYTHON[kind] and (not self.members or value in self.members)


@dataclass(frozen=True, slots=True)
class Signal:
    """A span, event or metric: its names as patterns of attributes, and the requirement level of each attribute."""

    name: str
    attributes: Mapping[str, str]
    brief: str = ""
    kind: str = ""
    patterns: tuple[str, ...] = ()
    instrument: str = ""
    unit: str = ""

    def named(self, attributes: Mapping[str, Any]) -> str | None:
        """What a span with these attributes is to be called."""
        for pattern in self.patterns:
            if all(str(attributes.get(key, "")) for key in re.findall(r"{(.*?)}", pattern)):
                return re.sub(r"{(.*?)}", lambda found: str(attributes[found[1]]), pattern)
        return None


@dataclass(frozen=True, slots=True)
class Registry:
    """All that is registered, with groups and references resolved."""

    attributes: Mapping[str, Attribute]
    spans: tuple[Signal, ...]
    events: Mapping[str, Signal]
    metrics: Mapping[str, Signal]

    def attribute(self, key: str) -> Attribute | None:
        """The attribute that an exported key belongs to: itself, or the template that it begins with."""
        if key in self.attributes:
            return self.attributes[key]
        for place in range(key.count("."), 0, -1):
            found = self.attributes.get(".".join(key.split(".")[:place]))
            if found is not None and found.type.startswith("template["):
                return found
        return None

    def problems(self, signal: Signal, attributes: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with exported attributes of a span, event or point."""
        for key, value in attributes.items():
            registered = self.attribute(key)
            if registered is None:
                yield f"{signal.name}: {key} is not registered"
            elif registered.key not in signal.attributes:
                yield f"{signal.name}: {key} is not registered for it"
            elif not registered.accepts(value):
                yield f"{signal.name}: {key} is to be {registered.type} {sorted(registered.members)}: {value!r}"
        for key, level in signal.attributes.items():
            if level == "required" and key not in attributes:
                yield f"{signal.name}: {key} is missing"

    def problems_of_span(self, name: str, kind: str, attributes: Mapping[str, Any]) -> list[str]:
        """What is wrong with an exported span: the shortest list among the types that its name and kind allow."""
        fitting = [span for span in self.spans if span.kind == kind and span.named(attributes) == name]
        found = [list(self.problems(span, attributes)) for span in fitting]
        return min(found, key=len) if found else [f"no type of spans is named {name!r} [{kind}] with {attributes}"]


@cache
def registry() -> Registry:
    """The registry in `docs/registry`."""
    files = [yaml.safe_load(file.read_text("utf-8")) for file in sorted(FOLDER.glob("*.yaml")) if file != MANIFEST]

    def each(section: str) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(file.get(section, ()) for file in files)

    attributes = {key: Attribute(key, kind, "") for key, kind in UPSTREAM.items()}
    for item in each("attributes"):
        members = frozenset(each["value"] for each in item["type"]["members"]) if type(item["type"]) is dict else ()
        kind = "string" if members else item["type"]
        content = bool(item.get("annotations", {}).get("content"))
        attributes[item["key"]] = Attribute(item["key"], kind, item["brief"], frozenset(members), content)
    groups = {group["id"]: group["attributes"] for group in each("attribute_groups")}

    def resolved(item: Mapping[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        given = item.get("attributes", ())
        parts = [*(groups[ref["ref_group"]] for ref in given if "ref_group" in ref), [r for r in given if "ref" in r]]
        for ref in itertools.chain.from_iterable(parts):
            level = ref.get("requirement_level", "recommended")
            found[ref["ref"]] = level if isinstance(level, str) else next(iter(level))
        return found

    spans = tuple(
        Signal(
            item["type"],
            resolved(item),
            item["brief"],
            item["kind"].upper(),
            tuple(re.findall(r"`(.*?)`", item["name"]["note"])),
        )
        for item in each("spans")
    )
    events = [(item["name"], item) for item in each("events")]
    events += [(item["ref"], item) for item in each("event_refinements")]
    metrics = [(item["name"], item, item) for item in each("metrics")]
    metrics += [(item["ref"], item, item["annotations"]) for item in each("metric_refinements")]
    return Registry(
        attributes,
        spans,
        {name: Signal(name, resolved(item), item["brief"]) for name, item in events},
        {
            name: Signal(name, resolved(item), item["brief"], instrument=more["instrument"], unit=more["unit"])
            for name, item, more in metrics
        },
    )


def broken_rules(telemetry: Any) -> list[str]:
    """What is wrong with all that a `Recorder` has of ours."""
    known = registry()
    found: set[str] = set()
    for span in telemetry.spans:
        if span.instrumentation_scope.name != "dspy_otel":
            continue
        found |= set(known.problems_of_span(span.name, span.kind.name, span.attributes))
        for event in span.events:
            found |= set(known.problems(known.events[event.name], event.attributes))
    for name, metric in telemetry.metrics().items():
        for point in metric.data.data_points:
            found |= set(known.problems(known.metrics[name], point.attributes))
    return sorted(found)
