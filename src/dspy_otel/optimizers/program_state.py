"""A candidate's whole state, and its differences from its parent. Both are content: only behind the content switch."""

from __future__ import annotations

import copy
import json
import re
from typing import Any, Final

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.digest import digest, runs_code
from dspy_otel.content.encoder import Content
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.operations.module_tree import attributes, named_parameters, named_predictors
from dspy_otel.operations.texts import Texts

MOST: Final = 256 * 1024
"""Bytes of a saved state that may be recorded whatever the content limit: a truncated state cannot be loaded."""
_CONTROLS: Final = re.compile(r"[\x7f-\x9f]")


def state_of(program: Any) -> dict[str, Any]:
    """Instructions, field prefixes, demos and decision settings of every predictor by name.

    Plain copies: optimizers change programs in place.
    """
    return {name: _predictor_state(attributes(predictor)) for name, predictor in named_predictors(program)}


def _predictor_state(stored: dict[str, Any]) -> dict[str, Any]:
    signature, decisions = stored["signature"], stored.get("fields")
    return {
        "instructions": signature.instructions,
        "prefixes": {field: (info.json_schema_extra or {}).get("prefix") for field, info in signature.fields.items()},
        "demos": [_copied(demo) for demo in introspection.items(stored.get("demos"))],
        "decisions": copy.deepcopy(decisions) if type(decisions) is dict else {},  # DSPy 3.4
    }


def _copied(demo: Any) -> Any:
    values = demo if introspection.is_a(demo, dict) else introspection.store_of(demo)
    return demo if values is None else dict(dict.items(values))


def differences(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """The changes from ``parent`` to ``child``, by predictor.

    Returns:
        For each changed predictor: ``instructions``, ``prefixes`` and ``decisions`` with ``before`` and ``after``;
        ``demos`` with those ``added`` and the number ``removed``. Empty when nothing changed.
    """
    changes: dict[str, Any] = {}
    for name, state in child.items():
        before = parent.get(name, {"instructions": None, "prefixes": None, "demos": [], "decisions": {}})
        change: dict[str, Any] = {
            part: {"before": before[part], "after": state[part]}
            for part in ("instructions", "prefixes", "decisions")
            if digest(state[part]) != digest(before[part])
        }
        # By digest: comparing them would run code of the classes of their values.
        old, new = [digest(demo) for demo in before["demos"]], [digest(demo) for demo in state["demos"]]
        added = [demo for demo, known in zip(state["demos"], new, strict=True) if known not in old]
        removed = sum(known not in new for known in old)
        if added or removed:
            change["demos"] = {"added": added, "removed": removed}
        if change:
            changes[name] = change
    return changes


def saved(program: Any) -> tuple[dict[str, Any], bool]:
    """The state that ``program.save("x.json")`` writes and ``program.load`` reads.

    Only code of DSPy's works it out: of a user's class that has a part in saving (``dump_state``, ``__getattr__``, a
    property, a serializer), the fields are taken as they are.

    Returns:
        The state, and whether it is surely what DSPy writes.
    """
    if type(program) is Texts:
        return program.saved(), True
    from dspy.utils.saving import get_dependency_versions

    kept = [(name, *_saved_parameter(parameter)) for name, parameter in named_parameters(program)]
    state: dict[str, Any] = {name: each for name, each, _ in kept}
    if kept and kept[0][0] == "self":  # a predictor that is the whole program
        state = kept[0][1]
    whole = all(each for *_, each in kept) and not _takes_part(program, _LOOKUPS)
    return {**state, "metadata": {"dependency_versions": get_dependency_versions()}}, whole


def _saved_parameter(parameter: Any) -> tuple[dict[str, Any], bool]:
    """The state of a parameter as DSPy dumps it, and whether it is whole."""
    stored = introspection.instance_dict(parameter)
    lm, given = stored.get("lm"), list(introspection.items(stored.get("demos")))
    demos = [_copied(demo) for demo in given]
    instead: dict[str, Any] = {}
    if lm is not None and _takes_part(lm):
        instead["lm"] = _as_of_dspy(lm, {})
    of_users = any(type(demo) is not dict and introspection.library(type(demo)) != "dspy" for demo in given)
    if of_users or runs_code(demos, examples=True):
        instead["demos"] = []
    if not instead and not _takes_part(parameter):
        return parameter.dump_state(), True
    state = _as_of_dspy(parameter, instead).dump_state()
    return {**state, "demos": demos} if "demos" in instead else state, False


_LOOKUPS: Final = frozenset({"__getattribute__", "__getattr__", "dump_state", "named_parameters"})
_PARTS: Final = _LOOKUPS | {
    *("traces", "train", "demos", "signature", "lm", "fields"),
    *("kwargs", "model", "model_type", "cache", "num_retries", "__bool__", "__len__"),
}


def _takes_part(value: Any, names: frozenset[str] = _PARTS) -> bool:
    """Whether code of a user's class, under one of these names, would run while DSPy saves ``value``."""
    bases = (base for base in introspection.bases_of(type(value)) if introspection.library(base) != "dspy")
    return any(base is not object and names & introspection.members_of(base).keys() for base in bases)


def _as_of_dspy(value: Any, instead: dict[str, Any]) -> Any:
    """``value`` as an instance of the class of DSPy's that its own derives from, with other values in some fields."""
    kind: Any = next(base for base in introspection.bases_of(type(value)) if introspection.library(base) == "dspy")
    made = object.__new__(kind)
    introspection.instance_dict(made).update({**introspection.instance_dict(value), **instead})
    return made


def put_state(telemetry: Telemetry, attributes: Attributes, program: Any, key: str = semconv.PROGRAM_STATE) -> None:
    """Add a program's saved state under ``key``, if content may be on spans.

    ``<key>.complete`` is False beside it when the text is not the whole state: truncated, masked or redacted.
    """
    if telemetry.config.content_on_spans:
        nothing: Attributes = {}
        attributes.update(guard("program state")(_state_attributes)(telemetry, program, key) or nothing)


def _state_attributes(telemetry: Telemetry, program: Any, key: str) -> Attributes:
    state, loadable = saved(program)
    content = telemetry.content
    text = Content(max(content.limit, MOST), content.media, content.redact).json(state)
    # Escaped, as JSON has the other control characters: those would be replaced on the way into a span.
    text = _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    attributes: Attributes = {key: text}
    if not loadable or not _is_whole(state, text):
        attributes[key + semconv.STATE_COMPLETE] = False
    return attributes


def _is_whole(state: dict[str, Any], text: str) -> bool:
    try:
        return bool(json.loads(json.dumps(state)) == json.loads(text))
    except (TypeError, ValueError):  # DSPy could not save it as JSON either.
        return False
