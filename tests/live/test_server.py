"""The server: nothing without the token, nothing for other hosts, one event when something has changed."""

from __future__ import annotations

import http.client
import logging
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from opentelemetry.trace import NoOpTracerProvider

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import dspy_otel
from dspy_otel import cli
from dspy_otel.live.feeds import Feed, SpanFeed
from dspy_otel.live.server import LiveServer, Report
from tests.live.spans import Program
from tests.optimizers.common import RUNS, quietly, scripted_lm, trials


@contextmanager
def serving(feed: Feed) -> Iterator[LiveServer]:
    server = LiveServer(feed, interval=0.0)
    server.start()
    try:
        yield server
    finally:
        server.close()


def get(url: str, **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


@pytest.fixture
def feed() -> SpanFeed:
    feed = SpanFeed()
    program = Program(feed, content="a canary")
    program.start()
    program.trial(1, 0.25)
    program.trial(2, 0.5)
    return feed


def test_the_page_is_behind_its_token_and_loads_nothing(feed: SpanFeed) -> None:
    with serving(feed) as server:
        assert server.url.startswith("http://127.0.0.1:")
        status, text, headers = get(server.url)
        assert status == 200
        assert "Searcher on Capitals" in text
        assert "http://" not in text
        assert "https://" not in text
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "connect-src 'self'" in policy
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        root = server.url.rsplit("/", 2)[0]
        token = server.url.rsplit("/", 2)[1]
        assert len(token) >= 32
        for path in ("", "/", "/report", "/x/", "/x/events", "/x/report", f"/{token[:-1]}/", f"/{token}x/", "/%C3%A9/"):
            status, text, _ = get(root + path)
            assert status == 404, path
            assert "Searcher" not in text


def test_another_site_cannot_ask_it_by_a_name_of_its_own(feed: SpanFeed) -> None:
    with serving(feed) as server:
        assert get(server.url, Host="rebound.example")[0] == 400
        assert get(server.url, Host=f"localhost:{urlsplit(server.url).port}")[0] == 200


def test_it_listens_on_the_loopback_address_of_ipv6_too(feed: SpanFeed) -> None:
    try:
        server = LiveServer(feed, "::1", interval=0.0)
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    server.start()
    assert get(server.url)[0] == 200
    assert get(server.url, Host="rebound.example")[0] == 400
    server.close()


def test_an_event_comes_when_something_has_changed(caplog: pytest.LogCaptureFixture) -> None:
    feed = SpanFeed()
    program = Program(feed)
    with serving(feed) as server:
        place = urlsplit(server.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=20)
        connection.request("GET", f"{place.path}events")
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("text/event-stream")

        def event() -> str:
            while not (line := answer.readline().decode()).startswith("data: "):
                assert line
            return line

        seen = [event()]
        program.start()
        seen.append(event())
        program.trial(1, 0.25)
        seen.append(event())
        assert len(set(seen)) == 3
        assert "1 of 4 trials" in get(f"{server.url}report")[1]
    assert answer.read().strip() == b""  # the stream ends with the server, and nothing is logged
    connection.close()
    assert caplog.records == []


def test_without_content_there_is_none(feed: SpanFeed) -> None:
    with serving(feed) as server:
        assert "a canary" in get(server.url)[1]
    without = SpanFeed()
    program = Program(without)
    program.start()
    program.trial(1, 0.25)
    with serving(without) as server:
        text = get(server.url)[1]
        assert "a canary" not in text
        assert "CAPTURE_MESSAGE_CONTENT=span_only" in text


def test_a_program_opens_the_page_with_one_line(
    telemetry: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: telemetry.tracer_provider)
    lm = scripted_lm()
    telemetry.instrument(capture_content="span_only")
    page = dspy_otel.watch()
    try:
        assert page.url in capsys.readouterr().err
        assert page.url in page._repr_html_()
        quietly(RUNS["COPRO"], lm)
        text = get(page.url)[1]
        assert "COPRO on ColourFamily" in text
        assert f"Finished: this program · {len(trials(telemetry, 'COPRO'))} trials" in text
    finally:
        page.close()
    with pytest.raises(urllib.error.URLError):
        get(page.url)


def test_without_a_provider_of_the_sdk_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", NoOpTracerProvider)
    with pytest.raises(RuntimeError, match="needs a tracer provider of the OpenTelemetry SDK"):
        dspy_otel.watch()


def test_a_long_silence_is_told_once_and_then_each_minute(feed: SpanFeed) -> None:
    now = 0.0
    report = Report(feed, silent=120, clock=lambda: now)
    versions = []
    for now in (0.0, 60.0, 119.0, 121.0, 150.0, 181.0):
        report.refresh()
        versions.append(report.version)
    assert versions[0] == versions[1] == versions[2] != versions[3]
    assert versions[3] == versions[4] != versions[5]
    assert "Nothing new for 3 min 0 s" in report.html


def test_a_look_that_takes_long_is_taken_less_often(feed: SpanFeed) -> None:
    now, looks = 0.0, 0

    class Slow(SpanFeed):
        def read(self):  # type: ignore[no-untyped-def]
            nonlocal now, looks
            looks, now = looks + 1, now + 2.0
            return feed.read()

    report = Report(Slow(), interval=1.0, clock=lambda: now)
    report.refresh()
    now += 7.9
    report.refresh()
    assert looks == 1
    now += 0.2
    report.refresh()
    assert looks == 2


def test_a_port_that_is_taken_is_one_sentence(feed: SpanFeed, capsys: pytest.CaptureFixture[str], tmp_path) -> None:  # type: ignore[no-untyped-def]
    with serving(feed) as server:
        port = str(urlsplit(server.url).port)
        assert cli.main(["watch", "--spans", str(tmp_path / "x.jsonl"), "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert logging.root.manager.disable == logging.NOTSET
    assert cli.main(["watch", "--spans", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_without_its_packages_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("dspy_otel.live.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["watch", "--spans", "x.jsonl"]) == 2
    assert "watch needs uvicorn: pip install 'dspy-otel[watch]'" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match=r"needs uvicorn: pip install 'dspy-otel\[watch\]'"):
        dspy_otel.watch()
