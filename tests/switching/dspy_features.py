"""Every feature of DSPy that we reach for without it being promised to us: one table, for tests and for the docs.

A row says what must hold, where it is used, and what telemetry lacks without it. `test_features.py` checks each row on
the DSPy that is installed, and that nothing is replaced which has no row; `docs/versions.md` shows the table
(`python -m tests.switching.dspy_features` prints it).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from dspy_otel.operations import native_tracing
from tests.support.older import DSPY

Holds = Callable[[Any], bool]
NEVER = (99,)
PROPOSED = (98,)
"""`since` of what DSPy may have one day."""
ENGINES = find_spec("gepa") is not None and find_spec("gepa.gepa_launcher") is not None
"""Whether this GEPA's `optimize_anything` runs any engine."""


@dataclass(frozen=True)
class Feature:
    """One row.

    Attributes:
        place: ``module:attribute.attribute``.
        relies: what must be so, in a few words.
        used: our file, below ``src/dspy_otel``.
        loses: what telemetry lacks without it.
        holds: whether it is so, given what is at ``place``.
        since: first DSPy version that has it.
        until: first DSPy version that has it no more.
        replaces: we put a wrapper there.
        with_engines: only GEPA after 0.1.4 has it, whose `optimize_anything` runs any engine.
    """

    place: str
    relies: str
    used: str
    loses: str
    holds: Holds = callable
    since: tuple[int, ...] = (3, 0, 4)
    until: tuple[int, ...] = NEVER
    replaces: bool = True
    with_engines: bool = False

    @property
    def here(self) -> bool:
        """Whether the DSPy, or the GEPA, that is installed should have it."""
        return self.since <= DSPY < self.until and (ENGINES or not self.with_engines)

    @property
    def versions(self) -> str:
        """For people: which DSPy versions."""
        if self.since == PROPOSED:
            return "proposed"
        if self.with_engines:
            return "with GEPA after 0.1.4"
        first, last = ".".join(map(str, self.since)), ".".join(map(str, self.until))
        if self.since <= (3, 0, 4):
            return "all" if self.until == NEVER else f"before {last}"
        return f"from {first}" if self.until == NEVER else f"{first} to before {last}"

    def find(self) -> Any:
        """What is at ``place``; raises what Python raises if nothing is."""
        module, _, path = self.place.partition(":")
        importlib.import_module(module)
        found: Any = sys.modules[module]
        for part in path.split(".") if path else ():
            found = getattr(found, part)
        return found

    def complaint(self, found: str) -> str:
        """What a developer needs to know when it does not hold."""
        return (
            f"DSPy {version('dspy')}: {self.place}: {found}. We rely on: {self.relies}. "
            f"Used in src/dspy_otel/{self.used}. Without it, telemetry lacks {self.loses}."
        )


def takes(*names: str) -> Holds:
    """Its first parameters have these names, in this order."""
    return lambda function: tuple(inspect.signature(function).parameters)[: len(names)] == names


def has(*names: str) -> Holds:
    """It has these parameters, somewhere."""
    return lambda function: set(names) <= inspect.signature(function).parameters.keys()


def calls(*names: str) -> Holds:
    """Its code looks these names up when it runs, so that a replacement takes effect."""

    def mentioned(code: Any) -> set[str]:
        inner = (constant for constant in code.co_consts if inspect.iscode(constant))
        return {*code.co_names, *code.co_varnames, *code.co_freevars}.union(*map(mentioned, inner))

    return lambda function: set(names) <= mentioned(inspect.unwrap(function).__code__)


def built(*names: str, **arguments: Any) -> Holds:
    """An instance has these attributes."""
    return lambda kind: all(hasattr(kind(**arguments), name) for name in names)


def declares(*names: str) -> Holds:
    """A dataclass has these fields."""
    return lambda kind: set(names) <= kind.__dataclass_fields__.keys()


def _metric(example: Any, prediction: Any, trace: Any = None) -> bool:
    return True


def _predictor() -> Any:
    import dspy

    return dspy.Predict("question -> answer")


def _entry(place: str, loses: str, used: str, *methods: str, since: tuple[int, ...] = (3, 0, 4)) -> list[Feature]:
    return [
        Feature(f"{place}.{method}", "a public entry point, a plain method", used, loses, since=since)
        for method in methods
    ]


LM, OLDER, OPS = "operations/lm.py", "operations/older_dspy.py", "operations"
USAGE = "usage, cost and cache hits of LM calls"
SIMBA = "SIMBA's trials"
GEPA = "GEPA's verdicts, parents and reflections"
SERVER = "evaluations by GEPA's engines, and their parents behind HTTP"
EVENTS = {
    "on_iteration_start": ("iteration", "state"),
    "on_candidate_selected": ("candidate_idx",),
    "on_minibatch_sampled": ("minibatch_ids",),
    "on_evaluation_start": ("candidate_idx", "parent_ids"),
    "on_evaluation_end": ("candidate_idx", "scores"),
    "on_evaluation_skipped": ("reason",),
    "on_reflective_dataset_built": ("candidate_idx",),
    "on_proposal_start": (),
    "on_proposal_end": ("new_instructions",),
    "on_pareto_front_updated": ("new_front", "displaced_candidates"),
    "on_valset_evaluated": ("candidate", "candidate_idx", "average_score"),
    "on_candidate_rejected": ("old_score", "new_score", "reason"),
    "on_merge_rejected": ("reason",),
    "on_iteration_end": (),
}


def _events(protocol: Any) -> bool:
    """GEPA announces each event that we follow, with what we read of it."""
    for name, keys in EVENTS.items():
        parameters = list(inspect.signature(getattr(protocol, name)).parameters.values())
        kind = parameters[1].annotation
        kind = getattr(sys.modules[protocol.__module__], kind) if isinstance(kind, str) else kind
        if not set(keys) <= kind.__annotations__.keys():
            return False
    return True


FEATURES: tuple[Feature, ...] = (
    # --- entry points -------------------------------------------------------------------------------------------------
    *_entry("dspy.primitives.module:Module", "programs and modules", f"{OPS}/module.py", "__call__", "acall"),
    *_entry("dspy.clients.base_lm:BaseLM", "LM calls", LM, "__call__", "acall"),
    *_entry("dspy.clients.base_lm:BaseLM", "LM calls of adapters", LM, "generate", "agenerate", since=(3, 5)),
    *_entry("dspy.clients.typesafe:TypeSafe", "decisions of TypeSafe", LM, "__call__", "acall", since=(3, 4)),
    *_entry("dspy.adapters.types.tool:Tool", "tool calls", f"{OPS}/tool.py", "__call__", "acall"),
    *_entry("dspy.adapters.base:Adapter", "adapter names", f"{OPS}/adapter.py", "__call__", "acall"),
    *_entry("dspy.adapters.base:Adapter", "adapter spans", f"{OPS}/adapter.py", "format", "parse"),
    *_entry("dspy.clients.embedding:Embedder", "embeddings", f"{OPS}/embedding.py", "__call__", "acall"),
    *_entry("dspy.retrievers.retrieve:Retrieve", "retrieval", f"{OPS}/retrieval.py", "__call__"),
    *_entry("dspy.retrievers.embeddings:Embeddings", "retrieval by embeddings", f"{OPS}/retrieval.py", "__call__"),
    *_entry("dspy.predict.knn:KNN", "retrieval by KNN", f"{OPS}/retrieval.py", "__call__"),
    *_entry("dspy.dsp.colbertv2:ColBERTv2", "retrieval by ColBERTv2", f"{OPS}/retrieval.py", "__call__"),
    *_entry("dspy.evaluate.evaluate:Evaluate", "evaluations", f"{OPS}/evaluation.py", "__call__"),
    *_entry(
        "dspy.primitives.python_interpreter:PythonInterpreter", "executed code", f"{OPS}/interpreter.py", "execute"
    ),
    *_entry(
        "dspy.primitives.local_interpreter:LocalInterpreter",
        "executed code",
        f"{OPS}/interpreter.py",
        "execute",
        since=(3, 4),
    ),
    *_entry("dspy.teleprompt.teleprompt:Teleprompter", "optimizations", "optimizers/compile.py", "compile"),
    # --- LM calls -----------------------------------------------------------------------------------------------------
    Feature(
        "dspy.clients.execution:finalize",
        "(lm, call, result), asked for by each LM call when it has its answer",
        LM,
        USAGE,
        takes("lm", "call", "result"),
        since=(3, 4),
    ),
    Feature(
        "dspy.clients.base_lm:BaseLM.__call__",
        "looks `finalize` up in `dspy.clients.execution` at each call",
        LM,
        USAGE,
        calls("finalize"),
        since=(3, 4),
        replaces=False,
    ),
    Feature(
        "dspy.clients.base_lm:BaseLM.generate",
        "looks `finalize` up in `dspy.clients.execution` at each call",
        LM,
        USAGE,
        calls("finalize"),
        since=(3, 5),
        replaces=False,
    ),
    Feature(
        "dspy.clients.call_result:CallResult",
        "fields responses, outputs, usage, cost, response_model, cache_hit",
        "operations/lm_response.py",
        USAGE,
        declares("responses", "outputs", "usage", "cost", "response_model", "cache_hit"),
        since=(3, 4),
        replaces=False,
    ),
    Feature(
        "dspy.clients.execution:_engine",
        "(lm, call, asynchronous) -> (engine, provider), before 3.5 with the request between them",
        LM,
        "the engine of LM calls",
        lambda function: len(inspect.signature(function).parameters) == 3,
        since=(3, 4),
    ),
    Feature(
        "dspy.clients.execution:_delay",
        "(error, attempt) -> seconds, asked once before each retry",
        LM,
        "retries of LM calls",
        lambda function: len(inspect.signature(function).parameters) == 2,
        since=(3, 4),
    ),
    Feature("dspy.clients.execution:stream_emitted", "called for each chunk", LM, "time to first chunk", since=(3, 4)),
    Feature(
        "dspy.clients.lm:stream_emitted",
        "called for each chunk",
        LM,
        "time to first chunk",
        since=(3, 4),
        until=(3, 5),
    ),
    *(
        Feature(
            f"{place}:{name}",
            "(source), LiteLLM's stream: `chunks` as the server sent them",
            LM,
            "what servers report in LiteLLM's streams",
            takes("source"),
            since=(3, 4),
            until=until,
        )
        for place, name, until in (
            ("dspy.clients.lm", "aclosing_stream", (3, 5)),
            ("dspy.clients.engines.litellm_engine", "aclosing_stream", NEVER),
            ("dspy.clients.engines.litellm_engine", "closing_stream", NEVER),
        )
    ),
    Feature(
        "dspy.clients.base_lm:BaseLM._process_lm_response",
        "(self, response, ...), asked for by each LM call when it has its answer",
        OLDER,
        USAGE,
        takes("self", "response"),
        until=(3, 4),
    ),
    Feature(
        "dspy.clients.base_lm:BaseLM._finalize_lm_response",
        "(self, request, response, ...), likewise for typed requests",
        OLDER,
        "usage and cost of typed requests",
        takes("self", "request", "response"),
        since=(3, 3),
        until=(3, 4),
    ),
    Feature(
        "dspy.clients.lm:_get_stream_completion_fn",
        "takes `send_stream` from DSPy's settings",
        OLDER,
        "time to first chunk",
        calls("send_stream"),
        until=(3, 4),
    ),
    Feature(
        "dspy.clients.base_lm:BaseLM.__init__",
        "keeps the call's settings, with the keys, in `kwargs`",
        LM,
        "the keys of LMs, until their first call, to mask them",
        lambda _: hasattr(__import__("dspy").LM("openai/none", api_key="x"), "kwargs"),
    ),
    # --- adapters -----------------------------------------------------------------------------------------------------
    Feature(
        "dspy.adapters.base:Adapter._call_postprocess",
        "parses the answers of one LM call, and raises what cannot be parsed",
        "operations/adapter.py",
        "parse failures and adapter fallbacks",
        lambda function: not {"outputs", "responses"}.isdisjoint(inspect.signature(function).parameters),
    ),
    Feature(
        f"{native_tracing.PLACE}:{native_tracing.CALLBACK}",
        "a callback that records spans of DSPy's own: its handlers are passed over for calls that have one of ours",
        "operations/native_tracing.py",
        "nothing; those calls would show twice",
        lambda kind: callable(kind.on_lm_start) and callable(kind.on_lm_end),
        since=PROPOSED,
        replaces=False,
    ),
    # --- threads and evaluations --------------------------------------------------------------------------------------
    Feature(
        "dspy.utils.parallelizer:ParallelExecutor.execute",
        "(self, function, data): what Parallel, Module.batch, Evaluate and optimizers run on",
        "operations/parallel.py",
        "parents of spans in worker threads, and examples",
        takes("self", "function", "data"),
    ),
    Feature(
        "dspy.utils.parallelizer:ParallelExecutor",
        "instances have num_threads and failed_indices",
        "operations/parallel.py",
        "size and failures of parallel runs",
        built("num_threads", "failed_indices", num_threads=1),
        replaces=False,
    ),
    Feature(
        "dspy.evaluate.evaluate:Evaluate",
        "instances have devset, metric and num_threads",
        "operations/evaluation.py",
        "size and metric of evaluations",
        built("devset", "metric", "num_threads", devset=[]),
        replaces=False,
    ),
    Feature(
        "dspy.evaluate.evaluate:Evaluate.__call__",
        "its first arguments are program, metric and devset",
        "operations/evaluation.py",
        "program, size and metric of evaluations",
        takes("self", "program", "metric", "devset"),
        replaces=False,
    ),
    # --- programs -----------------------------------------------------------------------------------------------------
    Feature(
        "dspy.primitives.base_module:BaseModule",
        "modules of DSPy are known by the name of this base class",
        "operations/module_tree.py",
        "paths of modules and dspy.program.id",
        lambda kind: kind in __import__("dspy").Module.__mro__ and kind.__name__ == "BaseModule",
        replaces=False,
    ),
    Feature(
        "dspy.predict.parameter:Parameter",
        "predictors are known by the name of this base class",
        "operations/module_tree.py",
        "paths of modules that a program has in several places",
        lambda kind: kind in __import__("dspy").Predict.__mro__ and kind.__name__ == "Parameter",
        replaces=False,
    ),
    Feature(
        "dspy.predict.predict:Predict",
        "instances have a random `stage`, which copies keep",
        "operations/module_tree.py",
        "paths of the copies of modules that BestOfN and Refine run",
        lambda _: type(_predictor().deepcopy().stage) is str,
        replaces=False,
    ),
    Feature(
        "dspy.primitives.example:Example",
        "fields live in the dictionary `_store`",
        "content/introspection.py",
        "the contents and ids of examples and demos",
        lambda kind: kind(a=1).__dict__.get("_store") == {"a": 1},
        replaces=False,
    ),
    Feature(
        "dspy.predict.predict:Predict",
        "signature and demos are attributes of the instance",
        "operations/program.py",
        "dspy.program.id, signatures and demos",
        lambda _: {"signature", "demos"} <= _predictor().__dict__.keys(),
        replaces=False,
    ),
    Feature(
        "dspy.predict.predict:Predict",
        "decision settings are the attribute `fields`",
        "operations/program.py, optimizers/trackers/reanchor.py",
        "decision settings in dspy.program.id and in ReAnchor's trials",
        lambda _: "fields" in _predictor().__dict__,
        since=(3, 4),
        replaces=False,
    ),
    Feature(
        "dspy.signatures.signature:SignatureMeta",
        "a signature's text is its instructions, its prefixes are in json_schema_extra",
        "optimizers/program_state.py",
        "the state of candidates",
        lambda _: "prefix" in _predictor().signature.fields["answer"].json_schema_extra,
        replaces=False,
    ),
    Feature(
        "dspy.primitives.module:Module.dump_state",
        "with get_dependency_versions(), what `save` writes",
        "optimizers/program_state.py",
        "states of programs that can be loaded",
        lambda _: callable(importlib.import_module("dspy.utils.saving").get_dependency_versions),
        replaces=False,
    ),
    # --- optimizers ---------------------------------------------------------------------------------------------------
    Feature(
        "dspy.teleprompt.bootstrap:BootstrapFewShot._bootstrap",
        "the whole of bootstrapping",
        "optimizers/trackers/bootstrap.py",
        "BootstrapFewShot's bootstrap phase",
    ),
    Feature(
        "dspy.teleprompt.bootstrap:BootstrapFewShot._bootstrap_one_example",
        "(self, example, round_idx) -> success",
        "optimizers/trackers/bootstrap.py",
        "BootstrapFewShot's attempts",
        takes("self", "example", "round_idx"),
    ),
    Feature(
        "dspy.teleprompt.copro_optimizer:COPRO._set_signature",
        "(self, predictor, ...) puts a candidate's text into a predictor",
        "optimizers/trackers/copro.py",
        "which predictor a trial of COPRO changes",
        takes("self", "predictor"),
    ),
    Feature(
        "dspy.teleprompt.copro_optimizer:COPRO",
        "instances have breadth and depth",
        "optimizers/trackers/copro.py",
        "how many trials COPRO plans",
        built("breadth", "depth", metric=_metric),
        replaces=False,
    ),
    Feature(
        "dspy.teleprompt.bootstrap_finetune:BootstrapFinetune.finetune_lms",
        "(finetune_dict): all training jobs",
        "optimizers/trackers/finetune.py",
        "BootstrapFinetune's finetune phase",
        takes("finetune_dict"),
    ),
    Feature(
        "dspy.teleprompt.grpo:GRPO.report_validation_metrics",
        "(self, student, trainset, valset, logger, step_idx)",
        "optimizers/trackers/finetune.py",
        "GRPO's trials",
        takes("self", "student", "trainset", "valset", "logger", "step_idx"),
    ),
    Feature(
        "gepa:optimize",
        "takes `callbacks`",
        "optimizers/trackers/gepa.py",
        GEPA,
        has("callbacks"),
        since=(3, 2),
    ),
    Feature(
        "gepa.optimize_anything:optimize_anything",
        "the keywords `evaluator`, `dataset`, `valset`, `config`; a `GEPAConfig` has `callbacks`",
        "optimizers/doors.py",
        "optimizations by `optimize_anything`",
        lambda function: has("evaluator", "dataset", "valset", "config")(function)
        and declares("callbacks")(sys.modules[function.__module__].GEPAConfig),
        since=(3, 3, 1),
    ),
    Feature(
        "gepa.gepa_launcher:optimize_anything",
        "the one before; GEPA's own engine looks it up at each run, and gives it a `GEPAConfig`",
        "optimizers/doors.py",
        "GEPA's trials in optimizations by `optimize_anything`",
        has("evaluator", "dataset", "valset", "config"),
        with_engines=True,
    ),
    Feature(
        "gepa.optimize_anything:_run_engine",
        "(server, engine, ...): the run of any engine; the server has task, budget and eval_fn",
        "optimizers/engines.py",
        "optimizations by GEPA's engines",
        takes("server", "engine"),
        with_engines=True,
    ),
    Feature(
        "gepa.optimize_anything:_score_test",
        "scores a candidate on the test set",
        "optimizers/engines.py",
        "the role of LM calls on the test set",
        with_engines=True,
    ),
    Feature(
        "gepa.oa.eval_server:EvalServer.evaluate",
        "(self, candidate, example)",
        "optimizers/engines.py",
        SERVER,
        takes("self", "candidate", "example"),
        with_engines=True,
    ),
    Feature(
        "gepa.oa.eval_server:EvalServer.evaluate_examples",
        "(self, candidate, example_ids, split), of the rows of iter_split()",
        "optimizers/engines.py",
        SERVER,
        takes("self", "candidate", "example_ids", "split"),
        with_engines=True,
    ),
    Feature(
        "gepa.oa.eval_server:EvalServer.evaluate_batch",
        "evaluates pairs by one call of the evaluator",
        "optimizers/engines.py",
        SERVER,
        with_engines=True,
    ),
    Feature(
        "gepa.oa.engines.gepa:GepaEngine",
        "the engine that calls `gepa.gepa_launcher.optimize_anything`",
        "optimizers/engines.py",
        "GEPA's trials in optimizations by `optimize_anything`",
        lambda kind: calls("optimize_anything")(kind.run),
        with_engines=True,
        replaces=False,
    ),
    Feature(
        "gepa.core.callbacks:GEPACallback",
        "the events and keys that we read",
        "optimizers/trackers/gepa.py",
        GEPA,
        _events,
        since=(3, 2),
        replaces=False,
    ),
    Feature(
        "dspy.teleprompt.infer_rules:InferRules.induce_natural_language_rules",
        "finds the rules of one candidate",
        "optimizers/trackers/infer_rules.py",
        "InferRules' propose phases",
    ),
    Feature(
        "dspy.teleprompt.infer_rules:InferRules",
        "instances have num_candidates",
        "optimizers/trackers/infer_rules.py",
        "how many trials InferRules plans",
        built("num_candidates", metric=_metric),
        replaces=False,
    ),
    *(
        Feature(
            f"dspy.teleprompt.mipro_optimizer_v2:MIPROv2.{method}",
            "the whole of this phase",
            "optimizers/trackers/mipro.py",
            f"MIPROv2's {phase} phase",
        )
        for method, phase in (("_bootstrap_fewshot_examples", "bootstrap"), ("_propose_instructions", "propose"))
    ),
    Feature(
        "dspy.teleprompt.mipro_optimizer_v2:MIPROv2._optimize_prompt_parameters",
        "the search; num_trials, minibatch and minibatch_full_eval_steps are its arguments 6, 7 and 9",
        "optimizers/trackers/mipro.py",
        "MIPROv2's search phase",
        lambda function: (
            [list(inspect.signature(function).parameters)[place] for place in (6, 7, 9)]
            == ["num_trials", "minibatch", "minibatch_full_eval_steps"]
        ),
    ),
    Feature(
        "dspy.teleprompt.mipro_optimizer_v2:MIPROv2._select_and_insert_instructions_and_demos",
        "Optuna's trial is its argument 3",
        "optimizers/trackers/mipro.py",
        "the parameters of MIPROv2's trials",
        lambda function: list(inspect.signature(function).parameters)[4] == "trial",
    ),
    Feature(
        "dspy.teleprompt.random_search:BootstrapFewShotWithRandomSearch",
        "instances have num_candidate_sets; seeds go from -3 up",
        "optimizers/trackers/random_search.py",
        "seeds and strategies of BootstrapFewShotWithRandomSearch's trials",
        lambda kind: built("num_candidate_sets", metric=_metric)(kind) and -3 in _constants(kind.compile),
        replaces=False,
    ),
    Feature(
        "dspy.teleprompt.bettertogether:BetterTogether",
        "instances have optimizers by name; `strategy` names them",
        "optimizers/trackers/better_together.py",
        "the steps of BetterTogether's trials",
        lambda kind: built("optimizers", metric=_metric)(kind) and has("strategy")(kind.compile),
        since=(3, 2),
        replaces=False,
    ),
    Feature(
        "dspy.teleprompt.teleprompt_optuna:BootstrapFewShotWithOptuna.objective",
        "(self, trial)",
        "optimizers/trackers/optuna.py",
        "the parameters of BootstrapFewShotWithOptuna's trials",
        takes("self", "trial"),
    ),
    Feature(
        "dspy.teleprompt.reanchor.calibrate:scores",
        "(program, examples, metric, num_threads, ...) -> one score for each example",
        "optimizers/trackers/reanchor.py",
        "ReAnchor's trials",
        takes("program", "examples", "metric", "num_threads"),
        since=(3, 4),
    ),
    Feature(
        "dspy.teleprompt.simba:prepare_models_for_resampling",
        "called once in each step",
        "optimizers/trackers/simba.py",
        SIMBA,
    ),
    Feature(
        "dspy.teleprompt.simba:wrap_program",
        "(program, metric) -> what a pair runs",
        "optimizers/trackers/simba.py",
        SIMBA,
        takes("program", "metric"),
    ),
    Feature(
        "dspy.predict.parallel:Parallel.__call__",
        "SIMBA evaluates by it, with a list of pairs",
        "optimizers/trackers/simba.py",
        SIMBA,
    ),
    Feature(
        "dspy.teleprompt.simba:SIMBA.compile",
        "looks the three above up when it runs, and numbers programs as simba_idx",
        "optimizers/trackers/simba.py",
        SIMBA,
        calls("prepare_models_for_resampling", "wrap_program", "simba_idx"),
        replaces=False,
    ),
    Feature(
        "dspy.teleprompt.simba:SIMBA",
        "instances have strategies, bsize, num_candidates and max_steps",
        "optimizers/trackers/simba.py",
        "which strategy made a candidate of SIMBA",
        built("strategies", "bsize", "num_candidates", "max_steps", metric=_metric),
        replaces=False,
    ),
    Feature(
        "dspy.predict.rlm:ThreadPoolExecutor",
        "the pool of `llm_query_batched`, looked up when it runs",
        OLDER,
        "parents of LM calls in RLM's batches",
        inspect.isclass,
        since=(3, 1, 3),
        until=(3, 3),
    ),
    # --- elsewhere ----------------------------------------------------------------------------------------------------
    Feature(
        "dspy.primitives.facade:SandboxLM",
        "stands for an LM, which makes the call",
        "instrumentor.py",
        "LM calls of sandboxes, counted once",
        inspect.isclass,
        since=(3, 4, 1),
        replaces=False,
    ),
    *(
        Feature(
            f"dspy.predict.{place}",
            "what an agent's LM is shown of a tool's error, looked up when it runs",
            "core/errors.py",
            "nothing; on Python 3.10 our frames would show in it",
            takes(first),
            since=since,
            until=until,
            replaces=sys.version_info < (3, 11),
        )
        for place, first, since, until in (
            ("react:_fmt_exc", "err", (3, 0, 4), (3, 3)),
            ("react:format_error_for_lm", "error", (3, 3), NEVER),
            ("react_v2:format_error_for_lm", "error", (3, 3), NEVER),
        )
    ),
)


def _constants(function: Any) -> list[Any]:
    """All constants in a function's code."""
    found: list[Any] = []
    for constant in inspect.unwrap(function).__code__.co_consts:
        found.extend(constant if isinstance(constant, tuple) else [constant])
    return found


def table() -> str:
    """The table of docs/versions.md."""
    lines = ["| DSPy | we rely on | versions | used in | without it, telemetry lacks |", "|---|---|---|---|---|"]
    for row in FEATURES:
        name = row.place.replace(":", ".")
        lines.append(f"| `{name}` | {row.relies} | {row.versions} | `{row.used}` | {row.loses} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
