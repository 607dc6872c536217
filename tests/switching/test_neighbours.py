"""Beside others: observability stacks that own the provider, and other instrumentations of DSPy.

Each in a fresh process: what others patch, they do not always put back.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.switching.process import Finished, python

pytestmark = pytest.mark.integration

_PROGRAM = """
import sys
from opentelemetry import trace
from tests.support.spans import Recorder
telemetry = Recorder()
{setup}
import dspy
import dspy_otel
{switch_on}
from tests.switching.app import App, EchoLM
dspy.configure(lm=EchoLM(model="test/echo"))
app = App()
print("answer:", app(question="?").answer)
{between}
print("answer:", app(question="?").answer)
ours = [span.name for span in telemetry.spans if span.instrumentation_scope.name == "dspy_otel"]
print(ours)
{after}
"""
_OURS = "dspy_otel.instrument(tracer_provider=telemetry.tracer_provider)"
_TWO_ANSWERS = "answer: blue\nanswer: blue\n"
_SPANS = ["invoke_workflow App", "Predict reply", "chat echo"]


def run(setup: str = "", switch_on: str = _OURS, between: str = "", after: str = "", **rest: object) -> Finished:
    code = _PROGRAM.format(setup=setup, switch_on=switch_on, between=between, after=after)
    return python(code, **rest)  # type: ignore[arg-type]


def needs(module: str, package: str) -> pytest.MarkDecorator:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return pytest.mark.skipif(not found, reason=f"{package} is not installed")


# name, how to switch it on, what the warning says
OPENINFERENCE = (
    "from openinference.instrumentation.dspy import DSPyInstrumentor as Other; Other().instrument(skip_dep_check=True)"
)
GENAI = (
    "from opentelemetry.instrumentation.genai.dspy import DSPyInstrumentor as Other; "
    "Other().instrument(skip_dep_check=True)"
)
MLFLOW = "import mlflow; mlflow.set_tracking_uri('sqlite:///mlflow.db'); mlflow.dspy.autolog()"
NEIGHBOURS = [
    pytest.param(
        OPENINFERENCE,
        "openinference-instrumentation-dspy is active too: modules, LM calls, tools and retrieval will show twice",
        id="openinference",
        marks=needs("openinference.instrumentation.dspy", "openinference-instrumentation-dspy"),
    ),
    pytest.param(
        GENAI,
        "opentelemetry-instrumentation-genai-dspy is active too: LM calls, tools, agents",
        id="genai",
        marks=needs("opentelemetry.instrumentation.genai.dspy", "opentelemetry-instrumentation-genai-dspy"),
    ),
    pytest.param(
        MLFLOW,
        "mlflow.dspy.autolog is active too: programs, LM calls and evaluations in MLflow will show twice",
        id="autolog",
        marks=needs("mlflow.dspy", "mlflow"),
    ),
]


_ORDERS = ("before", "after", "after the first call")


@pytest.mark.parametrize(
    ("other", "said", "order"),
    [
        pytest.param(*neighbour.values, order, id=f"{neighbour.id}-{order}", marks=neighbour.marks)
        for neighbour in NEIGHBOURS
        # MLflow takes long to start: the other orders are those of test_together.py.
        for order in (_ORDERS if neighbour.id != "autolog" else _ORDERS[2:])
    ],
)
def test_one_clear_warning_and_the_same_results_also_without_us(tmp_path: Path, other: str, said: str, order: str):
    done = run(
        switch_on={"before": f"{other}\n{_OURS}", "after": f"{_OURS}\n{other}"}.get(order, _OURS),
        between=other if order == "after the first call" else "",
        after="telemetry.clear(); dspy_otel.uninstrument(); print(app(question='?').answer)\n"
        "print([span.name for span in telemetry.spans])",
        cwd=tmp_path,
    )
    assert done.output.startswith(_TWO_ANSWERS)
    (warning,) = done.warnings
    assert said in warning
    assert "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=dspy_otel" in warning
    # Ours is complete, with or without the other one; and off again, it leaves the program and the other alone.
    assert done.output == f"{_TWO_ANSWERS}{_SPANS * 2}\nblue\n[]\n"


_TAKEN = "dspy.Module.__call__ is no longer ours"


@pytest.mark.parametrize(("other", "said"), NEIGHBOURS[:2])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_other_is_switched_off_again(tmp_path: Path, other: str, said: str, order: str):
    """OpenInference's ``uninstrument()`` takes ours along: that is said, and ours comes back when it is asked to."""
    done = run(
        switch_on=f"{other}\n{_OURS}" if order == "before" else f"{_OURS}\n{other}",
        between="Other().uninstrument()",
        after=f"telemetry.clear(); dspy_otel.uninstrument(); {_OURS}; app(question='?')\n"
        "print([span.name for span in telemetry.spans])",
        cwd=tmp_path,
    )
    taken = other is OPENINFERENCE
    second = ["chat echo"] if taken else _SPANS
    assert done.output == f"{_TWO_ANSWERS}{_SPANS + second}\n{_SPANS}\n"
    assert [_TAKEN in warning for warning in done.warnings] == [False, True][: 1 + taken]


@pytest.mark.parametrize(("other", "said"), NEIGHBOURS)
def test_installed_but_not_active_is_no_reason_to_warn(tmp_path: Path, other: str, said: str):
    done = run(setup=other.partition(";")[0], cwd=tmp_path)
    assert done.output == f"{_TWO_ANSWERS}{_SPANS * 2}\n"
    assert done.warnings == []


@needs("logfire", "logfire")
def test_logfire_owns_the_provider():
    done = run(
        setup=(
            "import logfire\n"
            "from opentelemetry.sdk.trace.export import SimpleSpanProcessor\n"
            "logfire.configure(send_to_logfire=False, console=False, metrics=False, inspect_arguments=False,\n"
            "    additional_span_processors=[SimpleSpanProcessor(telemetry.exporter)])"
        ),
        switch_on="dspy_otel.instrument(); request = logfire.span('request').__enter__()",
        between="request.__exit__(None, None, None)",
        after="print([span.parent is not None and span.context.trace_id == request.context.trace_id\n"
        "    for span in telemetry.named('invoke_workflow')])",
    )
    assert done.output == f"{_TWO_ANSWERS}{_SPANS * 2}\n[True, False]\n"
    assert done.warnings == []


@needs("phoenix.otel", "arize-phoenix-otel")
def test_phoenix_owns_the_provider():
    done = run(
        setup=(
            "from opentelemetry.sdk.trace.export import SimpleSpanProcessor\n"
            "from phoenix.otel import register\n"
            "provider = register(endpoint='http://127.0.0.1:9/v1/traces', protocol='http/protobuf', verbose=False,\n"
            "    batch=True)\n"
            "provider.add_span_processor(SimpleSpanProcessor(telemetry.exporter), replace_default_processor=True)"
        ),
        switch_on="dspy_otel.instrument()",
    )
    assert done.output == f"{_TWO_ANSWERS}{_SPANS * 2}\n"
    assert done.warnings == []
