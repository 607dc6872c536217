"""What the application says about its calls, in OpenTelemetry's baggage: only it can know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from opentelemetry import baggage
from opentelemetry.context import Context

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.names import without_secrets
from dspy_otel.core.attributes import Attributes

CALLER: Final = (semconv.SESSION_ID, semconv.USER_ID, semconv.GEN_AI_CONVERSATION_ID)
"""Who asks, and in which conversation: for all spans of a program call."""
PROMPT: Final = (semconv.GEN_AI_PROMPT_NAME, semconv.GEN_AI_PROMPT_VERSION)
"""Which prompt of a registry is in use: for the LM calls that are made while the application says so."""


def attributes_from_baggage(names: Iterable[str], context: Context) -> Attributes:
    """Those entries of the baggage in ``context`` that are among ``names``, as attributes."""
    found = baggage.get_all(context)
    attributes: Attributes = {}
    for name in names:
        value = found.get(name)
        shown = introspection.text(value) if introspection.is_a(value, str) else introspection.whole(value)
        if shown is not None:
            attributes[name] = without_secrets(str(shown))
    return attributes
