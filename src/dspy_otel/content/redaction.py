"""Keys, tokens and passwords are masked wherever they hide, whatever is switched on.

They are found by their look, by the name they stand under (:mod:`dspy_otel.content.secret_rules` is the table of both),
and by their value, where it is known. The cost of looking is linear: a text is read a few times by functions written in
C, and an expression runs only where one of those has found the beginning of a key or the name of a secret.
"""

from __future__ import annotations

import functools
import json
import operator
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, islice, product
from typing import Any, Final, NamedTuple

MASK: Final = "[masked]"


class _Pattern:
    """A regular expression over ASCII bytes, compiled when it is first used: there are many, and few are ever used."""

    search: Callable[..., re.Match[bytes] | None]
    match: Callable[..., re.Match[bytes] | None]
    finditer: Callable[..., Iterator[re.Match[bytes]]]
    sub: Callable[[Callable[[re.Match[bytes]], bytes], bytes], bytes]

    def __init__(self, source: str, flags: int = 0) -> None:
        self._source = source
        self._flags = flags

    def __getattr__(self, name: str) -> Any:
        if name not in ("search", "match", "finditer", "sub"):
            raise AttributeError(name)
        method = getattr(re.compile(self._source.encode("ascii"), self._flags), name)
        setattr(self, name, method)  # found directly from now on
        return method


# --- by name -----------------------------------------------------------------------------------------------------
# Names are compared in snake case: `X-Api-Key`, `apiKey` and `API_KEY` are all `api_key`.
_ACRONYM: Final = re.compile(r"(?<=[A-Z])(?=[A-Z][a-z])|(?<=[a-z0-9])(?=[A-Z])")
_SEPARATORS: Final = re.compile(r"[^a-z0-9]+")
_NO_PART: Final = frozenset({"b64", "base64"})
_MOST_PARTS: Final = 4
# `token` alone is a word of language models too: under such a name, only what looks like a credential is masked.
_CREDENTIAL: Final = re.compile(r"(?=[^0-9]*[0-9])(?=[^A-Za-z]*[A-Za-z])[\x21-\x7e]{16,}")
_WORD: Final = re.compile(r"[a-z][a-z_\-]*")
_LONGEST_NAME: Final = 128
_NAMING: Final = (
    *("name", "key", "header", "field", "parameter", "param", "variable", "property", "id", "type", "k"),
    *("Name", "Key"),
)
_NAMED: Final = ("value", "val", "content", "v", "Value")
# A passage has a title, too: under a title or label, what has no blank in it is no passage.
_TITLING: Final = ("label", "title")
_TITLED: Final = (*_NAMED, "text")
_BLANK: Final = re.compile(r"\s")
NAMING: Final = frozenset((*_NAMING, *_TITLING))
"""Keys under which a dictionary may have the name of another of its values."""

# --- by look -----------------------------------------------------------------------------------------------------
_RUN: Final = 15
"""Keys are unbroken runs of at least this many letters, digits, ``_`` and ``-``; prose has few of those."""
_RUN_BYTES: Final = b"x" * _RUN
_RUN_TABLE: Final = bytes(
    120 if byte < 128 and (chr(byte).isalnum() or chr(byte) in "_-") else 32 for byte in range(256)
)
_BY_FREQUENCY: Final = " etaoinsrhldcumpfgwybvkxjqz'-ETAOINSRHLDCUMPFGWYBVKXJQZ"
"""Characters of needles, the rare ones last."""
_LONGEST_NEEDLE: Final = 12
"""How far before a run a key may begin whose first letters are not part of it (``SG.``)."""

# Characters without which there is nothing to look for. A number is found in bytes faster than bytes are.
_COLON, _EQUALS, _SLASH, _DOUBLE_QUOTE, _QUOTE, _BRACKET = b":=/\"'("
_BACKSLASH, _PERCENT, _AMPERSAND, _LESS, _DASH, _HASH, _ESCAPE = b"\\%&<-#\x1b"

# --- by name, in text --------------------------------------------------------------------------------------------
_AROUND_NAME: Final = b" \t\\\"'`[]!"
_NAME_BEFORE: Final = _Pattern(r"(?:[\s\S]*[^A-Za-z0-9_.\- ])?([A-Za-z0-9_.\- ]{2,})")
_NAME_WINDOW: Final = 80
_NAMING_WINDOW: Final = 160
_TAIL: Final = operator.itemgetter(slice(-3, None))
_LONGEST_WORD: Final = 20
_NAMING_BEFORE: Final = _Pattern(
    r"[\s\S]*\b(?:name|key|header|field|parameter|param|variable|property|label|title|id)[\\\"']{0,4}\s{0,4}[:=]\s{0,4}[\\\"']{0,4}"
    r"([\w.\-]{2,64})[\\\"']{0,4}[,\s]{0,40}[\\\"']{0,4}(?:value|val)\Z",
    re.IGNORECASE,
)

# --- by value ----------------------------------------------------------------------------------------------------
_ESCAPES: Final = {b"\\": 1, b"%": 2}
"""What begins an escape, and how many letters of a name behind it belong to it."""
_ENCODED_SIGNS: Final = (b"%3D", b"%3d", b"%22%3A", b"%22%3a", b"&quot;:", b"&#34;:", b"&#61;")
_HEADING: Final = b" ## ]]"
"""What follows the name of a field in DSPy's prompts."""
_QUOTED_SIGNS: Final = ((_DOUBLE_QUOTE, (b'",', b'("', b'\\",')), (_QUOTE, (b"',", b"('")))
_MIN_LENGTH: Final = 8
_MAX_LENGTH: Final = 4096
_MOST_KNOWN: Final = 256
_LONGEST: Final = 1024
_LONGEST_JSON: Final = 16_384
_known: dict[str, None] = {}
remembered = 0
"""How many texts have been remembered so far: what was masked before may have one of them."""
_PAUSE: Final = 1.0
_environment_seen = (float("-inf"), 0)
_WORKING_DIRECTORY: Final = "PWD"
"""A variable that every shell sets. Elsewhere, a password stands under that name."""
_LOGIN: Final = re.compile(r"https?://[^\s/:@]{0,128}:([^\s/@]{1,256})@")
_NESTED: Final = 4
_MOST_SETTINGS: Final = 1000


class _Names(NamedTuple):
    """The table's names without separators, with their kind: of values, and in text."""

    of_values: dict[str, int]
    in_text: dict[str, int]


@functools.lru_cache(maxsize=1)
def _names() -> _Names:
    from dspy_otel.content.secret_rules import NAMES, Where

    names = _Names({}, {})
    for row in NAMES:
        words = {word.replace("_", ""): int(row.kind) for word in row.words}
        if row.where is not Where.TEXT:
            names.of_values.update(words)
        if row.where is not Where.NAME:
            names.in_text.update(words)
    return names


def _kind(name: str, names: dict[str, int]) -> int:
    parts = [part for part in _SEPARATORS.split(_ACRONYM.sub("_", name).lower()) if part]
    while len(parts) > 1 and (parts[-1].isdigit() or parts[-1] in _NO_PART):
        parts.pop()
    if not parts:
        return 0
    parts[-1] = parts[-1].rstrip("0123456789") or parts[-1]
    parts = parts[-_MOST_PARTS:]
    return next((kind for first in range(len(parts)) if (kind := names.get("".join(parts[first:]), 0))), 0)


@functools.lru_cache(maxsize=2048)
def name_kind(name: str) -> int:
    """2: the name of a secret; 1: perhaps of one; 0: of something else."""
    return _kind(name, _names().of_values)


@functools.lru_cache(maxsize=512)
def _text_kind(name: bytes) -> int:
    """The kind of a name that was found in a text; 0: no secret stands under it."""
    return _kind(name.decode("ascii"), _names().in_text)


def is_secret_name(name: str) -> bool:
    """Whether a field, header, parameter or environment variable of this name holds a secret."""
    return len(name) <= _LONGEST_NAME and name_kind(name) == 2


def hides(name: str, value: Any) -> bool:
    """Whether ``value`` must be masked because of its name. ``None`` and an empty string are shown.

    Args:
        name: name of the field, header or parameter.
        value: its value; only looked at if it is exactly a ``str``.
    """
    kind = name_kind(name) if len(name) <= _LONGEST_NAME else 0
    if not kind or value is None or (type(value) is str and not value):
        return False
    return kind == 2 or (kind == 1 and type(value) is str and _CREDENTIAL.fullmatch(value, 0, 4096) is not None)


def hides_pair(name: Any, value: Any) -> bool:
    """Whether ``value`` must be masked because it stands beside its name: ``("Authorization", "Bearer ...")``.

    A pair of two plain words (``["password", "username"]``) is a list of names, not a name and its value.

    Args:
        name: the first of two items; ``str`` or, as in ASGI's headers, ``bytes``. Anything else names nothing.
        value: the second.
    """
    if type(name) is bytes and len(name) <= _LONGEST_NAME:
        name = name.decode("latin-1")
    if type(name) is not str or not hides(name, value):
        return False
    return not (type(value) is str and len(value) <= _LONGEST_NAME and _WORD.fullmatch(value))


def hides_next(argument: Any, value: Any) -> bool:
    """Whether ``value`` must be masked because it follows an option of a command line: ``["--api-key", "..."]``."""
    return type(argument) is str and argument.startswith("--") and hides_pair(argument[2:], value)


def named(fields: Mapping[str, Any]) -> str | None:
    """The key whose value must be masked because another entry names it: ``{"name": "api_key", "value": "..."}``.

    Args:
        fields: a dictionary whose keys are all exactly ``str``: others could run code of the user's when compared. If
            no key is in :data:`NAMING`, nothing is named.
    """
    names = {
        naming: name
        for naming in NAMING & fields.keys()
        if type(name := fields[naming]) is str and len(name) <= _LONGEST_NAME and name_kind(name)
    }
    if not names:
        return None
    for key in _NAMED:
        if key in fields and any(hides(name, fields[key]) for each, name in names.items() if each not in _TITLING):
            return key
    for titling in _TITLING:
        if is_secret_name(names.get(titling, "")):
            for key in _TITLED:
                value = fields.get(key)
                if type(value) is str and value and _BLANK.search(value, 0, _MAX_LENGTH) is None:
                    return key
    return None


def remember(value: Any) -> None:
    """Mask this very text wherever it shows from now on (an LM's own ``api_key``, for one).

    The 256 last ones are kept. Plain lower-case words (``anonymous``) and texts of less than 8 or more than 4,096
    characters are not: masking such a word would blot out ordinary text.
    """
    if type(value) is not str or not _MIN_LENGTH <= len(value) <= _MAX_LENGTH or value in _known:
        return
    if value.isalpha() and value.islower() and len(value) < 20:
        return
    global remembered  # noqa: PLW0603
    while len(_known) >= _MOST_KNOWN:
        _known.pop(next(iter(tuple(_known))), None)
    _known[value] = None
    remembered += 1


def remember_settings(settings: Mapping[Any, Any], depth: int = _NESTED) -> None:
    """Remember each value whose name says that it holds a secret, among an LM's settings and in its headers.

    Args:
        settings: parameters by name, with dictionaries in them (headers, credentials).
        depth: how many levels of dictionaries to look into.
    """
    for name, value in tuple(islice(settings.items(), _MOST_SETTINGS)):
        kind = type(value)
        if kind is str:
            # Most names are ordinary, and a value that is known already is skipped.
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
        if name != _WORKING_DIRECTORY and (is_secret_name(name) or hides(name, value)):
            remember(value)


def refresh_environment() -> None:
    """Likewise, for what has been set since (``load_dotenv()``): when there are more variables, or once a second."""
    when, count = _environment_seen
    if len(os.environ) != count or time.monotonic() - when > _PAUSE:
        remember_environment()


def lookahead() -> int:
    """How far text that is to be cut must be looked at beyond the cut, so that no secret survives by being cut."""
    return max(_LONGEST, *map(len, tuple(_known))) if _known else _LONGEST


class _Rules(NamedTuple):
    """The table, ready for use. The last words of names are found by their last three letters, in any case."""

    heads: _Pattern
    keys: dict[bytes, tuple[tuple[_Pattern, _Pattern | None], ...]]
    runs: tuple[tuple[int, _Pattern], ...]
    shapes: tuple[tuple[int, bytes, tuple[_Pattern, ...]], ...]
    urls: tuple[_Pattern, ...]
    flag: _Pattern
    dashes: _Pattern
    elements: tuple[_Pattern, ...]
    escape: _Pattern
    values: dict[int, tuple[_Pattern, ...]]
    last_words: dict[bytes, tuple[bytes, ...]]


@functools.lru_cache(maxsize=1)
def _rules() -> _Rules:
    from dspy_otel.content.secret_rules import ELEMENTS, ESCAPE, FLAG, KEYS, NAMES, SHAPES, URLS, VALUES, Where

    by_needle: dict[str, list[tuple[_Pattern, _Pattern | None]]] = {}
    for key in KEYS:
        for needle in key.needles:
            before = _Pattern(rf"(?:{key.before})\Z") if key.before else None
            by_needle.setdefault(needle, []).append((_Pattern(re.escape(needle) + key.pattern), before))
    by_first: dict[str, list[str]] = {}
    for needle in sorted(by_needle, key=len, reverse=True):
        by_first.setdefault(needle[0], []).append(re.escape(needle[1:]))
    heads = "|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in by_first.items())
    # Where one needle begins another, the rows of both may apply.
    keys = {
        needle.encode(): tuple(rule for other, rules in by_needle.items() if needle.startswith(other) for rule in rules)
        for needle in by_needle
    }
    words = [word for row in NAMES if row.where is not Where.NAME for word in row.words]
    last_words = {"value", "val", *(word.rpartition("_")[2] for word in words if not word.endswith("_id"))}
    for word in words:
        if word.endswith("_id"):  # Too short to tell anything: with the word before.
            last_words |= {f"{word.split('_')[-2]}{separator}id" for separator in ("", "_", "-", ".")}
    return _Rules(
        _Pattern(f"(?<![A-Za-z0-9])(?:{heads})"),
        keys,
        tuple(
            (back, _Pattern("|".join(shape.pattern for shape in SHAPES if not shape.needle and shape.back == back)))
            for back in dict.fromkeys(shape.back for shape in SHAPES if not shape.needle)
        ),
        tuple(
            (
                ord(max(needle, key=_BY_FREQUENCY.find)),
                needle.encode(),
                tuple(_Pattern(shape.pattern) for shape in SHAPES if shape.needle == needle),
            )
            for needle in dict.fromkeys(shape.needle for shape in SHAPES if shape.needle)
        ),
        tuple(_Pattern(shape.pattern) for shape in URLS),
        _Pattern(FLAG),
        _Pattern("-+"),
        tuple(map(_Pattern, ELEMENTS)),
        _Pattern(ESCAPE),
        {row.kind: tuple(_Pattern(pattern, re.IGNORECASE) for pattern in row.patterns) for row in VALUES},
        {
            tail: tuple(word.encode() for word in sorted(last_words) if word.endswith(end))
            for end in {word[-3:] for word in last_words}
            for tail in _in_any_case(end)
        },
    )


def _in_any_case(word: str) -> Iterator[bytes]:
    """A word in every mixture of small and capital letters: cheaper than to make a whole text small."""
    return ("".join(letters).encode() for letters in product(*((letter, letter.upper()) for letter in word)))


def mask(text: str) -> str:
    """``text`` without the secrets that can be recognised in it."""
    if len(text) < _MIN_LENGTH:
        return text
    for known in tuple(_known):
        if known in text:
            text = text.replace(known, MASK)
    spans, _ = _secrets(text)
    if not spans:
        return text
    pieces: list[str] = []
    done = 0
    for start, end in sorted(spans):
        if start >= done:
            pieces += (text[done:start], MASK)
        done = max(done, end)
    return "".join((*pieces, text[done:]))


class Scan(NamedTuple):
    """What there is in several texts.

    Attributes:
        suspect: whether :func:`mask` might change one of them; sometimes true when it would not.
        runs: whether there may be a long run of letters, digits, ``_`` and ``-`` without a blank.
    """

    suspect: bool
    runs: bool


def scan(text: str) -> Scan:
    """Search several texts at once, a line break between each two."""
    if any(known in text for known in tuple(_known)):
        return Scan(True, True)
    found, runs = _secrets(text)
    return Scan(bool(found), runs)


def _secrets(text: str) -> tuple[list[tuple[int, int]], bool]:
    """Where secrets are in ``text``, in no order, and they may overlap; and whether it has long runs."""
    # One byte for each character, so that positions are the same; a whole text is searched much faster so.
    raw = text.encode("ascii", "replace")
    rules = _rules()
    found: list[tuple[int, int]] = []
    for rare, needle, patterns in rules.shapes:
        # One character is found much faster than several, and most texts lack it; `rfind` is faster than `in`.
        if rare in raw and raw.rfind(needle) >= 0:
            for pattern in patterns:
                found += map(_inner, pattern.finditer(raw))
    if _COLON in raw:
        _under_names(raw, b":", _AROUND_NAME, rules, found)
    if _EQUALS in raw:
        _under_names(raw, b"=", _AROUND_NAME, rules, found)
    if _SLASH in raw and _COLON in raw:
        _in_urls(raw, rules, found)
    # The second of two texts in quotes, where the first is a name; the argument of a function; JSON in JSON.
    for quote, signs in _QUOTED_SIGNS:
        for sign in signs if quote in raw else ():
            if sign[0] in raw and raw.rfind(sign) >= 0:
                _under_names(raw, sign, b"", rules, found)
    if _HASH in raw and raw.rfind(_HEADING) >= 0:
        _under_names(raw, _HEADING, b"", rules, found)
    for sign in _ENCODED_SIGNS if _PERCENT in raw or _AMPERSAND in raw else ():
        if sign in raw:
            _under_names(raw, sign, b"", rules, found)
    if _LESS in raw and b"</" in raw:
        for element in rules.elements:
            found += ((m.end(1), m.start(3)) for m in element.finditer(raw) if _text_kind(m[2]) >= 2)
    if _DASH in raw:
        _under_flags(raw, rules, found)
    return found, _in_runs(raw, rules, found)


def _inner(match: re.Match[bytes]) -> tuple[int, int]:
    """Where the secret is in a match: after the first group and before the second, if there are any."""
    start, end = match.span()
    groups = match.re.groups
    if groups:
        start = max(match.end(1), start)
        if groups > 1 and match.start(2) >= 0:
            end = match.start(2)
    return start, end


def _under_names(raw: bytes, sign: bytes, between: bytes, rules: _Rules, found: list[tuple[int, int]]) -> None:
    """Values of assignments, headers, query strings, JSON and pairs: what stands behind each name and ``sign``.

    Args:
        raw: the text.
        sign: what follows a name.
        between: bytes that may stand between a name and the sign.
        rules: what to look for.
        found: secrets are added to it.
    """
    before = pieces = raw.split(sign)
    if between:
        if len(raw) > 2 * _NAME_WINDOW * len(pieces):  # No name is read beyond the window.
            before = [piece[-_NAME_WINDOW:] for piece in pieces]
        before = sign.join(before).translate(None, between).split(sign)
    words = rules.last_words
    hits = [
        index
        for index, tail in enumerate(map(_TAIL, before))
        if tail in words and before[index][-_LONGEST_WORD:].lower().endswith(words[tail])
    ]
    if not hits:
        return
    ends = list(accumulate(map(len, pieces)))
    done = 0
    for index in hits:
        position = ends[index] + index * len(sign)
        # A name inside a value that is masked already is part of it: a second look would cost the square of the length.
        if done <= position < len(raw) and (secret := _under_name(raw, position, rules)) is not None:
            found.append(secret)
            done = secret[1]


def _under_flags(raw: bytes, rules: _Rules, found: list[tuple[int, int]]) -> None:
    """What stands behind the flags of command lines: the expression is tried at dashes only."""
    start, done = raw.find(b"--"), 0
    while start >= 0:
        # A flag stands behind a blank, or behind the two characters of an escape.
        for first in (start - 1, start - 2) if start else (0,):
            match = rules.flag.match(raw, first) if first >= done else None
            if match is not None:
                done = match.end()
                if _text_kind(match[2]):
                    found.append((match.end(1), done))
                break
        dashes = rules.dashes.match(raw, start)
        start = raw.find(b"--", start + 2 if dashes is None else dashes.end())


def _in_urls(raw: bytes, rules: _Rules, found: list[tuple[int, int]]) -> None:
    start = raw.find(b"://")
    while start >= 0:
        for pattern in rules.urls:
            match = pattern.match(raw, start)
            if match is not None:
                found.append(_inner(match))
        start = raw.find(b"://", start + 3)


def _under_name(raw: bytes, position: int, rules: _Rules) -> tuple[int, int] | None:
    """Where the secret is that stands under the name before the sign at ``position``."""
    window = raw[max(position - _NAME_WINDOW, 0) : position].rstrip(_AROUND_NAME)
    name = _NAME_BEFORE.match(window)
    if name is None:
        return None
    kind = _text_kind(name[1])
    if kind < 2 and (escape := _ESCAPES.get(window[: name.start(1)][-1:], 0)):
        # Behind an escape: a line break in JSON in JSON, a quote in a URL.
        kind = max(kind, _text_kind(name[1][escape:]))
    if not kind and window[-3:].lower() in (b"lue", b"val"):
        end = max(position - _NAME_WINDOW, 0) + len(window)
        naming = _NAMING_BEFORE.match(raw, max(end - _NAMING_WINDOW, 0), end)
        kind = _text_kind(naming[1]) if naming is not None else 0
    for pattern in rules.values.get(kind, ()):
        match = pattern.match(raw, position)
        if match is not None:
            return _inner(match)
    return None


def _in_runs(raw: bytes, rules: _Rules, found: list[tuple[int, int]]) -> bool:
    """Keys among the long unbroken runs: much cheaper than a search for each of their beginnings.

    Returns:
        Whether there are such runs.
    """
    runs = raw.translate(_RUN_TABLE)
    start = runs.find(_RUN_BYTES)
    if start < 0:
        return False
    if _BACKSLASH in raw or _PERCENT in raw or _ESCAPE in raw:
        # A key may begin right behind the letter of an escape.
        raw = rules.escape.sub(lambda escape: b" " * len(escape[0]), raw)
        runs = raw.translate(_RUN_TABLE)
        start = runs.find(_RUN_BYTES, start)
    while start >= 0:
        end = runs.find(b" ", start)
        if end < 0:
            end = len(raw)
        end = _in_run(raw, start, end, rules, found)
        start = runs.find(_RUN_BYTES, end)
    return True


def _in_run(raw: bytes, start: int, end: int, rules: _Rules, found: list[tuple[int, int]]) -> int:
    """Keys in one run, or that begin shortly before it; gives where to go on."""
    for back, pattern in rules.runs:
        match = pattern.match(raw, start - back) if start >= back else None
        if match is not None:
            found.append(_inner(match))
            return match.end()
    head = rules.heads.search(raw, max(start - _LONGEST_NEEDLE, 0), end)
    while head is not None:
        first = head.start()
        for pattern, before in rules.keys[head[0]]:
            match = pattern.match(raw, first)
            if match is not None and (before is None or before.search(raw, max(first - 20, 0), first)):
                found.append(match.span())
                if match.end() >= end:
                    return match.end()
                first = match.end() - 1
                break
        head = rules.heads.search(raw, first + 1, end)
    return end
