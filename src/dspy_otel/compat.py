"""Threads of DSPy before 3.3 that do not carry the context themselves."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dspy_otel.operations.parallel import bind
from dspy_otel.patching import Patches, resolve


class BoundPool(ThreadPoolExecutor):
    """A pool whose work belongs to the span it was submitted in."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Like ``ThreadPoolExecutor.submit``."""
        return super().submit(bind(fn), *args, **kwargs)


def patch(patches: Patches) -> None:
    """RLM's ``llm_query_batched`` (3.1 and 3.2): the LM calls of its pool belong to the RLM. DSPy 3.3 sees to it."""
    rlm = resolve("dspy.predict.rlm")
    own = vars(rlm) if rlm is not None else {}
    if own.get("ThreadPoolExecutor") is ThreadPoolExecutor and "contextvars" not in own:
        patches.replace(rlm, "ThreadPoolExecutor", BoundPool)
