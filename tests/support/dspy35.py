"""DSPy 3.5 as far as it is known, put over the DSPy 3.4.1 that is installed: for tests, until there is one to install.

``DSPY_SHIM=3.5 pytest tests/operations tests/optimizers tests/inert`` runs the suites on it. It changes DSPy in this
process only; processes that a test starts have the DSPy that is installed.

Known, from the code and the thread of pull request stanfordnlp/dspy#10401 as they were in September 2026, from DSPy's
migration guide, and from what 3.4.1 itself announces for 3.5:

- ``BaseLM.generate(request, *, n=1, cache=None, rollout_id=None, **client_options)`` and ``agenerate`` give a list of
  ``lm15.Response``; adapters call them. Neither goes through ``__call__``, nor the other way round: each prepares,
  executes and finalizes by itself. One call is one entry of the history, whatever ``n``; the answers are separate
  requests, one after the other.
- ``lm("text")`` gives a list of outputs, ``lm(request)`` one ``Response``. ``lm(messages=...)`` raises ``TypeError``.
- ``execution._engine`` gives two values, the engine and the provider. ``finalize``, ``_delay`` and ``stream_emitted``
  stay where they are; ``dspy.clients.lm`` has no ``stream_emitted`` and no streams of its own any more.
- A custom LM is an engine: ``dspy.LM(engine=...)``, ``BaseLM(..., engine=..., async_engine=...)``. A call without one
  raises ``LMUnsupportedFeatureError``. An LM has its engine's capabilities.
- ``Adapter.format()`` gives ``dspy.adapters.Prompt(messages, system)`` of lm15 objects, a frozen dataclass;
  ``Adapter._call_postprocess(processed, original, responses)`` reads responses.
- The cache goes by the request, the rollout and ``n``.
- Gone: ``forward`` and ``aforward`` of LMs, ``LegacyEngine``, ``AsyncLegacyEngine``, ``complete_legacy``, CodeAct,
  ProgramOfThought.

Guessed, or otherwise than there:

- Prompts are what 3.4.1 renders, read by lm15's reader of Chat Completions; so are options. Types still render as in
  3.4.1, and read 3.4.1's outputs.
- LiteLLM's engine is the one that 3.4.1 has for typed requests. It knows no text completions.
- ``SandboxLM`` has a ``generate``, which hands on. TypeSafe is as in 3.4.1.
- TwoStepAdapter's asynchronous call is written here.
- GEPA's hint at the expected format, and GRPO's training data, read 3.4.1's messages: they are not run on this.

For the tests: an LM of theirs that is written as ``forward()``, as all DSPy versions before want it, is given an engine
that asks it (:class:`ForwardEngine`). Its errors come as they are, it is not asked again, and the price it states takes
the place of DSPy's price list. A ``forward()`` of anybody else's is refused, as 3.5 does.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import sys
import types
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

RELEASE = (3, 5, 0)
BASE = "3.4.1"
WANTED = os.environ.get("DSPY_SHIM") == "3.5"
"""Whether the tests of this process are to run on it."""

_EXECUTION_KEYS = frozenset({"cache", "rollout_id", "n", "num_generations"})
_GUIDE = "https://dspy.ai/community/normalized-lm-api-migration/"
_call: ContextVar[tuple[Any, Any] | None] = ContextVar("dspy35_call", default=None)


def apply() -> None:
    """Change the DSPy of this process. To be called before anything takes hold of its functions: before dspy_otel."""
    if version("dspy") != BASE:
        raise RuntimeError(f"the shim of DSPy 3.5 is made for DSPy {BASE}, and this is {version('dspy')}")
    import dspy

    _change_execution()
    _change_lms()
    _change_adapters()
    _remove(dspy)


# --- execution -------------------------------------------------------------------------------------------------------


@dataclass
class PreparedCall:
    """One public call of an LM, as its execution needs it.

    Attributes:
        request: what is asked.
        prompt: the text that was given instead of a request.
        options: of this call: client settings, and for a text those of its generation.
        cache: whether the cache may answer.
        rollout_id: tells it from the same request.
        n: how many answers.
        candidates: asked for by ``generate``.
        managed: whether DSPy retries, and projects errors; not for an LM of these tests.
        legacy: what 3.4.1's functions look client settings up in.
        asked: how often an LM of these tests has been asked for it.
    """

    request: Any
    prompt: str | None
    options: dict[str, Any]
    cache: bool
    rollout_id: Any
    n: int
    candidates: bool
    managed: bool
    legacy: dict[str, Any] = field(default_factory=dict)
    asked: int = 0

    @property
    def messages(self) -> None:
        """For 3.4.1's history; there is always a request."""

    @property
    def kwargs(self) -> dict[str, Any]:
        """For 3.4.1's history."""
        return self.options

    def key(self, lm: Any, asynchronous: bool) -> dict[str, Any]:
        """Of the cache: the same for synchronous and asynchronous calls."""
        from dspy._vendor.lm15.serde import request_to_dict

        key = {"_fn_identifier": "dspy.clients.lm15.complete", "request": request_to_dict(self.request)}
        return {**key, "rollout_id": self.rollout_id, **({"n": self.n} if self.n != 1 else {})}


def build_request(lm: Any, prompt: Any, options: dict[str, Any] | None = None) -> Any:
    """A request of a prompt (or a text) and of options by OpenAI's names; unknown ones become extensions."""
    from dspy._vendor.lm15.providers import openai_chat
    from dspy.adapters.base import Prompt
    from dspy.clients import execution
    from dspy.clients.backend_selection import CLIENT_KEYS
    from dspy.lm15 import Message

    if isinstance(prompt, str):
        prompt = Prompt(messages=(Message.user(prompt),))
    merged = {**lm.kwargs, **(options or {})}
    merged = {k: v for k, v in merged.items() if k not in _EXECUTION_KEYS | CLIENT_KEYS and v is not None}
    known = openai_chat._INGEST_CONFIG_KEYS | openai_chat._INGEST_EXTENSIONS_KEYS | {"prompt_cache"}
    extra = {key: merged.pop(key) for key in list(merged) if key not in known}
    stub = {"model": lm.model, "messages": [{"role": "user", "content": "."}]}
    request = execution._canonical(SimpleNamespace(request=None, legacy={**stub, **merged}))
    if extra:
        extensions = {**(request.config.extensions or {}), **extra}
        request = replace(request, config=replace(request.config, extensions=extensions))
    return replace(request, messages=prompt.messages, system=prompt.system)


def _count(lm: Any, n: Any) -> int:
    n = n if n is not None else lm.kwargs.get("n") or lm.kwargs.get("num_generations") or 1
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError("n must be a positive integer")
    return n


def prepare(
    lm: Any,
    prompt: Any,
    options: dict[str, Any],
    *,
    cache: Any = None,
    rollout_id: Any = None,
    n: Any = None,
    candidates: bool = False,
    asynchronous: bool = False,
) -> PreparedCall:
    """What is asked, from the arguments of a public call."""
    from dspy.clients.backend_selection import CLIENT_KEYS
    from dspy.clients.lm15_boundary import snapshot_request
    from dspy.lm15 import Request

    options = dict(options)
    if "messages" in options:
        raise TypeError(f"lm(messages=[...]) was removed in DSPy 3.5; see {_GUIDE}")
    if "request" in options:
        if prompt is not None:
            raise TypeError("a Request is given once")
        prompt = options.pop("request")
    managed = not isinstance(lm.engine, ForwardEngine)
    use_cache = bool(managed and (lm.cache if cache is None else cache) and getattr(lm, "_cache_responses", True))
    rollout_id = lm.kwargs.get("rollout_id") if rollout_id is None else rollout_id
    text = prompt if isinstance(prompt, str) else None
    if isinstance(prompt, Request):
        extra = options.keys() - _EXECUTION_KEYS - CLIENT_KEYS
        if extra:
            raise TypeError(f"what is generated is said in Request.config: {sorted(extra)}")
        if prompt.model != lm.model:
            raise ValueError("Request.model must match LM.model")
        request, count = prompt, _count(lm, n) if candidates else 1
    elif text is None or candidates:
        raise TypeError("an LM takes a dspy.lm15.Request, or a text where it is called")
    else:
        count = _count(lm, options.pop("n", options.pop("num_generations", None)))
        if hasattr(lm, "_warn_zero_temp_rollout"):
            lm._warn_zero_temp_rollout({**lm.kwargs, **options}.get("temperature"), rollout_id)
        request = build_request(lm, text, options)
    clients = {key: value for key, value in options.items() if key in CLIENT_KEYS}
    request = snapshot_request(request)
    return PreparedCall(request, text, options, use_cache, rollout_id, count, candidates, managed, clients)


def _change_execution() -> None:
    from dspy.clients import execution
    from dspy.clients.call_result import CallResult
    from dspy.clients.errors import error_boundary
    from dspy.utils.exceptions import LMUnsupportedFeatureError

    select, finalize_34, price = execution._select_engine, execution.finalize, execution._price_result

    def _engine(lm: Any, call: Any, asynchronous: bool) -> tuple[Any, Any]:
        with error_boundary(lm.model):
            if not isinstance(lm.engine, str):
                backend = lm.async_engine if asynchronous else lm.engine
                if backend is None:
                    what = "async_engine=" if asynchronous else "engine="
                    raise LMUnsupportedFeatureError(f"{type(lm).__name__} has no {what}; see {_GUIDE}", model=lm.model)
                return backend, None
            backend, _, provider = select(lm, call, asynchronous)
            return backend, provider

    def three_values(lm: Any, call: Any, asynchronous: bool) -> tuple[Any, Any, Any]:
        backend, provider = execution._engine(lm, call, asynchronous)
        return backend, call.request, provider

    def _price_result(lm: Any, result: Any, response: Any, provider: Any, request: Any) -> None:
        price(lm, result, response, provider, request)
        if isinstance(lm.engine, ForwardEngine):
            result.cost = (response.provider_data or {}).get(_PRICE)

    def on_35(function: Any) -> Any:
        """3.4.1's loop over answers and attempts, with the functions of 3.5 that it calls."""
        changed = {
            "_engine": three_values,
            "_price_result": _price_result,
            "_delay": lambda error, attempt: execution._delay(error, attempt),  # looked up when it is called
        }
        return types.FunctionType(function.__code__, {**vars(execution), **changed}, function.__name__)

    run, arun = on_35(execution.execute), on_35(execution.aexecute)

    def execute(lm: Any, call: Any) -> Any:
        token = _call.set((lm, call))
        try:
            return run(lm, call)
        finally:
            _call.reset(token)

    async def aexecute(lm: Any, call: Any) -> Any:
        token = _call.set((lm, call))
        try:
            return await arun(lm, call)
        finally:
            _call.reset(token)

    def finalize(lm: Any, call: Any, result: Any) -> Any:
        finalize_34(lm, call, result)  # usage and history
        if call.candidates:
            return list(result.responses)
        return result.outputs if call.prompt is not None else result.responses[0]

    CallResult.typed = lambda self, request, model_type: None
    for function in (prepare, _engine, execute, aexecute, finalize):
        function.__module__ = execution.__name__
        setattr(execution, function.__name__, function)
    requests = types.ModuleType("dspy.clients.requests")
    requests.build_request = build_request  # type: ignore[attr-defined]
    sys.modules["dspy.clients.requests"] = requests


# --- LMs -------------------------------------------------------------------------------------------------------------


def _change_lms() -> None:
    from dspy.clients.base_lm import BaseLM
    from dspy.clients.lm import LM
    from dspy.primitives.facade import SandboxLM
    from dspy.utils.callback import with_callbacks
    from dspy.utils.dummies import DummyLM

    def __call__(self: Any, prompt: Any = None, *, cache: Any = None, rollout_id: Any = None, **options: Any) -> Any:
        from dspy.clients.execution import execute, finalize, prepare

        call = prepare(self, prompt, options, cache=cache, rollout_id=rollout_id)
        return finalize(self, call, execute(self, call))

    async def acall(self: Any, prompt: Any = None, *, cache: Any = None, rollout_id: Any = None, **options: Any) -> Any:
        from dspy.clients.execution import aexecute, finalize, prepare

        given = {"cache": cache, "rollout_id": rollout_id, "asynchronous": True}
        call = await asyncio.to_thread(prepare, self, prompt, options, **given)
        return finalize(self, call, await aexecute(self, call))

    def generate(
        self: Any, request: Any, *, n: int = 1, cache: Any = None, rollout_id: Any = None, **client_options: Any
    ) -> list[Any]:
        from dspy.clients.execution import execute, finalize, prepare

        given = {"cache": cache, "rollout_id": rollout_id, "n": n, "candidates": True}
        call = prepare(self, request, client_options, **given)
        return list(finalize(self, call, execute(self, call)))

    async def agenerate(
        self: Any, request: Any, *, n: int = 1, cache: Any = None, rollout_id: Any = None, **client_options: Any
    ) -> list[Any]:
        from dspy.clients.execution import aexecute, finalize, prepare

        given = {"cache": cache, "rollout_id": rollout_id, "n": n, "candidates": True, "asynchronous": True}
        call = await asyncio.to_thread(prepare, self, request, client_options, **given)
        return list(finalize(self, call, await aexecute(self, call)))

    for function in (__call__, acall, generate, agenerate):
        function.__module__, function.__qualname__ = BaseLM.__module__, f"BaseLM.{function.__name__}"
        setattr(BaseLM, function.__name__, with_callbacks(function))

    init = BaseLM.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, engine: Any = None, async_engine: Any = None, **kwargs: Any) -> None:
        if engine is None and is_of_these_tests(type(self)):
            engine, async_engine = ForwardEngine(), AsyncForwardEngine()
        if engine is not None or not hasattr(self, "_engine_spec"):
            self._engine_spec, self._async_engine_spec = engine, async_engine
        init(self, *args, **kwargs)

    BaseLM.__init__ = __init__
    BaseLM.engine = property(lambda self: self._engine_spec)
    BaseLM.async_engine = property(lambda self: self._async_engine_spec)
    for name in ("supports_function_calling", "supports_reasoning", "supports_response_schema"):
        setattr(BaseLM, name, property(lambda self, name=name: bool(getattr(self._engine_spec, name, False))))
    BaseLM.supported_params = property(lambda self: set(getattr(self._engine_spec, "supported_params", ())))

    def hand_on(self: Any, request: Any, **options: Any) -> Any:
        self._admit(options)
        return self._lm.generate(request, **options)

    async def ahand_on(self: Any, request: Any, **options: Any) -> Any:
        self._admit(options)
        return await self._lm.agenerate(request, **options)

    SandboxLM.generate, SandboxLM.agenerate = hand_on, ahand_on
    for kind in (BaseLM, LM, DummyLM, SandboxLM):
        for name in ("forward", "aforward"):
            if name in vars(kind):
                delattr(kind, name)


# --- the tests' own LMs ----------------------------------------------------------------------------------------------

_PRICE = "price"


def is_of_these_tests(kind: type) -> bool:
    """Whether it is an LM of these tests that is written as ``forward()``."""
    written = getattr(kind, "forward", None)
    return written is not None and getattr(written, "__module__", "").partition(".")[0] in ("tests", "__main__")


class ForwardEngine:
    """Asks the ``forward()`` of an LM of these tests."""

    def complete(self, request: Any) -> Any:
        """Answer one request."""
        lm, arguments = _arguments(request)
        return _response(lm.forward(**arguments), request)

    def dump_state(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> Any:
        """A new engine."""
        return cls()


class AsyncForwardEngine(ForwardEngine):
    """The same for ``aforward()``."""

    async def complete(self, request: Any) -> Any:
        """Answer one request."""
        lm, arguments = _arguments(request)
        if not hasattr(lm, "aforward"):
            raise NotImplementedError
        return _response(await lm.aforward(**arguments), request)


def _arguments(request: Any) -> tuple[Any, dict[str, Any]]:
    """The LM that is called, and what its ``forward()`` is given: what 3.4 gives, for one answer."""
    from dspy.clients.lm15_boundary import history_messages, request_kwargs
    from dspy.lm15 import Message

    current = _call.get()
    assert current is not None
    lm, call = current
    call.asked += 1
    settings = request_kwargs(replace(request, messages=(Message.user("."),), system=None), "chat")
    given = {**settings, **(request.config.extensions or {}), **call.options, "messages": history_messages(request)}
    if call.rollout_id is not None:
        given["rollout_id"] = call.rollout_id
    given["prompt"] = call.prompt
    if call.prompt is not None:
        given["messages"] = None
    return lm, given


def is_further_answer() -> bool:
    """Whether a ``forward()`` is asked for the second or a later answer of one call."""
    current = _call.get()
    return current is not None and current[1].asked > 1


def _response(raw: Any, request: Any) -> Any:
    from dspy.clients.lm15_boundary import response_value
    from dspy.lm15 import Response

    if isinstance(raw, Response):
        return raw
    body = dict(_plain(raw))
    body["choices"] = body["choices"][:1]
    price = body.pop("_hidden_params", {}).get("response_cost")
    response = response_value(body, "chat", request)
    return replace(response, provider_data={**(response.provider_data or {}), _PRICE: price})


def _plain(value: Any) -> Any:
    if isinstance(value, SimpleNamespace):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# --- adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What an adapter renders: lm15 messages, and the instructions before them."""

    messages: tuple[Any, ...]
    system: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))


Prompt.__module__ = "dspy.adapters.base"


def prompt_of(messages: list[dict[str, Any]]) -> Prompt:
    """3.4.1's messages as lm15 reads them."""
    from dspy.lm15 import request_from_openai_chat

    if all(message["role"] == "system" for message in messages):
        return Prompt((), "\n".join(message["content"] for message in messages) or None)
    request = request_from_openai_chat({"model": "any", "messages": messages})
    return Prompt(request.messages, request.system)


def _change_adapters() -> None:
    import dspy
    from dspy.adapters import base
    from dspy.adapters.base import Adapter
    from dspy.adapters.chat_adapter import ChatAdapter
    from dspy.adapters.two_step_adapter import TwoStepAdapter
    from dspy.clients.backend_selection import CLIENT_KEYS
    from dspy.clients.call_result import legacy_output
    from dspy.clients.capabilities import with_capability_planning
    from dspy.clients.lm15_boundary import request_kwargs
    from dspy.lm15 import Request
    from dspy.utils.callback import with_callbacks

    postprocess = Adapter._call_postprocess

    def execution_options(lm_kwargs: dict[str, Any]) -> dict[str, Any]:
        options = {key: lm_kwargs.get(key) for key in ("cache", "rollout_id", *CLIENT_KEYS)}
        options["n"] = lm_kwargs.get("n", lm_kwargs.get("num_generations"))
        return {key: value for key, value in options.items() if value is not None}

    def ask(self: Any, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> tuple[Any, Any]:
        processed = self._call_preprocess(lm, lm_kwargs, signature, inputs)
        prompt = self.format(processed, demos, inputs)
        if lm_kwargs.get("parallel_tool_calls") is not None:
            lm_kwargs.setdefault("tool_choice", "auto")
        return processed, build_request(lm, prompt, lm_kwargs)

    @with_capability_planning
    def __call__(self: Any, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        processed, request = ask(self, lm, lm_kwargs, signature, demos, inputs)
        responses = lm.generate(request, **execution_options(lm_kwargs))
        return self._call_postprocess(processed, signature, responses)

    @with_capability_planning
    async def acall(self: Any, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        processed, request = ask(self, lm, lm_kwargs, signature, demos, inputs)
        responses = await lm.agenerate(request, **execution_options(lm_kwargs))
        return self._call_postprocess(processed, signature, responses)

    def _call_postprocess(self: Any, processed_signature: Any, original_signature: Any, responses: Any) -> Any:
        outputs = [legacy_output(response, logprobs=response.logprobs is not None) for response in responses]
        return postprocess(self, processed_signature, original_signature, outputs, None, {})

    async def two_steps(self: Any, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        request = build_request(lm, self.format(signature, demos, inputs), lm_kwargs)
        extractor, values = self._create_extractor_signature(signature), []
        for response in await lm.agenerate(request, **execution_options(lm_kwargs)):
            text = {"text": response.text or ""}
            values += await ChatAdapter().acall(self.extraction_model, {}, extractor, [], text)
        return values

    def prompting(function: Any) -> Any:
        @functools.wraps(function)
        def format(self: Any, *args: Any, **kwargs: Any) -> Prompt:
            return prompt_of(function(self, *args, **kwargs))

        return format

    Adapter.__call__, Adapter.acall, Adapter._call_postprocess = __call__, acall, _call_postprocess
    TwoStepAdapter.acall = two_steps
    # Each class has the method of its base once more, for callbacks.
    Adapter.format = prompting(Adapter.format)
    for kind in _subclasses(Adapter):
        if "format" in vars(kind):
            written = inspect.unwrap(kind.format, stop=lambda one: not hasattr(one, "__wrapped__"))
            kind.format = with_callbacks(prompting(written))
    finetune = ChatAdapter.format_finetune_data

    def format_finetune_data(self: Any, signature: Any, demos: Any, inputs: Any, outputs: Any) -> Any:
        prompt = self.format(signature=signature, demos=demos, inputs=inputs)
        written = request_kwargs(Request(model="any", messages=prompt.messages, system=prompt.system), "chat")
        said = {"role": "assistant", "content": self.format_assistant_message_content(signature, outputs)}
        return {"messages": [*written["messages"], said]}

    ChatAdapter.format_finetune_data = functools.wraps(finetune)(format_finetune_data)
    base.Prompt = dspy.adapters.Prompt = Prompt


def _subclasses(kind: type) -> list[type]:
    return [each for one in kind.__subclasses__() for each in (one, *_subclasses(one))]


# --- what is gone ----------------------------------------------------------------------------------------------------


class _Gone:
    """Finds no module of these names, and leaves all others to those who look after it."""

    names = ("dspy.predict.code_act", "dspy.predict.program_of_thought", "dspy.clients.engines.legacy_engine")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raises for those that are gone."""
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _remove(dspy: Any) -> None:
    from dspy.clients import engines, execution, lm
    from dspy.clients.engines import dummy_engine, litellm_engine

    for name in ("CodeAct", "ProgramOfThought"):
        delattr(dspy, name)
        delattr(dspy.predict, name)
    for module in _Gone.names:
        parent, _, name = module.rpartition(".")
        sys.modules.pop(module, None)
        vars(sys.modules[parent]).pop(name, None)
    sys.meta_path.insert(0, _Gone())
    for name in ("LegacyEngine", "AsyncLegacyEngine"):
        delattr(engines, name)
        delattr(execution, name)
    for kind in (
        *(dummy_engine.DummyEngine, dummy_engine.AsyncDummyEngine),
        *(litellm_engine.LiteLLMEngine, litellm_engine.AsyncLiteLLMEngine),
    ):
        del kind.complete_legacy
    for name in ("stream_emitted", "aclosing_stream", "_get_stream_completion_fn", "completed_legacy"):
        delattr(lm, name)
