"""LM calls with OpenAI's messages, in any DSPy."""

from __future__ import annotations

from typing import Any

from tests.support import dspy35
from tests.support.older import DSPY


def chat(lm: Any, messages: Any, **options: Any) -> Any:
    """What `lm(messages=messages, **options)` gives: a list of outputs. DSPy 3.5 takes requests only."""
    if DSPY < (3, 5):
        return lm(messages=messages, **options)
    from dspy.clients.backend_selection import CLIENT_KEYS
    from dspy.clients.requests import build_request

    request = build_request(lm, dspy35.prompt_of(messages), options)
    of_the_call = {key: value for key, value in options.items() if key in CLIENT_KEYS or key == "n"}
    return [response.text for response in lm.generate(request, **of_the_call)]
