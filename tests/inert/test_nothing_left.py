"""Nothing stays behind: no references, no threads, no context, no patch; and classes can be pickled and made anew."""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import random
import sys
import threading
import weakref
from typing import Any

import cloudpickle
import dspy
import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

import dspy_otel
from tests.inert.programs import Failing, LoudTree, Oracle, Shape, build, metric, until
from tests.support.waiting import run


class Box:
    """Something that can be weakly referenced, with a way back to whatever."""

    def __init__(self, other: Any = None) -> None:
        self.other = other


@pytest.mark.parametrize("content", ["no_content", "span_and_event"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_program_and_its_inputs_are_collected_after_the_call(telemetry: Any, content: str, fails: bool) -> None:
    telemetry.instrument(capture_content=content)
    lm = Oracle()
    program = build(("tree", [("predict", "question -> answer"), ("cot", "question -> answer")], False, "prediction"))
    if fails:
        program.last = Failing("cause")
        program.others.append(program.last)
    value = Box(program)
    program.first.demos = [dspy.Example(question="q", answer=Box(program))]
    watched = [weakref.ref(thing) for thing in (program, program.first, value, lm)]
    with dspy.context(lm=lm, disable_history=True, trace=None):
        try:
            program(question=value)
        except RuntimeError:
            assert fails
    del program, value, lm
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


def test_an_evaluation_and_its_rows_are_collected(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_and_event")
    lm, program = Oracle(), build(("predict", "question -> answer"))
    rows = [dspy.Example(question=Box()).with_inputs("question") for _ in range(4)]
    watched = [weakref.ref(thing) for thing in (program, lm, *rows, *(row.question for row in rows))]
    with dspy.context(lm=lm, disable_history=True, trace=None):
        result = dspy.Evaluate(devset=rows, metric=metric, num_threads=2, display_progress=False)(program)
    assert len(result.results) == 4
    del lm, program, rows, result

    def gone() -> bool:
        gc.collect()
        return [ref() for ref in watched] == [None] * len(watched)

    assert until(gone), [ref() for ref in watched if ref() is not None]


def test_memory_does_not_grow_with_calls() -> None:
    dspy_otel.instrument(tracer_provider=TracerProvider(shutdown_on_exit=False), capture_content="span_only")
    program = build(("tree", [("predict", "question -> answer")], False, "prediction"))

    def calls(count: int) -> int:
        for number in range(count):
            program(question=f"number {number}")
        gc.collect()
        return len(gc.get_objects())

    with dspy.context(lm=Oracle(), disable_history=True, trace=None):
        lm = dspy.settings.lm
        calls(50)
        lm.seen.clear()
        before = calls(10)
        after = calls(500)
    assert after - before < 200


@pytest.mark.slow
def test_memory_does_not_grow_with_programs_and_classes() -> None:
    dspy_otel.instrument(tracer_provider=TracerProvider(shutdown_on_exit=False), capture_content="span_only")

    def calls(count: int) -> int:
        for number in range(count):
            made = type("Made", (dspy.Module,), {"forward": lambda self, question: self.step(question=question)})()
            made.step = dspy.Predict("question -> answer")
            made(question=f"number {number}")
        gc.collect()
        return len(gc.get_objects())

    with dspy.context(lm=Oracle(), disable_history=True, trace=None):
        first = calls(100)
        second = calls(100)
        third = calls(300)
    # DSPy and pydantic keep something of each signature themselves; ours must not come on top.
    dspy_otel.uninstrument()
    with dspy.context(lm=Oracle(), disable_history=True, trace=None):
        fourth = calls(300)
    assert third - second <= 3 * (second - first) + 3 * 300
    assert (third - second) - (fourth - third) < 3000


def test_counters_leave_the_random_module_alone() -> None:
    """The SDK's counters and id generator draw from it; ours must not come to that."""
    reader = InMemoryMetricReader()
    dspy_otel.instrument(
        tracer_provider=TracerProvider(shutdown_on_exit=False),
        meter_provider=MeterProvider([reader], shutdown_on_exit=False),
    )
    program = build(("predict", "question -> answer"))
    rows = [dspy.Example(question=str(number)).with_inputs("question") for number in range(5)]
    with dspy.context(lm=Quiet(), disable_history=True, trace=None):
        random.seed(7)
        state = random.getstate()
        for _ in range(3):
            program(question="q")
            dspy.Evaluate(devset=rows, metric=metric, num_threads=2, display_progress=False)(program)
        assert random.getstate() == state
    data = reader.get_metrics_data()
    kept = {item.name for scope in data.resource_metrics for part in scope.scope_metrics for item in part.metrics}
    assert "dspy.evaluation.examples" in kept


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_retries_to_a_dead_backend_leave_the_random_module_alone(protocol: str) -> None:
    """The OTLP exporters draw from it how long to wait, here in the thread of the program."""
    exporters = importlib.import_module(f"opentelemetry.exporter.otlp.proto.{protocol}.trace_exporter")
    place = "http://127.0.0.1:1/v1/traces" if protocol == "http" else "http://127.0.0.1:1"
    options = {} if protocol == "http" else {"insecure": True}
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporters.OTLPSpanExporter(place, timeout=1, **options)))
    dspy_otel.instrument(tracer_provider=provider)
    program = build(("predict", "question -> answer"))
    with dspy.context(lm=Quiet(), disable_history=True, trace=None):
        random.seed(7)
        state = random.getstate()
        program(question="q")
        assert random.getstate() == state


def test_a_provider_that_is_set_later_gives_system_ids_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    dspy_otel.instrument()
    provider = TracerProvider(shutdown_on_exit=False)
    program = build(("predict", "question -> answer"))
    with dspy.context(lm=Quiet(), disable_history=True, trace=None):
        program(question="before")
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        random.seed(7)
        state = random.getstate()
        program(question="after")
        assert random.getstate() == state
    ours = dspy_otel.DSPyInstrumentor()._telemetry.tracer
    assert type(ours._tracer.id_generator).__name__ == "SystemIds"
    assert type(provider.get_tracer("another").id_generator).__name__ == "RandomIdGenerator"


def test_a_users_own_id_generator_is_kept() -> None:
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class Mine(RandomIdGenerator):
        used = 0

        def generate_span_id(self) -> int:
            Mine.used += 1
            return super().generate_span_id()

    dspy_otel.instrument(tracer_provider=TracerProvider(id_generator=Mine(), shutdown_on_exit=False))
    with dspy.context(lm=Quiet(), disable_history=True, trace=None):
        build(("predict", "question -> answer"))(question="q")
    assert Mine.used == 2


class Quiet(Oracle):
    """Draws no random numbers."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        state = random.getstate()
        try:
            return super().forward(prompt, messages, **kwargs)
        finally:
            random.setstate(state)


def test_all_patches_are_gone_after_uninstrument(telemetry: Any) -> None:
    def members() -> dict[tuple[str, str], Any]:
        found: dict[tuple[str, str], Any] = {}
        for module_name, module in list(sys.modules.items()):
            if not module_name.startswith(("dspy.", "tests.inert")):
                continue
            for name, value in list(vars(module).items()):
                found[module_name, name] = value
                if isinstance(value, type) and value.__module__.startswith(("dspy.", "tests.inert")):
                    owner = f"{value.__module__}.{value.__qualname__}"
                    found.update({(owner, key): item for key, item in vars(value).items()})
        return found

    before = members()
    telemetry.instrument(adapter_spans=True)
    changed = {key for key, value in members().items() if before.get(key) is not value}
    assert len(changed) > 10
    dspy_otel.uninstrument()
    after = members()
    ignored = {"__abstractmethods__", "_abc_impl", "__doc__"}
    left = {key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)}
    assert not {key for key in left if key[1] not in ignored}


BY_VALUE = """
import pickle, sys
assert "dspy_otel" not in sys.modules
program = pickle.loads(bytes.fromhex(sys.argv[1]))
assert "dspy_otel" not in sys.modules, "dspy_otel is needed to load it"
print(type(program).__name__, program(question="q"))
"""


def test_a_class_with_an_override_is_pickled_by_value_and_needs_nothing_of_ours(telemetry: Any) -> None:
    telemetry.instrument()
    source = """
import dspy
class Mine(dspy.Module):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)
    def forward(self, question):
        return question + "!"
"""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(source, scope)
    program = scope["Mine"]()
    assert program(question="q") == "q!"
    assert [span.name for span in telemetry.spans] == ["invoke_workflow Mine"]
    data = cloudpickle.dumps(program)
    done = run([sys.executable, "-c", BY_VALUE, data.hex()])
    assert done.stdout.split() == ["Mine", "q!"], done.stderr


def test_program_saved_whole_and_loaded_is_the_same(telemetry: Any, tmp_path: Any) -> None:
    program = build(("tree", [("predict", "question -> answer"), ("cot", "question -> answer")], False, "prediction"))
    program.save(tmp_path / "state.json")
    bare = (tmp_path / "state.json").read_bytes()
    telemetry.instrument(capture_content="span_only")
    with dspy.context(lm=Oracle(), disable_history=True, trace=None):
        program(question="q")
    program.save(tmp_path / "watched.json")
    assert (tmp_path / "watched.json").read_bytes() == bare
    program.save(tmp_path / "whole", save_program=True)
    allowed = {"allow_pickle": True} if "allow_pickle" in inspect.signature(dspy.load).parameters else {}  # DSPy 3.1
    loaded = dspy.load(tmp_path / "whole", **allowed)
    assert loaded.dump_state() == program.dump_state()


# --- context -----------------------------------------------------------------------------------------------------


async def test_cancellation_and_abandoned_coroutines_leave_no_context(telemetry: Any) -> None:
    telemetry.instrument()
    started = asyncio.Event()

    class Slow(Oracle):
        async def aforward(self, *args: Any, **kwargs: Any) -> Any:
            started.set()
            await asyncio.sleep(60)

    program = build(("tree", [("cot", "question -> answer")], False, "prediction"))
    surrounding = otel_context.get_current()
    with dspy.context(lm=Slow(), disable_history=True, trace=None):
        task = asyncio.create_task(program.acall(question="q"))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert otel_context.get_current() is surrounding

        started.clear()
        coroutine = program.acall(question="q")
        coroutine.send(None)  # Runs in this very context, up to its first wait.
        assert trace.get_current_span(otel_context.get_current()).is_recording()
        coroutine.close()
        assert otel_context.get_current() is surrounding
        never = program.acall(question="q")
        never.close()
    names = [span.name for span in telemetry.spans]
    assert names == 2 * ["invoke_workflow Tree", "ChainOfThought first", "Predict first.predict", "chat oracle"]
    assert all(span.status.status_code.name == "ERROR" for span in telemetry.spans)


def test_threads_of_a_user_start_without_our_context(telemetry: Any) -> None:
    telemetry.instrument()
    seen: list[Any] = []

    class Threaded(dspy.Module):
        def forward(self, question: str) -> None:
            thread = threading.Thread(target=lambda: seen.append(trace.get_current_span().get_span_context().is_valid))
            thread.start()
            thread.join()

    Threaded()(question="q")
    assert seen == [False]


def test_shapes_cover_overrides() -> None:
    assert isinstance(build(("loud", [("predict", "ask")], True, "list")), LoudTree)
    assert Shape(tree=("predict", "ask")).runner == "call"
