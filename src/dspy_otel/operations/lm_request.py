"""Requests to LMs: from DSPy's LM and the arguments of a call to attributes of the request. Pure mapping."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from dspy_otel import semconv
from dspy_otel.content import introspection
from dspy_otel.content.introspection import field, is_a
from dspy_otel.content.names import plain_word, without_secrets
from dspy_otel.core.attributes import Attributes

# DSPy's model prefixes (LiteLLM's and lm15's provider ids) as the GenAI conventions name those providers.
PROVIDERS: Final[Mapping[str, str]] = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "google": "gcp.gemini",
    "vertex": "gcp.vertex_ai",
    "vertex_ai": "gcp.vertex_ai",
    "vertex-express": "gcp.vertex_ai",
    "mistral": "mistral_ai",
    "text-completion-openai": "openai",
    "xai": "x_ai",
    "watsonx": "ibm.watsonx.ai",
}

# Request parameters by name: their attribute, and whether it is a whole number.
_REQUEST_NUMBERS: Final = {
    "temperature": (semconv.GEN_AI_REQUEST_TEMPERATURE, False),
    "top_p": (semconv.GEN_AI_REQUEST_TOP_P, False),
    "frequency_penalty": (semconv.GEN_AI_REQUEST_FREQUENCY_PENALTY, False),
    "presence_penalty": (semconv.GEN_AI_REQUEST_PRESENCE_PENALTY, False),
    "max_tokens": (semconv.GEN_AI_REQUEST_MAX_TOKENS, True),
    "max_completion_tokens": (semconv.GEN_AI_REQUEST_MAX_TOKENS, True),
    "max_output_tokens": (semconv.GEN_AI_REQUEST_MAX_TOKENS, True),
    "seed": (semconv.GEN_AI_REQUEST_SEED, True),
    "top_k": (semconv.GEN_AI_REQUEST_TOP_K, True),
}
_READ: Final = frozenset(
    {*_REQUEST_NUMBERS, "stop", "n", "reasoning_effort", "response_format", "rollout_id", "api_base", "base_url"}
)
"""The parameters that attributes of a request are made of."""
CONNECTION: Final = ("api_base", "base_url", "api_key")
"""The parameters of an LM that apply beside a typed request, whatever that says."""
_OF_CONFIG: Final = (
    *("temperature", "top_p", "max_tokens", "top_k", "seed", "stop", "n"),
    *("frequency_penalty", "presence_penalty", "response_format", "reasoning"),
)
_COMPARABLE: Final = frozenset(map(id, (str, int, float, bool, type(None))))
_LONGEST_COMPARED: Final = 1024
_MOST_STOPS: Final = 16
_LONGEST_ADDRESS: Final = 4096


def split_model(model: str) -> tuple[str | None, str]:
    """DSPy's ``provider/model`` as (GenAI provider name or ``None``, model as the provider calls it)."""
    provider, slash, name = model.partition("/")
    if not slash:
        return None, model
    return PROVIDERS.get(provider, provider), name


def explicit_request(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The typed request object a call was given instead of a prompt or messages, or ``None``."""
    request = kwargs.get("request")
    if request is None and args and not is_a(args[0], str) and field(args[0], "messages") is not None:
        request = args[0]
    return request


def own_settings(lm: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that an LM was made with. Never to be changed.

    Args:
        lm: the LM.
        stored: what it holds, by :func:`dspy_otel.content.introspection.instance_dict`.
    """
    own = stored.get("kwargs")
    if type(own) is dict:
        return own
    own = field(lm, "kwargs")
    return dict(dict.items(own)) if is_a(own, dict) else {}


def request_settings(
    own: dict[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], kept: tuple[str, ...] = CONNECTION
) -> dict[str, Any]:
    """An LM's own parameters, overridden by those of the call (a typed request brings its own config).

    Args:
        own: the LM's.
        args: positional arguments of the call.
        kwargs: its keyword arguments.
        kept: which of the LM's own apply beside a typed request.
    """
    settings = own.copy()
    request = explicit_request(args, kwargs) if args or "request" in kwargs else None
    if request is not None:
        config = field(request, "config")
        settings = {key: settings[key] for key in kept if key in settings}
        for name, value in zip(_OF_CONFIG, introspection.fields(config, *_OF_CONFIG), strict=True):
            if value is not None and not (type(value) is tuple and not value):
                settings[name] = value
        reasoning = settings.pop("reasoning", None)
        if reasoning is not None:
            settings["reasoning_effort"] = field(reasoning, "effort")
    settings.update(kwargs)
    return settings


def request_key(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What :func:`request_attributes` depends on: equal for two calls only if those are.

    ``None`` where that is more than short texts and numbers: to compare it might run code of a user's class.

    Args:
        stored: what the LM holds.
        settings: of the call.
    """
    model, kind = stored.get("model"), stored.get("model_type", "chat")
    if type(model) is not str or type(kind) is not str:
        return None
    key: list[Any] = [model, kind]
    for name, value in settings.items():
        if name in _READ:
            if name == "response_format":
                key += (name, value is None)
                continue
            type_ = type(value)
            if id(type_) not in _COMPARABLE or (type_ is str and len(value) > _LONGEST_COMPARED):
                return None
            key += (name, type_, value)  # 1, 1.0 and True are equal, and not the same.
    return tuple(key)


def request_attributes(lm: Any, settings: Mapping[str, Any]) -> Attributes:
    """Attributes of the model and of its settings. Never prompts, headers or keys."""
    provider, model = split_model(
        without_secrets(introspection.text(field(lm, "model")) or str(introspection.name_of(type(lm))))
    )
    kind = field(lm, "model_type", "chat")
    attributes: Attributes = {
        semconv.GEN_AI_OPERATION_NAME: semconv.OPERATION_TEXT_COMPLETION if kind == "text" else semconv.OPERATION_CHAT,
        semconv.GEN_AI_REQUEST_MODEL: model,
    }
    if provider is not None:
        attributes[semconv.GEN_AI_PROVIDER_NAME] = provider
    for name, value in settings.items():
        known = _REQUEST_NUMBERS.get(name)
        if known is None or value is None or value is True or value is False:
            continue
        number = introspection.whole(value) if known[1] else introspection.real(value)
        if number is not None:
            attributes[known[0]] = number
    stop = settings.get("stop")
    if stop is not None:
        texts = [stop] if is_a(stop, str) else introspection.bounded(stop, _MOST_STOPS)[0]
        if texts and all(is_a(text, str) for text in texts):
            attributes[semconv.GEN_AI_REQUEST_STOP_SEQUENCES] = texts
    count = introspection.whole(settings.get("n"))
    if count is not None and count > 1:
        attributes[semconv.GEN_AI_REQUEST_CHOICE_COUNT] = count
    effort = introspection.text(settings.get("reasoning_effort"), 64)
    if effort is not None:
        attributes[semconv.GEN_AI_REQUEST_REASONING_LEVEL] = plain_word(effort)
    if settings.get("response_format") is not None:
        attributes[semconv.GEN_AI_OUTPUT_TYPE] = "json"
    rollout = settings.get("rollout_id")
    if rollout is not None:
        shown = introspection.text(rollout) or introspection.whole(rollout)
        if shown is not None:
            attributes[semconv.LM_ROLLOUT_ID] = without_secrets(str(shown))
    address = settings.get("api_base")
    address = settings.get("base_url") if address is None else address
    if address is not None:
        attributes.update(server_attributes(address))
    return attributes


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether a server of this name or address is on this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def server_attributes(url: Any) -> Attributes:
    """Host and port of an endpoint; nothing else of its address, which may hold credentials."""
    address = introspection.text(url, _LONGEST_ADDRESS)
    if not address:
        return {}
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return {}
    if not host:
        return {}
    attributes: Attributes = {semconv.SERVER_ADDRESS: host}
    port = port or {"http": 80, "https": 443}.get(parts.scheme)
    if port:
        attributes[semconv.SERVER_PORT] = port
    return attributes
