"""Which answers become examples: nothing invented, nothing lost, people before programs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_otel.content.digest import digest
from dspy_otel.content.encoder import Content
from dspy_otel.dataset import NoExamplesError
from dspy_otel.dataset.selection import Criteria, Reason, Row, select, split
from dspy_otel.record.losses import Loss, loss_of
from dspy_otel.record.model import Answer, Judgement

TRACE = 0xABC


def answer(inputs: Any = None, outputs: Any = None, *said: Judgement, **others: Any) -> Answer:
    given = {"question": "why"} if inputs is None else inputs
    got = {"answer": "so"} if outputs is None else outputs
    known: dict[str, Any] = {"program": "p", "trace_id": TRACE, "span_id": 1, "started": 1}
    return Answer(inputs=json.dumps(given), outputs=json.dumps(got), judgements=said, **{**known, **others})


def by_person(name: str, value: Any, when: float = 1, **others: Any) -> Judgement:
    return Judgement(TRACE, None, name, value, human=True, when=when, **others)


def by_code(name: str, value: Any) -> Judgement:
    return Judgement(TRACE, None, name, value)


def expected(name: str, value: Any, when: float = 1) -> Judgement:
    return by_person(name, value, when, expectation=True)


def one(given: Answer, **criteria: Any) -> Row | Reason:
    """The row that an answer becomes, or the reason why it becomes none."""
    found = select([given], Criteria(**criteria))
    assert found.seen == 1
    return found.rows[0] if found.rows else next(iter(found.skipped))


def test_an_answer_is_its_own_label_without_the_steps_that_led_to_it() -> None:
    row = one(answer(None, {"reasoning": "hm", "answer": ["a", 1, None, {"b": 0.5}]}))
    assert isinstance(row, Row)
    assert (row.inputs, row.labels) == ({"question": "why"}, {"answer": ["a", 1, None, {"b": 0.5}]})
    assert row.failed is None
    # The id is the one that an evaluation will give this row.
    assert row.id == digest({"question": "why", "answer": ["a", 1, None, {"b": 0.5}]})


def test_what_a_person_says_is_right_is_the_label() -> None:
    row = one(answer(None, {"answer": "so", "sure": True}, expected("answer", "no", 1), expected("answer", "but", 2)))
    assert isinstance(row, Row)
    assert (row.labels, row.corrected, row.failed) == ({"answer": "but", "sure": True}, ("answer",), True)
    confirmed = one(answer(None, None, expected("answer", "so"), by_person("thumbs", True)))
    assert isinstance(confirmed, Row)
    assert (confirmed.labels, confirmed.failed) == ({"answer": "so"}, False)
    other = one(answer(None, None, Judgement(TRACE, None, "answer", "LM", expectation=True)))
    assert isinstance(other, Row)
    assert other.labels == {"answer": "so"}, "only people correct"


@pytest.mark.parametrize("name", ["expected", "expected_response"])
def test_an_expectation_of_the_whole_answer(name: str) -> None:
    fields = one(answer(None, {"answer": "so", "sure": True}, expected(name, {"answer": "but", "sure": False})))
    assert isinstance(fields, Row)
    assert fields.labels == {"answer": "but", "sure": False}
    only = one(answer(None, {"reasoning": "hm", "answer": "so"}, expected(name, "but")))
    assert isinstance(only, Row)
    assert only.labels == {"answer": "but"}
    assert one(answer(None, {"answer": "so", "sure": True}, expected(name, "but"))) is Reason.UNCLEAR


def test_an_answer_that_was_judged_wrong_is_no_label() -> None:
    wrong = answer(None, None, by_person("thumbs", False))
    assert one(wrong) is Reason.WRONG
    row = one(wrong, unlabelled=True)
    assert isinstance(row, Row)
    assert (row.labels, row.failed) == ({}, True)
    corrected = one(answer(None, None, by_person("thumbs", "no"), expected("answer", "but")))
    assert isinstance(corrected, Row)
    assert corrected.labels == {"answer": "but"}
    raised = one(answer(None, None, expected("answer", "but"), error="ValueError"))
    assert isinstance(raised, Row)
    assert (raised.labels, raised.failed) == ({"answer": "but"}, True)


def test_a_row_of_a_dataset_keeps_its_own_labels() -> None:
    given = answer(None, {"answer": "wrong"}, by_code("exact", 0.0), expected='{"answer": "right"}', example_id="1")
    row = one(given)
    assert isinstance(row, Row)
    assert (row.labels, row.score, row.failed) == ({"answer": "right"}, 0.0, True)


def test_people_go_before_evaluators_and_the_lowest_counts() -> None:
    both = answer(None, None, by_code("judge", 0.1), by_person("thumbs", True), by_person("tone", 0.6))
    row = one(both)
    assert isinstance(row, Row)
    assert (row.score, row.failed) == (0.6, False)
    named = one(both, metric="judge", unlabelled=True)
    assert isinstance(named, Row)
    assert (named.score, named.failed) == (0.1, True)
    again = one(answer(None, None, by_person("thumbs", False, 1), by_person("thumbs", True, 2)))
    assert isinstance(again, Row)
    assert again.score == 1.0


@pytest.mark.parametrize(
    ("given", "criteria", "reason"),
    [
        (Answer(), {}, Reason.NO_CONTENT),
        (dataclasses.replace(answer(), outputs=None), {}, Reason.NO_CONTENT),
        (dataclasses.replace(answer(), inputs='{"question": "wh'), {}, Reason.CUT),
        (answer(error="ValueError"), {}, Reason.ERROR),
        (answer({"question": "a…[cut 10 characters]"}), {}, Reason.CUT),
        (answer(None, {"answer": ["a", "…[cut 10 items]"]}), {}, Reason.CUT),
        (answer({"question": "the key is [masked]"}), {}, Reason.MASKED),
        (answer({"question": "<PIL.Image.Image>"}), {}, Reason.NO_VALUE),
        (answer({"image": {"url": "data:image/png;base64,<5 bytes>"}}), {}, Reason.NO_VALUE),
        (answer({"args": ["why"]}), {}, Reason.NO_NAMES),
        (answer(None, "so"), {}, Reason.NO_NAMES),
        (answer(None, None, expected("question", "else")), {}, Reason.UNCLEAR),
        (answer(unclear=True), {}, Reason.UNCLEAR),
        (answer(None, None, by_code("exact", 1)), {"feedback": True}, Reason.NO_FEEDBACK),
        (answer(), {"min_score": 0.5}, Reason.NO_SCORE),
        (answer(None, None, by_code("exact", 1)), {"max_score": 0.5}, Reason.SCORE),
    ],
)
def test_every_answer_that_is_no_example_has_one_reason(given: Answer, criteria: Any, reason: Reason) -> None:
    assert one(given, **criteria) is reason


def test_settings_of_a_predictor_are_no_inputs() -> None:
    row = one(
        answer({"question": "why", "config": {"n": 2}, "lm": "<dspy.clients.lm.LM>"}, fields="question -> answer")
    )
    assert isinstance(row, Row)
    assert row.inputs == {"question": "why"}


def test_of_the_same_inputs_the_one_that_most_is_known_of() -> None:
    answers = [
        answer(started=4),
        answer(None, {"answer": "well"}, by_code("judge", 1.0), started=3),
        answer(None, {"answer": "wrong"}, expected("answer", "right"), started=2),
        answer({"question": "else"}, started=1),
    ]
    found = select(answers, Criteria())
    assert [row.labels for row in found.rows] == [{"answer": "right"}, {"answer": "so"}]
    assert found.skipped == {Reason.DUPLICATE: 2}
    # Two rows of a dataset are two, also with the same inputs; the same row twice is one.
    rows = [answer(None, None, expected='{"answer": "a"}', example_id=name) for name in ("1", "2", "1")]
    assert select(rows, Criteria()).skipped == {Reason.DUPLICATE: 1}
    assert select([*rows, answer()], Criteria()).skipped == {Reason.DUPLICATE: 2}


def test_failed_answers_come_first() -> None:
    def asked(question: str, *said: Judgement, started: int) -> Answer:
        return answer({"question": question}, None, *said, started=started)

    answers = [
        asked("right", by_code("exact", 1.0), started=1),
        asked("unknown", started=2),
        asked("wrong", by_code("exact", 0.0), started=3),
        asked("person says wrong", by_code("exact", 1.0), by_person("thumbs", False), started=4),
        asked("corrected", by_person("thumbs", True), expected("answer", "but"), started=5),
    ]
    found = select(answers, Criteria(unlabelled=True))
    order = [row.inputs["question"] for row in found.rows]
    assert order == ["corrected", "wrong", "person says wrong", "unknown", "right"]
    by_time = select(answers, Criteria(unlabelled=True, failures_first=False, limit=2))
    assert [row.inputs["question"] for row in by_time.rows] == ["right", "unknown"]
    assert by_time.skipped == {Reason.LIMIT: 3}
    assert "3 skipped: above the limit" in " ".join(by_time.summary().split())


# --- properties -----------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=8) | st.sampled_from(["[masked]", "a…[cut 3 characters]", "<a.B>", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=3,
)
JUDGEMENTS = st.builds(
    Judgement,
    st.just(TRACE),
    st.none(),
    st.sampled_from(["answer", "question", "thumbs", "expected"]),
    st.booleans() | st.floats(allow_nan=False) | TEXTS,
    human=st.booleans(),
    expectation=st.booleans(),
    when=st.integers(0, 3),
)
ANSWERS = st.builds(
    Answer,
    inputs=st.none() | st.text(max_size=5) | st.builds(lambda text: json.dumps({"question": text}), JSON),
    outputs=st.none() | st.builds(lambda value: json.dumps({"answer": value}), JSON) | JSON.map(json.dumps),
    expected=st.none() | st.just('{"answer": "right"}'),
    error=st.none() | st.just("ValueError"),
    session=st.none() | st.sampled_from("abc"),
    example_id=st.none() | st.sampled_from("12"),
    trace_id=st.just(TRACE),
    started=st.integers(0, 5),
    judgements=st.lists(JUDGEMENTS, max_size=3).map(tuple),
    unclear=st.booleans(),
)
CRITERIA = st.builds(
    Criteria,
    metric=st.none() | st.just("thumbs"),
    min_score=st.none() | st.just(0.5),
    feedback=st.booleans(),
    unlabelled=st.booleans(),
    failures_first=st.booleans(),
    limit=st.none() | st.integers(1, 5),
)


@settings(deadline=None)
@given(st.lists(ANSWERS, max_size=6), CRITERIA)
def test_taken_and_skipped_are_all_that_was_seen(answers: list[Answer], criteria: Criteria) -> None:
    found = select(answers, criteria)
    assert len(found.rows) + sum(found.skipped.values()) == len(answers)
    for row in found.rows:
        assert row.inputs
        assert row.labels or criteria.unlabelled
        assert loss_of(dict(row.inputs)) is None
        assert loss_of({name: value for name, value in row.labels.items() if name not in row.corrected}) is None


ROWS = st.lists(
    st.builds(
        Row,
        inputs=st.just({"question": "why"}),
        labels=st.just({}),
        id=st.text("0123456789abcdef", min_size=4, max_size=4),
        session=st.none() | st.sampled_from("abcdef"),
        user=st.none() | st.sampled_from("xy"),
    ),
    max_size=40,
    unique_by=lambda row: row.id,
)


@settings(deadline=None)
@given(ROWS, st.floats(0.05, 0.95), st.sampled_from(["session", "user", "example"]), st.randoms(use_true_random=False))
def test_a_split_keeps_sessions_whole_and_loses_nothing(rows: list[Row], share: float, by: Any, random: Any) -> None:
    train, dev = split(rows, share, by)
    assert sorted([*train, *dev]) == list(range(len(rows)))
    groups: dict[str, set[bool]] = {}
    for part in (train, dev):
        for place in part:
            key = rows[place].id if by == "example" else getattr(rows[place], by) or rows[place].id
            groups.setdefault(key, set()).add(part is train)
    assert all(len(sides) == 1 for sides in groups.values())
    assert len(groups) < 2 or (train and dev)
    shuffled = random.sample(rows, len(rows))
    other, _ = split(shuffled, share, by)
    assert {shuffled[place].id for place in other} == {rows[place].id for place in train}
    if by == "example" and rows:
        assert abs(len(train) - share * len(rows)) <= 1


@pytest.mark.parametrize(("train", "by"), [(0.0, "session"), (1.0, "session"), (float("nan"), "user"), (0.5, "day")])
def test_a_split_that_cannot_be(train: float, by: Any) -> None:
    with pytest.raises(NoExamplesError, match="choose"):
        split((), train, by)


# --- what content capture leaves out --------------------------------------------------------------------------------


class Opaque:
    pass


def captured(value: Any, limit: int = 10_000) -> Any:
    return json.loads(Content(limit).json(value))


@pytest.mark.parametrize(
    ("value", "loss"),
    [
        ({"a": "x" * 20_000}, Loss.CUT),
        ({"a": list(range(2000))}, Loss.CUT),
        ({str(key): key for key in range(2000)}, Loss.CUT),
        ({"api_key": "a-value-that-nobody-sees"}, Loss.MASKED),
        ({"a": "sk-proj-" + "aB3" * 20}, Loss.MASKED),
        ({"a": Opaque()}, Loss.NO_VALUE),
        ({"a": object()}, Loss.NO_VALUE),
        ({"a": (each for each in "abc")}, Loss.NO_VALUE),
        ({"a": b"abc"}, Loss.NO_VALUE),
        ({"a": 2**200}, Loss.NO_VALUE),
        ({"a": Opaque}, Loss.NO_VALUE),
        ({"a": len}, Loss.NO_VALUE),
        ({"a": "data:image/png;base64," + "iVBORw0KGgo" * 40}, Loss.NO_VALUE),
        ({"a": "1 < 2 > 0, <b>bold</b>, <p class='x'>, …", "b": [1, 2.5, None, True, {"c": "[mask]"}]}, None),
    ],
)
def test_content_capture_leaves_marks_that_are_recognised(value: Any, loss: Loss | None) -> None:
    assert loss_of(captured(value)) is loss


def test_a_value_that_contains_itself_and_an_array() -> None:
    numpy = pytest.importorskip("numpy")
    around: list[Any] = [1]
    around.append(around)
    assert loss_of(captured(around)) is Loss.CUT
    assert loss_of(captured({"a": numpy.zeros((3, 4))})) is Loss.NO_VALUE


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(st.characters(codec="ascii"), max_size=2000),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=5),
    max_leaves=20,
)


@settings(deadline=None)
@given(PLAIN)
def test_without_a_mark_a_value_is_what_it_was(value: Any) -> None:
    found = captured(value, 1000)
    assert loss_of(found) is not None or found == value
