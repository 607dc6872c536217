"""LM messages, outputs and tools in the parts form of the GenAI conventions.

Input comes in three shapes: a prompt string, OpenAI-style message dictionaries, or a typed request of DSPy
(``dspy.lm15.Request`` in 3.4, ``dspy.LMRequest`` in 3.3). All become ``[{"role": ..., "parts": [...]}]``.
"""

from __future__ import annotations

import base64
import contextlib
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from ..telemetry.content import base64_size

Part = dict[str, Any]
Message = dict[str, Any]

# As the message schema of the GenAI conventions names them; `gen_ai.response.finish_reasons` keeps the provider's word.
_FINISH_REASONS = {"tool_calls": "tool_call", "function_call": "tool_call"}
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
    if request is None and first is not None and not isinstance(first, str) and hasattr(first, "messages"):
        request = first
    if request is not None:
        messages = [_message(message) for message in request.messages]
        system = getattr(request, "system", None)
        if system is not None:
            instructions = _parts(system)
    elif kwargs.get("messages"):
        messages = [_message(message) for message in kwargs["messages"]]
    elif first is not None:
        messages = _item_messages(args or (first,))
    else:
        return [], []
    return instructions, messages


def _item_messages(items: Sequence[Any]) -> list[Message]:
    """Messages from positional arguments: message objects as they are (DSPy 3.3), anything else is said by the user."""
    messages: list[Message] = []
    for item in items:
        if isinstance(item, (list, tuple)) and item and all(_is_message(part) for part in item):
            messages.extend(_message(part) for part in item)
        elif _is_message(item):
            messages.append(_message(item))
        else:
            messages.append({"role": "user", "parts": _parts(item)})
    return messages


def _is_message(item: Any) -> bool:
    return hasattr(item, "role") and hasattr(item, "parts")


def output_messages(outputs: Sequence[Any], finish_reasons: Sequence[str]) -> list[Message]:
    """DSPy's outputs (one text or dictionary for each candidate) as assistant messages.

    ``finish_reason`` stays in each message: Phoenix drops messages that lack it.
    """
    messages: list[Message] = []
    for index, output in enumerate(outputs):
        parts: list[Part] = []
        fields = output if isinstance(output, Mapping) else {"text": output}
        if fields.get("reasoning_content"):
            parts.append({"type": "reasoning", "content": fields["reasoning_content"]})
        if fields.get("text") is not None:
            parts.append({"type": "text", "content": fields["text"]})
        parts.extend(_tool_call(call) for call in fields.get("tool_calls") or ())
        reason = finish_reasons[index] if index < len(finish_reasons) else "stop"
        reason = _FINISH_REASONS.get(reason, reason)
        messages.append({"role": "assistant", "parts": parts, "finish_reason": reason})
    return messages


def tool_definitions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools an LM call offers, flattened from OpenAI's nesting to ``{type, name, description, parameters}``."""
    tools = kwargs.get("tools")
    if tools is None:
        request = kwargs.get("request", args[0] if args else None)
        tools = getattr(request, "tools", None)
    if not isinstance(tools, (list, tuple)):
        return []
    definitions = []
    for tool in tools:
        function = _get(tool, "function") or tool
        definition = {"type": _get(tool, "type") or "function", "name": _get(function, "name")}
        for key in ("description", "parameters"):
            if _get(function, key) is not None:
                definition[key] = _get(function, key)
        definitions.append(definition)
    return definitions


def _get(holder: Any, key: str) -> Any:
    return holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)


def _message(message: Any) -> Message:
    role = _get(message, "role") or "user"
    content = _get(message, "parts") if not isinstance(message, Mapping) else None
    parts = _parts(content if content is not None else _get(message, "content"))
    if role == "tool":
        identifier = _get(message, "tool_call_id")
        if identifier is not None:
            parts = [{"type": "tool_call_response", "id": identifier, "response": _get(message, "content")}]
    calls = _get(message, "tool_calls")
    if isinstance(calls, (list, tuple)):
        parts.extend(_tool_call(call) for call in calls)
    return {"role": str(role), "parts": parts}


def _parts(content: Any) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "content": content}]
    if isinstance(content, (list, tuple)):
        return [_part(part) for part in content]
    return [{"type": "text", "content": content}]


def _part(part: Any) -> Part:
    if isinstance(part, str):
        return {"type": "text", "content": part}
    kind = str(_get(part, "type") or "")
    if kind in ("text", "input_text", "output_text"):
        return {"type": "text", "content": _get(part, "text")}
    if kind in ("thinking", "reasoning"):
        return {"type": "reasoning", "content": _get(part, "text")}
    if kind == "tool_call":
        return {
            "type": "tool_call",
            "id": _get(part, "id"),
            "name": _get(part, "name"),
            "arguments": _get(part, "input") if _get(part, "input") is not None else _get(part, "args"),
        }
    if kind == "tool_result":
        return {"type": "tool_call_response", "id": _get(part, "id"), "response": _texts(_get(part, "content"))}
    if kind == "image_url":
        return _media("image", _get(_get(part, "image_url"), "url"), None, None)
    if kind in ("input_audio", "file"):
        inner = _get(part, kind) or {}
        return _media(
            _MODALITIES.get(kind, "file"), None, _get(inner, "data") or _get(inner, "file_data"), _get(inner, "format")
        )
    if kind in ("image", "audio", "video", "document", "binary"):
        return _media(_MODALITIES.get(kind, "file"), _get(part, "url"), _get(part, "data"), _get(part, "media_type"))
    if kind == "data":
        return {"type": "text", "content": _get(part, "value")}
    return {"type": kind or "generic", "content": part if isinstance(part, Mapping) else _get(part, "text")}


def _texts(content: Any) -> Any:
    if isinstance(content, (list, tuple)):
        return [_get(part, "text") if _get(part, "text") is not None else _get(part, "type") for part in content]
    return content


def _media(modality: str, url: Any, data: Any, media_type: Any) -> Part:
    """A media part: data as bare base64, as the conventions want it; anything else by its address."""
    if isinstance(data, (bytes, bytearray)):
        data = base64.b64encode(data).decode("ascii")
    if not isinstance(data, str):
        data = url if isinstance(url, str) and url.startswith("data:") else None
    if data is None:
        return {"type": "uri", "modality": modality, "uri": url}
    if data.startswith("data:"):
        # data:[<type>][;<parameter>]*[;base64],<data> (RFC 2397)
        comma = data.find(",", 0, 1024) + 1
        header, data = data[5 : max(comma - 1, 5)], data[comma:]
        media_type = media_type or header.partition(";")[0]
        if not header.endswith(";base64"):
            data = base64.b64encode(urllib.parse.unquote_to_bytes(data)).decode("ascii")
    return {"type": "blob", "modality": modality, "mime_type": media_type or None, "content": data}


def described(messages: list[Message], most: int) -> list[Message]:
    """``messages`` with text in place of media: what it is and how large.

    Args:
        messages: from :func:`input_messages`; changed in place.
        most: media of at most this many characters in base64 stays.
    """
    for message in messages:
        parts = message["parts"]
        for index, part in enumerate(parts):
            if part["type"] == "blob" and len(part["content"]) > most:
                what = part["mime_type"] or part["modality"]
                parts[index] = {"type": "text", "content": f"<{what}, {base64_size(part['content'])} bytes>"}
    return messages


def _tool_call(call: Any) -> Part:
    function = _get(call, "function") or call
    arguments = _get(function, "arguments")
    if arguments is None:
        arguments = _get(function, "args")
    if isinstance(arguments, str) and len(arguments) < 65536:
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    return {"type": "tool_call", "id": _get(call, "id"), "name": _get(function, "name"), "arguments": arguments}
