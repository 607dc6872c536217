"""Results to a verdict: pairs, repeats, failures, what is left out, and how all of it reads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

import pytest

from dspy_otel.decide import show
from dspy_otel.decide.comparison import Comparison, compare_results, matching
from dspy_otel.decide.errors import CannotCompareError
from dspy_otel.decide.evidence import BETTER, NOT_SHOWN, WORSE, Count
from dspy_otel.decide.results import Results, rows_of
from dspy_otel.record.model import Candidate, Example, Usage

pytest.importorskip("scipy")

STATE = '{"qa": {"signature": {"instructions": "%s"}, "demos": [%s]}, "same": {"signature": {"instructions": "Go."}}}'


def example(place: int, score: float | None, **more: Any) -> Example:
    given = {"inputs": {"question": f"question {place}"}, "prediction": {"answer": f"answer {score}"}, **more}
    return Example(place, f"id{place}", score=score, **given)


def results(scores: Iterable[float | None], metric: str = "exact", **more: Any) -> Results:
    rows = rows_of([example(place, score) for place, score in enumerate(scores)], metric)
    return Results("some", "evaluation of QA", tuple(rows), (metric,), **more)


def test_better_worse_and_neither() -> None:
    low, high = results([0.0] * 10), results([1.0] * 10)
    assert compare_results(low, high).verdict == BETTER
    worse = compare_results(high, low)
    assert (worse.verdict, worse.regression) == (WORSE, True)
    assert compare_results(high, high).verdict == NOT_SHOWN
    # Five losses of ten are a drop of a half, and may be chance: alpha 1 takes every drop as one.
    half = results([1.0] * 5 + [0.0] * 5)
    assert not compare_results(high, half).regression
    assert compare_results(high, half, alpha=1).regression
    assert not compare_results(high, high, alpha=1).regression


def test_of_a_program_what_both_have_of_the_same_examples_is_compared() -> None:
    def asked(places: Iterable[int], metric: str = "thumbs") -> Results:
        rows = rows_of([Example(None, f"asked {place}", score=1.0) for place in places], metric)
        return Results("x", "answers", tuple(rows), (metric,), (metric,), production=True)

    evaluated, old, new = results([1.0] * 20), asked(range(10)), asked(range(4, 20))
    assert [side.what for side in matching([old, evaluated], [new, evaluated])] == [
        "answers (and not: evaluation of QA)"
    ] * 2
    # The new one is not asked the same, or not judged, or not in production at all.
    for other in ([asked(range(8, 20)), evaluated], [asked(range(10), "other"), evaluated], [evaluated]):
        a, b = matching([old, evaluated], other)
        assert (a.what, b.rows) == ("evaluation of QA (and not: answers)", evaluated.rows)
    a, _ = matching([old, evaluated], [new, evaluated], ["exact"])
    assert a.rows == evaluated.rows
    # A row of a dataset is no answer in production, whatever its name; and what has nothing in common stays as it is.
    assert matching([old], [evaluated]) == (old, evaluated)


def test_a_drop_may_be_allowed() -> None:
    a, b = results([1.0] * 100), results([1.0] * 90 + [0.0] * 10)
    assert compare_results(a, b).regression
    allowed = compare_results(a, b, max_drop=0.1)
    assert (allowed.verdict, allowed.regression) == (WORSE, False)
    assert "by no more than the allowed 0.1" in str(allowed)
    assert compare_results(a, b, max_drop=0.09).regression


@pytest.mark.parametrize(("a", "b", "drop"), [(0.3, 0.27, 0.03), (0.9, 0.88, 0.02), (0.7, 0.6, 0.1)])
def test_a_drop_that_is_allowed_is_no_regression_by_its_last_digit(a: float, b: float, drop: float) -> None:
    low, high = results([b] * 10), results([a] * 10)
    assert not compare_results(high, low, max_drop=drop).regression
    assert compare_results(high, low, max_drop=drop - 0.001).regression


def test_with_alpha_one_any_drop_of_any_metric_counts() -> None:
    def both(exact: list[float], brief: list[float]) -> Results:
        one, other = results(exact), results(brief, "brief")
        return dataclasses.replace(one, rows=(*one.rows, *other.rows), metrics=("exact", "brief"))

    found = compare_results(both([1.0] * 10, [1.0] * 10), both([1.0] * 9 + [0.0], [1.0] * 10), alpha=1)
    assert [score.regression for score in found.scores] == [True, False]
    assert "exact McNemar: p = 1.00 (each difference counts): worse" in str(found)
    assert "share alpha" not in str(found)
    # One pair has no interval, and JSON has no infinity.
    found = compare_results(results([0.5]), results([0.4]), alpha=1)
    assert found.regression
    assert "interval" not in str(found)
    for render in show.FORMATS.values():
        assert "inf" not in render(found)
    assert json.loads(show.as_json(found))["scores"][0]["low"] is None
    assert "inf" not in found._repr_html_()


def test_ranks_and_mean_that_disagree_show_nothing() -> None:
    # Nearly all examples lose a little, and two win so much that the mean is higher.
    found = compare_results(results([0.5] * 30), results([0.45] * 28 + [40.0] * 2))
    (score,) = found.scores
    assert score.result.p < 0.05
    assert score.result.difference > 0 > score.result.direction
    assert found.verdict == NOT_SHOWN


def test_pairs_are_the_same_examples_whatever_their_order() -> None:
    a = results([1.0, 0.0] * 5)
    b = dataclasses.replace(a, rows=(*reversed(a.rows), *rows_of([example(99, 1.0)], "exact")))
    (score,) = compare_results(a, b).scores
    assert (score.result.pairs, score.result.ties, score.only) == (10, 10, Count(0, 1))
    assert "Examples of one side only: 0 of A, 1 of B" in str(compare_results(a, b))


def test_examples_without_ids_are_paired_by_their_place() -> None:
    rows = rows_of([Example(place, score=1.0) for place in range(6)], None)
    side = Results("x", "y", tuple(rows), ("metric",))
    assert compare_results(side, side).scores[0].result.pairs == 6


def test_repeats_are_averaged_within_their_example_first() -> None:
    a = results([1.0] * 6)
    # One example ten times wrong is one example, not ten.
    b = dataclasses.replace(a, rows=(*a.rows, *rows_of([example(0, 0.0)] * 10, "exact")))
    (score,) = compare_results(a, b).scores
    assert (score.result.pairs, score.result.losses) == (6, 1)
    assert score.result.b == pytest.approx((5 + 1 / 11) / 6)
    assert score.repeated == Count(0, 1)
    assert "Examples with repeats, averaged first: 0 of A, 1 of B" in str(compare_results(a, b))


def test_failed_and_unscored_rows_are_listed() -> None:
    a = results([1.0] * 10)
    failed = [example(place, None, error="ValueError") for place in range(2)]
    rows = (*rows_of(failed, "exact"), *rows_of([example(2, None)], "exact"), *a.rows[3:])
    b = dataclasses.replace(a, rows=rows, size=12)
    found = compare_results(a, b)
    (score,) = found.scores
    assert (score.failed, score.unscored, score.result.pairs) == (Count(0, 2), Count(0, 1), 9)
    assert score.result.losses == 2
    text = str(found)
    assert "Failed answers count as 0: 0 of A, 2 of B" in text
    assert "Answers without a score: 0 of A, 1 of B" in text
    assert "B: 2 of 12 evaluated examples were not recorded" in text
    assert "B: ValueError" in text
    unfinished = compare_results(a, dataclasses.replace(b, unfinished=True))
    assert "B: an evaluation did not finish." in str(unfinished)
    skipped = compare_results(a, b, failed_score=None)
    assert (skipped.scores[0].result.pairs, skipped.scores[0].result.losses) == (7, 0)
    assert "Failed answers are left out: 0 of A, 2 of B" in str(skipped)


def test_several_metrics_share_alpha() -> None:
    def both(scores: list[float]) -> Results:
        one, other = results(scores), results([1.0] * len(scores), "brief")
        return dataclasses.replace(one, rows=(*one.rows, *other.rows), metrics=("exact", "brief"))

    # Six wins of six have p = 0.031: enough alone, and not for one of two.
    a, b = [0.0] * 6, [1.0] * 6
    assert compare_results(results(a), results(b)).verdict == BETTER
    with pytest.raises(CannotCompareError, match="at least 7 are needed"):
        compare_results(both(a), both(b))
    found = compare_results(both([*a, 0.0]), both([*b, 0.0]))
    assert [score.metric for score in found.scores] == ["exact", "brief"]
    assert found.scores[0].verdict == NOT_SHOWN
    assert "2 metrics share alpha 0.05" in str(found)
    assert compare_results(both(a), both(b), metrics=["exact"]).verdict == BETTER
    other = compare_results(both(a), results(b))
    assert other.other_metrics == ("brief",)
    assert "Metrics of one side only: brief" in str(other)


def test_what_people_said_of_few_answers_stops_no_comparison() -> None:
    def side(score: float, said: int, judged: tuple[str, ...]) -> Results:
        found = results([score] * 12)
        rows = [
            dataclasses.replace(row, scores={**row.scores, **dict.fromkeys(("thumbs", "tone"), 1.0)})
            if place < said
            else row
            for place, row in enumerate(found.rows)
        ]
        return dataclasses.replace(found, rows=tuple(rows), metrics=("exact", "thumbs", "tone"), judged=judged)

    both = ("thumbs", "tone")
    found = compare_results(side(1.0, 3, both), side(0.0, 3, both))
    assert ([score.metric for score in found.scores], found.few_pairs) == (["exact"], both)
    assert found.scores[0].result.alpha == 0.05
    assert "Not compared, for too few examples of both have it: thumbs, tone." in str(found)
    # What was asked for, and what an evaluation was made with, is compared or nothing is.
    for options, judged in (({"metrics": ["exact", "thumbs"]}, both), ({}, ("tone",))):
        with pytest.raises(CannotCompareError, match="Too few: 3"):
            compare_results(side(1.0, 3, judged), side(0.0, 3, judged), **options)
    # Answers that nobody judged are counted.
    found = compare_results(side(1.0, 8, both), side(0.0, 12, both))
    assert [(score.metric, score.unscored) for score in found.scores] == [
        ("exact", Count(0, 0)),
        ("thumbs", Count(4, 0)),
        ("tone", Count(4, 0)),
    ]
    assert "Answers without a score (tone): 4 of A, 0 of B" in str(found)


def test_an_answer_to_an_unknown_example_is_paired_with_nothing() -> None:
    a = results([1.0] * 8)
    unknown = rows_of([Example(score=0.0)] * 3, "exact")
    found = compare_results(a, dataclasses.replace(a, rows=(*a.rows, *unknown)))
    assert (found.scores[0].nameless, found.scores[0].result.pairs) == (Count(0, 3), 8)
    text = " ".join(str(found).split())
    assert "whose example is not known, for their inputs were not recorded whole: 0 of A, 3 of B." in text
    alone = dataclasses.replace(a, rows=tuple(unknown))
    with pytest.raises(CannotCompareError, match="Other rows: of A, 3 scored answers"):
        compare_results(alone, alone)


@pytest.mark.parametrize(
    ("a", "b", "options", "reason"),
    [
        (results([1.0] * 9), results([1.0] * 9, "other"), {}, "Other metrics: A has exact, B has other."),
        (results([1.0] * 9), results([1.0] * 9), {"metrics": ["no"]}, "not both have no."),
        (results([1.0] * 5), results([1.0] * 5), {}, "Too few: 5 examples are scored by both"),
        (
            results([1.0] * 9),
            results([]),
            {},
            "No scores (exact): A has 9 scored examples and 0 answers without a score",
        ),
        (results([1.0] * 9), results([None] * 9), {}, "B has 0 and 9."),
        (results([1.0] * 9), results([1.0] * 9), {"alpha": 0}, "alpha is 0"),
        (results([1.0] * 9), results([1.0] * 9), {"max_drop": -1}, "max_drop is -1"),
    ],
)
def test_what_cannot_be_compared_has_a_reason(a: Results, b: Results, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CannotCompareError) as error:
        compare_results(a, b, **options)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


# --- how it reads ---------------------------------------------------------------------------------------------------
HOSTILE = "<script>alert(1)</script> \x1b[31m | `code` ](http://x) \u202e"


def hostile() -> Comparison:
    def side(scores: list[float], instructions: str, demos: str, model: str, cost: float) -> Results:
        rows = [
            dataclasses.replace(
                example(place, score), inputs={"q": HOSTILE * 5}, prediction={"answer": HOSTILE}, seconds=place / 10
            )
            for place, score in enumerate(scores)
        ]
        return Results(
            f"runs/{HOSTILE}",
            f"evaluation of {HOSTILE}",
            tuple(rows_of(rows, f"exact {HOSTILE}")),
            (f"exact {HOSTILE}",),
            program=Candidate(f"id{cost}", STATE % (instructions, demos)),
            models={"task": (model,)},
            usage=Usage(lm_calls=20, cost=cost, input_tokens=1000),
            parse_failures=int(cost),
        )

    a = side([1.0] * 12 + [0.0] * 4, "Answer the question briefly.", "1", "small", 1.0)
    b = side([0.0] * 12 + [1.0] * 2 + [0.0] * 2, "Answer the question in one word.", "1, 2", "large", 2.0)
    return compare_results(a, b)


def test_a_table_fits_eighty_columns() -> None:
    text = str(hostile())
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert re.search(r"^cost +\$1\.0000 +\$2\.0000 +\+100 %$", text, re.MULTILINE)
    assert re.search(r"^latency p50 +0\.75 s +0\.75 s +[+-]0 %$", text, re.MULTILINE)
    assert re.search(r"^parse failures +1 +2 +\+100 %$", text, re.MULTILINE)
    assert "16 pairs: B better 2, worse 12, same 2" in text
    assert "and 7 more" in text
    assert "task model: small -> large" in text
    assert "qa: demos 1 -> 2" in text
    assert "Answer the question [-briefly-]{+in one word+}." in text
    assert "\nB is worse than A" in text


@pytest.mark.parametrize(("text", "kept"), [("ab" * 40, 80), ("ab" * 41, 77), ("\u6f22" * 40, 40), ("\u6f22" * 41, 38)])
def test_a_line_is_cut_at_the_columns_that_it_takes(text: str, kept: int) -> None:
    assert show.cut(text, 80) == text[:kept] + ("..." if kept < len(text) else "")


def test_markdown_and_html_show_texts_as_they_are() -> None:
    found = hostile()
    html = found._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    ElementTree.fromstring(html.replace("&nbsp;", " "))
    text = show.markdown(found)
    assert "<script" not in re.sub("`[^`]*`", "", text)  # in code nothing is markup
    rows = [line for line in text.splitlines() if line.startswith("| ") and "script" in line]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {7, 9}


def test_json_has_all_of_it_by_stable_names() -> None:
    loaded = json.loads(show.as_json(hostile()))
    assert list(loaded) == [
        *("verdict", "regression", "alpha", "max_drop", "failed_score", "a", "b"),
        *("scores", "costs", "left_out", "programs"),
    ]
    (score,) = loaded["scores"]
    assert (score["verdict"], score["regression"], score["pairs"], score["losses"]) == ("worse", True, 16, 12)
    assert len(score["changes"]) == 14
    assert score["changes"][0]["a"] > score["changes"][0]["b"]
    assert loaded["programs"]["predictors"][0]["demos"] == [1, 2]
    assert loaded == json.loads(json.dumps(hostile().to_dict()))


def test_junit_fails_a_metric_that_is_worse() -> None:
    suite = ElementTree.fromstring(show.junit(hostile()))
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert "1.000" not in str(failure.get("message"))
    assert "0.750 -> 0.125" in str(failure.get("message"))
    same = results([1.0] * 6)
    suite = ElementTree.fromstring(show.junit(compare_results(same, same)))
    assert (suite.get("failures"), suite.find("testcase/failure")) == ("0", None)
    suite = ElementTree.fromstring(show.ERRORS["junit"]("Other rows."))
    assert (suite.get("errors"), suite.find("testcase/error").get("message")) == ("1", "Other rows.")  # type: ignore[union-attr]


def test_the_number_of_changes_is_bounded() -> None:
    size = 3000
    found = compare_results(results([1.0] * size), results([place / size for place in range(size)]))
    (score,) = found.scores
    assert score.result.losses == size
    assert len(score.changes) == 1000
    assert score.changes[0].b == 0
    assert str(found).count("->") < 20
