"""Types shared by everything that maps DSPy objects to attributes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from opentelemetry.trace import Span, Tracer

from dspy_otel.content.truncation import repaired

AttributeValue: TypeAlias = (
    "str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]"
)
Attributes: TypeAlias = dict[str, AttributeValue]
ReadOnlyAttributes: TypeAlias = Mapping[str, AttributeValue]

EMPTY: Final[Attributes] = {}
"""No attributes. Never changed."""


class Labels(dict[str, AttributeValue]):
    """Attributes of metrics that are made once and never changed, so that what counts them is found once.

    Attributes:
        series: by instrument, what counts them there.
    """

    __slots__ = ("series",)

    def __init__(self, attributes: ReadOnlyAttributes) -> None:
        super().__init__(attributes)
        self.series: dict[Any, Any] = {}


_SHORT: Final = 256
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_CONTROLS: Final = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_C1: Final = re.compile(rb"\xc2[\x80-\x9f]")  # as UTF-8
_LINES: Final = re.compile(r"[\t\r\n\u2028\u2029]")
_NUMBERS: Final = frozenset({int, float, bool})


def repair(attributes: Attributes) -> bool:
    """Make each text among ``attributes``, in place, one that every exporter can send and every store keep.

    Half a character in one value would cost its whole batch in OTLP, and NUL in a SQL store. What :func:`sendable`
    replaces is replaced.

    Returns:
        Whether all values are texts, numbers and booleans of Python's own classes, which the SDK keeps as they are.
    """
    scalar = True
    # For each span, and most texts are ASCII: one look at each.
    for key, value in attributes.items():
        kind = type(value)
        if kind is str:
            text: str = value  # type: ignore[assignment]
            if not text.isprintable() if len(text) <= _SHORT else not text.isascii() or "\0" in text or "\x1b" in text:
                attributes[key] = sendable(text)
        elif kind not in _NUMBERS:
            scalar = False
            mended = _mended(value)
            if mended is not value:
                attributes[key] = mended
    return scalar


def set_repaired(span: Span, attributes: Attributes) -> None:
    """Set attributes that :func:`repair` has gone over, and that the SDK keeps as they are, on a span.

    Args:
        span: the span.
        attributes: texts, numbers, booleans, and tuples of one of these. Never changed.
    """
    set_light_attributes = getattr(span, "set_light_attributes", None)  # of light spans
    if set_light_attributes is None:
        span.set_attributes(attributes.copy())  # A span of another SDK may keep, or change, what it gets.
    else:
        set_light_attributes(attributes)


def _mended(value: AttributeValue) -> AttributeValue:
    if isinstance(value, str):
        return sendable(value)
    if isinstance(value, (list, tuple)):
        mended = [sendable(each) if isinstance(each, str) else each for each in value]
        return value if mended == list(value) else tuple(mended) if isinstance(value, tuple) else mended
    return value


def restore_dropped(span: Span, attributes: ReadOnlyAttributes) -> None:
    """Set the attributes that a span was started with once more, if its sampler has dropped them.

    A span of the SDK starts with the attributes of its sampler's result. A sampler of a program's own that returns
    none, or only its own, would leave a compile without its run id, and so without its MLflow run.
    """
    kept = getattr(span, "attributes", None)
    if kept is not None and attributes and next(iter(attributes)) not in kept:
        span.set_attributes(attributes)


def keeps_attributes(tracer: Tracer) -> bool:
    """Whether spans of ``tracer`` have all attributes that they are started with: its sampler is the SDK's own.

    So is each sampler that it asks in turn.
    """
    return _is_the_sdks(getattr(tracer, "sampler", None))


def _is_the_sdks(sampler: Any) -> bool:
    if type(sampler).__module__ != "opentelemetry.sdk.trace.sampling":
        return False
    return all(_is_the_sdks(each) for each in vars(sampler).values() if hasattr(each, "should_sample"))


def sendable(text: str) -> str:
    """``text`` without half characters and control characters, which would be commands to a terminal that shows it.

    Each is replaced by U+FFFD. Tab, CR and LF stay. A text of more than 256 characters is searched only for NUL, ESC
    and C1: what a terminal obeys begins with one of those.
    """
    if len(text) <= _SHORT:
        return text if text.isprintable() else _CONTROLS.sub(_REPLACEMENT, repaired(text))
    if text.isascii():
        return _CONTROLS.sub(_REPLACEMENT, text) if "\0" in text or "\x1b" in text else text
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        return _CONTROLS.sub(_REPLACEMENT, repaired(text))
    found = b"\0" in data or b"\x1b" in data or (b"\xc2" in data and _C1.search(data) is not None)
    return _CONTROLS.sub(_REPLACEMENT, text) if found else text


def sendable_name(text: str) -> str:
    """:func:`sendable`, on one line: the name of a span, or a label of a metric."""
    return text if text.isprintable() else _LINES.sub(" ", sendable(text))
