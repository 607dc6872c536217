"""On and off: reads the settings, applies the patches, and restores them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from typing import Any, Final

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]
from wrapt import register_post_import_hook

from .config import Config
from .neighbours import warn_about_neighbours
from .operations.adapter import AdapterOperation, AdapterSpanOperation
from .operations.embedding import EmbeddingOperation
from .operations.evaluation import EvaluateOperation, ExampleOperation
from .operations.interpreter import InterpreterOperation
from .operations.lm import LMOperation
from .operations.module import ModuleOperation
from .operations.parallel import ParallelOperation
from .operations.program import Programs
from .operations.retrieval import RetrievalOperation
from .operations.tool import ToolOperation
from .optimizers.compile import CompileOperation
from .patching import Patches, resolve
from .telemetry import secrets
from .telemetry.core import Telemetry
from .telemetry.guard import failed, reset_warnings
from .telemetry.spans import Operation

_LOG: Final = logging.getLogger(__name__)
_instruments: Final = ("dspy >= 3.3.1, < 4",)

_PROVIDERS: Final = ("tracer_provider", "meter_provider", "logger_provider")


class DSPyInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """OpenTelemetry instrumentor of DSPy; entry point ``dspy_otel`` of ``opentelemetry-instrument``.

    One per process. ``instrument()`` may come before or after ``import dspy``: nothing is imported for it.
    """

    _telemetry: Telemetry | None = None
    _patches: Patches | None = None
    _generation = 0

    def instrumentation_dependencies(self) -> Collection[str]:
        """What is instrumented, as requirement strings; the extra ``instruments`` says the same."""
        return _instruments

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
        secrets.remember_environment()
        self._telemetry = Telemetry(Config.load(**kwargs), **providers)
        self._generation += 1
        generation = self._generation
        if "dspy" in sys.modules and hasattr(sys.modules["dspy"], "Module"):
            self._patch(generation)
        else:
            # Imported in full by the time the hook runs. A later uninstrument() makes it stale.
            register_post_import_hook(lambda _: self._patch(generation), "dspy")

    def _uninstrument(self, **kwargs: Any) -> None:
        self._generation += 1
        if self._telemetry is not None:
            # Somebody may have wrapped our wrappers: those stay in place, and pass everything through.
            self._telemetry.active = False
            self._telemetry = None
        if self._patches is not None:
            self._patches.restore()
            self._patches = None
        reset_warnings()

    def _patch(self, generation: int) -> None:
        if generation != self._generation or self._telemetry is None:
            return
        try:
            self._patches = Patches()
            apply(self._telemetry, self._patches)
            warn_about_neighbours()
        except Exception as error:  # Never in the way of `import dspy`.
            failed("instrument()", error)


def apply(telemetry: Telemetry, patches: Patches) -> None:
    """Put every patch in force that this DSPy has a place for."""
    programs = Programs()
    lm = LMOperation(telemetry)
    module = ModuleOperation(telemetry, programs)
    tool = ToolOperation(telemetry)
    adapter = AdapterOperation(telemetry)
    embedding = EmbeddingOperation(telemetry)
    evaluate = EvaluateOperation(telemetry, programs)
    parallel = ParallelOperation(telemetry, ExampleOperation(telemetry, programs))
    local, remote = RetrievalOperation(telemetry), RetrievalOperation(telemetry, remote=True)
    compiles = CompileOperation(telemetry, programs)
    interpreter = InterpreterOperation(telemetry)

    # Public entry points. (class, its operation, synchronous method, asynchronous method)
    entry_points: tuple[tuple[str, str, Operation, str, str | None], ...] = (
        ("dspy.primitives.module", "Module", module, "__call__", "acall"),
        ("dspy.clients.base_lm", "BaseLM", lm, "__call__", "acall"),
        ("dspy.clients.typesafe", "TypeSafe", lm, "__call__", "acall"),
        ("dspy.adapters.types.tool", "Tool", tool, "__call__", "acall"),
        ("dspy.adapters.base", "Adapter", adapter, "__call__", "acall"),
        ("dspy.clients.embedding", "Embedder", embedding, "__call__", "acall"),
        ("dspy.retrievers.retrieve", "Retrieve", local, "__call__", None),
        ("dspy.retrievers.embeddings", "Embeddings", local, "__call__", None),
        ("dspy.predict.knn", "KNN", local, "__call__", None),
        ("dspy.dsp.colbertv2", "ColBERTv2", remote, "__call__", None),
        ("dspy.evaluate.evaluate", "Evaluate", evaluate, "__call__", None),
        ("dspy.primitives.python_interpreter", "PythonInterpreter", interpreter, "execute", None),
        ("dspy.primitives.local_interpreter", "LocalInterpreter", interpreter, "execute", None),
        ("dspy.teleprompt.teleprompt", "Teleprompter", compiles, "compile", None),
    )
    for place, name, operation, method, async_method in entry_points:
        owner = resolve(place, name)
        if owner is None:
            continue  # A class of another DSPy version; there is nothing to watch.
        wrap_class_tree(patches, owner, operation, method, async_method)

    # Internals, each where nothing public tells the same. (module, function, wrapper, DSPy versions, lost without it)
    execution = resolve("dspy.clients.execution")
    base_lm = resolve("dspy.clients.base_lm", "BaseLM")
    if execution is not None:  # 3.4
        patches.wrap(execution, "finalize", lm.wrap_finalize, loses="usage, cost and cache hits of LM calls")
        patches.wrap(execution, "_engine", lm.wrap_engine, loses="the engine of LM calls")
        patches.wrap(execution, "_delay", lm.wrap_delay, loses="retries of LM calls")
        patches.wrap(execution, "stream_emitted", lm.wrap_stream_emitted, loses="time to first chunk")
        patches.wrap(resolve("dspy.clients.lm"), "stream_emitted", lm.wrap_stream_emitted, loses="time to first chunk")
    else:  # 3.3
        loses = "usage, cost and cache hits of LM calls"
        patches.wrap(base_lm, "_process_lm_response", lm.wrap_process_response, loses=loses)
        patches.wrap(base_lm, "_finalize_lm_response", lm.wrap_finalize_typed)
    executor = resolve("dspy.utils.parallelizer", "ParallelExecutor")
    patches.wrap(executor, "execute", parallel.wrap_execute, loses="parents of spans in worker threads, and examples")
    adapters = resolve("dspy.adapters.base", "Adapter")
    patches.wrap(adapters, "_call_postprocess", adapter.watch, loses="parse failures and adapter fallbacks")

    if telemetry.config.adapter_spans and adapters is not None:
        for method in ("format", "parse"):
            wrap_class_tree(patches, adapters, AdapterSpanOperation(telemetry, method), method, None)


def wrap_class_tree(patches: Patches, base: type, operation: Operation, method: str, async_method: str | None) -> None:
    """Wrap an entry point of ``base``, every override of it in a subclass, and those of subclasses made later.

    DSPy's own overrides of ``__call__`` call the method they override, and are left alone: that one is enough.
    """

    def wrap(owner: type[Any]) -> None:
        is_base = owner is base
        if not is_base and method == "__call__" and owner.__module__.startswith("dspy."):
            return
        if method in vars(owner):
            patches.wrap(owner, method, lambda original: operation.wrap(original, is_base))
        if async_method is not None and async_method in vars(owner):
            patches.wrap(owner, async_method, lambda original: operation.wrap_async(original, is_base))

    for owner in (base, *_subclasses(base)):
        wrap(owner)

    own = vars(base).get("__init_subclass__")

    def __init_subclass__(cls: type[Any], /, **kwargs: Any) -> None:
        if own is not None:
            own.__func__(cls, **kwargs)
        else:
            super(base, cls).__init_subclass__(**kwargs)  # type: ignore[arg-type]
        operation.telemetry.safely("subclass", None, wrap, cls)

    patches.replace(base, "__init_subclass__", classmethod(__init_subclass__))


def _subclasses(base: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = []
    kind: type[Any]
    for kind in type.__subclasses__(base):
        found.append(kind)
        found.extend(_subclasses(kind))
    return found
