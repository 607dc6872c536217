"""OpenTelemetry's declarative configuration: one file for the SDK and for our settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dspy_otel import DSPyInstrumentor
from dspy_otel.config import Config
from tests.switching.process import installed, instrumented

FILE = """
file_format: "1.0"
resource:
  attributes:
    - {name: service.name, value: declared}
tracer_provider:
  processors:
    - simple:
        exporter:
          console:
instrumentation/development:
  python:
    dspy_otel: OPTIONS
"""


def in_a_file(folder: Path, options: str) -> str:
    """The path of a file of declarative configuration with these options of ours."""
    place = folder / "otel.yaml"
    place.write_text(FILE.replace("OPTIONS", options), "utf-8")
    return str(place)


def test_a_file_may_have_each_setting_and_no_other() -> None:
    # Without the package: it makes a dataclass of what is in the file, and hands on what is not `None`.
    declared = DSPyInstrumentor.configuration
    assert [each.name for each in dataclasses.fields(declared)] == [each.name for each in dataclasses.fields(Config)]
    assert set(dataclasses.asdict(declared()).values()) == {None}
    with pytest.raises(TypeError, match="capture_contents"):
        declared(capture_contents="span_only")


@installed
@pytest.mark.integration
def test_a_file_switches_on_with_its_options(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.configuration")
    place = in_a_file(tmp_path, "{capture_content: span_only, openinference: false, content_limit: 1000}")
    done = instrumented(OTEL_CONFIG_FILE=place, OTEL_DSPY_ADAPTER_SPANS="true")
    assert '"service.name": "declared"' in done.output
    assert "dspy.module.inputs" in done.output  # content, without OpenInference's names
    assert "openinference.span.kind" not in done.output
    assert "ChatAdapter.format" in done.output  # what the file leaves out is the environment's
    assert not done.warnings


@installed
@pytest.mark.integration
@pytest.mark.parametrize(
    ("options", "expected"),
    [("{content_limit: many}", "use a whole number"), ("{capture_contents: span_only}", "capture_contents")],
)
def test_a_wrong_option_is_said_and_the_program_runs(tmp_path: Path, options: str, expected: str) -> None:
    pytest.importorskip("opentelemetry.configuration")
    done = instrumented(OTEL_CONFIG_FILE=in_a_file(tmp_path, options))
    assert expected in done.errors
    assert "invoke_workflow" in done.output


@installed
@pytest.mark.integration
def test_a_file_can_leave_it_off(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.configuration")
    done = instrumented(
        OTEL_CONFIG_FILE=in_a_file(tmp_path, "{enabled: false}"), OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="*"
    )
    assert "invoke_workflow" not in done.output
