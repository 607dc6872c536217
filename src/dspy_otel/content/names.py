"""Names that others make up (models, ids, finish reasons, tools): bounded, of plain characters, without secrets.

A server may answer with anything, also with a prompt or a key, where a model's name is expected.
"""

from __future__ import annotations

import functools
import re
from typing import Final

from dspy_otel.content import redaction

OTHER: Final = "other"
LONGEST: Final = 256

# What the providers' APIs, LiteLLM and DSPy name; any other that looks like one passes too.
_WORD: Final = re.compile(r"[A-Za-z]{1,24}(?:[_-][A-Za-z0-9]{1,24}){0,4}")
_NOT_PLAIN: Final = re.compile(r"[^\w.:/@+=,()\[\]#|~-]")


@functools.lru_cache(maxsize=1024)
def plain_name(text: str) -> str:
    """At most 256 characters of ``text``: secrets masked, and ``_`` for spaces, control characters and signs."""
    shown = redaction.mask(text[:LONGEST])
    # The mask stays as it is everywhere.
    return redaction.MASK.join(_NOT_PLAIN.sub("_", part) for part in shown.split(redaction.MASK))


@functools.lru_cache(maxsize=1024)
def without_secrets(text: str) -> str:
    """A name that the user gave, as it is except for secrets."""
    return redaction.mask(text[: 4 * LONGEST])


@functools.lru_cache(maxsize=1024)
def plain_word(text: str) -> str:
    """A word of a vocabulary (``stop``, ``tool_calls``, ``xhigh``), or ``other`` for what cannot be one."""
    return text if _WORD.fullmatch(text) is not None and redaction.mask(text) == text else OTHER
