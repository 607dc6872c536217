"""What operations share: the first span of all."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider

from dspy_otel.config import Config
from dspy_otel.core.telemetry import Telemetry
from tests.support.waiting import STALLED, wait_for_event


def test_no_thread_makes_a_span_before_the_provider_is_known() -> None:
    """Whoever is told of the provider adds a span processor to it: it would miss the start of such a span."""
    told: list[Any] = []
    made: list[float] = []

    def slowly(provider: Any) -> None:
        time.sleep(0.2)
        told.append((provider, time.perf_counter()))

    provider = TracerProvider(shutdown_on_exit=False)
    telemetry = Telemetry(Config(), provider, on_provider=slowly)
    all_there = threading.Barrier(4)

    def first() -> None:
        all_there.wait()
        telemetry.tracer.start_span("first").end()
        made.append(time.perf_counter())

    threads = [threading.Thread(target=first) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((which, when),) = told
    assert which is provider
    assert len(made) == 4
    assert min(made) > when


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_forked_meanwhile_waits_for_nobody() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(provider: Any) -> None:
        begun.set()
        go_on.wait()

    telemetry = Telemetry(Config(), TracerProvider(shutdown_on_exit=False), on_provider=slowly)
    first = threading.Thread(target=lambda: telemetry.tracer)
    first.start()
    wait_for_event(begun, "the thread that makes the tracer")
    child = os.fork()
    if child == 0:
        go_on.set()
        signal.alarm(int(STALLED))  # ends a child that waits
        assert telemetry.tracer is not None
        os._exit(0)
    go_on.set()
    first.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("light", [True, False])
def test_spans_are_light_ones_unless_that_is_switched_off(light: bool) -> None:
    telemetry = Telemetry(Config(light_spans=light), TracerProvider(shutdown_on_exit=False))
    assert type(telemetry.tracer.start_span("span")).__name__ == ("LightSpan" if light else "_Span")


def test_nothing_is_followed_before_there_is_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    telemetry = Telemetry(Config(), meter_provider=NoOpMeterProvider())
    measuring = Telemetry(Config(), meter_provider=MeterProvider(shutdown_on_exit=False))
    assert (telemetry.discards, measuring.discards) == (True, False)
    assert telemetry.tracer is telemetry.tracer
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider(shutdown_on_exit=False))
    assert (telemetry.discards, measuring.discards) == (False, False)
    assert telemetry.tracer.start_span("recorded").is_recording()


def test_a_completion_hook_without_the_package_that_has_its_types_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Hook:
        def on_completion(self, **_: Any) -> None:
            raise AssertionError

    monkeypatch.setitem(sys.modules, "opentelemetry.util.genai.types", None)
    config = Config.load(completion_hook=Hook())
    assert config.content  # secrets are looked for as if content were captured
    assert Telemetry(config, TracerProvider(shutdown_on_exit=False)).completions is None
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "pip install 'dspy-otel[upload]'" in warning


def test_a_tracer_of_somebody_elses_may_have_methods_by_our_names() -> None:
    class Theirs(TracerProvider):
        def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
            tracer: Any = super().get_tracer(*args, **kwargs)

            class Wrapping(trace.Tracer):
                start_span = staticmethod(tracer.start_span)
                start_as_current_span = staticmethod(tracer.start_as_current_span)

                def begin_span(self, name: str) -> None:
                    raise AssertionError(name)

            return Wrapping()

    telemetry = Telemetry(Config(), Theirs(shutdown_on_exit=False))
    assert telemetry.begin_span("a", Context(), trace.SpanKind.INTERNAL, {}, ()).is_recording()
    assert telemetry.light_tracer is None
