"""On and off: reads the settings, applies the patches, and restores them."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Collection
from types import FunctionType
from typing import Any, Final

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]
from wrapt import register_post_import_hook

from dspy_otel.coexistence import OtherInstrumentations
from dspy_otel.config import Config, Configuration
from dspy_otel.content import redaction
from dspy_otel.content.id_key import IdKey
from dspy_otel.content.introspection import library, members_of, module_of
from dspy_otel.core.errors import formatting_without_our_frames
from dspy_otel.core.id_generator import give_exporters_a_generator
from dspy_otel.core.internal_errors import failed, guard, reset_warnings, warn_once
from dspy_otel.core.operation import Operation
from dspy_otel.core.telemetry import Telemetry
from dspy_otel.operations import older_dspy
from dspy_otel.operations.adapter import AdapterOperation, AdapterSpanOperation
from dspy_otel.operations.embedding import EmbeddingOperation
from dspy_otel.operations.interpreter import InterpreterOperation
from dspy_otel.operations.lm import LMOperation
from dspy_otel.operations.lm_request import CONNECTION
from dspy_otel.operations.native_tracing import NativeTracing
from dspy_otel.operations.parallel import ParallelOperation
from dspy_otel.operations.program import Programs
from dspy_otel.operations.retrieval import RetrievalOperation
from dspy_otel.operations.tool import ToolOperation
from dspy_otel.optimizers import Optimizers
from dspy_otel.optimizers.trackers import gepa
from dspy_otel.packages import has_gepa_alone
from dspy_otel.patching import Patches, resolve
from dspy_otel.propagation import parent_of_process

_LOG: Final = logging.getLogger(__name__)
_instruments: Final = ("dspy >= 3.0.4, < 4",)
_gepa_alone: Final = ("gepa >= 0.0.27",)

_SUBCLASS: Final = guard("subclass")
_BASE_LM: Final = "dspy.clients.base_lm"
_LM: Final = "dspy.clients.lm"
_STREAM: Final = "_get_stream_completion_fn"
_THREADS: Final = "parents of spans in worker threads, and examples"
_FALLBACKS: Final = "parse failures and adapter fallbacks"
_PROVIDERS: Final = ("tracer_provider", "meter_provider", "logger_provider")


class DSPyInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """OpenTelemetry instrumentor of DSPy; entry point ``dspy_otel`` of ``opentelemetry-instrument``.

    One per process. ``instrument()`` may come before or after ``import dspy``: nothing is imported for it.
    """

    configuration = Configuration
    """What ``opentelemetry-configuration`` reads options of a file into, before it calls :meth:`instrument`."""

    _telemetry: Telemetry | None = None
    _patches: Patches | None = None
    _optimizers: Optimizers | None = None
    _generation = 0

    def instrumentation_dependencies(self) -> Collection[str]:
        """What is instrumented, as requirement strings; the extra ``instruments`` says the same.

        A program that has GEPA and no DSPy is instrumented, too.
        """
        return _gepa_alone if has_gepa_alone() else _instruments

    @property
    def config(self) -> Config | None:
        """The settings in force; None while instrumentation is off."""
        return None if self._telemetry is None else self._telemetry.config

    @property
    def telemetry(self) -> Telemetry | None:
        """What all operations share; None while instrumentation is off."""
        return self._telemetry

    def instrument(self, **kwargs: Any) -> None:
        """Switch on.

        Args:
            **kwargs: ``tracer_provider``, ``meter_provider``, ``logger_provider`` (default: the global ones, also if
                they are set later), and any field of :class:`~dspy_otel.config.Config`.

        Raises:
            TypeError: for an argument that is neither.
        """
        super().instrument(**kwargs)

    def _instrument(self, **kwargs: Any) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("skip_dep_check", "configuration")}
        providers = {name: kwargs.pop(name, None) for name in _PROVIDERS}
        with guard("secrets of the environment"):
            redaction.remember_environment()
        config = Config.load(**kwargs)
        self._generation += 1
        try:
            checks = before_each_program(config.content)
            parent = guard("parent of this process")(parent_of_process)()
            self._telemetry = Telemetry(
                config, **providers, on_provider=track_runs, on_outermost=checks, default_parent=parent
            )
        except Exception as error:
            failed("instrument()", error)
            return
        generation = self._generation
        for name, member, patch in (("dspy", "Module", self._patch), ("gepa", "optimize", self._patch_gepa)):
            if name in sys.modules and hasattr(sys.modules[name], member):
                patch(generation)
            else:
                # Imported in full by the time the hook runs. A later uninstrument() makes it stale.
                register_post_import_hook(functools.partial(_imported, patch, generation), name)

    def _uninstrument(self, **kwargs: Any) -> None:
        self._generation += 1
        if self._telemetry is not None:
            # Somebody may have wrapped our wrappers: those stay in place, and pass everything through.
            self._telemetry.active = False
            self._telemetry = None
        if self._patches is not None:
            self._patches.restore()
            self._patches = self._optimizers = None
        reset_warnings()

    def _patch(self, generation: int) -> None:
        if generation != self._generation or self._telemetry is None:
            return
        try:
            apply(self._telemetry, *self._parts(self._telemetry))
            self._telemetry.on_outermost()
        except Exception as error:  # Never in the way of `import dspy`.
            failed("instrument()", error)

    def _patch_gepa(self, generation: int) -> None:
        """The program has imported GEPA, by itself or by DSPy, and may have no DSPy."""
        if generation != self._generation or self._telemetry is None:
            return
        try:
            patches, optimizers = self._parts(self._telemetry)
            gepa.patch(optimizers, patches)
        except Exception as error:  # Never in the way of `import gepa`.
            failed("instrument()", error)

    def _parts(self, telemetry: Telemetry) -> tuple[Patches, Optimizers]:
        """The patches, and the operations that DSPy and GEPA share: made by whichever is imported first."""
        if self._patches is None or self._optimizers is None:
            self._patches, self._optimizers = Patches(), Optimizers(telemetry, programs_of(telemetry))
        return self._patches, self._optimizers


def _imported(patch: Callable[[int], None], generation: int, _: Any) -> None:
    patch(generation)


def before_each_program(content: bool) -> Callable[[], None]:
    """What is checked before each outermost call, because it may have changed since the last one."""
    others = OtherInstrumentations()
    check_others = guard("other instrumentations")(others.check)
    check_exporters = guard("exporters")(give_exporters_a_generator)
    refresh = guard("secrets of the environment")(redaction.refresh_environment)
    modules = 0

    def check() -> None:
        nonlocal modules
        # Both other instrumentations and exporters must be imported first, and a program soon stops importing.
        if len(sys.modules) != modules or others.entry_changed():
            modules = len(sys.modules)
            check_others()
            check_exporters()
        if content:
            refresh()

    return check


def track_runs(provider: Any) -> None:
    """Let our exporter to MLflow, if this tracer provider has one, record runs too: they need the starts of spans."""
    if "dspy_otel.mlflow" in sys.modules:
        from dspy_otel.mlflow.exporter import track_runs

        track_runs(provider)


def programs_of(telemetry: Telemetry) -> Programs:
    """The programs, and their ids."""
    # A plain digest of a row tells it to whoever can guess it: only where the row itself may stand beside it.
    return Programs(None if telemetry.config.content_on_spans else IdKey(telemetry.config.id_key))


def apply(telemetry: Telemetry, patches: Patches, optimizers: Optimizers) -> None:
    """Put every patch in force that this DSPy has a place for.

    Args:
        telemetry: where to record.
        patches: the patches.
        optimizers: has operations of its own for modules, evaluations and examples.
    """
    lm, generate = LMOperation(telemetry), LMOperation(telemetry, kept=(*CONNECTION, "rollout_id"))
    module, evaluate = optimizers.module, optimizers.evaluate
    tool = ToolOperation(telemetry)
    adapter = AdapterOperation(telemetry)
    embedding = EmbeddingOperation(telemetry)
    parallel = ParallelOperation(telemetry, optimizers.example)
    local, remote = RetrievalOperation(telemetry), RetrievalOperation(telemetry, remote=True)
    interpreter = InterpreterOperation(telemetry)

    # Public entry points: class, its operation, synchronous and asynchronous method, and what is lost without it.
    # A class or method that only some DSPy versions have is not missed in the others.
    entry_points: tuple[tuple[str, str, Operation, str, str | None, str], ...] = (
        ("dspy.primitives.module", "Module", module, "__call__", "acall", "programs and modules"),
        (_BASE_LM, "BaseLM", lm, "__call__", "acall", "LM calls"),
        (_BASE_LM, "BaseLM", generate, "generate", "agenerate", ""),  # 3.5
        ("dspy.clients.typesafe", "TypeSafe", lm, "__call__", "acall", ""),  # 3.4
        ("dspy.adapters.types.tool", "Tool", tool, "__call__", "acall", "tool calls"),
        ("dspy.adapters.base", "Adapter", adapter, "__call__", "acall", "adapter names"),
        ("dspy.clients.embedding", "Embedder", embedding, "__call__", "acall", "embeddings"),
        ("dspy.retrievers.retrieve", "Retrieve", local, "__call__", None, "retrieval"),
        ("dspy.retrievers.embeddings", "Embeddings", local, "__call__", None, "retrieval by embeddings"),
        ("dspy.predict.knn", "KNN", local, "__call__", None, "retrieval by KNN"),
        ("dspy.dsp.colbertv2", "ColBERTv2", remote, "__call__", None, "retrieval by ColBERTv2"),
        ("dspy.evaluate.evaluate", "Evaluate", evaluate, "__call__", None, "evaluations"),
        ("dspy.primitives.python_interpreter", "PythonInterpreter", interpreter, "execute", None, "executed code"),
        ("dspy.primitives.local_interpreter", "LocalInterpreter", interpreter, "execute", None, ""),  # 3.4
        ("dspy.teleprompt.teleprompt", "Teleprompter", optimizers.compile, "compile", None, "optimizations"),
    )
    for place, name, operation, method, async_method, loses in entry_points:
        owner = resolve(place, name)
        if owner is not None and (loses or hasattr(owner, method)):
            wrap_class_tree(patches, owner, operation, method, async_method, loses)
        elif loses:
            warn_once(("patch", place, name), "this DSPy has no %s; telemetry lacks %s", name, loses)

    # Internals, where nothing public shows the same: whether this DSPy is one to have it, where it is, how it is
    # watched and by what, and what is lost without it. Optimizers have more of them, in their own files.
    from_34 = resolve("dspy.clients.execution") is not None
    python_310 = sys.version_info < (3, 11)
    usage, first_chunk = "usage, cost and cache hits of LM calls", "time to first chunk"
    in_streams = "what servers report in LiteLLM's streams"
    # Streams of `dspy.clients.lm`, which are to go with these engines, are not missed after that.
    has_own = resolve("dspy.clients.engines.legacy_engine") is not None
    keys = "the keys of LMs, until their first call, to mask them"
    internals: tuple[tuple[bool, str, str, str, Callable[..., bool], Callable[..., Any], str], ...] = (
        (from_34, "dspy.clients.execution", "", "finalize", patches.before, lm.record_result, usage),
        (from_34, "dspy.clients.execution", "", "_engine", patches.after, lm.record_engine, "the engine of LM calls"),
        (from_34, "dspy.clients.execution", "", "_delay", patches.after, lm.record_retry, "retries of LM calls"),
        (from_34, "dspy.clients.execution", "", "stream_emitted", patches.before, lm.record_chunk, first_chunk),
        (from_34, _LM, "", "stream_emitted", patches.before, lm.record_chunk, first_chunk if has_own else ""),
        (from_34, _LM, "", "aclosing_stream", patches.before, lm.record_stream, in_streams if has_own else ""),
        *(
            (from_34, "dspy.clients.engines.litellm_engine", "", name, patches.before, lm.record_stream, in_streams)
            for name in ("aclosing_stream", "closing_stream")
        ),
        (not from_34, _BASE_LM, "BaseLM", "_process_lm_response", patches.after, older_dspy.record_response, usage),
        (not from_34, _BASE_LM, "BaseLM", "_finalize_lm_response", patches.after, older_dspy.record_typed_response, ""),
        (not from_34, _LM, "", _STREAM, patches.wrap, older_dspy.counting_stream, first_chunk),
        (True, _BASE_LM, "BaseLM", "__init__", patches.after, lm.remember_settings, keys),
        (True, "dspy.utils.parallelizer", "ParallelExecutor", "execute", patches.wrap, parallel.wrap_execute, _THREADS),
        (True, "dspy.adapters.base", "Adapter", "_call_postprocess", patches.wrap, adapter.watch, _FALLBACKS),
        # ReAct and ReActV2 show the LM the frames of an error; the second name is that before DSPy 3.3.
        *(
            (python_310, place, "", name, patches.wrap, formatting_without_our_frames, "")
            for place in ("dspy.predict.react", "dspy.predict.react_v2")
            for name in ("format_error_for_lm", "_fmt_exc")
        ),
    )
    for applies, place, owner_name, name, watch, hook, loses in internals:
        if applies:
            watch(resolve(place, owner_name), name, hook, loses=loses)
    rlm = resolve("dspy.predict.rlm")
    if older_dspy.needs_bound_pool(rlm):
        patches.replace(rlm, "ThreadPoolExecutor", older_dspy.BoundPool)

    optimizers.patch(patches)
    NativeTracing(telemetry).patch(patches)

    adapters = resolve("dspy.adapters.base", "Adapter")
    if telemetry.config.adapter_spans and adapters is not None:
        for method in ("format", "parse"):
            wrap_class_tree(patches, adapters, AdapterSpanOperation(telemetry, method), method, None)


def wrap_class_tree(
    patches: Patches, base: type, operation: Operation, method: str, async_method: str | None, loses: str = ""
) -> None:
    """Wrap an entry point of ``base``, every override of it in a subclass, and those of subclasses made later.

    DSPy's own overrides that call the method they override are left alone: that one is enough.
    """
    methods = ((method, operation.wrap), *(((async_method, operation.wrap_async),) if async_method else ()))

    def wrap(owner: type[Any]) -> None:
        override_of = None if owner is base else owner
        for name, make in methods:
            if owner is base:
                patches.wrap(base, name, make, loses=loses)
            elif name in members_of(owner) and not _hands_on(owner, name):
                patches.wrap(owner, name, functools.partial(make, override_of=override_of))

    for owner in (base, *_subclasses(base)):
        wrap(owner)

    own = vars(base).get("__init_subclass__")

    def __init_subclass__(cls: type[Any], /, **kwargs: Any) -> None:
        if own is not None:
            own.__func__(cls, **kwargs)
        else:
            super(base, cls).__init_subclass__(**kwargs)  # type: ignore[arg-type]
        # Somebody may have put theirs around ours: then ours stays after uninstrument().
        if operation.telemetry.active:
            with _SUBCLASS:
                wrap(cls)

    patches.replace(base, "__init_subclass__", classmethod(__init_subclass__))


def _hands_on(owner: type, method: str) -> bool:
    """Whether ``owner`` is a class of DSPy whose override of ``method`` ends in another call that is watched."""
    if method not in ("__call__", "acall", "generate", "agenerate") or library(owner) != "dspy":
        return False
    function = members_of(owner)[method]
    if not isinstance(function, FunctionType):
        return True  # another instrumentation's wrapper around it
    code = function.__code__
    # By super(), to the synchronous way (DummyLM before DSPy 3.2), or to the LM it stands for.
    through = "__class__" in code.co_freevars or (method == "acall" and "__call__" in code.co_names)
    return through or module_of(owner) == "dspy.primitives.facade"


def _subclasses(base: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = []
    kind: type[Any]
    for kind in type.__subclasses__(base):
        found.append(kind)
        found.extend(_subclasses(kind))
    return found
