"""Keys, tokens and passwords are masked wherever they hide, whatever is switched on."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Final

MASK: Final = "[masked]"


class _Pattern:
    """A regular expression that is compiled when it is first used: importing must be cheap."""

    search: Callable[..., re.Match[str] | None]
    match: Callable[..., re.Match[str] | None]
    sub: Callable[..., str]

    def __init__(self, source: str, flags: int = 0) -> None:
        self._source = source
        self._flags = flags

    def __getattr__(self, name: str) -> Any:
        if name not in ("search", "match", "sub"):
            raise AttributeError(name)
        method = getattr(re.compile(self._source, self._flags), name)
        setattr(self, name, method)  # found directly from now on
        return method


# --- by name -----------------------------------------------------------------------------------------------------
# Names are compared in snake case: `X-Api-Key`, `apiKey` and `API_KEY` are all `api_key`.
_ACRONYM: Final = re.compile(r"(?<=[A-Z])(?=[A-Z][a-z])|(?<=[a-z0-9])(?=[A-Z])")
_SEPARATORS: Final = re.compile(r"[^a-z0-9]+")
_SECRET_NAME: Final = re.compile(
    r"(?:^|_)(?:"
    r"api_?keys?|access_?key(?:_id)?|secret_?key|private_?key|subscription_key|signing_key|encryption_key|account_key|"
    r"auth|authorization|authentication_token|x_auth|basic_auth|"
    r"(?:client_|app_|shared_|webhook_|consumer_)?secrets?|secret_(?:access_key|token|id|value)|"
    r"password|passwd|passphrase|pwd|credentials?|set_cookie|cookies?|bearer|jwt|"
    r"(?:access|auth|refresh|session|security|bearer|hf|hub|github|gitlab|slack|api|id|ad|csrf|oauth|personal_access)"
    r"_token"
    r")$"
)
# `token` alone is a word of language models too: under such a name, only what looks like a credential is masked.
_DOUBTFUL_NAME: Final = re.compile(r"(?:^|_)(?:token|key|session|signature|dsn|connection_string)$")
_CREDENTIAL: Final = re.compile(r"(?=[^0-9]*[0-9])(?=[^A-Za-z]*[A-Za-z])[\x21-\x7e]{16,}")
_LONGEST_NAME: Final = 128

# --- by look -----------------------------------------------------------------------------------------------------
_RUN: Final = 15
"""Keys are unbroken runs of at least this many letters, digits, ``_`` and ``-``; prose has few of those."""
_RUN_BYTES: Final = b"x" * _RUN
_RUN_TABLE: Final = bytes(
    120 if byte < 128 and (chr(byte).isalnum() or chr(byte) in "_-") else 32 for byte in range(256)
)
_KEY: Final = _Pattern(
    r"(?<![A-Za-z0-9])(?:"
    r"[srp]k-(?!learn)[\w\-]{12,}|[sr]k_(?:live|test)_\w{10,}|csk-\w{12,}|"
    r"A(?:KIA|SIA|GPA|ROA|IDA)[0-9A-Z]{16}|AIza[\w\-]{30,}|"
    r"gh[pousr]_\w{16,}|github_pat_\w{16,}|gl(?:pat|rt|dt)-[\w\-]{12,}|"
    r"hf_[A-Za-z0-9]{12,}|gsk_[A-Za-z0-9]{12,}|xai-\w{12,}|nvapi-[\w\-]{12,}|pplx-\w{12,}|r8_\w{12,}|fw_\w{16,}|jina_\w{16,}|"
    r"tvly-[\w\-]{10,}|"
    r"lsv2_\w{12,}|dapi[0-9a-f]{32}|npm_\w{30,}|pypi-[\w\-]{16,}|xox[abeoprs]-[\w\-]{10,}|xapp-[\w\-]{10,}|"
    r"whsec_\w{12,}|shpat_\w{12,}|dop_v1_\w{12,}|AGE-SECRET-KEY-\w{12,}"
    r")"
)
_DOTTED: Final = _Pattern(
    # A JWT, also one that the end of the text cuts off; Google's OAuth tokens; SendGrid's keys.
    r"eyJ[\w\-]{8,}(?:\.[\w\-]{8,}(?:\.[\w\-]*)?|\.?[\w\-]*\Z)|ya29\.[\w\-.]{12,}|SG\.[\w\-]{16,}\.[\w\-]{16,}"
)
_ASSIGNED: Final = _Pattern(
    r"""(?:api[_\- ]?key|subscription-key|access[_\- ]?key|account[_\- ]?key|secret|token|authorization|password|sig)"""
    r"""\\?["']?\s?[:=]\s?\\?["']?(?:[A-Za-z]+\s)?\Z""",
    re.IGNORECASE,
)
_TOKEN: Final = _Pattern(r"[\w\-.~+/]+=*")
# Each beside a cheap `in` that decides whether it is worth running; each begins with literal text, which is fast.
_PATTERNS: Final = tuple(
    (needle, _Pattern(pattern), replacement)
    for needle, pattern, replacement in (
        ("earer ", r"earer (?=\S*[0-9=~+_]|\S*[a-z][A-Z])[\w\-.~+/]{8,}=*", f"earer {MASK}"),
        ("asic ", r"asic (?=\S*[0-9=]|\S*[a-z][A-Z])[A-Za-z0-9+/\-_]{12,}=*", f"asic {MASK}"),
        (
            "PRIVATE KEY",
            r"PRIVATE KEY(?: BLOCK)?-----[\s\S]*?(?:-----END [A-Z ]{0,32}PRIVATE KEY(?: BLOCK)?-----|\Z)",
            f"PRIVATE KEY-----{MASK}",
        ),
        ("://", r"://[^\s/:@\"'<>]{0,128}:[^\s/@\"'<>]{1,256}@", f"://{MASK}@"),
        ("assword", r"assword((?:\\?[\"'])?[:=]\\?[\"']?|\\?[\"']: ?\\?[\"'])[^\s\"'&;,\\]{4,}", rf"assword\1{MASK}"),
    )
)

# --- by value ----------------------------------------------------------------------------------------------------
_MIN_LENGTH: Final = 8
_MAX_LENGTH: Final = 4096
_MOST_KNOWN: Final = 256
_LONGEST: Final = 1024
_LONGEST_JSON: Final = 16_384
_known: dict[str, None] = {}
_PAUSE: Final = 1.0
_environment_seen = (float("-inf"), 0)
_LOGIN: Final = _Pattern(r"https?://[^\s/:@]{0,128}:([^\s/@]{1,256})@")
_NESTED: Final = 4
_MOST_SETTINGS: Final = 1000


@functools.lru_cache(maxsize=2048)
def _name_kind(name: str) -> int:
    """2: holds a secret; 1: might hold one; 0: does not."""
    plain = _SEPARATORS.sub("_", _ACRONYM.sub("_", name).lower()).strip("_")
    return 2 if _SECRET_NAME.search(plain) else 1 if _DOUBTFUL_NAME.search(plain) else 0


def is_secret_name(name: str) -> bool:
    """Whether a field, header, parameter or environment variable of this name holds a secret."""
    return len(name) <= _LONGEST_NAME and _name_kind(name) == 2


def hides(name: str, value: Any) -> bool:
    """Whether ``value`` must be masked because of its name. ``None`` and an empty string are shown.

    Args:
        name: name of the field, header or parameter.
        value: what it holds; only looked at if it is exactly a ``str``.
    """
    kind = _name_kind(name) if len(name) <= _LONGEST_NAME else 0
    if not kind or value is None or (type(value) is str and not value):
        return False
    return kind == 2 or (kind == 1 and type(value) is str and _CREDENTIAL.fullmatch(value, 0, 4096) is not None)


def remember(value: Any) -> None:
    """Mask this very text wherever it shows from now on (an LM's own ``api_key``, for one).

    The 256 last ones are kept. Plain lower-case words (``anonymous``) and texts of less than 8 or more than 4,096
    characters are not: masking such a word would blot out ordinary text.
    """
    if type(value) is not str or not _MIN_LENGTH <= len(value) <= _MAX_LENGTH or value in _known:
        return
    if value.isalpha() and value.islower() and len(value) < 20:
        return
    while len(_known) >= _MOST_KNOWN:
        _known.pop(next(iter(tuple(_known))), None)
    _known[value] = None


def remember_settings(settings: Mapping[Any, Any], depth: int = _NESTED) -> None:
    """Remember each value whose name says that it holds a secret, among an LM's settings and in its headers.

    Args:
        settings: parameters by name, with dictionaries in them (headers, credentials).
        depth: how many levels of dictionaries to look into.
    """
    for name, value in tuple(islice(settings.items(), _MOST_SETTINGS)):
        kind = type(value)
        if kind is str:
            # Most names are ordinary, and what is known already is not looked at again.
            if type(name) is str and hides(name, value) and value not in _known:
                _remember_setting(value, depth)
            elif value.startswith(("http://", "https://")) and (login := _LOGIN.match(value)):
                remember(login.group(1))  # Errors quote the address without its scheme.
        elif kind is dict and depth > 0:
            remember_settings(value, depth - 1)


def _remember_setting(value: str, depth: int) -> None:
    if value.startswith("{") and len(value) <= _LONGEST_JSON and depth > 0:  # Credentials as JSON (Vertex AI).
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            inner = None
        if type(inner) is dict:
            remember_settings(inner, depth - 1)
    scheme, space, rest = value.partition(" ")
    if space and scheme.isalpha() and " " not in rest:
        remember(rest)  # `Bearer ...`: also where the credential stands alone.
    remember(value)


def remember_environment() -> None:
    """Mask the values of environment variables whose names say that they hold a secret."""
    global _environment_seen  # noqa: PLW0603
    _environment_seen = time.monotonic(), len(os.environ)
    for name, value in list(os.environ.items()):
        if is_secret_name(name) or hides(name, value):
            remember(value)


def refresh_environment() -> None:
    """Likewise, for what has been set since (``load_dotenv()``): when there are more variables, or once a second."""
    when, count = _environment_seen
    if len(os.environ) != count or time.monotonic() - when > _PAUSE:
        remember_environment()


def lookahead() -> int:
    """How far text that is to be cut must be looked at beyond the cut, so that no secret survives by being cut."""
    return max(_LONGEST, *map(len, tuple(_known))) if _known else _LONGEST


def mask(text: str) -> str:
    """``text`` without the secrets that can be recognised in it."""
    if len(text) < _MIN_LENGTH:
        return text
    for known in tuple(_known):
        if known in text:
            text = text.replace(known, MASK)
    for needle, pattern, replacement in _PATTERNS:
        if needle in text:
            text = pattern.sub(replacement, text)
    return _mask_runs(text) if len(text) >= _RUN else text


def suspect(text: str) -> bool:
    """Whether :func:`mask` might change one of several texts; sometimes ``True`` when it would not.

    Args:
        text: the texts, a line break between each two: one look at all of them.
    """
    if _known and any(known in text for known in tuple(_known)):
        return True
    for needle, pattern, _ in _PATTERNS:
        if needle in text and pattern.search(text):
            return True
    runs = text.encode("ascii", "replace").translate(_RUN_TABLE)
    start = runs.find(_RUN_BYTES)
    while start >= 0:
        end = runs.find(b" ", start)
        end = len(text) if end < 0 else end
        # A JWT may be cut where its own text ends.
        if text.startswith("eyJ", start) or _secret_in_run(text, start, end) is not None:
            return True
        start = runs.find(_RUN_BYTES, end)
    return False


def _mask_runs(text: str) -> str:
    """Mask keys among the long unbroken runs of ``text``: much cheaper than a search for each prefix."""
    runs = text.encode("ascii", "replace").translate(_RUN_TABLE)
    start = runs.find(_RUN_BYTES)
    if start < 0:
        return text
    pieces: list[str] = []
    done = 0
    while start >= 0:
        end = runs.find(b" ", start)
        end = len(text) if end < 0 else end
        span = _secret_in_run(text, start, end)
        if span is not None and span[1] > done:
            pieces += (text[done : max(span[0], done)], MASK)
            done = end = max(span[1], done)
        start = runs.find(_RUN_BYTES, end)
    return text if not pieces else "".join((*pieces, text[done:]))


def _secret_in_run(text: str, start: int, end: int) -> tuple[int, int] | None:
    """Where in the unbroken run from ``start`` to ``end``, and what belongs to it, a secret is."""
    found = _KEY.search(text, start, end)
    if found is not None:
        return found.span()
    for first in (start, start - 3, start - 5):
        dotted = _DOTTED.match(text, first) if first >= 0 else None
        if dotted is not None:
            return dotted.span()
    if _ASSIGNED.search(text[max(start - 48, 0) : start]) and _CREDENTIAL.match(text, start, end):
        token = _TOKEN.match(text, start)
        return token.span() if token is not None else None
    return None
