"""LM messages, outputs and tools in the parts form of the GenAI conventions.

Input comes in three shapes: a prompt string, OpenAI-style message dictionaries, or a typed request of DSPy
(``dspy.lm15.Request`` in 3.4, ``dspy.LMRequest`` in 3.3). All become ``[{"role": ..., "parts": [...]}]``.

Values are passed on as they are, and nothing of a user's class is asked; of long lists the first 1,000 items are read,
for content shows no more.
"""

from __future__ import annotations

import base64
import contextlib
import json
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dspy_otel.content import introspection
from dspy_otel.content.encoder import MAX_ITEMS, base64_size
from dspy_otel.content.introspection import field, is_a

Part = dict[str, Any]
Message = dict[str, Any]

# As the message schema of the GenAI conventions names them; `gen_ai.response.finish_reasons` keeps the provider's word.
_FINISH_REASONS = {"tool_calls": "tool_call", "function_call": "tool_call"}
_MOST_QUOTED = 2**20
_MODALITIES = {"image": "image", "input_image": "image", "audio": "audio", "input_audio": "audio", "video": "video"}


def input_messages(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Part], list[Message]]:
    """System instructions and messages of an LM call.

    Args:
        args: positional arguments of the call.
        kwargs: its keyword arguments.

    Returns:
        The parts of instructions that were given apart from the messages (a typed request's ``system``), and the
        messages. A system message among the messages stays one, as the convention wants it.
    """
    instructions: list[Part] = []
    request = kwargs.get("request")
    first = args[0] if args else kwargs.get("prompt")
    if request is None and first is not None and not is_a(first, str) and field(first, "messages") is not None:
        request = first
    if request is not None:
        asked, system = introspection.fields(request, "messages", "system")
        messages = _each(_message, asked)
        if system is not None:
            instructions = _parts(system)
    elif introspection.length(kwargs.get("messages")):
        messages = _each(_message, kwargs["messages"])
    elif first is not None:
        messages = _item_messages(args or (first,))
    else:
        return [], []
    return instructions, messages


def _each(function: Callable[[Any], Any], items: Any) -> list[Any]:
    """``function`` of each of the first items; the others as they are, to be counted."""
    first, rest = introspection.bounded(items, MAX_ITEMS)
    return [*map(function, first), *rest]


def _item_messages(items: Sequence[Any]) -> list[Message]:
    """Messages from positional arguments: message objects as they are (DSPy 3.3), anything else is the user's."""
    messages: list[Message] = []
    for item in items:
        first, _ = introspection.bounded(item, MAX_ITEMS)
        if first and all(map(_is_message, first)):
            messages.extend(_each(_message, item))
        elif _is_message(item):
            messages.append(_message(item))
        else:
            messages.append({"role": "user", "parts": _parts(item)})
    return messages


def _is_message(item: Any) -> bool:
    return not is_a(item, dict) and field(item, "role") is not None and field(item, "parts") is not None


def output_messages(outputs: Sequence[Any], finish_reasons: Sequence[str]) -> list[Message]:
    """DSPy's outputs (one text or dictionary for each candidate) as assistant messages.

    ``finish_reason`` stays in each message: Phoenix drops messages that lack it.
    """
    messages: list[Message] = []
    for index, output in enumerate(outputs):
        parts: list[Part] = []
        fields = output if is_a(output, dict) else {"text": output}
        reasoning, text = field(fields, "reasoning_content"), field(fields, "text")
        if reasoning is not None and reasoning != "":
            parts.append({"type": "reasoning", "content": reasoning})
        if text is not None:
            parts.append({"type": "text", "content": text})
        parts.extend(_each(_tool_call, field(fields, "tool_calls")))
        reason = finish_reasons[index] if index < len(finish_reasons) else "stop"
        reason = _FINISH_REASONS.get(reason, reason)
        messages.append({"role": "assistant", "parts": parts, "finish_reason": reason})
    return messages


def tool_definitions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools an LM call offers, flattened from OpenAI's nesting to ``{type, name, description, parameters}``."""
    tools = kwargs.get("tools")
    if tools is None:
        request = kwargs.get("request", args[0] if args else None)
        tools = None if request is None else field(request, "tools")
    return [] if tools is None else _each(_definition, tools)


def _definition(tool: Any) -> dict[str, Any]:
    function = field(tool, "function") or tool
    definition = {"type": introspection.text(field(tool, "type")) or "function", "name": field(function, "name")}
    for key in ("description", "parameters"):
        if field(function, key) is not None:
            definition[key] = field(function, key)
    return definition


def _message(message: Any) -> Message:
    if type(message) is dict and len(message) == 2:  # Most are a role and a text.
        role, content = message.get("role"), message.get("content")
        if type(role) is str and type(content) is str and role and role != "tool":
            return {"role": role[:64], "parts": [{"type": "text", "content": content}]}
    if introspection.library(type(message)) == "dspy":  # So are most of lm15.
        role, parts = introspection.fields(message, "role", "parts")
        if type(role) is str and type(parts) is tuple and len(parts) == 1 and role != "tool":
            kind, content = introspection.fields(parts[0], "type", "text")
            if type(kind) is str and type(content) is str and kind == "text":
                return {"role": role[:64], "parts": [{"type": "text", "content": content}]}
    role = introspection.text(field(message, "role"), 64) or "user"
    content = field(message, "parts") if not is_a(message, dict) else None
    parts = _parts(content if content is not None else field(message, "content"))
    if role == "tool":
        identifier = field(message, "tool_call_id")
        if identifier is not None:
            parts = [{"type": "tool_call_response", "id": identifier, "response": field(message, "content")}]
    parts.extend(_each(_tool_call, field(message, "tool_calls")))
    return {"role": role, "parts": parts}


def _parts(content: Any) -> list[Part]:
    if content is None:
        return []
    if introspection.length(content) is not None:
        return _each(_part, content)
    return [{"type": "text", "content": content}]


def _part(part: Any) -> Part:
    if is_a(part, str):
        return {"type": "text", "content": part}
    kind = introspection.text(field(part, "type"), 64) or ""
    if kind in ("text", "input_text", "output_text"):
        return {"type": "text", "content": field(part, "text")}
    if kind in ("thinking", "reasoning"):
        return {"type": "reasoning", "content": field(part, "text")}
    if kind == "tool_call":
        given = field(part, "input")
        arguments = given if given is not None else field(part, "args")
        return {"type": "tool_call", "id": field(part, "id"), "name": field(part, "name"), "arguments": arguments}
    if kind == "tool_result":
        return {"type": "tool_call_response", "id": field(part, "id"), "response": _texts(field(part, "content"))}
    if kind == "image_url":
        return _media("image", field(field(part, "image_url"), "url"), None, None)
    if kind in ("input_audio", "file"):
        inner = field(part, kind)
        data, named = field(inner, "data"), field(inner, "format")
        return _media(_MODALITIES.get(kind, "file"), None, field(inner, "file_data") if data is None else data, named)
    if kind in ("image", "audio", "video", "document", "binary"):
        source = field(part, "url"), field(part, "data"), field(part, "media_type")
        return _media(_MODALITIES.get(kind, "file"), *source)
    if kind == "data":
        return {"type": "text", "content": field(part, "value")}
    text = field(part, "text")
    return {"type": kind or "generic", "content": part if is_a(part, dict) or text is None else text}


def _texts(content: Any) -> Any:
    """The texts of what a tool gave; most is one text."""
    length = introspection.length(content)
    if length is None:
        return content
    texts = _each(_text_of, content)
    return texts[0] if length == 1 else texts


def _text_of(part: Any) -> Any:
    text = field(part, "text")
    return text if text is not None else field(part, "type")


class Blob(NamedTuple):
    """Binary data as a part has it, not yet copied: in base64 from ``start`` on, as text in a URL, or as bytes."""

    data: Any
    start: int = 0
    quoted: bool = False

    def size(self) -> int:
        """How many bytes it is; of a very long quoted text, at most."""
        if is_a(self.data, str):
            if not self.quoted:
                return base64_size(self.data, self.start)
            escapes = str.count(self.data, "%", self.start, self.start + _MOST_QUOTED)
            return str.__len__(self.data) - self.start - 2 * escapes
        return next(int(kind.__len__(self.data)) for kind in (bytes, bytearray) if is_a(self.data, kind))

    def encoded(self) -> str:
        """All of it, in base64."""
        if not is_a(self.data, str):
            return base64.b64encode(self.data).decode("ascii")
        rest = str.__getitem__(self.data, slice(self.start, None))
        return base64.b64encode(urllib.parse.unquote_to_bytes(rest)).decode("ascii") if self.quoted else rest


def _media(modality: str, url: Any, data: Any, media_type: Any) -> Part:
    """A media part; whatever has no data of its own, by its address."""
    blob = Blob(data)
    if not is_a(data, (str, bytes, bytearray)):
        if not is_a(url, str) or not str.startswith(url, "data:"):
            return {"type": "uri", "modality": modality, "uri": url}
        blob = Blob(url)
    named = introspection.text(media_type, 128)
    if is_a(blob.data, str) and str.startswith(blob.data, "data:"):
        # data:[<type>][;<parameter>]*[;base64],<data> (RFC 2397)
        comma = str.find(blob.data, ",", 0, 1024) + 1
        header = str.__getitem__(blob.data, slice(5, max(comma - 1, 5)))
        named = named or header.partition(";")[0]
        blob = Blob(blob.data, comma, not header.endswith(";base64"))
    return {"type": "blob", "modality": modality, "mime_type": named or None, "content": blob}


def described(messages: list[Message], most: int) -> list[Message]:
    """``messages`` with text in place of media: what it is and how large.

    Args:
        messages: from :func:`input_messages`; changed in place.
        most: media of at most this many characters in base64 stays, as bare base64, as the conventions want it.
    """
    for message in messages[:MAX_ITEMS]:
        for part in message["parts"][:MAX_ITEMS]:
            if part["type"] != "blob":
                continue
            blob: Blob = part["content"]
            if (blob.size() + 2) // 3 * 4 <= most:
                part["content"] = blob.encoded()
            else:
                what = part["mime_type"] or part["modality"]
                part.clear()
                part.update(type="text", content=f"<{what}, {blob.size()} bytes>")
    return messages


def as_message(role: str, text: str) -> str:
    """A JSON text that is not made of messages, as JSON of one."""
    message: dict[str, Any] = {"role": role, "parts": [{"type": "text", "content": text}]}
    if role == "assistant":
        message["finish_reason"] = "stop"
    return json.dumps([message])


def _tool_call(call: Any) -> Part:
    function = field(call, "function") or call
    arguments = field(function, "arguments")
    if arguments is None:
        arguments = field(function, "args")
    if type(arguments) is str and len(arguments) < 65536:
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {"type": "tool_call", "id": field(call, "id"), "name": field(function, "name"), "arguments": arguments}
