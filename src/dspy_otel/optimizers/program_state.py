"""A candidate's whole state, and its differences from its parent. Both are content: only behind the content switch."""

from __future__ import annotations

import copy
import json
from typing import Any, Final

from dspy_otel import semconv
from dspy_otel.content import introspection
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
            if state[part] != before[part]
        }
        added = [demo for demo in state["demos"] if demo not in before["demos"]]
        removed = sum(demo not in state["demos"] for demo in before["demos"])
        if added or removed:
            change["demos"] = {"added": added, "removed": removed}
        if change:
            changes[name] = change
    return changes


def saved(program: Any) -> dict[str, Any]:
    """The state that ``program.save("x.json")`` writes and ``program.load`` reads."""
    from dspy.utils.saving import get_dependency_versions

    return {**program.dump_state(), "metadata": {"dependency_versions": get_dependency_versions()}}


def put_state(telemetry: Telemetry, attributes: Attributes, program: Any, key: str = semconv.PROGRAM_STATE) -> None:
    """Add a program's saved state under ``key``, if content may be on spans.

    ``<key>.complete`` is False beside it when the text is not the whole state: truncated, masked or redacted.
    """
    if telemetry.config.content_on_spans:
        nothing: Attributes = {}
        attributes.update(guard("program state")(_state_attributes)(telemetry, program, key) or nothing)


def _state_attributes(telemetry: Telemetry, program: Any, key: str) -> Attributes:
    state = saved(program)
    content = telemetry.content
    text = Content(max(content.limit, MOST), content.media, content.redact).json(state)
    attributes: Attributes = {key: text}
    if not _is_whole(state, text):
        attributes[key + semconv.STATE_COMPLETE] = False
    return attributes


def _is_whole(state: dict[str, Any], text: str) -> bool:
    try:
        return bool(json.loads(json.dumps(state)) == json.loads(text))
    except (TypeError, ValueError):  # DSPy could not save it as JSON either.
        return False
