"""Keys, tokens and passwords are masked wherever they hide, whatever is switched on."""

from __future__ import annotations

import os
import re
from typing import Any, Final

MASK: Final = "[masked]"

_SECRET_NAME: Final = re.compile(
    r"(?:^|[_\-.])(?:api[_\-]?keys?|apikey|authorization|auth|access[_\-]?key(?:[_\-]?id)?|secret(?:s|[_\-].*)?|"
    r"passw(?:or)?d|passphrase|credentials?|private[_\-]?key|cookie|set-cookie|bearer|"
    r"(?:access|auth|refresh|session|id|security|bearer|hf|github|api)[_\-]?token|token)$",
    re.IGNORECASE,
)
_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# A cheap `in` decides whether the pattern beside it is worth running: prompts are long and secrets rare.
_PATTERNS: Final = tuple(
    (needle, re.compile(pattern))
    for needle, pattern in (
        ("sk-", r"\bsk-[A-Za-z0-9_\-]{12,}"),
        ("Bearer ", r"(?<=Bearer )[A-Za-z0-9._~+/\-]{8,}=*"),
        ("bearer ", r"(?<=bearer )[A-Za-z0-9._~+/\-]{8,}=*"),
        ("Basic ", r"(?<=Basic )[A-Za-z0-9+/]{12,}=*"),
        ("AKIA", r"\bAKIA[0-9A-Z]{16}\b"),
        ("ASIA", r"\bASIA[0-9A-Z]{16}\b"),
        ("AIza", r"\bAIza[0-9A-Za-z_\-]{30,}"),
        ("gh", r"\bgh[pousr]_[A-Za-z0-9]{20,}"),
        ("github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{20,}"),
        ("glpat-", r"\bglpat-[A-Za-z0-9_\-]{16,}"),
        ("hf_", r"\bhf_[A-Za-z0-9]{16,}"),
        ("gsk_", r"\bgsk_[A-Za-z0-9]{16,}"),
        ("xai-", r"\bxai-[A-Za-z0-9]{16,}"),
        ("nvapi-", r"\bnvapi-[A-Za-z0-9_\-]{16,}"),
        ("pplx-", r"\bpplx-[A-Za-z0-9]{16,}"),
        ("xox", r"\bxox[abprs]-[A-Za-z0-9\-]{10,}"),
        ("eyJ", r"\beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]*"),
        ("PRIVATE KEY-----", r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
        ("://", r"(?<=://)[^\s/:@\"']{0,128}:[^\s/@\"']{1,256}(?=@)"),
    )
)

LONGEST: Final = 1024
"""Text that is to be cut is looked at this much further first, so that no secret survives by being cut in two."""

_MIN_LENGTH: Final = 8
_MOST_KNOWN: Final = 64
_known: dict[str, None] = {}


def is_secret_name(name: str) -> bool:
    """Whether a field, header, parameter or environment variable of this name holds a secret."""
    if len(name) > 128:
        return False
    return _SECRET_NAME.search(_CAMEL.sub("_", name)) is not None


def remember(value: Any) -> None:
    """Mask this very text wherever it shows from now on (an LM's own ``api_key``, for one)."""
    if isinstance(value, str) and len(value) >= _MIN_LENGTH and value not in _known and len(_known) < _MOST_KNOWN:
        _known[value] = None


def remember_environment() -> None:
    """Mask the values of environment variables whose names say that they hold a secret."""
    for name, value in os.environ.items():
        if is_secret_name(name):
            remember(value)


def mask(text: str) -> str:
    """``text`` without the secrets that can be recognised in it."""
    for known in tuple(_known):
        if known in text:
            text = text.replace(known, MASK)
    for needle, pattern in _PATTERNS:
        if needle in text:
            text = pattern.sub(MASK, text)
    return text
