"""Why the winner is better: every sentence and demo has one origin, and gains are of scores that can be compared."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspy_otel.decide.explanation import why_of
from dspy_otel.record.model import Candidate, Dataset, Optimization, Trial, Usage
from dspy_otel.reports.lineage import ancestors, nodes
from dspy_otel.reports.page import render
from dspy_otel.reports.reasons import changes_text
from dspy_otel.reports.why import (
    CUT_TEXTS,
    NO_TEXTS,
    Change,
    Explanation,
    Step,
    explain,
    sentences_of,
)


def program(id_: str, instructions: str, *demos: Any, name: str = "qa") -> Candidate:
    return Candidate(id_, json.dumps({name: {"signature": {"instructions": instructions}, "demos": list(demos)}}))


def optimization(*trials: Trial, programs: list[Candidate], winner: str, **options: Any) -> Optimization:
    return Optimization(
        id="run",
        optimizer="GEPA",
        initial=Candidate("seed"),
        returned=Candidate(winner),
        winner=next((one.number for one in reversed(trials) if one.candidate == winner), None),
        trials=trials,
        candidates={one.id: one for one in programs},
        **options,
    )


def scored(number: int, candidate: str, score: float, *parents: str, kind: str = "full", **options: Any) -> Trial:
    return Trial(number, kind, candidate, parents, score=score, size=8, **options)


SEED = program("seed", "Answer.")
LINE = optimization(
    scored(1, "seed", 0.2, kind="baseline"),
    scored(2, "a", 1.0, "seed", kind="minibatch", before=0.5, after=1.0),
    scored(3, "a", 0.5, "seed"),
    scored(4, "b", 0.4, "a"),
    scored(5, "c", 0.9, "b"),
    programs=[
        SEED,
        program("a", "Answer. Be brief."),
        program("b", "Answer. No guesses."),
        program("c", "Answer. Be  brief.\nNo guesses. One word.", {"q": "1", "augmented": True}, {"q": "2"}),
    ],
    winner="c",
)


def origins(found: Explanation) -> dict[str, str | None]:
    return {one.text: one.step for one in found.sentences}


def test_each_sentence_has_the_step_that_brought_it_first() -> None:
    found = explain(LINE)
    # "Be brief." was there, went, and came back: spaces do not count.
    assert origins(found) == {"Answer.": None, "Be  brief.": "a", "No guesses.": "b", "One word.": "c"}
    assert [(one.step, one.bootstrapped) for one in found.demos] == [("c", True), ("c", False)]
    a, b, c = found.steps
    assert (a.trial, b.trial, c.trial) == (2, 4, 5)
    assert (a.before, a.after, a.gain) == (0.2, 0.5, pytest.approx(0.3))
    assert (a.part_before, a.part_after, a.part_size) == (0.5, 1.0, 8)
    assert (b.part_before, b.gain) == (None, pytest.approx(-0.1))
    assert (c.before, c.after) == (0.4, 0.9)
    assert [step.together for step in found.steps] == [False, False, True]
    assert c.changes == (Change("qa", "instructions", 2, 0), Change("qa", "demos", 2, 0))
    assert found.missing == ()


def test_a_merge_has_the_sentences_of_both_parents_from_those() -> None:
    found = explain(
        optimization(
            scored(1, "seed", 0.2, kind="baseline"),
            scored(2, "a", 0.5, "seed"),
            scored(3, "b", 0.4, "seed"),
            scored(4, "c", 0.9, "a", "b"),
            programs=[
                SEED,
                program("a", "Answer. Be brief."),
                program("b", "Answer. No guesses."),
                program("c", "Answer. Be brief. No guesses."),
            ],
            winner="c",
        )
    )
    assert origins(found) == {"Answer.": None, "Be brief.": "a", "No guesses.": "b"}
    merge = found.steps[-1]
    # All of it is of its parents; the gain is over the better one.
    assert (merge.changes, merge.together, merge.before, merge.gain) == ((), False, 0.5, pytest.approx(0.4))


def test_scores_on_other_examples_are_never_mixed() -> None:
    found = explain(
        optimization(
            scored(1, "seed", 0.2, kind="baseline"),
            Trial(2, "minibatch", "a", ("seed",), score=1.0, size=4),
            Trial(3, "validation", "a", ("seed",), score=0.9, size=3),
            programs=[SEED, program("a", "Answer. Be brief.")],
            winner="a",
        )
    )
    (step,) = found.steps
    assert (step.before, step.after, step.gain, step.part_before) == (0.2, None, None, None)
    assert [one.candidate for one in found.lengths] == ["seed"]


def test_a_candidate_without_parents_is_one_step_from_the_start() -> None:
    found = explain(
        optimization(
            scored(1, "seed", 0.2, kind="baseline"),
            scored(2, "a", 0.6),
            scored(3, "b", 0.5),
            scored(4, "c", 0.9),
            programs=[
                program("seed", "Answer."),
                program("a", "Answer.", {"q": "1"}),
                program("b", "Be brief."),
                program("c", "Be brief.", {"q": "1"}),
            ],
            winner="c",
        )
    )
    (step,) = found.steps
    assert (step.candidate, step.parents, step.together) == ("c", ("seed",), True)
    # Other candidates had its parts before.
    assert [(one.step, one.tried) for one in (*found.sentences, *found.demos)] == [("c", 3), ("c", 2)]
    # The same demos with the initial instructions, and the same instructions with the initial demos.
    assert [(one.part, one.trial, one.initial) for one in found.contrasts] == [
        ("instructions", 2, True),
        ("demos", 3, True),
    ]
    assert [one.gain for one in found.contrasts] == pytest.approx([0.3, 0.4])


def test_what_is_not_known_is_said() -> None:
    trials = scored(1, "seed", 0.2, kind="baseline"), scored(2, "a", 0.5, "seed"), scored(3, "b", 0.9, "a")
    without = explain(optimization(*trials, programs=[], winner="b"))
    assert (without.sentences, without.demos, without.leaks) == ((), (), ())
    assert without.missing == (NO_TEXTS,)
    assert [step.gain for step in without.steps] == pytest.approx([0.3, 0.4])
    masked = explain(optimization(*trials, programs=[SEED, Candidate("b", "{cut")], winner="b"))
    assert masked.missing == (CUT_TEXTS,)
    # Of a step whose parent is not known, all that is new is there at the latest.
    gap = explain(optimization(*trials, programs=[SEED, program("b", "Answer. Be brief.")], winner="b"))
    assert [(one.step, one.certain) for one in gap.sentences] == [(None, True), ("b", False)]
    assert gap.steps[-1].changes is None


def test_a_winner_that_is_the_initial_program_has_no_steps() -> None:
    found = explain(optimization(scored(1, "seed", 0.2, kind="baseline"), programs=[SEED], winner="seed"))
    assert (found.steps, origins(found)) == ((), {"Answer.": None})
    assert explain(Optimization()).sentences == ()


def test_a_winner_that_no_trial_has_scored_has_its_demos() -> None:
    found = explain(optimization(programs=[SEED, program("a", "Answer.", {"q": "1", "augmented": True})], winner="a"))
    (step,) = found.steps
    assert (step.trial, step.gain, step.parents) == (None, None, ("seed",))
    assert [(one.step, one.bootstrapped, one.tried) for one in found.demos] == [("a", True, None)]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("Do it, e.g. so. Then stop.", ["Do it, e.g. so.", "Then stop."]),
        ("1. Look.\n- No guesses!\n\n2) Say", ["1. Look.", "- No guesses!", "2) Say"]),
        ("日本語です。はい。", ["日本語です。", "はい。"]),
        ("---\nGo.\n***", ["---", "Go.", "***"]),
        ("Is it? **Yes.** No", ["Is it?", "**Yes.** No"]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert sentences_of(text) == sentences


def test_very_many_sentences_are_bounded() -> None:
    found = sentences_of("Do it. " * 5000)
    assert len(found) == 1000
    assert " ".join(found).split() == ("Do it. " * 5000).split()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.sampled_from("aB .!?\n1-。é日\t"), max_size=60))
def test_sentences_are_the_whole_text(text: str) -> None:
    assert "".join("".join(sentences_of(text)).split()) == "".join(text.split())


# --- training and validation ----------------------------------------------------------------------------------------

DATASETS = {"train": Dataset("train", 40, "t"), "val": Dataset("val", 20, "v")}


def gepa(train_after: float, rollouts: int, validation_after: float, **datasets: Dataset) -> Explanation:
    return explain(
        optimization(
            Trial(1, "baseline", "seed", score=0.4, size=20),
            Trial(2, "sample", "seed", score=0.4, size=rollouts),
            Trial(3, "minibatch", "a", ("seed",), score=1.0, size=3, before=0.0, after=1.0),
            Trial(4, "full", "a", ("seed",), score=validation_after, size=20),
            Trial(5, "sample", "a", score=train_after, size=rollouts),
            programs=[],
            winner="a",
            **(datasets or DATASETS),
        )
    )


def test_training_and_validation_part() -> None:
    found = gepa(0.95, 60, 0.4).train_and_validation
    assert found is not None
    assert (found.train_before, found.train_after, found.rollouts_after) == (0.4, 0.95, 60)
    assert (found.validation_before, found.validation_after, found.validation_size) == (0.4, 0.4, 20)
    assert (found.gap, found.gap_before) == pytest.approx((0.55, 0.0))
    assert found.parted


@pytest.mark.parametrize(("train", "rollouts", "validation"), [(0.95, 60, 0.9), (1.0, 3, 0.4), (0.4, 60, 0.9)])
def test_luck_and_a_gain_on_both_are_no_parting(train: float, rollouts: int, validation: float) -> None:
    found = gepa(train, rollouts, validation).train_and_validation
    assert found is not None
    assert not found.parted


def test_a_validation_set_that_is_harder_from_the_start_is_no_parting() -> None:
    found = explain(
        optimization(
            Trial(1, "baseline", "seed", score=0.2, size=200),
            Trial(2, "sample", "seed", score=0.5, size=100),
            Trial(4, "full", "a", ("seed",), score=0.6, size=200),
            Trial(5, "sample", "a", score=0.95, size=100),
            programs=[],
            winner="a",
            **{**DATASETS, "val": Dataset("val", 200, "v")},
        )
    ).train_and_validation
    assert found is not None
    assert found.error is not None
    assert found.gap > 2 * found.error
    assert not found.parted


def test_sets_that_are_one_have_nothing_to_part() -> None:
    assert gepa(0.9, 60, 0.4, **{**DATASETS, "val": Dataset("val", 20, "t")}).train_and_validation is None
    assert gepa(0.9, 60, 0.4, train=Dataset("train", 40)).train_and_validation is None


def test_scores_beyond_one_are_shown_and_not_judged() -> None:
    found = gepa(7.0, 60, 0.4).train_and_validation
    assert found is not None
    assert (found.error, found.parted, found.train_after) == (None, False, 7.0)


# --- length and spending --------------------------------------------------------------------------------------------


def test_a_shorter_candidate_that_is_as_good_is_named() -> None:
    found = explain(
        optimization(
            scored(1, "seed", 0.2, kind="baseline"),
            scored(2, "a", 0.9, "seed"),
            scored(3, "b", 0.9, "seed"),
            programs=[SEED, program("a", "Brief."), program("b", "Answer at length.", "demo")],
            winner="b",
        )
    )
    assert [(one.trial, one.instructions, one.demos) for one in found.lengths] == [(1, 7, 0), (2, 6, 0), (3, 17, 4)]
    assert found.shorter is not None
    assert found.shorter.candidate == "a"


def test_what_cost_most_for_least() -> None:
    def costing(number: int, candidate: str, cost: float | None, best: float, kind: str = "full") -> Trial:
        return Trial(number, kind, candidate, score=best, best=best, size=8, usage=Usage(cost=cost, input_tokens=9))

    found = explain(
        optimization(
            costing(1, "seed", 1.0, 0.2, "baseline"),
            costing(2, "seed", 0.5, 0.2, "sample"),
            costing(3, "a", 2.0, 0.2, "minibatch"),
            costing(4, "b", 1.0, 0.3, "minibatch"),
            costing(5, "b", 2.0, 0.3),
            costing(6, "c", None, 0.8),
            costing(7, "d", 4.0, 0.8),
            programs=[],
            winner="c",
            baseline=0.2,
            usage=Usage(cost=12.0),
        )
    )
    assert (found.unit, found.elsewhere) == ("USD", pytest.approx(2.0))
    spent = [(one.candidate, one.trial, one.spent, pytest.approx(one.gained)) for one in found.spending]
    assert spent == [("d", 7, 4.0, 0.0), ("a", 3, 2.0, 0.0), ("b", 4, 3.0, 0.1), ("c", 6, 0.0, 0.5)]
    assert found.spending[2].per_point == pytest.approx(0.3)
    assert found.spending[0].per_point is None


# --- whatever was recorded ------------------------------------------------------------------------------------------

WORDS = ["Answer.", "Be brief.", "No guesses.", "One word.", "Think first."]


@st.composite
def recorded(draw: st.DrawFn) -> Optimization:
    count = draw(st.integers(1, 8))
    programs, trials = [], []
    for place in range(count):
        id_ = "seed" if place == 0 else f"c{place}"
        texts = [" ".join(draw(st.lists(st.sampled_from(WORDS), max_size=5))) for _ in range(2)]
        demos = [draw(st.lists(st.sampled_from(["x", "y", {"q": "1"}]), max_size=3)) for _ in range(2)]
        state = {f"p{at}": {"signature": {"instructions": text}, "demos": demos[at]} for at, text in enumerate(texts)}
        if place == 0 or place == count - 1 or draw(st.integers(0, 4)):
            programs.append(Candidate(id_, json.dumps(state)))
        parents = draw(st.lists(st.sampled_from(["seed", *(f"c{at}" for at in range(1, count))]), max_size=2))
        kind = "baseline" if place == 0 else draw(st.sampled_from(["full", "minibatch", "sample"]))
        score = draw(st.none() | st.floats(0, 1))
        usage = Usage(cost=draw(st.none() | st.floats(0, 1)))
        trials.append(Trial(place + 1, kind, id_, tuple(parents), score=score, best=score, size=8, usage=usage))
    return optimization(*trials, programs=programs, winner="seed" if count == 1 else f"c{count - 1}")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recorded())
def test_each_sentence_and_demo_comes_from_one_step_of_the_lineage_or_the_start(record: Optimization) -> None:
    found = explain(record)
    steps = {step.candidate: step for step in found.steps}
    lineage = ancestors(nodes(record), found.winner) | {"seed"}
    assert len(steps) == len(found.steps)
    assert {*steps, "seed"} == lineage
    winner = record.candidates[str(found.winner)].predictors
    assert [(one.predictor, one.text) for one in found.sentences] == [
        (name, text) for name, one in winner.items() for text in sentences_of(one.instructions or "")
    ]
    assert [one.value for one in found.demos] == [demo for one in winner.values() for demo in one.demos or ()]
    for one in (*found.sentences, *found.demos):
        assert one.step is None or one.step in steps
        own = record.candidates["seed" if one.step is None else one.step].predictors[one.predictor]
        has = (
            one.text in sentences_of(own.instructions or "") if hasattr(one, "text") else one.value in (own.demos or ())
        )
        assert has
        if one.step is not None and one.certain:
            assert brought(record, steps[one.step], one)


def brought(record: Optimization, step: Step, one: Any) -> bool:
    """Whether none of a step's known parents had it, unless those came up later."""
    order = list(nodes(record))
    for parent in step.parents:
        if parent in record.candidates and order.index(parent) < order.index(step.candidate):
            old = record.candidates[parent].predictors[one.predictor]
            if (
                one.text in sentences_of(old.instructions or "")
                if hasattr(one, "text")
                else one.value in (old.demos or ())
            ):
                return False
    return True


def test_what_a_step_changed_is_a_sentence() -> None:
    found = explain(LINE)
    a, _, c = found.steps
    assert changes_text(found, a) == "1 sentence of qa added"
    assert changes_text(found, c) == "all together: 2 sentences of qa added, 2 demos of qa added"
    swapped = Step("c", changes=(Change("qa", "instructions", 1, 1),))
    assert changes_text(found, swapped) == "1 sentence of qa added and 1 removed"


def test_a_step_whose_words_were_replaced_is_shown_with_what_it_gained() -> None:
    record = optimization(
        scored(1, "seed", 0.2, kind="baseline"),
        scored(2, "a", 0.6, "seed"),
        scored(3, "b", 0.5, "a"),
        scored(4, "c", 0.9, "b"),
        programs=[SEED, program("a", "Answer. Be brief."), program("b", "Answer."), program("c", "Answer. One word.")],
        winner="c",
    )
    found = why_of(record)
    gains = [step.gain for step in found.steps]
    assert sum(filter(None, gains)) == pytest.approx(0.9 - 0.2)
    text = " ".join(str(found).split())
    assert "trial 2: 0.2 → 0.6 (+0.4); 1 sentence of qa added; nothing in the winner comes from it" in text
    assert "trial 3: 0.6 → 0.5 (-0.1); 1 sentence of qa removed trial 4" in text
    assert "0.2 → 0.6; 1 sentence of qa added; nothing in the winner comes from it" in found._repr_html_()


def test_a_leaked_sentence_stands_once_for_all_its_rows() -> None:
    rows = [{"colour": "sandstone", "family": "brown"}, {"colour": "burnt sienna", "family": "brown"}]
    leaky = program("leaky", "Answer. Sandstone and burnt sienna are brown.")
    trials = (scored(1, "seed", 0.2, kind="baseline"), scored(2, "leaky", 0.9, "seed"))
    train = Dataset("train", 2, text=json.dumps(rows))
    page = render(optimization(*trials, programs=[SEED, leaky], winner="leaky", train=train))
    box = page[page.index("Leak: ") : page.index("came with")]
    assert box.count("training row") == 2 + 1  # the first sentence counts them
    assert box.count("Sandstone and burnt sienna are brown.") == 1
