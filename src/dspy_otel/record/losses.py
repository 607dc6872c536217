"""What of a recorded value is not what the program had: cut, masked, or known by its class only.

Content capture leaves marks where it cut or masked something (:mod:`dspy_otel.content`). A text of the program's own
that looks like one of these marks counts as one: an example is lost then, but none is wrong.
"""

from __future__ import annotations

import builtins
import enum
import re
import types
from collections.abc import Iterator
from typing import Any, Final

from dspy_otel.content.redaction import MASK
from dspy_otel.content.truncation import MARK
from dspy_otel.content.walker import CHANGING, CYCLE, DEEPER


class Loss(enum.Enum):
    """Why a value is not what the program had."""

    CUT = "cut"
    MASKED = "masked"
    NO_VALUE = "no value"


_BUILT_IN: Final = "|".join(
    sorted(
        {kind.__name__ for room in (builtins, types) for kind in vars(room).values() if isinstance(kind, type)}
        - {"str", "int", "float", "bool", "dict", "list", "NoneType"}  # have values of JSON
    )
)
_CUT: Final = re.compile(
    MARK.replace("[", r"\[").replace("]", r"\]").format(r"\d+", "(?:characters|items|bytes)")
    + rf"|\A(?:{'|'.join(map(re.escape, (CYCLE, DEEPER, CHANGING)))})\Z"
)
_BINARY: Final = re.compile(r"<\d+ bytes>")
_CLASS: Final = r"[A-Za-z_]\w*(?:\.[\w<>]+)+"
_BY_CLASS: Final = re.compile(
    rf"<(?:int of \d+ bits|class [^<>]+|function .+|{_BUILT_IN}|{_CLASS}(?: .*)?)>"
    rf"|(?:\d{{4}}-\d\d-\d\d )?\d\d:\d\d[^<]* <{_CLASS}>",  # a time in a zone of a user's class
    re.DOTALL,
)


def loss_of(value: Any) -> Loss | None:
    """Why a value of JSON, as content capture wrote it, is not what the program had; None when it is."""
    found = {loss for text in _texts(value) if (loss := _loss_of(text)) is not None}
    return next((loss for loss in Loss if loss in found), None)


def _loss_of(text: str) -> Loss | None:
    if "…[" in text and _CUT.search(text):
        return Loss.CUT
    if MASK in text:
        return Loss.MASKED
    if "<" in text and (_BINARY.search(text) or _BY_CLASS.fullmatch(text)):
        return Loss.NO_VALUE
    return None


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, keys among them."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, (list, tuple)):
            waiting += each
