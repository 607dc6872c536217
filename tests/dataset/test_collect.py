"""Examples of real programs' traces, from memory and from files of OTLP; saved, read back, and the command."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM
from opentelemetry import baggage, context

import dspy_otel
from dspy_otel import cli, program_id, semconv
from dspy_otel.dataset import Examples, NoExamplesError, load_examples
from dspy_otel.dataset.selection import Reason
from dspy_otel.record.otlp import encode
from tests.decide.test_compare import Asking, Failing, evaluate, score_log, write


def ask(telemetry: Any, questions: list[str], program: Any = None, session: str | None = None) -> tuple[Any, ...]:
    """The spans of answers in production; the model says "right" and then the number of the answer."""
    telemetry.clear()
    program = program or Asking()
    answers = [{"answer": f"right {place}"} for place in range(len(questions))]
    token = context.attach(baggage.set_baggage(semconv.SESSION_ID, session)) if session else None
    with dspy.context(lm=DummyLM(answers)):
        for question in questions:
            with contextlib.suppress(LookupError):
                program(question=question)
    if token is not None:
        context.detach(token)
    return tuple(telemetry.exporter.get_finished_spans())


@pytest.fixture
def spans(telemetry: Any) -> list[Any]:
    """Six answers in three sessions, two of them failed, and an evaluation."""
    telemetry.instrument(capture_content="span_only")
    found = [*ask(telemetry, ["a", "b"], session="s1"), *ask(telemetry, ["c1", "c3"], Failing("Other."), "s2")]
    found += ask(telemetry, ["d", "a", "x" * 100_000], session="s3")
    return [*found, *evaluate(telemetry, ["right"] * 11 + ["wrong"])]


def test_answers_in_memory(spans: list[Any]) -> None:
    found = dspy_otel.examples(spans)
    assert isinstance(found, Examples)
    assert isinstance(found, list)
    questions = [example.question for example in found]
    # The two of "a" are one, the newer.
    assert questions == ["b", "c3", "d", "a"]
    assert [sorted(example.inputs().keys()) for example in found] == [["question"]] * 4
    assert found[0].labels().toDict() == {"answer": "right 1"}
    assert found.skipped == {Reason.ERROR: 1, Reason.DUPLICATE: 1, Reason.CUT: 1}
    assert (found.seen, [row.session for row in found.rows]) == (7, ["s1", "s2", "s3", "s3"])
    assert "1 skipped: cut at the content limit" in found.summary()


def test_choosing_by_program_and_time(spans: list[Any]) -> None:
    other = program_id(Failing("Other."))
    for choice in ({"program": "Failing"}, {"program_id": other}):
        assert [example.question for example in dspy_otel.examples(spans, **choice)] == ["c3"]
    before, after = [span.start_time for span in spans if span.name.startswith("invoke_workflow")][3:5]
    between = datetime.datetime.fromtimestamp((before + after) / 2e9, datetime.timezone.utc)
    assert dspy_otel.examples(spans, since=between).seen == 3
    assert dspy_otel.examples(spans, until=between).seen == 4
    assert dspy_otel.examples(spans, since="1h").seen == 7
    assert dspy_otel.examples(spans, since=datetime.timedelta(hours=1), until="2100-01-01T00:00:00Z").seen == 7
    with pytest.raises(NoExamplesError, match="There is no answer of a program there"):
        dspy_otel.examples(spans, until="2001-01-01")


def test_rows_of_an_evaluation_keep_their_labels_and_ids(spans: list[Any], telemetry: Any) -> None:
    found = dspy_otel.examples(spans, program="Asking", evaluations=True)
    rows = [row for row in found.rows if row.score is not None]
    assert len(rows) == 12
    assert (rows[0].inputs, rows[0].labels, rows[0].failed) == ({"question": "question 11"}, {"answer": "right"}, True)
    ids = {span.attributes[semconv.EXAMPLE_ID] for span in spans if semconv.EXAMPLE_ID in span.attributes}
    assert {row.id for row in rows} == ids
    # And those of production will have these ids when they are evaluated.
    mine = dspy_otel.examples(spans)
    with dspy.context(lm=DummyLM([{"answer": "right"}] * 4)):
        telemetry.clear()
        dspy.Evaluate(devset=mine, metric=lambda *_: 1.0, num_threads=1, display_progress=False)(Asking())
    again = [span.attributes for span in telemetry.exporter.get_finished_spans() if span.name.startswith("example")]
    assert sorted(at[semconv.EXAMPLE_ID] for at in again) == sorted(row.id for row in mine.rows)


def test_a_trace_with_several_answers_and_a_score(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument(capture_content="span_only")
    with telemetry.tracer.start_as_current_span("GET /") as request:
        ask(telemetry, ["a", "b"])
        request.add_event(
            semconv.LOG_EVALUATION_RESULT,
            {semconv.GEN_AI_EVALUATION_NAME: "thumbs", semconv.GEN_AI_EVALUATION_SCORE_VALUE: 0.0},
        )
    assert dspy_otel.examples(telemetry.exporter.get_finished_spans()).skipped == {Reason.UNCLEAR: 2}
    # On a span of its own it is clear, and so it is where the trace has one answer.
    scored = [*ask(telemetry, ["c"])]
    file = tmp_path / "spans.jsonl"
    write(file, [*scored, *ask(telemetry, ["d"])])
    file.write_text(file.read_text() + score_log(scored[-1], 0.0))
    found = dspy_otel.examples(file)
    assert ([example.question for example in found], found.skipped) == (["d"], {Reason.WRONG: 1})


def test_an_agent_below_a_request_is_an_answer_and_one_inside_a_program_is_none(telemetry: Any) -> None:
    class Team(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.agent = dspy.ReAct("question -> answer", tools=[], max_iters=1)

        def forward(self, question: str) -> Any:
            return self.agent(question=question)

    telemetry.instrument(capture_content="span_only")
    for program in (Team(), Team().agent):
        telemetry.clear()
        lm = DummyLM(
            [
                {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": "{}"},
                {"reasoning": "r", "answer": "so"},
            ]
        )
        with telemetry.tracer.start_as_current_span("GET /"), dspy.context(lm=lm):
            program(question="why")
        (row,) = dspy_otel.examples(telemetry.exporter.get_finished_spans()).rows
        assert (row.inputs, row.labels) == ({"question": "why"}, {"answer": "so"})


def protobuf(path: Path, spans: list[Any]) -> Path:
    path.write_bytes(encode(spans))
    return path


def test_files_say_the_same_as_memory(spans: list[Any], tmp_path: Path) -> None:
    expected = dspy_otel.examples(spans)
    for file in (Path(write(tmp_path / "spans.jsonl", spans)), protobuf(tmp_path / "spans.pb", spans)):
        found = dspy_otel.examples(file)
        assert found.rows == expected.rows
        assert found.skipped == expected.skipped
        only = dspy_otel.examples(f"{file}#{program_id(Failing('Other.'))}")
        assert [example.question for example in only] == ["c3"]
    evaluation = next(span.attributes[semconv.EVALUATION_ID] for span in spans if span.name.startswith("evaluate"))
    assert len(dspy_otel.examples(f"{tmp_path / 'spans.jsonl'}#{evaluation}")) == 12


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_saved_and_read_back(spans: list[Any], tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    found = dspy_otel.examples(spans, evaluations=True)
    path = tmp_path / f"train.{ending}"
    found.save(path)
    found.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    back = load_examples(path)
    assert back.rows == found.rows
    assert [one.toDict() for one in back] == [one.toDict() for one in found]
    if ending == "jsonl":
        line = json.loads(path.read_text().splitlines()[0])
        assert line["question"] == found[0].question
        assert line["dspy_inputs"] == ["question"]


def test_values_that_parquet_would_change_are_refused(tmp_path: Path, telemetry: Any) -> None:
    pytest.importorskip("pyarrow")
    telemetry.instrument(capture_content="span_only")

    class Choosing(Asking):
        def forward(self, question: str) -> Any:
            return dspy.Prediction(answer={question: 1} if question == "a" else [1])

    found = dspy_otel.examples(ask(telemetry, ["a", "b"], Choosing()))
    with pytest.raises(NoExamplesError, match=r"The values of answer have no common type for Parquet: use \.jsonl"):
        found.save(tmp_path / "a.parquet")
    found.save(tmp_path / "a.jsonl")
    assert [one.answer for one in load_examples(tmp_path / "a.jsonl")] == [{"a": 1}, [1]]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_without_content_there_is_nothing_to_learn_from(telemetry: Any) -> None:
    telemetry.instrument()
    assert dspy_otel.examples(ask(telemetry, ["a"])).skipped == {Reason.NO_CONTENT: 1}


def test_an_optimizer_takes_them_and_a_split(spans: list[Any]) -> None:
    train, dev = dspy_otel.examples(spans, evaluations=True).split(0.7)
    assert len(train) + len(dev) == 16
    assert not {row.session for row in train.rows} & {row.session for row in dev.rows} - {None}
    compiled = dspy.LabeledFewShot(k=3).compile(Asking(), trainset=train)
    assert len(compiled.ask.demos) == 3


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_both_parts_and_says_what_it_left_out(
    spans: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "spans.jsonl", spans)
    assert cli.main(["dataset", file]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "4 examples of 7 answers"
    output = tmp_path / "train.jsonl"
    assert cli.main(["dataset", file, "-o", str(output), "--split", "0.5", "--since", "1h", "--by-time"]) == 0
    printed = capsys.readouterr().out
    parts = [load_examples(output), load_examples(tmp_path / "train.dev.jsonl")]
    assert sum(map(len, parts)) == 4
    assert f"{output}: {len(parts[0])}" in printed
    assert "1 skipped: the program raised an error" in printed
    assert cli.main(["dataset", file, "--feedback", "-o", str(tmp_path / "none.jsonl")]) == 1
    captured = capsys.readouterr()
    assert "7 skipped: no feedback of people" in captured.out
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "none.jsonl").exists()


WRONG: list[tuple[list[str], str]] = [
    (["{tmp}/nothing.jsonl"], "nothing.jsonl: name a file that exists"),
    (["{tmp}/empty.jsonl"], "is empty: nothing has been written to it yet"),
    (["{tmp}/text.jsonl"], "text.jsonl is no file of OTLP JSON"),
    (["{tmp}/none.jsonl"], "There is no answer of a program there"),
    (
        ["{tmp}/none.jsonl", "-o", "{tmp}/train.csv"],
        "is no name for a dataset: end it with .jsonl or .parquet",
    ),
    (["{tmp}/none.jsonl", "-o", "{tmp}/no/train.jsonl"], "cannot be written: name a file in a directory that exists"),
    (["{tmp}/none.jsonl", "--split", "0.5"], "--split needs a file to write to: name one with -o"),
    (["{tmp}/none.jsonl", "-o", "{tmp}/a.jsonl", "--split", "80"], "train is 80: choose a share above 0 and below 1"),
    (["{tmp}/none.jsonl", "--since", "yesterday"], "since is yesterday: use a date"),
    (["{tmp}/none.jsonl", "--since", "1d", "--until", "2d"], "since is not before until: no answer is between."),
    (["{tmp}/none.jsonl", "--min-score", "1", "--max-score", "0"], "min_score is 1 and max_score 0"),
    (["{tmp}/none.jsonl", "--min-score", "nan"], "min_score is nan: choose a number."),
    (["{tmp}/none.jsonl", "--passing", "nan"], "passing is nan: choose a number."),
    (["{tmp}/none.jsonl", "--limit", "0"], "limit is 0: choose 1 or more."),
]


@pytest.mark.parametrize(("arguments", "reason"), WRONG, ids=[" ".join(given[1:]) or given[0] for given, _ in WRONG])
def test_every_wrong_input_is_one_sentence(
    tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "none.jsonl").write_text("{}\n")
    (tmp_path / "text.jsonl").write_text("hello\n")
    assert cli.main(["dataset", *(each.replace("{tmp}", str(tmp_path)) for each in arguments)]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


@pytest.mark.parametrize(
    "content", ["{}", "[1]", "hello", '{"dspy_inputs": ["question"]}', '{"dspy_inputs": 3}', "\ud800"]
)
def test_a_file_of_something_else_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(NoExamplesError, match="has no examples that dspy-otel wrote"):
        load_examples(path)
    with pytest.raises(NoExamplesError, match="cannot be read"):
        load_examples(tmp_path / "nothing.jsonl")


def test_a_field_may_have_the_name_of_an_argument(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument(capture_content="span_only")
    with dspy.context(lm=DummyLM([{"answer": "11"}])):
        dspy.Predict("base, other -> answer")(base="2", other="3")
    found = dspy_otel.examples(telemetry.exporter.get_finished_spans())
    found.save(tmp_path / "train.jsonl")
    for (example,) in (found, load_examples(tmp_path / "train.jsonl")):
        assert example.toDict() == {"base": "2", "other": "3", "answer": "11"}


def test_answers_are_read_one_by_one(spans: list[Any]) -> None:
    reader: Callable[..., Any] = dspy_otel.examples
    assert reader(iter(spans)).rows == reader(spans).rows
