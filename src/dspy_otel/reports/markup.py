"""Elements of HTML and SVG. The standard library's element tree writes them, so that no text can become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final
from xml.etree.ElementTree import Element, tostring

Child = Any
"""Text, an element, None, or an iterable of these."""

_UNSAFE: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]")
"""Control characters, those that turn the direction of text, and halves of characters: not allowed in a file."""


def tag(name: str, /, *children: Child, **attributes: Any) -> Element:
    """An element.

    Args:
        name: such as ``div``.
        *children: its text and elements; None is left out.
        **attributes: a trailing ``_`` is dropped and ``_`` becomes ``-``; None is left out.
    """
    element = Element(name)
    for key, value in attributes.items():
        if value is not None:
            element.set(key.rstrip("_").replace("_", "-"), clean(value))
    put(element, children)
    return element


def put(element: Element, child: Child) -> None:
    """Add to the end of an element."""
    if child is None:
        return
    if isinstance(child, Element):
        element.append(child)
    elif isinstance(child, (str, int, float)):
        text = clean(child)
        if len(element):
            element[-1].tail = (element[-1].tail or "") + text
        else:
            element.text = (element.text or "") + text
    elif isinstance(child, Iterable):
        for one in child:
            put(element, one)
    else:
        put(element, str(child))


def clean(value: Any) -> str:
    """A value as text without characters that are not allowed in HTML."""
    if isinstance(value, float):
        return f"{value:g}"
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", str(value))


def cut(text: str, limit: int) -> str:
    """A text of at most ``limit`` characters; an ellipsis marks a cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def document(root: Element) -> str:
    """A whole HTML file."""
    return "<!doctype html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
