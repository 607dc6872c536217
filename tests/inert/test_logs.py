"""Whatever DSPy is handed is asked for the same things, in the same order, watched or not."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import dspy
import pytest
import tqdm
from dspy.teleprompt.grpo import GRPO
from dspy.teleprompt.teleprompt_optuna import BootstrapFewShotWithOptuna
from dspy.utils.parallelizer import ParallelExecutor

import dspy_otel
from tests.inert.logged import LOG, derived, of_logged_class, stand_in
from tests.optimizers.common import quietly
from tests.optimizers.test_weights import Trainer
from tests.support.older import DSPY
from tests.support.spans import Recorder

ANSWER = {
    **{"answer": "a", "reasoning": "b", "proposed_instruction": "i", "proposed_prefix_for_output_field": "p"},
    **{"natural_language_rules": "n", "observations": "o", "summary": "s", "program_description": "d"},
    **{"module_description": "m", "discussion": "d", "module_advice": '{"self": "be brief"}'},
}
Make = Callable[[Any, str], Any]
Arguments = Callable[[], dict[str, Any]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("dspy")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(level)


class Same(dspy.LM):
    """Gives the same answer to everybody, whatever fields they ask for."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        text = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in ANSWER.items())
        choice = SimpleNamespace(message=SimpleNamespace(content=text), finish_reason="stop")
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return SimpleNamespace(id="one", model="same", choices=[choice] * (kwargs.get("n") or 1), usage=usage)

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        return self.forward(prompt, messages, **kwargs)


def lm() -> Any:
    return Same("vendor/same", cache=False, provider=Trainer())


def rows(count: int = 3, kind: Any = dspy.Example) -> list[Any]:
    return [kind(question=f"q{number}", answer="a").with_inputs("question") for number in range(count)]


def metric(example: Any, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
    return 1.0


def embed(texts: list[str]) -> list[list[float]]:
    return [[float(len(text)), 1.0] for text in texts]


def program(kind: Any = dspy.Predict) -> Any:
    made = kind("question -> answer")
    made.set_lm(lm())
    return made


def subclass(value: Any, name: str) -> Any:
    """A value of a class of the user's own that derives from the usual one, where such a class can be made."""
    kind = type(value)
    return derived(kind, name)(value) if kind in (str, int, float, list, dict) else value


# Time decides how often a pool looks for stragglers; and where one thread is a pool, when it may start a thread.
TIMED = {("disable_progress_bar", "__bool__")}
if not hasattr(ParallelExecutor, "_execute_sequential"):
    TIMED |= {("num_threads", "__gt__"), ("num_threads", "__lt__")}


def observe(run: Callable[[], Any]) -> tuple[Any, list[tuple[str, str]]]:
    """How it ends, and everything that logged objects were asked meanwhile."""
    tqdm.tqdm.set_lock(threading.RLock())  # It keeps its lock when a total that is no number fails it.
    random.seed(5)
    with dspy.context(lm=lm(), disable_history=True, trace=None):
        try:
            ended: Any = type(quietly(lambda _: run(), None)).__name__
        except Exception as error:
            ended = type(error).__name__, str(error)
    return ended, [asked for asked in LOG if asked not in TIMED]


def assert_same(telemetry: Recorder, about: str, run: Callable[[], Any]) -> None:
    """That ``run``, which makes its objects itself, ends and asks as it does bare, with content off and on."""
    LOG.clear()
    bare = observe(run)
    for content in ("no_content", "span_and_event"):
        telemetry.instrument(capture_content=content, adapter_spans=True)
        try:
            LOG.clear()
            watched = observe(run)
        finally:
            dspy_otel.uninstrument()
        assert watched[0] == bare[0], f"{about}, {content}"
        more = Counter(watched[1])
        more.subtract(Counter(bare[1]))
        assert not {asked: count for asked, count in more.items() if count}, f"{about}, {content}"
        assert watched[1] == bare[1], f"{about}, {content}: in another order"


# --- optimizers: each parameter of each constructor and of each compile() -------------------------------------------


class Optimizer(NamedTuple):
    """An optimizer, arguments of its constructor, and arguments of ``compile()`` beyond student and training set."""

    kind: Any
    first: Arguments
    second: Arguments = dict


def few(**more: Any) -> dict[str, Any]:
    return {"metric": metric, "max_bootstrapped_demos": 1, "max_labeled_demos": 1, **more}


def with_valset(**more: Any) -> dict[str, Any]:
    return {"valset": rows(2), **more}


ONE = {"num_threads": 1}
OPTIMIZERS = {
    "LabeledFewShot": Optimizer(dspy.LabeledFewShot, lambda: {"k": 1}),
    "BootstrapFewShot": Optimizer(dspy.BootstrapFewShot, lambda: few(teacher_settings={})),
    "RandomSearch": Optimizer(
        dspy.BootstrapFewShotWithRandomSearch,
        lambda: few(num_candidate_programs=1, **ONE),
        lambda: with_valset(restrict=[-3, -2]),
    ),
    "Optuna": Optimizer(
        BootstrapFewShotWithOptuna, lambda: few(num_candidate_programs=1, **ONE), lambda: with_valset(max_demos=1)
    ),
    "KNNFewShot": Optimizer(
        dspy.KNNFewShot, lambda: {"k": 1, "trainset": rows(), "vectorizer": dspy.Embedder(embed, caching=False)}
    ),
    "COPRO": Optimizer(
        dspy.COPRO,
        lambda: {"metric": metric, "breadth": 2, "depth": 1, "prompt_model": lm(), "track_stats": True},
        lambda: {"eval_kwargs": ONE.copy()},
    ),
    "MIPROv2": Optimizer(
        dspy.MIPROv2,
        lambda: few(auto=None, num_candidates=2, prompt_model=lm(), task_model=lm(), seed=1, **ONE),
        lambda: with_valset(num_trials=1, minibatch=False),
    ),
    "SIMBA": Optimizer(
        dspy.SIMBA,
        lambda: {"metric": metric, "bsize": 2, "num_candidates": 1, "max_steps": 1, **ONE},
        lambda: {"seed": 1},
    ),
    "GEPA": Optimizer(
        dspy.GEPA,
        lambda: {"metric": metric, "max_metric_calls": 4, "reflection_lm": lm(), "seed": 1, **ONE},
        with_valset,
    ),
    "InferRules": Optimizer(dspy.InferRules, lambda: few(num_candidates=1, num_rules=1, **ONE), with_valset),
    "BetterTogether": Optimizer(
        dspy.BetterTogether,
        lambda: {"metric": metric, "p": dspy.LabeledFewShot(k=1)},
        lambda: with_valset(strategy="p", **ONE),
    ),
    "Ensemble": Optimizer(dspy.Ensemble, lambda: {"size": 1}, lambda: {"programs": [program()]}),
    "BootstrapFinetune": Optimizer(dspy.BootstrapFinetune, lambda: {"metric": metric, **ONE}),
    "GRPO": Optimizer(
        GRPO,
        lambda: {
            **{"metric": metric, "num_train_steps": 1, "num_steps_for_val": 1, "num_dspy_examples_per_grpo_step": 1},
            **{"num_rollouts_per_grpo_step": 1, "failure_score": 0, "format_failure_score": -1},
            **{"exclude_demos": True, **ONE},
        },
        with_valset,
    ),
}
# GEPA, with everything right, tries until it has spent its budget on samples that it then skips.
LONG = {("GEPA", "skip_perfect_score", "subclass")}


def optimize(name: str, place: str = "", parameter: str = "", make: Make = stand_in, kind: Any = None) -> Any:
    optimizer = OPTIMIZERS[name]
    kind = kind or optimizer.kind
    given = {"__init__": optimizer.first(), "compile": optimizer.second()}
    known = inspect.signature(optimizer.kind.compile).parameters
    given["compile"].update({"trainset": rows()} if "trainset" in known and name != "KNNFewShot" else {})
    given["compile"].update({"student": program()} if "student" in known else {})
    if parameter:
        usual = inspect.signature(getattr(optimizer.kind, place)).parameters[parameter].default
        given[place][parameter] = make(given[place].get(parameter, usual), parameter)
    LOG.clear()
    return kind(**given["__init__"]).compile(**given["compile"])


def parameters(name: str) -> list[tuple[str, str]]:
    kind = OPTIMIZERS[name].kind
    return [
        (place, each)
        for place in ("__init__", "compile")
        for each, about in inspect.signature(getattr(kind, place)).parameters.items()
        if each != "self" and about.kind not in (about.VAR_KEYWORD, about.VAR_POSITIONAL)
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_itself(name: str, telemetry: Recorder) -> None:
    """Else nothing would be shown by the tests below; and a class of the user's own that derives from it."""
    ended, _ = observe(lambda: optimize(name))
    assert isinstance(ended, str), ended
    assert_same(telemetry, name, lambda: optimize(name, kind=derived(OPTIMIZERS[name].kind, "optimizer")))


# MIPROv2 has the most parameters, and takes longest: as long as all others together.
@pytest.mark.parametrize("make", [stand_in, subclass])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "MIPROv2" else ()) for name in OPTIMIZERS]
)
def test_every_parameter_of_every_optimizer(name: str, make: Make, telemetry: Recorder) -> None:
    for place, parameter in parameters(name):
        if (name, parameter, make.__name__) not in LONG:
            about = f"{place}({parameter}=...)"
            assert_same(telemetry, about, lambda p=place, q=parameter: optimize(name, p, q, make))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "KNNFewShot"])
def test_programs_and_rows_of_the_users_classes(name: str, telemetry: Recorder) -> None:
    def run() -> Any:
        optimizer = OPTIMIZERS[name]
        given = optimizer.second()
        own = derived(dspy.Example, "row")
        given.update({key: rows(3, own) for key in ("trainset", "valset") if key in given or key == "trainset"})
        mine = program(derived(Nested, "program"))
        given = {**given, "student": mine} if name != "Ensemble" else {"programs": [mine]}
        LOG.clear()
        return optimizer.kind(**optimizer.first()).compile(**given)

    assert_same(telemetry, name, run)


# --- entry points: each argument, and a class of the user's own in place of DSPy's ----------------------------------


class Nested(dspy.Module):
    """A program with a predictor inside."""

    def __init__(self, signature: Any) -> None:
        super().__init__()
        self.inner = dspy.ChainOfThought(signature)
        self.many = {"a": [dspy.Predict(signature)]}

    def forward(self, question: Any) -> Any:
        return self.inner(question=question)


class Passages(dspy.Retrieve):
    """Finds the same for everybody."""

    def forward(self, query: Any, k: Any = None, **kwargs: Any) -> Any:
        return dspy.Prediction(passages=["one", "two"])


def look_up(place: Any = None) -> Any:
    return place


def embeddings(kind: Any) -> Any:
    return kind(corpus=["one", "two"], embedder=dspy.Embedder(embed, caching=False), k=1)


def evaluate(kind: Any, **given: Any) -> Any:
    made = kind(devset=rows(2), metric=metric, num_threads=1, display_progress=False)
    LOG.clear()
    return made(**given)


def adapt(kind: Any, **given: Any) -> Any:
    return kind()(lm(), **given)


def signature() -> Any:
    return dspy.Signature("question -> answer")


class EntryPoint(NamedTuple):
    """A class of DSPy's, its call, and the arguments of that."""

    kind: Any
    call: Callable[..., Any]
    arguments: Arguments


QUESTION = {"question": "q"}
ENTRY_POINTS = {
    "Module": EntryPoint(Nested, lambda kind, **given: program(kind)(**given), QUESTION.copy),
    "Module.acall": EntryPoint(
        dspy.Predict, lambda kind, **given: asyncio.run(program(kind).acall(**given)), QUESTION.copy
    ),
    "Predict": EntryPoint(
        dspy.Predict,
        lambda kind, **given: program(kind)(**given),
        lambda: {**QUESTION, "config": {"temperature": 0.5}, "demos": rows(1), "lm": lm(), "signature": signature()},
    ),
    "ReAct": EntryPoint(
        dspy.ReAct,
        lambda kind, **given: kind("question -> answer", tools=[look_up], max_iters=1)(**given),
        QUESTION.copy,
    ),
    "BaseLM": EntryPoint(
        Same,
        lambda kind, **given: kind("vendor/same", cache=False)(**given),
        lambda: {
            **{"prompt": "p", "temperature": 0.5, "max_tokens": 5, "n": 2, "stop": ["s"], "seed": 1, "tools": []},
            **{"headers": {"a": "b"}, "api_base": "http://localhost:1", "rollout_id": 1, "reasoning_effort": "low"},
        },
    ),
    "BaseLM, messages": EntryPoint(
        Same,
        lambda kind, **given: kind("vendor/same", cache=False, model_type="chat")(**given),
        lambda: {"messages": [{"role": "user", "content": "c"}]},
    ),
    "Tool": EntryPoint(dspy.Tool, lambda kind, **given: kind(look_up)(**given), lambda: {"place": "here"}),
    "Adapter": EntryPoint(
        dspy.ChatAdapter,
        adapt,
        lambda: {
            "lm_kwargs": {"temperature": 0.5},
            "signature": signature(),
            "demos": rows(1),
            "inputs": dict(QUESTION),
        },
    ),
    "Embedder": EntryPoint(
        dspy.Embedder, lambda kind, **given: kind(embed, caching=False)(**given), lambda: {"inputs": ["one", "two"]}
    ),
    "Retrieve": EntryPoint(Passages, lambda kind, **given: kind(k=2)(**given), lambda: {"query": "q", "k": 2}),
    "Embeddings": EntryPoint(dspy.Embeddings, lambda kind, **given: embeddings(kind)(**given), lambda: {"query": "q"}),
    "KNN": EntryPoint(
        dspy.KNN, lambda kind, **given: kind(1, rows(), dspy.Embedder(embed, caching=False))(**given), QUESTION.copy
    ),
    "Evaluate": EntryPoint(
        dspy.Evaluate,
        evaluate,
        lambda: {
            **{"program": program(), "metric": metric, "devset": rows(2), "num_threads": 1, "display_progress": False},
            **{"display_table": False, "callback_metadata": {"a": 1}},
        },
    ),
    "Parallel": EntryPoint(
        dspy.Parallel,
        lambda kind, **given: kind(num_threads=1, disable_progress_bar=True)(**given),
        lambda: {"exec_pairs": [(program(), row) for row in rows(2)], "num_threads": 1},
    ),
    "Module.batch": EntryPoint(
        dspy.Predict,
        lambda kind, **given: program(kind).batch(**given),
        lambda: {"examples": rows(2), "num_threads": 1, "disable_progress_bar": True},
    ),
}


@pytest.mark.parametrize("make", [stand_in, subclass])
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_argument_of_every_entry_point(name: str, make: Make, telemetry: Recorder) -> None:
    entry = ENTRY_POINTS[name]

    def run(argument: str) -> Any:
        given = entry.arguments()
        given[argument] = make(given[argument], argument)
        LOG.clear()
        return entry.call(entry.kind, **given)

    for argument in entry.arguments():
        assert_same(telemetry, f"{name}({argument}=...)", lambda a=argument: run(a))


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_classes_of_the_users_own(name: str, telemetry: Recorder) -> None:
    entry = ENTRY_POINTS[name]

    def run() -> Any:
        kind = derived(entry.kind, "own")
        given = entry.arguments()
        LOG.clear()
        return entry.call(kind, **given)

    assert_same(telemetry, name, run)


def answered() -> Any:
    return derived(dspy.Prediction, "prediction")(answer="a", score=0.5, feedback="f")


def row() -> Any:
    return derived(dspy.Example, "row")(question="q", answer="a", score=0.5)


class Answering(dspy.Module):
    """Gives whatever it is to give."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, **inputs: Any) -> Any:
        return self.answer()


VALUES: dict[str, Callable[[], Any]] = {
    "prediction": answered,
    "row": row,
    "anything": lambda: stand_in(object(), "anything"),
    "a number": lambda: stand_in(0.5, "number"),
    "a number's subclass": lambda: derived(float, "number")(0.5),
    "a text": lambda: derived(str, "text")("a"),
    "a list": lambda: derived(list, "list")([1]),
    "a dictionary": lambda: derived(dict, "dictionary")(score=1),
    "of a logged class": lambda: of_logged_class("asked"),
    "a logged class": lambda: type(of_logged_class("asked")),
    "a list of a logged class's": lambda: [of_logged_class("asked"), of_logged_class("asked")],
}


@pytest.mark.skipif(DSPY < (3, 2), reason="DSPy does not wait for its workers: the logs of two bare runs differ")
@pytest.mark.parametrize("name", VALUES)
def test_results_of_programs_tools_metrics_and_retrievers(name: str, telemetry: Recorder) -> None:
    make = VALUES[name]

    class Finds(Passages):
        def forward(self, query: Any, k: Any = None, **kwargs: Any) -> Any:
            return make()

    def evaluated(answer: Callable[[], Any], verdict: Callable[..., Any], row: Any = dspy.Example) -> Any:
        devset = rows(2, row)
        LOG.clear()
        return dspy.Evaluate(devset=devset, metric=verdict, num_threads=1, display_progress=False)(Answering(answer))

    cases: dict[str, Callable[[], Any]] = {
        "program": lambda: Answering(make)(question="q"),
        "tool": lambda: dspy.Tool(make, name="t")(),
        "retriever": lambda: Finds(k=1)("q"),
        "evaluated program": lambda: evaluated(make, metric),
        "metric": lambda: evaluated(lambda: dspy.Prediction(answer="a"), lambda *_: make()),
        "rows": lambda: evaluated(lambda: dspy.Prediction(answer="a"), metric, derived(dspy.Example, "row")),
        "bootstrap": lambda: dspy.BootstrapFewShot(metric=lambda *_: make(), max_bootstrapped_demos=1).compile(
            program(), trainset=rows(2)
        ),
    }
    for about, run in cases.items():
        assert_same(telemetry, about, run)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {derived(str, "key")("k"): 1},
        lambda: {"a": {stand_in(object(), "key"): 1}},
        lambda: [{(1, derived(int, "key")(2)): 1}],
        lambda: of_logged_class("asked"),
        lambda: {of_logged_class("asked"): of_logged_class("asked")},
        lambda: [of_logged_class("asked"), (of_logged_class("asked"),)],
    ],
)
def test_values_of_demos(make: Callable[[], Any], telemetry: Recorder) -> None:
    def run() -> Any:
        trainset = [dspy.Example(question=make(), answer="a").with_inputs("question")]
        LOG.clear()
        return dspy.BootstrapFewShot(
            metric=lambda *_: True, max_bootstrapped_demos=1, max_labeled_demos=1, metric_threshold=None
        ).compile(program(), trainset=trainset)

    assert_same(telemetry, "demos", run)


def test_classes_of_parameters(telemetry: Recorder) -> None:
    def run() -> Any:
        optimizer = dspy.BootstrapFewShotWithRandomSearch(
            metric=metric, num_candidate_programs=1, max_rounds=1, num_threads=1, stop_at_score=of_logged_class("asked")
        )
        restrict = [0, of_logged_class("asked")]
        LOG.clear()
        return optimizer.compile(program(), trainset=rows(2), restrict=restrict)

    assert_same(telemetry, "restrict", run)
