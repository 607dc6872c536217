"""Small DSPy programs of many shapes, run while everything a user could notice is written down."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import datetime
import enum
import inspect
import json
import pickle
import pickletools
import random
import re
import signal
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace as Bag
from typing import Any

import cloudpickle
import dspy
from dspy.utils.callback import BaseCallback
from hypothesis import strategies as st
from opentelemetry import context as otel_context

from tests.support.older import DSPY
from tests.support.waiting import Stalled, wait_for

# --- what a program is made of -----------------------------------------------------------------------------------

_ADDRESS = re.compile(r":\d{7,20}")


class OracleError(RuntimeError):
    pass


class Oracle(dspy.BaseLM):
    """A user's own LM. What it answers depends on the messages only, and on its random numbers."""

    def __init__(self, json_answers: bool = False, fails_every: int = 0, garbled_every: int = 0) -> None:
        super().__init__(model="acme/oracle")
        self.json_answers, self.fails_every, self.garbled_every = json_answers, fails_every, garbled_every
        self.seen: list[str] = []

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        text = json.dumps(messages, default=repr) if messages is not None else str(prompt)
        text = re.sub(r"0x[0-9a-f]+", "address", text)
        self.seen.append(text + json.dumps(sorted(kwargs), default=repr))
        number = zlib.crc32(text.encode("utf-8", "replace")) ^ random.getrandbits(4)
        if self.fails_every and number % self.fails_every == 0:
            try:
                raise KeyError("inner")
            except KeyError as inner:
                raise OracleError("no answer", number) from inner
        tool = ("add", "broken", "finish")[number % 3]
        fields = {
            "reasoning": f"because {number}",
            "answer": f"answer {number % 100}",
            "good": "True",
            "next_thought": "think",
            "next_tool_name": tool,
            "next_tool_args": '{"x": 1}' if tool != "finish" else "{}",
        }
        if self.garbled_every and number % self.garbled_every == 0:
            content = "nothing that an adapter can read"
        elif self.json_answers:
            content = json.dumps({**fields, "next_tool_args": json.loads(fields["next_tool_args"])})
        else:
            content = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in fields.items())
        message = Bag(content=content, tool_calls=None, reasoning_content=None)
        return Bag(
            id="oracle",
            model="oracle-large",
            choices=[Bag(message=message, finish_reason="stop", index=0)],
            usage={"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        )

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return self.forward(prompt, messages, **kwargs)


class LoudLM(Oracle):
    """An LM class that overrides the public entry points."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append("__call__")
        return super().__call__(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append("acall")
        return await super().acall(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append("generate")
        return super().generate(*args, **kwargs)

    async def agenerate(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append("agenerate")
        return await super().agenerate(*args, **kwargs)


class Ask(dspy.Signature):
    """Answer."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


def add(x: int) -> int:
    """Adds one."""
    return x + 1


def broken(x: int) -> int:
    """Always fails."""
    raise ValueError("broken tool", x)


class Failing(dspy.Module):
    """Raises, with a chain of causes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, **inputs: Any) -> Any:
        if self.kind == "plain":
            raise ValueError("failing", sorted(inputs))
        if self.kind == "custom":
            raise Unprintable(3)
        if self.kind == "exit":
            raise SystemExit(3)
        try:
            {}["missing"]
        except KeyError as error:
            if self.kind == "cause":
                raise OracleError("with a cause") from error
            if self.kind == "silent":
                raise OracleError("without context") from None
            raise OracleError("with a context")
        return None

    async def aforward(self, **inputs: Any) -> Any:
        return self.forward(**inputs)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")

    __repr__ = __str__


class Tree(dspy.Module):
    """Modules in an attribute, a list and a dictionary, called in turn; a failure of one goes through or is kept."""

    def __init__(self, children: list[Any], careful: bool, returns: str) -> None:
        super().__init__()
        self.first = children[0] if children else None
        self.others = children[1:2]
        self.named = {f"child {index}": child for index, child in enumerate(children[2:])}
        self.careful, self.returns = careful, returns

    def steps(self) -> list[Any]:
        return [*([self.first] if self.first is not None else []), *self.others, *self.named.values()]

    def finish(self, found: list[Any]) -> Any:
        if self.returns == "list":
            return found
        if self.returns == "none":
            return None
        return dspy.Prediction(found=found, count=len(found))

    def forward(self, **inputs: Any) -> Any:
        found = []
        for step in self.steps():
            try:
                found.append(step(**inputs))
            except Exception as error:
                if not self.careful:
                    raise
                found.append(type(error).__name__)
        return self.finish(found)

    async def aforward(self, **inputs: Any) -> Any:
        found = []
        for step in self.steps():
            try:
                found.append(await step.acall(**inputs))
            except Exception as error:
                if not self.careful:
                    raise
                found.append(type(error).__name__)
        return self.finish(found)


class LoudTree(Tree):
    """A module that overrides ``__call__`` and ``acall``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        random.random()
        return super().__call__(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        random.random()
        return await super().acall(*args, **kwargs)


# --- hostile inputs ----------------------------------------------------------------------------------------------


class Picky:
    """Says when it is asked anything, and answers DSPy's own questions."""

    asked = 0

    def __repr__(self) -> str:
        Picky.asked += 1
        return "<picky>"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        Picky.asked += 1
        return self is other

    def __hash__(self) -> int:
        Picky.asked += 1
        return 1

    def __len__(self) -> int:
        Picky.asked += 1
        return 3

    def __bool__(self) -> bool:
        Picky.asked += 1
        return True

    def __iter__(self) -> Any:
        Picky.asked += 1
        return iter((1, 2))

    def __getattr__(self, name: str) -> Any:
        Picky.asked += 1
        raise AttributeError(name)


class Raising:
    def __repr__(self) -> str:
        raise OracleError("repr")

    __str__ = __repr__

    def __deepcopy__(self, memo: Any) -> Any:
        raise OracleError("deepcopy")


class RaisingAll(Raising):
    def __getattr__(self, name: str) -> Any:
        raise OracleError("getattr", name)

    def __eq__(self, other: object) -> bool:
        raise OracleError("eq")

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        raise OracleError("len")


class Colour(enum.Enum):
    RED = "red"


def cyclic() -> Any:
    made: dict[str, Any] = {"a": [1]}
    made["a"].append(made)
    return made


def deep() -> Any:
    made: list[Any] = []
    for _ in range(200):
        made = [made]
    return made


INPUTS: dict[str, Any] = {
    "text": lambda: "what is it?",
    "none": lambda: None,
    "number": lambda: 7,
    "nan": lambda: float("nan"),
    "huge": lambda: 10**300,
    "surrogate": lambda: "a\ud800b",
    "long": lambda: "long " * 20_000,
    "bytes": lambda: b"\x00\xff",
    "list": lambda: [1, "two", [3]],
    "keys": lambda: {(1, 2): "a", None: "b", 3: "c"},
    "set": lambda: {1, 2},
    "date": lambda: datetime.date(2020, 1, 2),
    "enum": lambda: Colour.RED,
    "example": lambda: dspy.Example(a=1).with_inputs("a"),
    "history": lambda: dspy.History(messages=[{"question": "a", "answer": "b"}]),
    "image": lambda: dspy.Image("data:image/png;base64," + "QUJD" * 50),
    "cyclic": cyclic,
    "deep": deep,
    "picky": Picky,
    "raising": Raising,
    "raising-all": RaisingAll,
    "generator": lambda: (number for number in range(3)),
    "lock": threading.Lock,
}


# --- shapes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A program to build and how to run it."""

    tree: Any
    inputs: tuple[str, ...] = ("text",)
    asynchronous: bool = False
    runner: str = "call"
    adapter: str = "chat"
    lm: str = "plain"
    fails_every: int = 0
    garbled_every: int = 0
    callbacks: bool = True
    seed: int = 0


FAILURES = ("plain", "custom", "exit", "cause", "context", "silent")
LEAF = st.one_of(
    *(st.just(("predict", text)) for text in ("question -> answer", "question -> answer, good: bool", "ask")),
    st.just(("cot", "question -> answer")),
    st.just(("react", "question -> answer")),
    st.sampled_from(FAILURES).map(lambda kind: ("failing", kind)),
)
TREE = st.recursive(
    LEAF,
    lambda inner: st.tuples(
        st.sampled_from(["tree", "loud"]),
        st.lists(inner, min_size=1, max_size=3),
        st.booleans(),
        st.sampled_from(["prediction", "list", "none"]),
    ),
    max_leaves=4,
)
SHAPES = st.builds(
    Shape,
    tree=TREE,
    inputs=st.lists(st.sampled_from(sorted(INPUTS)), min_size=1, max_size=2).map(tuple),
    asynchronous=st.booleans(),
    runner=st.sampled_from(["call", "call", "call", "batch", "parallel", "evaluate", "threads"]),
    adapter=st.sampled_from(["chat", "json", "xml"]),
    lm=st.sampled_from(["plain", "loud"]),
    fails_every=st.sampled_from([0, 0, 3, 7]),
    garbled_every=st.sampled_from([0, 0, 3]),
    callbacks=st.booleans(),
    seed=st.integers(0, 3),
)


def build(tree: Any) -> Any:
    kind = tree[0]
    if kind == "predict":
        return dspy.Predict(Ask if tree[1] == "ask" else tree[1])
    if kind == "cot":
        return dspy.ChainOfThought(tree[1])
    if kind == "react":
        return dspy.ReAct(tree[1], tools=[add, broken], max_iters=2)
    if kind == "failing":
        return Failing(tree[1])
    return {"tree": Tree, "loud": LoudTree}[kind]([build(child) for child in tree[1]], tree[2], tree[3])


# --- what a user could notice ------------------------------------------------------------------------------------


class Diary(BaseCallback):
    """Every callback event, with what came in and went out; call ids by order of appearance."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.ids: dict[str, int] = {}

    def note(self, name: str, call_id: str, *rest: Any) -> None:
        self.events.append((name, self.ids.setdefault(call_id, len(self.ids)), *map(freeze, rest)))


def _event(name: str) -> Any:
    def on(self: Diary, call_id: str, *args: Any, **kwargs: Any) -> None:
        self.note(name, call_id, *args, *(value for _, value in sorted(kwargs.items())))

    return on


for _name in dir(BaseCallback):
    if _name.startswith("on_"):
        setattr(Diary, _name, _event(_name))


def freeze(value: Any, depth: int = 0) -> Any:
    """A comparable picture of any value, by type and content, that calls no code of a hostile class."""
    kind = type(value)
    if kind is str:
        return re.sub(r"0x[0-9a-f]+", "address", value)
    if kind in (int, bool, type(None), bytes):
        return value
    if kind is float:
        return repr(value)
    if depth > 8:
        return "deeper"
    if isinstance(value, BaseException):
        return exception(value)
    if kind is dict or (issubclass(kind, dict) and kind.__module__.startswith(("dspy", "collections"))):
        return ("dict", [(freeze(key, depth + 1), freeze(item, depth + 1)) for key, item in dict.items(value)])
    if kind in (list, tuple, set):
        return (kind.__name__, [freeze(item, depth + 1) for item in value])
    if issubclass(kind, dspy.Example):
        return (kind.__name__, freeze(value._store, depth + 1))
    if issubclass(kind, enum.Enum):
        return str(value)
    if kind.__module__.startswith("dspy.adapters.types") or kind.__module__ == "datetime":
        return repr(value)
    return f"<{kind.__name__}>"


def exception(error: BaseException | None, depth: int = 0) -> Any:
    if error is None or depth > 6:
        return None
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if sys.version_info >= (3, 11) or "dspy_otel" not in code.co_filename:  # 3.10 shows our outermost frame.
            frames.append(code.co_name)
        traceback = traceback.tb_next
    return (
        type(error).__qualname__,
        [freeze(argument) for argument in error.args],
        sorted(vars(error)) if hasattr(error, "__dict__") else [],
        frames,
        error.__suppress_context__,
        exception(error.__cause__, depth + 1),
        exception(error.__context__, depth + 1),
    )


@dataclass
class Seen:
    """Everything noticed about one run."""

    outcome: Any = None
    lm_calls: Any = None
    events: Any = None
    inputs: Any = None
    state: Any = None
    pickles: Any = None
    signatures: Any = None
    randomness: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


def observe(shape: Shape) -> Seen:
    """Build the program, run it, and write down everything a user could notice."""
    import numpy

    seen = Seen()
    adapter = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter, "xml": dspy.XMLAdapter}[shape.adapter]()
    oracle = {"plain": Oracle, "loud": LoudLM}[shape.lm](
        shape.adapter == "json", shape.fails_every, shape.garbled_every
    )
    random.seed(shape.seed)  # DSPy draws a random name for each Predict.
    program = build(shape.tree)
    diary = Diary()
    names = ("question", "extra")
    values = {name: INPUTS[kind]() for name, kind in zip(names, shape.inputs, strict=False)}
    before = {name: (id(value), freeze(value)) for name, value in values.items()}
    seen.pickles = pickles(program)
    seen.signatures = signatures(program, oracle)
    random.seed(shape.seed)
    numpy.random.seed(shape.seed)
    Picky.asked = 0
    threads = live_threads()
    surrounding = otel_context.get_current()
    with dspy.context(
        lm=oracle,
        adapter=adapter,
        callbacks=[diary] if shape.callbacks else [],
        disable_history=True,
        max_errors=100,
        provide_traceback=False,
    ):
        try:
            seen.outcome = ("returned", freeze(start(shape, program, values)))
        except BaseException as error:
            seen.outcome = ("raised", exception(error))
    seen.randomness = (
        zlib.crc32(repr(random.getstate()).encode()),
        zlib.crc32(repr(numpy.random.get_state()).encode()),
    )
    seen.lm_calls, seen.events = oracle.seen, diary.events
    seen.inputs = [name for name, value in values.items() if (id(value), freeze(value)) != before[name]]
    seen.state = json.dumps(program.dump_state(), default=repr) if hasattr(program, "dump_state") else None
    # Before DSPy 3.2, a program is not always the same bytes twice, watched or not.
    seen.pickles = [seen.pickles, pickles(program)] if DSPY >= (3, 2) else None
    seen.extra = {"picky": Picky.asked}
    assert otel_context.get_current() is surrounding, "the OpenTelemetry context has leaked"
    assert until(lambda: not (live_threads() - threads)), f"left: {live_threads() - threads}"
    return seen


def live_threads() -> set[threading.Thread]:
    """All threads but the one of tqdm's, which DSPy's progress bars start."""
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}


def until(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes to hold. DSPy does not wait for its worker threads to end."""
    try:
        return wait_for(condition, "a condition", pause=0.002)
    except Stalled:
        return False


def start(shape: Shape, program: Any, values: dict[str, Any]) -> Any:
    if shape.runner == "batch":
        rows = [dspy.Example(**values).with_inputs(*values) for _ in range(2)]
        return program.batch(rows, num_threads=1, max_errors=100, disable_progress_bar=True)
    if shape.runner == "parallel":
        row = dspy.Example(**values).with_inputs(*values)
        return dspy.Parallel(num_threads=1, max_errors=100, disable_progress_bar=True)([(program, row), (program, row)])
    if shape.runner == "evaluate":
        rows = [dspy.Example(**values).with_inputs(*values) for _ in range(2)]
        evaluate = dspy.Evaluate(devset=rows, metric=metric, num_threads=1, max_errors=100, display_progress=False)
        result = evaluate(program)
        return [result.score, freeze(result.results)]
    if shape.runner == "threads":
        return in_own_thread(program, values)
    if shape.asynchronous:
        handler = signal.getsignal(signal.SIGINT)
        try:
            return asyncio.run(program.acall(**values))
        finally:
            # asyncio leaves its own behind when the error has no repr(); signal() has set it by the time that fails.
            with contextlib.suppress(RuntimeError, ValueError):
                signal.signal(signal.SIGINT, handler)
    return program(**values)


def in_own_thread(program: Any, values: dict[str, Any]) -> Any:
    """A thread of the user's own, without any context."""
    found: list[Any] = []
    settings = dict(dspy.settings.items())

    def work() -> None:
        with dspy.context(**settings):
            try:
                found.append(program(**values))
            except BaseException as error:
                found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found


def metric(example: Any, prediction: Any, trace: Any = None) -> Any:
    if "count" in prediction and prediction.count == 2:
        raise ValueError("metric")
    return dspy.Prediction(score=0.5, feedback="so so") if "answer" in prediction else 1.0


class Counted:
    """Stands for the module `uuid` inside cloudpickle, which numbers classes at random."""

    def __init__(self) -> None:
        self.number = 0

    def uuid4(self) -> Any:
        self.number += 1
        return Bag(hex=f"{self.number:032x}")


def pickles(program: Any) -> Any:
    """What copying, pickling and saving give."""
    made: dict[str, Any] = {}
    dumped: dict[str, bytes] = {}
    inside = cloudpickle.cloudpickle
    inside._DYNAMIC_CLASS_TRACKER_BY_CLASS.clear()
    uuid, inside.uuid = inside.uuid, Counted()
    try:
        for name, dump in (("pickle", pickle.dumps), ("cloudpickle", cloudpickle.dumps)):
            try:
                dumped[name] = dump(program)
                made[name] = instructions(dumped[name])
            except Exception as error:
                made[name] = type(error).__name__
    finally:
        inside.uuid = uuid
    made["deepcopy"] = freeze(copy.deepcopy(program).dump_state())
    made["reset"] = freeze(program.reset_copy().dump_state())
    if "pickle" in dumped:
        made["again"] = json.dumps(pickle.loads(dumped["pickle"]).dump_state(), default=repr)
    return made


def instructions(dumped: bytes) -> list[tuple[str, Any]]:
    """A pickle as what it says, one after the other.

    Pydantic names schemas by the address of the class, which has 8 to 15 digits: the sizes of frames tell that, too.
    """
    return [
        (code.name, _ADDRESS.sub(":0", argument) if isinstance(argument, str) else argument)
        for code, argument, _ in pickletools.genops(dumped)
        if code.name != "FRAME"
    ]


def signatures(program: Any, oracle: Any) -> Any:
    """How its entry points present themselves."""
    seen: list[Any] = []
    for owner in (program, oracle):
        entry_points = (owner.__call__, owner.acall, type(owner), type(owner).__call__, type(owner).acall)
        seen += [str(inspect.signature(function)) for function in entry_points]
        seen += [inspect.iscoroutinefunction(owner.acall), owner.__call__.__doc__, type(owner).__call__.__qualname__]
    return seen
