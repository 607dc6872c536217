"""What ``import dspy_otel`` costs, and that instrumentation waits for ``import dspy`` instead of causing it."""

from __future__ import annotations

import pytest

from tests.switching.process import python

HEAVY = (
    *("dspy", "mlflow", "rich", "litellm", "requests", "pydantic", "numpy"),
    *("opentelemetry.sdk", "opentelemetry.exporter"),
)


@pytest.mark.parametrize("then", ["", "dspy_otel.instrument()", "dspy_otel.instrument(); dspy_otel.uninstrument()"])
def test_nothing_heavy_is_imported(then: str):
    done = python(f"import sys, dspy_otel; {then}\nprint('\\n'.join(sys.modules))")
    loaded = done.output.splitlines()
    assert ("dspy_otel.instrumentor" in loaded) is bool(then)
    assert [name for name in loaded if name.startswith(tuple(f"{heavy}." for heavy in HEAVY)) or name in HEAVY] == []


def test_the_public_face_is_loaded_when_it_is_asked_for():
    """A program that leaves instrumentation off pays for none of it, and finds every name all the same."""
    done = python(
        "import sys, dspy_otel\n"
        "before = [name for name in sys.modules if name.startswith(('dspy_otel.', 'opentelemetry.'))]\n"
        "assert before == ['dspy_otel.version'], before\n"
        "assert set(dspy_otel.__all__) <= set(dir(dspy_otel))\n"
        "from dspy_otel import *\n"
        "print([name for name in dspy_otel.__all__ if name not in globals()])\n"
        "print(DSPyInstrumentor is dspy_otel.instrumentor.DSPyInstrumentor, hasattr(dspy_otel, 'nothing_of_this_name'))"
    )
    assert done.output == "[]\nTrue False\n"


# Everything that asks the network anything, however it is reached. `configure()` makes exporters, which connect only
# when they export, in their own time.
_OFFLINE = """
import os, sys
{first}
asked = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        asked.append((event, args[1:]))
        raise OSError("the network was asked")
sys.addaudithook(watch)
import dspy_otel
{then}
assert asked == [], asked
import socket
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError as error:
    print(error)
sys.stdout.flush()
os._exit(0)  # what is not exported yet is nobody's business here
"""


@pytest.mark.parametrize("first", ["", "import dspy"])
@pytest.mark.parametrize(
    "then",
    [
        "dspy_otel.instrument(capture_content='span_and_event')",
        "dspy_otel.instrument(); dspy_otel.uninstrument()",
        "dspy_otel.instrument(); from tests.switching.app import main; sys.argv = ['app', 'evaluate']; main()",
        "dspy_otel.configure(console=True)",
        "dspy_otel.configure(otlp='http://collector.example:4318')",
        "import dspy_otel.mlflow as ours; ours.MLflowSpanExporter(tracking_uri='http://mlflow.example')",
    ],
)
@pytest.mark.integration
def test_no_network_is_asked(first: str, then: str):
    if "MLflow" in then or "configure" in then:
        pytest.importorskip("opentelemetry.sdk")
    done = python(_OFFLINE.format(first=first, then=then))
    assert done.output.splitlines()[-1] == "the network was asked", "the watch itself does not work"


_ORDER = """
import sys
{first}
from opentelemetry import trace
from tests.support.spans import Recorder
import dspy_otel
{second}
telemetry = Recorder()
{third}
from tests.switching.app import main
sys.argv = sys.argv[:1]
main()
print([span.name for span in telemetry.spans])
"""
_ON = "dspy_otel.instrument(tracer_provider=telemetry.tracer_provider)"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("first", "second", "third"),
    [
        ("import dspy", "", _ON),
        ("", "", _ON + "; assert 'dspy' not in sys.modules; import dspy"),
        ("", "", _ON + "; assert 'dspy' not in sys.modules"),
        # Off and on again before DSPy is there: nothing stale, no doubles.
        ("", "", _ON + "; dspy_otel.uninstrument(); " + _ON),
        # The provider comes later than instrumentation.
        ("", "dspy_otel.instrument()", "trace.set_tracer_provider(telemetry.tracer_provider)"),
        ("import dspy", "dspy_otel.instrument()", "trace.set_tracer_provider(telemetry.tracer_provider)"),
    ],
)
def test_any_order_of_imports_and_providers(first: str, second: str, third: str):
    done = python(_ORDER.format(first=first, second=second, third=third))
    assert done.output == "answer: blue\n['invoke_workflow App', 'Predict reply', 'chat echo']\n"
    assert done.warnings == []


@pytest.mark.integration
def test_switched_off_before_dspy_is_imported():
    done = python(_ORDER.format(first="", second="", third=_ON + "; dspy_otel.uninstrument()"))
    assert done.output == "answer: blue\n[]\n"


@pytest.mark.integration
def test_meters_and_loggers_that_come_later():
    done = python(
        "import dspy_otel, sys\n"
        "dspy_otel.instrument()\n"
        "import dspy\n"
        "from opentelemetry import _logs, metrics\n"
        "from tests.support.spans import Recorder\n"
        "telemetry = Recorder()\n"
        "metrics.set_meter_provider(telemetry.meter_provider)\n"
        "_logs.set_logger_provider(telemetry.logger_provider)\n"
        "from tests.switching.app import main\n"
        "sys.argv = ['app', 'evaluate']\n"
        "main()\n"
        "data = telemetry.reader.get_metrics_data()\n"
        "print(sorted(m.name for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics)[0])\n"
        "print([item.log_record.event_name for item in telemetry.log_exporter.get_finished_logs()])"
    )
    assert done.output.splitlines()[-2:] == [
        "dspy.evaluation.examples",
        "['gen_ai.evaluation.result', 'gen_ai.evaluation.result']",
    ]


def test_report_is_the_function_whatever_has_been_imported():
    code = "import dspy_otel; from dspy_otel.reports import page, render; from dspy_otel import report; "
    code += "print(report is dspy_otel.report, report.__module__, render is page.render)"
    assert python(code).output.split() == ["True", "dspy_otel.inline_report", "True"]


@pytest.mark.integration
def test_no_sdk_at_all():
    """The core needs the OpenTelemetry API only; without an SDK it does nothing, quietly."""
    done = python(
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "import dspy_otel\n"
        "dspy_otel.instrument(capture_content='span_and_event')\n"
        "from tests.switching.app import main\n"
        "sys.argv = ['app', 'evaluate']\n"
        "main()"
    )
    assert done.output == "answer: blue\nscore: 100.0\n"
    assert done.warnings == []
