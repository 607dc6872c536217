"""What the page answers: is it better, is that certain, what changed, what got worse; and that it fits its frame."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Any

import pytest

from dspy_otel.record.addresses import Address
from dspy_otel.record.model import Candidate, Example, Optimization, Trial, Usage
from dspy_otel.reports import Source, charts, lineage, render
from dspy_otel.reports.examples import compared
from dspy_otel.reports.heat_map import MAX_COLUMNS, heat_map
from dspy_otel.reports.numbers import cost_text, count_text, tick_text
from dspy_otel.reports.verdict import verdict_of
from tests.reports.test_page import Page


def examples(scores: str, content: bool = True) -> tuple[Example, ...]:
    """One for each figure, such as ``"0110"``; ``x`` is one that raised."""
    return tuple(
        Example(
            place,
            f"e{place}",
            inputs={"name": f"colour {place}"} if content else None,
            score=None if figure == "x" else float(figure),
            error="ValueError" if figure == "x" else None,
            feedback=f"feedback {place}",
            trace_id=place + 1,
        )
        for place, figure in enumerate(scores)
    )


def state(text: str) -> str:
    return json.dumps({"qa": {"signature": {"instructions": text}, "demos": []}})


def optimization(*columns: str, **changes: Any) -> Optimization:
    """A baseline and full trials with scores of examples; each is made from the one before, and the last one wins."""
    trials = []
    for number, scores in enumerate(columns, 1):
        known = [float(figure) for figure in scores if figure != "x"]
        trials.append(
            Trial(
                number,
                "full" if number > 1 else "baseline",
                f"p{number}",
                (f"p{number - 1}",) if number > 1 else (),
                score=sum(known) / len(scores),
                size=len(scores),
            )
        )
    last = trials[-1]
    values: dict[str, Any] = {
        "outcome": "finished",
        "baseline": trials[0].score,
        "best": last.score,
        "winner": last.number,
        "initial": Candidate("p1"),
        "returned": Candidate(last.candidate or ""),
        "trials": tuple(trials),
        "candidates": {one.candidate: Candidate(one.candidate or "", state(f"Say {one.number}.")) for one in trials},
        "examples": {number: examples(scores) for number, scores in enumerate(columns, 1)},
    }
    return Optimization(**{**values, **changes})


def verdict(report: Optimization) -> tuple[str, str]:
    found = verdict_of(report, compared(report))
    assert found is not None
    return found.headline, " ".join(found.sentences)


# --- is it better, and is that certain ------------------------------------------------------------------------------


def test_a_gain_that_is_certain() -> None:
    pytest.importorskip("scipy")
    report = optimization("0" * 20 + "1", "1" * 20 + "0")
    headline, text = verdict(report)
    assert headline == "Better: 0.04762 → 0.9524 (+0.905)"
    assert "20 of 21 examples got better, 1 got worse, 0 stayed" in text
    assert re.search(r"95 % interval \+0\.\d+ to \+\d", text)
    assert "exact McNemar, p < 0.001" in text
    page = Page(render(report)).text
    assert headline in page
    assert "Changed: the instructions of qa." in page
    assert "Worse on 1 example: 20." in page


def test_a_gain_that_may_be_chance() -> None:
    pytest.importorskip("scipy")
    headline, text = verdict(optimization("0000000001", "1000000001"))
    assert headline.startswith("Better, but not certain: 0.1 → 0.2")
    assert "can be chance" in text


def test_the_winner_of_many_was_chosen_by_the_same_examples() -> None:
    pytest.importorskip("scipy")
    _, text = verdict(optimization("0" * 20, "0" * 19 + "1", "1" * 20))
    assert "best of 2 candidates on these same examples" in text


def test_without_scipy_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    headline, text = verdict(optimization("0" * 20, "1" * 20))
    assert headline == "Better by 1: 0 → 1"
    assert "install scipy: pip install 'dspy-otel[decide]'" in text


def test_no_gain_few_examples_and_no_baseline_are_told_as_such() -> None:
    assert verdict(optimization("01", "01"))[0] == "No candidate was better than the initial program: 0.5"
    assert "cannot be known from 2 examples: 6 are needed" in verdict(optimization("00", "01"))[1]
    assert verdict(optimization("01", "11", baseline=None))[0] == "Best score 1"
    assert verdict(optimization("01", "11", examples={}))[1].endswith("were not recorded.")
    assert verdict_of(Optimization(), []) is None


def test_the_optimizers_own_number_is_there_where_it_differs() -> None:
    report = optimization("0000", "1110")
    trials = (report.trials[0], dataclasses.replace(report.trials[1], reported=75.0))
    report = dataclasses.replace(report, trials=trials, optimizer="MIPROv2")
    assert "MIPROv2 itself reports 75." in verdict(report)[1]
    page = Page(render(report))
    assert "reported" in page.texts
    assert "reported" not in Page(render(optimization("00", "11"))).texts


# --- examples by candidate ------------------------------------------------------------------------------------------


def test_the_heat_map_tells_what_fails_what_flips_and_what_is_solved() -> None:
    found = heat_map(optimization("0011", "0101", "0x11"))
    assert found is not None
    assert (found.failing, found.flipping, found.solved) == (1, 2, 1)
    assert [row.example.index for row in found.rows] == [0, 1, 2, 3]
    assert found.rows[1].scores == (0.0, 1.0, 0.0)


def test_the_heat_map_keeps_the_baseline_the_winner_and_the_best() -> None:
    columns = ["0001", *("0011" if number % 2 else "0111" for number in range(200)), "0000"]
    report = optimization(*columns)
    found = heat_map(report)
    assert found is not None
    numbers = [trial.number for trial in found.trials]
    assert len(numbers) == MAX_COLUMNS
    assert numbers[0] == 1
    assert numbers[-1] == report.winner
    assert f"{202 - MAX_COLUMNS} candidates with lower scores are not drawn" in Page(render(report)).text


def test_there_is_no_map_of_one_column() -> None:
    assert heat_map(optimization("01")) is None
    assert heat_map(optimization("01", "11", examples={})) is None


# --- lineage and texts ----------------------------------------------------------------------------------------------


def test_two_hundred_candidates_fit_the_frame() -> None:
    report = optimization(*("01" for _ in range(200)))
    picture = lineage.graph(report, {})
    assert picture is not None
    (svg,) = picture.iter("svg")
    width, height = (float(part) for part in svg.get("viewBox", "").split()[2:])
    assert width <= 1121
    assert height <= 700
    for circle in svg.iter("circle"):
        assert 0 <= float(circle.get("cx", "")) <= width
        assert 0 <= float(circle.get("cy", "")) <= height
    page = Page(render(report))
    assert "The winner was made in 199 steps:" in page.text
    assert "… 160 more …" in page.text
    assert "All 200 candidates" in page.text


def test_the_winners_line_takes_the_better_parent() -> None:
    trials = (
        Trial(1, "baseline", "a", score=0.1),
        Trial(2, "full", "b", ("a",), score=0.3),
        Trial(3, "full", "c", ("a",), score=0.5),
        Trial(4, "full", "d", ("b", "c"), score=0.6),
    )
    report = Optimization(initial=Candidate("a"), returned=Candidate("d"), trials=trials)
    assert lineage.line(report, lineage.nodes(report)) == ["a", "c", "d"]


def test_texts_are_compared_with_the_parent_and_with_the_initial_program() -> None:
    page = Page(render(optimization("0001", "0011", "0111")))
    assert "c1 → c2: 0.75" in page.text
    assert "The returned program (c2) against the initial one." in page.text


def test_a_step_of_gepa_tells_feedback_new_instruction_and_verdict() -> None:
    report = optimization("0001", "0011", "0111")
    sample = Trial(4, "sample", "p1", score=0.5, params={"iteration": 1})
    proposal = Trial(
        5,
        "minibatch",
        "p2",
        ("p1",),
        accepted=True,
        before=0.5,
        after=1.0,
        params={"iteration": 1, "components": ("qa",)},
    )
    report = dataclasses.replace(
        report,
        trials=(*report.trials, sample, proposal),
        examples={**report.examples, 4: examples("10")},
    )
    text = Page(render(report)).text
    assert "seed → c1, qa: 0.5" in text
    start = text.index("Feedback, trial 4")
    order = ("feedback 1", "feedback 0", "Reflection and new instruction", "Accepted: 0.5 → 1 on the same examples")
    places = [text.index(one, start) for one in order]
    assert places == sorted(places)


# --- numbers, links, loading ----------------------------------------------------------------------------------------


def test_numbers_are_short() -> None:
    assert [count_text(value) for value in (0, 9_999, 12_345, 200_000, 999_700, 1_250_000)] == [
        *("0", "9,999", "12.3k", "200k", "1M", "1.25M")
    ]
    assert [tick_text(value) for value in (0, 0.25, 50, 200_000, 1_500_000)] == ["0", "0.25", "50", "200k", "1.5M"]


def test_an_axis_of_tokens_is_short_and_parts_have_a_chart_of_their_own() -> None:
    trials = (
        Trial(1, "baseline", score=0.6, best=0.6, spent=Usage(input_tokens=200_000)),
        Trial(2, "minibatch", score=0.0, spent=Usage(input_tokens=400_000)),
        Trial(3, "full", score=0.7, best=0.7, spent=Usage(input_tokens=600_000)),
    )
    report = Optimization(trials=trials)
    page = Page(render(report))
    assert {"200k", "400k", "600k"} <= set(page.texts)
    whole = charts.by_trial(report, lambda trial: str(trial.number))
    parts = charts.by_trial(report, lambda trial: str(trial.number), parts=True)
    assert whole is not None
    assert parts is not None
    assert "0" not in [text.text for text in whole.iter("text") if text.get("text-anchor") == "end"]
    assert [title.text for title in parts.iter("title")] == ["2"]


def test_equal_scores_are_in_the_middle_of_their_axis() -> None:
    trials = (Trial(1, "baseline", score=0.6), Trial(2, "full", score=0.6))
    chart = charts.by_trial(Optimization(trials=trials), lambda trial: str(trial.number))
    assert chart is not None
    found = [float(text.text or "") for text in chart.iter("text") if text.get("text-anchor") == "end"]
    assert 0.4 <= min(found) < 0.6 < max(found) <= 0.8


def test_a_cached_call_costs_nothing_and_that_is_said() -> None:
    assert cost_text(Usage(lm_calls=3, cache_hits=3)) == "cached"
    assert cost_text(Usage(lm_calls=3, cache_hits=3, cost=0.0)) == "cached"
    assert cost_text(Usage(lm_calls=3, cache_hits=2, cost=0.5)) == "$0.5000"
    assert cost_text(Usage(lm_calls=3)) is None
    report = optimization("01", "11")
    trials = (report.trials[0], dataclasses.replace(report.trials[1], usage=Usage(lm_calls=2, cache_hits=2)))
    assert "cached" in Page(render(dataclasses.replace(report, trials=trials))).texts


def test_what_an_answer_costs_is_only_drawn_of_trials_without_the_cache() -> None:
    report = optimization("01", "11", "11")

    def drawn(*hits: float | None) -> int:
        used = (Usage(lm_calls=2, input_tokens=1000 + at, cache_hits=hit) for at, hit in enumerate(hits))
        trials = tuple(dataclasses.replace(one, usage=usage) for one, usage in zip(report.trials, used, strict=True))
        found = charts.by_price(dataclasses.replace(report, trials=trials), lambda trial: str(trial.number))
        return 0 if found is None else len([*found[1].iter("title")])

    assert drawn(0.0, 0.0, 0.0) == 3
    assert drawn(0.0, 1.0, 0.0) == 2
    assert drawn(None, None, None) == 0


def test_links_are_short_and_the_winner_can_be_loaded() -> None:
    run_id = "0123456789abcdef0123456789abcdef"
    source = Source(
        run=Address(run_id, f"http://localhost:5000/#/experiments/1/runs/{run_id}"),
        tracking_uri="http://localhost:5000",
        trace_url="http://localhost:5000/{}",
        trace_name="tr-{}",
    )
    page = Page(render(optimization("01", "11", program_name="QA"), source))
    links = {attributes["href"]: attributes.get("title") for name, attributes in page.elements if name == "a"}
    assert links[f"http://localhost:5000/tr-{1:032x}"] == f"tr-{1:032x}"
    assert "tr-000000" in page.texts
    assert run_id in str(links)
    assert f"load_best(program, run_id='{run_id}', tracking_uri='http://localhost:5000')" in page.text
    assert "program = QA()" in page.text
    assert "load_best" not in Page(render(optimization("01", "11"))).text
    kept = Page(render(optimization("01", "11"), Source(in_run=True))).text
    assert "load_best(program, run_id=RUN_ID)" in kept
    assert "RUN_ID is the run that has this page" in kept


@pytest.mark.parametrize("count", [168, 500])
def test_many_trials_are_there_on_demand(count: int) -> None:
    trials = tuple(
        Trial(number, "full" if number % 3 == 0 else "minibatch", f"p{number}", score=number / count)
        for number in range(1, count + 1)
    )
    text = render(Optimization(trials=trials))
    page = Page(text)
    assert f"All {count} trials" in page.text
    assert "The best 20 of those on all examples:" in page.text
    assert len(text) < 1_000_000
