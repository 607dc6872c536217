"""Content by reference: a completion hook stores what a call was asked and has answered, and names it on the span.

The hook, its messages and its settings are those of OpenTelemetry's package ``opentelemetry-util-genai``, so that one
that a program has already serves here too. A hook of the user's is called as it is, in the thread of the call, before
its span ends; that package's own one, ``upload``, is made in :mod:`.uploads`.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import threading
from collections.abc import Mapping
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Final

from opentelemetry.trace import Span

from dspy_otel import semconv
from dspy_otel.config import COMPLETION_HOOKS, UPLOAD
from dspy_otel.core.deferred_spans import DeferredSpan
from dspy_otel.core.internal_errors import failed, warn_once
from dspy_otel.core.metrics import WithoutExemplars

_TYPES: Final = "opentelemetry.util.genai.types"
_SECONDS: Final = 10.0
"""The longest that a store may take before a program goes on without it."""


class Completions:
    """Hands the content of calls to a completion hook.

    Args:
        hook: the hook; ``None`` for one that is still being made.

    Attributes:
        hook: likewise.

    Raises:
        ImportError: without ``opentelemetry-util-genai``, which has the types of what a hook takes.
    """

    def __init__(self, hook: Any = None) -> None:
        self._types = importlib.import_module(_TYPES)
        self.hook = hook

    def hand_over(self, span: Span, content: Mapping[str, Any]) -> None:
        """Call the hook with the content of a recorded call, whose span has not ended.

        Of a trace that may be dropped, the hook is called once that is kept: nothing is stored that nobody refers to.

        Args:
            span: gets the references.
            content: JSON by the names of the attributes that it would be, masked and bounded as those are.

        Raises:
            Exception: what the hook raises.
        """
        if self.hook is None or not content:
            return
        if isinstance(span, DeferredSpan):
            span.once_real(partial(self._call, content=content))
        else:
            self._call(span, content)

    def _call(self, span: Span, content: Mapping[str, Any]) -> None:
        if not span.is_recording():  # a sampler's word on a span that was deferred
            return
        types = self._types
        items = {key: _list(text) for key, text in content.items()}
        tools = [_tool(types, item) for item in items.get(semconv.GEN_AI_TOOL_DEFINITIONS, ())]
        self.hook.on_completion(
            inputs=[
                types.InputMessage(role=_role(item, "user"), parts=_parts(types, item))
                for item in items.get(semconv.GEN_AI_INPUT_MESSAGES, ())
            ],
            outputs=[
                types.OutputMessage(
                    role=_role(item, "assistant"),
                    parts=_parts(types, item),
                    finish_reason=item.get("finish_reason") if type(item) is dict else None,
                )
                for item in items.get(semconv.GEN_AI_OUTPUT_MESSAGES, ())
            ],
            system_instruction=[_part(types, item) for item in items.get(semconv.GEN_AI_SYSTEM_INSTRUCTIONS, ())],
            tool_definitions=tools or None,
            span=span,
            log_record=None,
        )


def load(hook: Any, files: WithoutExemplars) -> Completions | None:
    """What hands content over to a hook; ``None`` where that cannot be used, which one warning says.

    Args:
        hook: the hook itself, or its name among the entry points of ``opentelemetry_genai_completion_hook``.
        files: counts files of content, those that are lost with the reason.
    """
    try:
        if not isinstance(hook, str):
            return Completions(hook)
        if hook == UPLOAD:
            return _load_uploads(files)
        (found,) = entry_points(group=COMPLETION_HOOKS, name=hook)
        made = found.load()()
        return None if type(made).__name__ == "_NoOpCompletionHook" else Completions(made)
    except ImportError as error:
        # The names of modules are no content. fsspec says with an error of its own what a store needs.
        names = [each.name for each in (error, error.__cause__) if isinstance(each, ImportError) and each.name]
        warn_once(
            "completion hook",
            "a completion hook needs what is not installed (%s): `pip install 'dspy-otel[upload]'`, and what fsspec "
            "needs for its store",
            names[-1] if names else "an optional package",
        )
    except Exception as error:
        failed("completion hook", error)
    return None


def _load_uploads(files: WithoutExemplars) -> Completions | None:
    """OpenTelemetry's ``upload``. It tries its store at once, which may not answer: it is not waited for then."""
    from dspy_otel.core.uploads import make, reason_of  # needs the extra

    completions = Completions()
    problems: list[Exception] = []

    def load_hook() -> None:
        try:
            completions.hook = make(files)
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=load_hook, name="dspy-otel store of content", daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if thread.is_alive():
        warn_once("store", "the store of content does not answer: content is not stored until it does")
        return completions
    for error in problems:
        if isinstance(error, ImportError):
            raise error
        warn_once(
            "store",
            "nothing can be written to the store of content (%s), which is not used then: is "
            "OTEL_INSTRUMENTATION_GENAI_UPLOAD_BASE_PATH right?",
            reason_of(error.__context__ or error),
        )
    return None if problems else completions


# --- JSON of ours as the types of the package. Content that was cut may have marks of that anywhere -------------------


def _list(text: str) -> list[Any]:
    read = json.loads(text)
    return read if type(read) is list else [read]


def _text(value: Any) -> str:
    return value if type(value) is str else json.dumps(value, ensure_ascii=False)


def _role(message: Any, default: str) -> str:
    return _text(message.get("role", default)) if type(message) is dict else default


def _parts(types: Any, message: Any) -> list[Any]:
    parts = message.get("parts") if type(message) is dict else message
    return [_part(types, part) for part in (parts if type(parts) is list else [parts])]


def _part(types: Any, part: Any) -> Any:
    found = part if type(part) is dict else {"type": "text", "content": part}
    kind = found.get("type")
    content = found.get("content")
    if kind == "tool_call":
        return types.ToolCallRequestPart(found.get("arguments"), _text(found.get("name")), found.get("id"))
    if kind == "tool_call_response":
        return types.ToolCallResponsePart(found.get("response"), found.get("id"))
    if kind == "reasoning":
        return types.ReasoningPart(_text(content))
    if kind == "uri":
        return types.UriPart(None, found.get("modality", "file"), _text(found.get("uri")))
    if kind == "blob":
        try:
            data = base64.b64decode(_text(content), validate=True)
        except binascii.Error:  # it was cut
            return types.TextPart(_text(content))
        return types.BlobPart(found.get("mime_type"), found.get("modality", "file"), data)
    return types.TextPart(_text(content if kind == "text" else found))


def _tool(types: Any, tool: Any) -> Any:
    if type(tool) is not dict or tool.get("type") != "function":
        kind = tool.get("type") if type(tool) is dict else None
        return types.GenericToolDefinition(_text(tool.get("name") if type(tool) is dict else tool), _text(kind))
    return types.FunctionToolDefinition(_text(tool.get("name")), tool.get("description"), tool.get("parameters"))
