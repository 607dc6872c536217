"""``DSPyInstrumentor``: on, off, exactly back; classes that override entry points, before and after it."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import dspy
import pytest
from dspy.utils import DummyLM

import dspy_otel
from dspy_otel import DSPyInstrumentor
from dspy_otel.instrumentor import _instruments
from tests.support.spans import Recorder
from tests.switching.process import python


# --- a user's classes, made before instrument() ---------------------------------------------------------------------
class Plain(dspy.Module):
    def forward(self, text: str = "") -> str:
        return text.upper()

    async def aforward(self, text: str = "") -> str:
        return text.upper()


class Calls(Plain):
    """Overrides the entry points, and calls them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        return await super().acall(*args, **kwargs)


class CallsAgain(Calls):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        return await super().acall(*args, **kwargs)


class Retries(Plain):
    """Calls what it overrides several times for one call of itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return [super(Retries, self).__call__(*args, **kwargs) for _ in range(3)][-1]

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        return [await super(Retries, self).acall(*args, **kwargs) for _ in range(3)][-1]


class Ignores(Plain):
    """Overrides the entry points without ever calling them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


class Fails(Plain):
    """Overrides an entry point, and raises there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("mine")


class Copies(Plain):
    """Shares a function with another class instead of inheriting it."""

    __call__ = Ignores.__call__
    acall = Ignores.acall


class Countdown(Plain):
    """Calls itself, through its own override."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def forward(self, left: int) -> int:
        return 0 if left == 0 else 1 + self(left=left - 1)


SHAPES = [Plain, Calls, CallsAgain, Retries, Ignores, Copies]


class OverridingLM(DummyLM):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        return await super().acall(*args, **kwargs)


class RetryingLM(DummyLM):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return [super(RetryingLM, self).__call__(*args, **kwargs) for _ in range(2)][-1]

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        return [await super(RetryingLM, self).acall(*args, **kwargs) for _ in range(2)][-1]


class IgnoringLM(DummyLM):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return ["[[ ## answer ## ]]\nblue\n\n[[ ## completed ## ]]"]

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        return ["[[ ## answer ## ]]\nblue\n\n[[ ## completed ## ]]"]


class PlainTool(dspy.Tool):
    pass


class OverridingTool(dspy.Tool):
    def __call__(self, **kwargs: Any) -> Any:
        return super().__call__(**kwargs)

    async def acall(self, **kwargs: Any) -> Any:
        return await super().acall(**kwargs)


class IgnoringTool(dspy.Tool):
    def __call__(self, **kwargs: Any) -> Any:
        return self.func(**kwargs)

    async def acall(self, **kwargs: Any) -> Any:
        return self.func(**kwargs)


def double(number: int) -> int:
    return number * 2


# --- exactly one span each ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES)
async def test_one_span_for_each_module_call(telemetry: Recorder, shape: type[dspy.Module]):
    telemetry.instrument()
    assert shape()(text="a") == "A"
    assert await shape().acall(text="b") == "B"
    assert [span.name for span in telemetry.spans] == [f"invoke_workflow {shape.__name__}"] * 2


@pytest.mark.parametrize("shape", SHAPES)
async def test_classes_made_after_instrument(telemetry: Recorder, shape: type[dspy.Module]):
    telemetry.instrument()
    late = type("Late", (shape,), {})
    overriding = type(
        "Overriding",
        (shape,),
        {"__call__": lambda self, **kwargs: shape.__call__(self, **kwargs)},
    )
    assert late()(text="a") == "A"
    assert overriding()(text="b") == "B"
    assert await overriding().acall(text="c") == "C"
    assert [span.name for span in telemetry.spans] == [
        "invoke_workflow Late",
        "invoke_workflow Overriding",
        "invoke_workflow Overriding",
    ]


def test_recursion_through_an_override_is_a_call_each(telemetry: Recorder):
    telemetry.instrument()
    assert Countdown()(left=2) == 2
    assert [span.name.split()[0] for span in telemetry.spans] == ["invoke_workflow", "Countdown", "Countdown"]


@pytest.mark.parametrize("kind", [DummyLM, OverridingLM, RetryingLM, IgnoringLM])
async def test_one_span_for_each_lm_call(telemetry: Recorder, kind: type[DummyLM]):
    telemetry.instrument()
    late = type("LateLM", (kind,), {})
    for each in (kind, late):
        with dspy.context(lm=each([{"answer": "blue"}] * 9)):
            assert dspy.Predict("question -> answer")(question="?").answer == "blue"
            assert (await dspy.Predict("question -> answer").acall(question="?")).answer == "blue"
    assert len(telemetry.named("chat ")) == 4
    assert len(telemetry.spans) == 8


@pytest.mark.parametrize("kind", [PlainTool, OverridingTool, IgnoringTool])
async def test_one_span_for_each_tool_call(telemetry: Recorder, kind: type[dspy.Tool]):
    telemetry.instrument()
    tool = kind(double)
    assert tool(number=2) == 4
    with dspy.context(allow_tool_async_sync_conversion=True):
        assert await tool.acall(number=3) == 6
    assert [span.name for span in telemetry.spans] == ["execute_tool double"] * 2


# --- on and off -----------------------------------------------------------------------------------------------------
def everything_of_dspy() -> dict[tuple[str, str], Any]:
    """Each attribute of each DSPy module and class, and of this file's classes."""
    found: dict[tuple[str, str], Any] = {}
    holders: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] == "dspy":
            holders[name] = module
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__.startswith("dspy"):
                    holders[f"{value.__module__}.{value.__qualname__}"] = value
    for kind in [*SHAPES, Countdown, OverridingLM, RetryingLM, IgnoringLM, PlainTool, OverridingTool, IgnoringTool]:
        holders[kind.__qualname__] = kind
    for name, holder in holders.items():
        for key, value in list(vars(holder).items()):
            if key not in ("_abc_impl", "__annotations_cache__"):
                found[name, key] = value
    return found


def changes(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> set[tuple[str, str]]:
    return {key for key in {*before, *after} if before.get(key, before) is not after.get(key, before)}


@pytest.mark.parametrize("options", [{}, {"adapter_spans": True}])
def test_uninstrument_puts_every_attribute_back(telemetry: Recorder, options: dict[str, Any]):
    telemetry.instrument()  # whatever this imports for the first time is not a change
    dspy_otel.uninstrument()
    before = everything_of_dspy()
    for _ in range(2):
        telemetry.instrument(**options)
        assert ("dspy.primitives.module.Module", "__call__") in changes(before, everything_of_dspy())
        assert ("Ignores", "acall") in changes(before, everything_of_dspy())
        dspy_otel.uninstrument()
        assert changes(before, everything_of_dspy()) == set()


def test_classes_made_while_on_are_put_back_too(telemetry: Recorder):
    def call(self: Any, **kwargs: Any) -> Any:
        return Plain.__call__(self, **kwargs)

    telemetry.instrument()
    late = type("Late", (Plain,), {"__call__": call})
    copied = type("Copied", (Plain,), {"__call__": vars(late)["__call__"]})
    slotted = dataclass(slots=True)(type("Slotted", (Plain,), {"__call__": call}))
    assert vars(late)["__call__"] is not call
    dspy_otel.uninstrument()
    assert vars(late)["__call__"] is call
    assert vars(copied)["__call__"] is call
    assert vars(slotted)["__call__"] is call
    assert late()(text="a") == "A"
    assert telemetry.spans == []


def test_twice_is_one_warning_and_no_double(telemetry: Recorder, caplog: pytest.LogCaptureFixture):
    telemetry.instrument()
    telemetry.instrument(capture_content="span_only")
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "Attempting to instrument while already instrumented"
    ]
    Plain()(text="a")
    assert len(telemetry.spans) == 1
    assert "input.value" not in telemetry.spans[0].attributes


def test_off_twice_is_one_warning(telemetry: Recorder, caplog: pytest.LogCaptureFixture):
    telemetry.instrument()
    dspy_otel.uninstrument()
    dspy_otel.uninstrument()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_again_after_uninstrument_with_new_settings(telemetry: Recorder):
    telemetry.instrument()
    Plain()(text="a")
    dspy_otel.uninstrument()
    Plain()(text="b")
    telemetry.instrument(capture_content="span_only")
    Plain()(text="c")
    assert [span.attributes.get("input.value") for span in telemetry.spans] == [None, '{"text":"c"}']


@pytest.mark.parametrize("copies_attributes", [True, False])
def test_what_somebody_wrapped_since_stays(
    telemetry: Recorder, monkeypatch: pytest.MonkeyPatch, copies_attributes: bool
):
    telemetry.instrument()
    ours = dspy.Module.__call__
    calls = []

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return ours(self, *args, **kwargs)

    if copies_attributes:
        theirs = functools.wraps(ours)(theirs)
    original = ours.__wrapped__
    monkeypatch.setattr(dspy.Module, "__call__", theirs)
    dspy_otel.uninstrument()
    assert dspy.Module.__call__ is theirs
    assert Plain()(text="a") == "A"
    assert len(calls) == 1
    assert telemetry.spans == []
    telemetry.instrument()
    assert Plain()(text="b") == "B"
    assert len(calls) == 2
    assert len(telemetry.spans) == 1
    dspy_otel.uninstrument()
    assert dspy.Module.__call__ is theirs
    monkeypatch.undo()
    dspy.Module.__call__ = original


def test_a_wrapped_subclass_hook_goes_quiet(telemetry: Recorder):
    telemetry.instrument()
    ours = vars(dspy.Module)["__init_subclass__"]

    def theirs(cls: type, **kwargs: Any) -> None:
        ours.__func__(cls, **kwargs)

    dspy.Module.__init_subclass__ = classmethod(theirs)
    dspy_otel.uninstrument()
    try:

        def call(self: Any, **kwargs: Any) -> None: ...

        late = type("Late", (Plain,), {"__call__": call})
        assert vars(late)["__call__"] is call
    finally:
        del dspy.Module.__init_subclass__


def test_uninstrument_inside_a_call(telemetry: Recorder):
    class Stops(dspy.Module):
        def forward(self) -> str:
            dspy_otel.uninstrument()
            return Plain()(text="a")

    telemetry.instrument()
    assert Stops()() == "A"
    assert [span.name for span in telemetry.spans] == ["invoke_workflow Stops"]


def test_own_hooks_of_subclasses_still_run(telemetry: Recorder):
    seen = []

    class Base(dspy.Module):
        def __init_subclass__(cls, /, colour: str, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            seen.append((cls.__name__, colour))

    telemetry.instrument()

    class Late(Base, colour="blue"):
        def __call__(self, **kwargs: Any) -> str:
            return "late"

    assert Late()() == "late"
    assert seen == [("Late", "blue")]
    assert [span.name for span in telemetry.spans] == ["invoke_workflow Late"]


def test_unknown_option_is_a_mistake_in_code(telemetry: Recorder):
    with pytest.raises(TypeError, match=r"unknown option capture_contents; known: capture_content, "):
        telemetry.instrument(capture_contents="span_only")
    assert not DSPyInstrumentor().is_instrumented_by_opentelemetry
    telemetry.instrument()
    Plain()(text="a")
    assert len(telemetry.spans) == 1


def test_the_extra_says_what_the_instrumentor_says():
    tomllib = pytest.importorskip("tomllib", reason="from Python 3.11 on")
    from packaging.requirements import Requirement

    from tests.switching.process import ROOT

    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["instruments"]
    assert [Requirement(item) for item in extra] == [Requirement(item) for item in _instruments]


def test_a_dspy_outside_the_range_is_refused_with_one_clear_error(
    telemetry: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("dspy_otel.instrumentor._instruments", ("dspy >= 99, < 100",))
    before = dspy.Module.__call__
    telemetry.instrument()
    assert dspy.Module.__call__ is before
    (said,) = [record.getMessage() for record in caplog.records]
    assert "dspy >= 99, < 100" in said
    assert f"dspy {version('dspy')}" in said
    # Whoever wants to try it all the same can.
    telemetry.instrument(skip_dep_check=True)
    Plain()(text="a")
    assert [span.name for span in telemetry.spans] == ["invoke_workflow Plain"]


# --- copies and pickles ---------------------------------------------------------------------------------------------
def test_copies_and_pickles_of_watched_objects(telemetry: Recorder):
    telemetry.instrument()
    for module in (Plain(), Calls(), Ignores()):
        for again in (copy.deepcopy(module), module.deepcopy(), pickle.loads(pickle.dumps(module))):
            assert again(text="a") == "A"
    assert len(telemetry.spans) == 9


def by_value(value: Any) -> bytes:
    """Pickled as cloudpickle pickles what ``__main__`` defines, and DSPy's ``save(save_program=True)`` a program."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        return cloudpickle.dumps(value)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_classes_pickled_by_value_need_nothing_of_ours(telemetry: Recorder, tmp_path: Path):
    telemetry.instrument()
    (tmp_path / "programs").write_bytes(by_value([Plain(), Calls(), Ignores(), Retries(), Fails()]))
    done = python(
        "import sys; sys.modules['dspy_otel'] = None\n"
        "import cloudpickle\n"
        "*programs, fails = cloudpickle.load(open('programs', 'rb'))\n"
        "print([program(text='a') for program in programs])\n"
        "try: fails(text='a')\n"
        "except KeyError as error: print(error)",
        cwd=tmp_path,
    )
    assert done.output == "['A', 'A', 'A', 'A']\n'mine'\n"


@pytest.mark.integration
def test_classes_pickled_by_value_are_watched_where_they_arrive(telemetry: Recorder, tmp_path: Path):
    telemetry.instrument()
    (tmp_path / "programs").write_bytes(by_value([Plain(), Calls(), Ignores(), Retries()]))
    done = python(
        "import cloudpickle, dspy, dspy_otel\n"
        "from tests.support.spans import Recorder\n"
        "programs = cloudpickle.load(open('programs', 'rb'))\n"
        "telemetry = Recorder().instrument()\n"
        "print([program(text='a') for program in programs], [span.name for span in telemetry.spans])",
        cwd=tmp_path,
    )
    names = [f"invoke_workflow {name}" for name in ("Plain", "Calls", "Ignores", "Retries")]
    assert done.output == f"['A', 'A', 'A', 'A'] {names}\n"
