"""The reference page and the names in the code are one list."""

from __future__ import annotations

import re
from pathlib import Path

from dspy_otel import semconv

PAGE = Path(__file__).parent.parent / "docs" / "semantic-conventions.md"
_NOT_EMITTED = {"SCHEMA_URL", "SCOPE_NAME", "OPTIMIZER_PARAMS_PREFIX"}


def emitted_names() -> dict[str, str]:
    constants = {name: value for name, value in vars(semconv).items() if name.isupper() and isinstance(value, str)}
    return {name: value for name, value in constants.items() if name not in _NOT_EMITTED}


def test_every_name_in_the_code_is_documented() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = {name: value for name, value in emitted_names().items() if value not in page}
    assert not missing


def test_every_documented_attribute_is_in_the_code() -> None:
    known = set(emitted_names().values())
    page = PAGE.read_text(encoding="utf-8")
    quoted = set(re.findall(r"`((?:gen_ai|dspy|openinference|input|output|exception|error|server)\.[a-z_.]+)`", page))
    code = {name for name in quoted if name.startswith("dspy.settings.")}
    unknown = {name for name in quoted - code if name not in known and not name.endswith(".")}
    assert not unknown
