"""A candidate's whole state, and its differences from its parent. Both are content: only behind the content switch."""

from __future__ import annotations

import copy
import json
from typing import Any, Final

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.digest import digest, runs_code
from dspy_otel.content.encoder import Content
from dspy_otel.core.attributes import Attributes
from dspy_otel.core.internal_errors import guard
from dspy_otel.core.telemetry import Telemetry

MOST: Final = 256 * 1024
"""Bytes of a saved state that may be recorded whatever the content limit: a truncated state cannot be loaded."""


def state_of(program: Any) -> dict[str, Any]:
    """Instructions, field prefixes, demos and decision settings of every predictor by name.

    Plain copies: optimizers change programs in place.
    """
    return {
        name: {
            "instructions": predictor.signature.instructions,
            "prefixes": {
                field: (info.json_schema_extra or {}).get("prefix")
                for field, info in predictor.signature.fields.items()
            },
            "demos": [_copied(demo) for demo in introspection.items(predictor.demos)],
            "decisions": copy.deepcopy(predictor.__dict__.get("fields") or {}),  # DSPy 3.4
        }
        for name, predictor in program.named_predictors()
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


def saved(program: Any) -> dict[str, Any]:
    """The state that ``program.save("x.json")`` writes and ``program.load`` reads."""
    from dspy.utils.saving import get_dependency_versions

    return {**program.dump_state(), "metadata": {"dependency_versions": get_dependency_versions()}}


def _saved_safely(program: Any) -> tuple[dict[str, Any], bool]:
    """The state, and whether it is as DSPy saves it.

    DSPy would run code of the classes of a demo's values (serializers, ``__class__``, ``toDict``): such demos are taken
    as they are.
    """
    demos = {name: introspection.instance_dict(each).get("demos") for name, each in program.named_parameters()}
    kept = {name: [_copied(demo) for demo in introspection.items(each)] for name, each in demos.items()}
    unsafe = {name for name, each in kept.items() if runs_code(each, examples=True)}
    if not unsafe:
        return saved(program), True
    state: dict[str, Any] = {}
    for name, parameter in program.named_parameters():
        if name in unsafe:
            without_demos = object.__new__(type(parameter))
            introspection.instance_dict(without_demos).update({**introspection.instance_dict(parameter), "demos": []})
            state[name] = {**without_demos.dump_state(), "demos": kept[name]}
        else:
            state[name] = parameter.dump_state()
    return state, False


def put_state(telemetry: Telemetry, attributes: Attributes, program: Any, key: str = semconv.PROGRAM_STATE) -> None:
    """Add a program's saved state under ``key``, if content may be on spans.

    ``<key>.complete`` is False beside it when the text is not the whole state: truncated, masked or redacted.
    """
    if telemetry.config.content_on_spans:
        nothing: Attributes = {}
        attributes.update(guard("program state")(_state_attributes)(telemetry, program, key) or nothing)


def _state_attributes(telemetry: Telemetry, program: Any, key: str) -> Attributes:
    state, loadable = _saved_safely(program)
    content = telemetry.content
    text = Content(max(content.limit, MOST), content.media, content.redact).json(state)
    attributes: Attributes = {key: text}
    if not loadable or not _is_whole(state, text):
        attributes[key + semconv.STATE_COMPLETE] = False
    return attributes


def _is_whole(state: dict[str, Any], text: str) -> bool:
    try:
        return bool(json.loads(json.dumps(state)) == json.loads(text))
    except (TypeError, ValueError):  # DSPy could not save it as JSON either.
        return False
