"""The demo's embedded model as a DSPy LM: an engine on DSPy 3.4 and newer, a `BaseLM` subclass before."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import dspy

from dspy_otel.cli.demo.brain import Completion, complete
from dspy_otel.cli.demo.prompt import Message

MODEL = "embedded/colour-words"
"""Name of the embedded model, in DSPy's `provider/model` form."""


def embedded_lm(**kwargs: Any) -> Any:
    """The embedded model as an LM for `dspy.configure(lm=...)`.

    `kwargs` go to the LM's constructor (`cache`, `temperature`, ...). Token counts are real (see
    `dspy_otel.cli.demo.brain.Completion`); the model has no price, so cost is unknown.
    """
    if hasattr(dspy, "lm15"):
        return dspy.LM(MODEL, engine=Engine(), async_engine=AsyncEngine(), **kwargs)
    return EmbeddedLM(MODEL, **kwargs)


class Engine:
    """DSPy 3.4's engine contract: one `lm15.Request` in, one `lm15.Response` out.

    It states no capability (tools, schemas, parameters), so adapters put everything into the prompt's text and do not
    import LiteLLM to ask.
    """

    def complete(self, request: Any) -> Any:
        """Answer one request."""
        system = request.system
        messages = [Message("system", system if isinstance(system, str) else _text(system))] if system else []
        messages += [Message(m.role, _text(m.parts)) for m in request.messages]
        done = complete(messages)
        return dspy.lm15.Response(
            id=_response_id(done),
            model=request.model,
            message=dspy.lm15.Message.assistant(done.text),
            finish_reason="stop",
            usage=dspy.lm15.Usage(input_tokens=done.input_tokens, output_tokens=done.output_tokens),
        )

    def dump_state(self) -> dict[str, Any]:
        """Nothing to keep: DSPy saves the class name beside it."""
        return {}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> Any:
        """A new engine; `state` is what `dump_state` gave."""
        return cls()


class AsyncEngine(Engine):
    """The same for `acall`."""

    async def complete(self, request: Any) -> Any:
        """Answer one request."""
        return super().complete(request)


class EmbeddedLM(dspy.BaseLM):  # type: ignore[misc]  # DSPy is untyped
    """DSPy 3.3's contract: messages in, an OpenAI-shaped response out."""

    def forward(self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **kwargs: Any) -> Any:
        """Answer one call, `n` times if asked."""
        given = messages or [{"role": "user", "content": prompt or ""}]
        done = complete([Message(m["role"], _text(m["content"])) for m in given])
        choice = SimpleNamespace(message=SimpleNamespace(content=done.text), finish_reason="stop")
        count = kwargs.get("n") or self.kwargs.get("n") or 1
        usage = {"prompt_tokens": done.input_tokens, "completion_tokens": done.output_tokens * count}
        usage["total_tokens"] = sum(usage.values())
        return SimpleNamespace(id=_response_id(done), model=self.model, choices=[choice] * count, usage=usage)

    async def aforward(self, prompt: str | None = None, messages: Any = None, **kwargs: Any) -> Any:
        """The same for `acall`."""
        return self.forward(prompt, messages, **kwargs)


def _text(content: Any) -> str:
    """The text of a message: a string, or the text parts of a list of parts (dicts or lm15 parts)."""
    if isinstance(content, str):
        return content
    texts = (part.get("text") if isinstance(part, dict) else getattr(part, "text", None) for part in content)
    return "\n".join(text for text in texts if text)


def _response_id(done: Completion) -> str:
    return "embedded-" + hashlib.sha1(done.text.encode("utf-8", "replace")).hexdigest()[:16]
