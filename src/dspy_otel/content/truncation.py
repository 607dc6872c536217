"""Plain JSON values made to fit into a number of bytes, with marks that say what was cut."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any, Final

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

MIN_LIMIT: Final = 64
"""Fewest bytes a limit can be: room for one mark that says what was cut."""
MARK: Final = "…[cut {} {}]"
MARK_SIZE: Final = 48
MORE: Final = "…"
"""The key under which a dictionary says how many of its entries were cut."""
_MARKED: Final = re.compile(r"…\[cut (\d{1,12}) characters\]\Z")
_MARKED_ITEMS: Final = re.compile(r"…\[cut (\d{1,12}) items\]")

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))


def encode(value: Any) -> str:
    """Plain values as JSON text: by orjson, which DSPy needs anyway, in a fifth of the time, where that can.

    It cannot where half a character is in a text, or an integer has more than 64 bits.
    """
    if orjson is not None:
        try:
            text: str = orjson.dumps(value).decode()
            return text
        except TypeError:
            pass
    return _ENCODER.encode(value)


def size_of(text: str) -> int:
    """How many bytes a text takes in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))


def fit(value: Any, room: int) -> Any:
    """``value`` so that its JSON takes at most ``room`` bytes (64 or more), saying what was cut.

    Short parts stay whole, long ones share the room that is left; when there are too many, the last ones go.
    """
    if isinstance(value, str):
        return _fit_text(value, room)
    if isinstance(value, dict):
        keys, items = list(value), list(value.values())
        more = len(keys) > 0 and keys[-1] == MORE
        fixed = [size_of(encode(key)) + 2 for key in keys]
    elif isinstance(value, list):
        keys, items, fixed = [], value, [1] * len(value)
        more = len(items) > 0
    else:
        return value
    sizes = [size_of(encode(item)) for item in items]
    room -= 2
    if sum(sizes) + sum(fixed) <= room:
        return value
    least = [min(size, MIN_LIMIT) + around for size, around in zip(sizes, fixed, strict=True)]
    kept, cut = len(items), 0
    if sum(least) > room:
        # The number that an earlier cut has left in its mark is added.
        earlier = _MARKED_ITEMS.fullmatch(items[-1]) if more and isinstance(items[-1], str) else None
        cut = int(earlier.group(1)) - 1 if earlier is not None else 0
        room -= MARK_SIZE
        kept = sum(total <= room for total in accumulate(least))
    left = room - sum(fixed[:kept])
    share = max(_share_of(sizes[:kept], left), MIN_LIMIT)
    fitted = [
        item if size <= share else fit(item, share) for item, size in zip(items[:kept], sizes[:kept], strict=True)
    ]
    mark = MARK.format(len(items) - kept + cut, "items") if kept < len(items) else None
    if isinstance(value, list):
        return fitted if mark is None else [*fitted, mark]
    result = dict(zip(keys, fitted, strict=False))
    if mark is not None:
        result[MORE] = mark
    return result


def _share_of(sizes: list[int], room: int) -> int:
    """The size to which the larger ones must shrink so that all fit."""
    ordered = sorted(sizes)
    for position, size in enumerate(ordered):
        share = room // (len(ordered) - position)
        if size > share:
            return share
        room -= size
    return room


def _fit_text(text: str, room: int) -> str:
    cut_before = _MARKED.search(text, max(len(text) - MARK_SIZE, 0))
    shown, cut = text, 0
    while (size := size_of(encode(shown))) > (room - MARK_SIZE if cut else room):
        whole = len(text) if cut_before is None else cut_before.start()
        keep = min(len(shown) * max(room - MARK_SIZE - 2, 0) // size, len(shown) - 1, whole)
        shown, cut = shown[:keep], whole - keep + (0 if cut_before is None else int(cut_before.group(1)))
    return shown + MARK.format(cut, "characters") if cut else shown


def repaired(text: str) -> str:
    """``text`` with half characters (lone surrogates) replaced: OTLP carries UTF-8 only, and one costs its batch."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
