"""The page: nothing in it can become markup, it loads nothing, and it stays small."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_otel.record.model import (
    Candidate,
    Dataset,
    Example,
    Failure,
    Optimization,
    Phase,
    Trial,
    Usage,
    number,
)
from dspy_otel.reports import Source, charts, render
from dspy_otel.reports.examples import compare
from dspy_otel.reports.numbers import change_text, tokens_text

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;]]><!-- \ud800 \x00 \u202e \N{PILE OF POO}"


class Page(HTMLParser):
    """Its elements and texts; fails on what a browser would have to guess."""

    VOID = frozenset({"meta"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def program(id_: str, instructions: str, demos: list[Any]) -> Candidate:
    return Candidate(id_, json.dumps({HOSTILE: {"signature": {"instructions": instructions}, "demos": demos}}))


def hostile(count: int = 3) -> Optimization:
    """Every text that a program or a model can choose, as bad as it can be."""
    example = Example(HOSTILE, HOSTILE, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, 0.0, HOSTILE, trace_id=1)  # type: ignore[arg-type]
    trials = tuple(
        Trial(
            number,
            {1: "baseline", 2: HOSTILE}.get(number, "full"),
            HOSTILE if number == 3 else f"id{number}",
            (HOSTILE, f"id{number - 1}"),
            score=number / count,
            best=number / count,
            reason=HOSTILE,
            accepted=number % 2 == 0,
            phase=HOSTILE,
            params={HOSTILE: HOSTILE, "list": [HOSTILE]},
            spent=Usage(cost=number * 0.1),
            failure=Failure(HOSTILE) if number == 1 else None,
        )
        for number in range(1, count + 1)
    )
    demos = [{HOSTILE: HOSTILE}, HOSTILE, None]
    return Optimization(
        optimizer=HOSTILE,
        program_name=HOSTILE,
        id=HOSTILE,
        outcome=HOSTILE,
        failure=Failure(HOSTILE, HOSTILE),
        baseline=1.0,
        best=2.0,
        gain=1.0,
        winner=2,
        initial=Candidate("id0"),
        returned=Candidate(f"id{count}"),
        params={HOSTILE: HOSTILE},
        train=Dataset(HOSTILE, 3, HOSTILE),
        usage=Usage(lm_calls=1, by_role={HOSTILE: Usage(lm_calls=1)}),
        models={HOSTILE: (HOSTILE,)},
        trials=trials,
        phases=(Phase(HOSTILE, 1, 1.0, Usage(lm_calls=1)),),
        candidates={
            f"id{number}": program(f"id{number}", f"{HOSTILE} {number}", [*demos, number])
            for number in range(count + 1)
        },
        examples={1: (example,), 2: (dataclasses.replace(example, score=1.0),)},
    )


SOURCE = Source(
    runs={2: "javascript:alert(3)", 3: f"http://localhost/{HOSTILE}"},
    trace_url="javascript:alert(4)//{}",
    trace_name=HOSTILE + "{}",
    versions={HOSTILE: HOSTILE},
)


def test_nothing_becomes_markup() -> None:
    page = Page(render(hostile(), SOURCE))
    names = {name for name, _ in page.elements}
    assert not names & {"script", "img", "iframe", "link", "object", "form", "base"}
    for name, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        assert "src" not in attributes
        assert (attributes.get("href") or "http://").startswith("http://")
    assert "<script>alert(1)</script>" in page.text


def test_it_can_be_written_and_read() -> None:
    text = render(hostile(), SOURCE)
    assert text.encode("utf-8").decode("utf-8") == text
    assert "\x00" not in text
    assert "\u202e" not in text


def test_it_loads_nothing_and_runs_nothing() -> None:
    text = render(hostile(), SOURCE)
    assert "url(" not in text
    assert "@import" not in text
    page = Page(text)
    (policy,) = [at["content"] for name, at in page.elements if name == "meta" and "http-equiv" in at]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_it_stays_small_however_large_the_optimization() -> None:
    report = hostile(3000)
    long = "word " * 20_000
    examples = {
        number: tuple(dataclasses.replace(kept[0], id=f"{place}") for place in range(5000))
        for number, kept in report.examples.items()
    }
    report = dataclasses.replace(
        report,
        candidates={name: program(name, f"{long}{name}", [long] * 100) for name in list(report.candidates)[:60]},
        examples=examples,
        params={f"{long}{number}": long for number in range(1000)},
    )
    text = render(report, SOURCE)
    assert len(text) < 3_000_000
    assert "more trials are not shown" in text
    assert "more candidates are not shown" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_what_is_no_number_is_not_drawn(value: Any) -> None:
    assert number(value) is None
    assert number(True) is None


def test_an_empty_report_is_a_page_too() -> None:
    page = Page(render(Optimization()))
    assert "running" in page.text


def test_without_content_it_says_how_to_get_the_rest() -> None:
    assert "CAPTURE_MESSAGE_CONTENT=span_only" in render(Optimization(trials=(Trial(1),)))


def test_lost_workers_are_said() -> None:
    lost = dataclasses.replace(hostile(), usage=Usage(lm_calls=80, worker_tasks=40, unanswered_tasks=2))
    said = "2 of 40 tasks of worker processes have handed nothing back"
    assert said in Page(render(lost)).text
    assert said not in Page(render(dataclasses.replace(lost, usage=Usage(lm_calls=80, worker_tasks=40)))).text


def test_one_trial_and_equal_scores_can_be_drawn() -> None:
    assert "<svg" in render(Optimization(trials=(Trial(1, "full", score=0.0, spent=Usage(cost=0.0)),)))
    assert "<svg" in render(Optimization(trials=tuple(Trial(n, "full", score=50.0) for n in (1, 2))))
    assert "<svg" in render(Optimization(trials=(Trial(1, "full", score=1.0), Trial(2, "full", score=1e308))))


@given(st.floats(-1e100, 1e100), st.floats(-1e100, 1e100))
def test_ticks_span_the_scores(one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = charts.ticks(low, high)
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 8
    slack = 1e-6 * (found[-1] - found[0])
    assert found[0] <= low + slack
    assert found[-1] >= high - slack


def test_a_circle_of_parents_ends() -> None:
    trials = (Trial(1, "full", "a", ("b",)), Trial(2, "full", "b", ("a",)), Trial(3, "full", "c", ("b",)))
    assert Page(render(Optimization(trials=trials, returned=Candidate("c")))).elements


def test_examples_are_compared_one_by_one() -> None:
    before, after = (
        tuple(Example(n, "same" if n < 2 else f"e{n}", score=score) for n, score in enumerate(scores))
        for scores in ((0, 1, 1, None), (1, 0, 1, 0.5))
    )
    assert [one.gain for one in compare(before, after)] == [1, -1, 0, 1]
    trials = (Trial(1, "baseline"), Trial(2, "full"))
    page = Page(render(Optimization(trials=trials, winner=2, examples={1: before, 2: after})))
    assert "2 improved" in page.text
    assert "1 regressed" in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1 / 6, "+0.167"), (-0.00351, "-0.004"), (0.0000123, "+1.23e-05"), (16.6667, "+16.7"), (0.0, "+0")],
)
def test_a_difference_has_the_digits_that_people_read(value: float, text: str) -> None:
    assert change_text(value) == text


def test_a_trial_whose_calls_all_came_from_the_cache_says_so() -> None:
    assert tokens_text(Usage(lm_calls=4, cache_hits=4)) == "cached"
    assert tokens_text(Usage(lm_calls=4, cache_hits=3, input_tokens=7, output_tokens=1)) == "8"
    assert tokens_text(Usage(lm_calls=4, cache_hits=3)) is None
