"""Names that others make up: models, ids, finish reasons, tools, parameters of ``compile()``.

A server may answer with anything, also with a prompt or a key, where a model's name is expected. So a word of a known
vocabulary passes; anything else is bounded, of plain characters, and without secrets, whether content is on or off.
"""

from __future__ import annotations

import functools
import re
from typing import Final

from dspy_otel.content import redaction
from dspy_otel.content.introspection import ByClass, short_name_of

OTHER: Final = "other"
LONGEST: Final = 256

# Finish reasons of OpenAI and LiteLLM, Anthropic, Gemini, Cohere, Mistral and local servers; reasoning efforts.
_WORDS: Final = """
stop length tool_calls function_call content_filter completed incomplete failed cancelled max_output_tokens
end_turn max_tokens stop_sequence tool_use pause_turn refusal compaction model_context_window_exceeded
STOP MAX_TOKENS SAFETY RECITATION LANGUAGE OTHER BLOCKLIST PROHIBITED_CONTENT SPII MALFORMED_FUNCTION_CALL
IMAGE_SAFETY UNEXPECTED_TOOL_CALL FINISH_REASON_UNSPECIFIED COMPLETE STOP_SEQUENCE TOOL_CALL ERROR ERROR_TOXIC
ERROR_LIMIT USER_CANCEL model_length error abort eos eos_token other unknown
none minimal low medium high xhigh max auto default disable
"""
VOCABULARY: Final = frozenset(_WORDS.split())
"""Words that pass as they are."""

_WORD: Final = re.compile(r"(?=.{1,48}\Z)[A-Za-z]{1,24}(?:[_-][A-Za-z0-9]{1,24}){0,4}")
_PARAMETER: Final = re.compile(r"(?=.{1,64}\Z)[A-Za-z][A-Za-z0-9]{0,31}(?:_[A-Za-z0-9]{0,31}){0,7}")
_PLAIN: Final = re.compile(r"[\w.:/@+=,()\[\]#|~-]*")
_NOT_PLAIN: Final = re.compile(r"[^\w.:/@+=,()\[\]#|~-]")


@functools.lru_cache(maxsize=1024)
def _masked(text: str, most: int, _: int) -> str:
    # Cut afterwards: half a secret at the end would not be recognised.
    return redaction.mask(text[: most + redaction.lookahead()])[:most]


def plain_name(text: str) -> str:
    """At most 256 characters of ``text``: secrets masked, and ``_`` for spaces, control characters and signs."""
    return _plain(text, redaction.remembered)


@functools.lru_cache(maxsize=1024)
def _plain(text: str, _: int) -> str:
    shown = _masked(text, LONGEST, redaction.remembered)
    if _PLAIN.fullmatch(shown):
        return shown
    # The mask stays as it is everywhere.
    return redaction.MASK.join(_NOT_PLAIN.sub("_", part) for part in shown.split(redaction.MASK))


def without_secrets(text: str) -> str:
    """A name that the user gave, as it is except for secrets."""
    return _masked(text, 4 * LONGEST, redaction.remembered)


class_name: Final = ByClass(lambda kind: without_secrets(short_name_of(kind))).of
"""The name of a class, whatever its metaclass makes of it, and without secrets."""


def plain_word(text: str) -> str:
    """A word of :data:`VOCABULARY`, or one that looks like one and is no secret; ``other`` for anything else."""
    if text in VOCABULARY:
        return text
    return text if _WORD.fullmatch(text) is not None and without_secrets(text) == text else OTHER


def is_parameter(text: str) -> bool:
    """Whether a name of a keyword argument is one: ``compile(**{"any text": ...})`` works with any text."""
    return _PARAMETER.fullmatch(text) is not None and without_secrets(text) == text
