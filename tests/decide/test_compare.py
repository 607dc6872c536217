"""Real evaluations and optimizations, compared from memory and from files of OTLP JSON; and the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

import dspy_otel
from dspy_otel import cli, program_id, semconv
from dspy_otel.decide import CannotCompareError, find_results
from dspy_otel.decide.evidence import BETTER, WORSE
from dspy_otel.decide.results import read_spans
from dspy_otel.record.history import optimizations
from dspy_otel.record.otlp import encode
from tests.optimizers.common import RUNS, quietly, scripted_lm
from tests.reports.test_optimizations import otlp_json

pytest.importorskip("scipy")

RESULT = semconv.LOG_EVALUATION_RESULT
ROWS = [dspy.Example(question=f"question {place}", answer="right").with_inputs("question") for place in range(12)]


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(prediction.answer == example.answer)


def length(example: Any, prediction: Any, trace: Any = None) -> float:
    return 1 / len(prediction.answer)


class Asking(dspy.Module):
    """One predictor with instructions."""

    def __init__(self, instructions: str = "Answer.") -> None:
        super().__init__()
        self.ask = dspy.Predict(dspy.Signature("question -> answer", instructions))

    def forward(self, question: str) -> Any:
        return self.ask(question=question)


class Failing(Asking):
    def forward(self, question: str) -> Any:
        if question.endswith(("1", "2")):
            raise LookupError("no")
        return super().forward(question)


def evaluate(
    telemetry: Any, answers: Sequence[str], program: Any = None, metric: Any = exact, rows: Any = ROWS
) -> tuple[Any, ...]:
    """The spans of an evaluation in which the model gives these answers."""
    telemetry.clear()
    program = program or Asking()
    with dspy.context(lm=DummyLM([{"answer": answer} for answer in answers])):
        dspy.Evaluate(devset=rows, metric=metric, num_threads=1, display_progress=False, max_errors=100)(program)
    return tuple(telemetry.exporter.get_finished_spans())


def write(path: Path, spans: Iterable[Any]) -> str:
    path.write_text(otlp_json(spans))
    return str(path)


def test_evaluations_in_memory(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    a = evaluate(telemetry, ["right"] * 12)
    b = evaluate(telemetry, ["right"] * 2 + ["wrong"] * 10)
    found = dspy_otel.compare(a, b)
    (score,) = found.scores
    assert (score.metric, score.result.a, score.result.b) == ("exact", 1.0, pytest.approx(2 / 12))
    assert (score.verdict, found.regression) == (WORSE, True)
    change = score.changes[0]
    assert (change.of_a.prediction, change.of_b.prediction) == ({"answer": "right"}, {"answer": "wrong"})
    assert change.of_b.inputs == {"question": "question 2"}
    assert found.a.usage.lm_calls == 12
    assert found.a.program is not None
    assert found.a.program.id == program_id(Asking())
    assert len(found.a.seconds) == 12
    assert "the same program" in str(found)
    assert dspy_otel.compare(b, a).verdict == BETTER


def test_a_file_says_the_same_as_memory(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument(capture_content="span_only")
    a, b = evaluate(telemetry, ["right"] * 12), evaluate(telemetry, ["wrong"] * 12)
    of_files = dspy_otel.compare(write(tmp_path / "a.jsonl", a), tmp_path / write(tmp_path / "b.jsonl", b))
    of_memory = dspy_otel.compare(a, b)
    assert of_files.scores == of_memory.scores
    assert of_files.a.rows == of_memory.a.rows
    for name, spans in (("a", a), ("b", b)):
        (tmp_path / f"{name}.pb").write_bytes(b"".join(len(one).to_bytes(4, "big") + one for one in [encode(spans)]))
    in_protobuf = [str(tmp_path / name) for name in ("a.pb", "b.pb")]
    assert dspy_otel.compare(*in_protobuf).scores == of_memory.scores
    assert cli.main(["compare", *in_protobuf, "--fail-on-regression"]) == 1
    assert [cli.main([command, in_protobuf[0]]) for command in ("runs", "show")] == [0, 0]


def test_without_content_rows_are_paired_all_the_same(telemetry: Any) -> None:
    telemetry.instrument()
    found = dspy_otel.compare(evaluate(telemetry, ["right"] * 12), evaluate(telemetry, ["wrong"] * 12))
    assert (found.scores[0].result.pairs, found.scores[0].result.losses) == (12, 12)
    assert "question" not in str(found)


def test_instructions_that_differ_are_shown_of_evaluations_too(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    a, b = evaluate(telemetry, ["right"] * 12), evaluate(telemetry, ["right"] * 12, Asking("Answer in a word."))
    found = dspy_otel.compare(a, b)
    (change,) = found.predictors
    assert (change.name, change.demos, found.programs_known) == ("ask", None, True)
    assert [piece.text for piece in change.instructions if piece.kind == "added"] == ["Answer in a word"]
    assert f"{program_id(Asking())} -> {program_id(Asking('Answer in a word.'))}; demos were not recorded" in str(found)
    # With other demos alone, it says that this is all that is known.
    shown = Asking()
    shown.ask.demos = [dspy.Example(question="q", answer="right")]
    found = dspy_otel.compare(a, evaluate(telemetry, ["right"] * 12, shown))
    text = " ".join(str(found).split())
    assert "the instructions are the same; demos were not recorded" in text
    assert found.predictors == ()


def test_failures_of_programs_and_of_adapters_are_counted(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    a = evaluate(telemetry, ["right"] * 12)
    found = dspy_otel.compare(a, evaluate(telemetry, ["right"] * 12, Failing()))
    (score,) = found.scores
    failing = sum(row.question.endswith(("1", "2")) for row in ROWS)
    assert (score.failed.b, score.result.losses) == (failing, failing)
    assert "B: LookupError" in str(found)
    telemetry.clear()
    with dspy.context(lm=DummyLM([{"nothing": "here"}] * 80)):
        dspy.Evaluate(devset=ROWS, metric=exact, num_threads=1, display_progress=False, max_errors=100)(Asking())
    found = dspy_otel.compare(a, telemetry.exporter.get_finished_spans())
    assert found.a.parse_failures == 0
    assert (found.b.parse_failures or 0) >= 12
    assert found.scores[0].failed.b == 12


def test_evaluations_of_one_program_in_a_file_are_repeats_and_metrics(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument(capture_content="span_only")
    good = [*evaluate(telemetry, ["right"] * 12), *evaluate(telemetry, ["right"] * 11 + ["wrong"])]
    good += evaluate(telemetry, ["right"] * 12, metric=length)
    path = write(tmp_path / "a.jsonl", good)
    found = dspy_otel.compare(path, path)
    assert [score.metric for score in found.scores] == ["exact", "length"]
    assert found.scores[0].repeated.a == 12
    assert found.scores[0].result.a == pytest.approx(11.5 / 12)
    assert found.a.what.startswith("3 evaluations of Asking")
    only = dspy_otel.compare(path, path, metric="length")
    assert [score.metric for score in only.scores] == ["length"]


def test_rows_of_another_dataset_cannot_be_compared(telemetry: Any) -> None:
    telemetry.instrument()
    others = [dspy.Example(question=f"other {place}", answer="right").with_inputs("question") for place in range(12)]
    a, b = evaluate(telemetry, ["right"] * 12), evaluate(telemetry, ["right"] * 12, rows=others)
    with pytest.raises(CannotCompareError, match="Other rows"):
        dspy_otel.compare(a, b)


@pytest.mark.parametrize("optimizer", ["MIPROv2", "GEPA", "BootstrapFewShotWithRandomSearch"])
def test_the_baseline_and_the_winner_of_an_optimization(telemetry: Any, optimizer: str, tmp_path: Path) -> None:
    if optimizer == "GEPA":
        pytest.importorskip("gepa")
    lm = scripted_lm()
    telemetry.instrument(capture_content="span_only")
    program, _ = quietly(RUNS[optimizer], lm)
    spans = telemetry.exporter.get_finished_spans()
    (record,) = optimizations(spans)
    path = write(tmp_path / "spans.jsonl", spans)
    found = dspy_otel.compare(f"{path}#baseline", path)
    assert found.a.what.endswith("trial 1 (baseline)")
    assert (found.a.program.id, found.b.program.id) == (record.initial_id, program_id(program))  # type: ignore[union-attr]
    (score,) = found.scores
    scale = 100 if (record.best or 0) > 1 else 1
    assert score.metric == str(record.params["metric"])
    assert (score.result.a * scale, score.result.b * scale) == pytest.approx((record.baseline, record.best), abs=0.01)
    assert found.programs_known
    texts = {name: one.signature.instructions for name, one in program.named_predictors()}
    for change in found.predictors:
        if change.instructions:
            added = "".join(piece.text for piece in change.instructions if piece.kind != "removed")
            assert added == texts[change.name]
    # The same by other names.
    assert find_results(f"{path}#{record.winner}").rows == found.b.rows
    assert find_results(f"{path}#{record.id}/best").rows == found.b.rows
    assert find_results(f"{path}#{record.id}").rows == found.b.rows


def test_instructions_are_those_of_predictors_also_of_one_that_is_the_program(telemetry: Any) -> None:
    telemetry.instrument(capture_content="span_only")
    texts = "Answer.", "Answer in a word."
    a, b = (dspy.Predict(dspy.Signature("question -> answer", text)) for text in texts)
    found = dspy_otel.compare(evaluate(telemetry, ["right"] * 12, a), evaluate(telemetry, ["right"] * 12, b))
    assert ([change.name for change in found.predictors], found.programs_known) == (["self"], True)
    # An agent has a signature and is no predictor.
    agent = dspy.ReAct("question -> answer", tools=[], max_iters=1)
    telemetry.clear()
    thought = {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": "{}"}
    with dspy.context(lm=DummyLM([thought, {"reasoning": "r", "answer": "so"}])):
        agent(question="why")
    recorded = read_spans(telemetry.exporter.get_finished_spans())
    assert {id_: set(texts) for id_, texts in recorded.instructions.items()} == {
        program_id(agent): {name for name, _ in agent.named_predictors()}
    }


# --- production -----------------------------------------------------------------------------------------------------


def answers(telemetry: Any, given: Sequence[str], program: Any) -> list[Any]:
    telemetry.clear()
    with dspy.context(lm=DummyLM([{"answer": answer} for answer in given])):
        for place in range(len(given)):
            program(question=f"question {place}")
    return list(telemetry.exporter.get_finished_spans())


def score_log(span: Any, score: float, *, of_span: bool = False) -> str:
    """As the Collector's file exporter writes the event of an evaluator in production."""
    at: dict[str, Any] = {semconv.GEN_AI_EVALUATION_NAME: {"stringValue": "thumbs"}}
    at[semconv.GEN_AI_EVALUATION_SCORE_VALUE] = (
        {"intValue": str(score)} if type(score) is int else {"doubleValue": score}
    )
    record = {
        "eventName": RESULT,
        "traceId": f"{span.context.trace_id:032x}",
        "spanId": f"{span.context.span_id:016x}" if of_span else "",
        "attributes": [{"key": key, "value": value} for key, value in at.items()],
    }
    return json.dumps({"resourceLogs": [{"scopeLogs": [{"logRecords": [record]}]}]}) + "\n"


def test_answers_in_production_are_paired_by_their_inputs(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument(capture_content="span_only")
    old, new = Asking("Answer."), Asking("Answer in one word.")
    text = ""
    for program, score in ((old, 1.0), (new, 0.0)):
        spans = answers(telemetry, ["right"] * 8, program)
        roots = [span for span in spans if span.parent is None]
        text += otlp_json(spans) + "".join(score_log(root, score) for root in roots[:7])
    path = tmp_path / "production.jsonl"
    path.write_text(text)
    found = dspy_otel.compare(f"{path}#{program_id(old)}", f"{path}#{program_id(new)}")
    (score,) = found.scores
    assert (score.metric, score.result.pairs, score.result.losses) == ("thumbs", 7, 7)
    assert found.a.what == "7 answers with a score, of 8"
    assert found.a.usage.lm_calls == 7
    other = tmp_path / "unscored.jsonl"
    other.write_text(otlp_json(answers(telemetry, ["right"], old)))
    with pytest.raises(CannotCompareError, match="none of the 1 answers of that program has a score"):
        find_results(f"{other}#{program_id(old)}")


def test_whole_numbers_are_scores_too(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument(capture_content="span_only")
    spans = answers(telemetry, ["right"] * 8, Asking())
    path = tmp_path / "production.jsonl"
    path.write_text(otlp_json(spans) + "".join(score_log(span, 1) for span in spans if span.parent is None))
    found = find_results(f"{path}#{program_id(Asking())}")
    assert [row.scores for row in found.rows] == [{"thumbs": 1.0}] * 8
    assert all(row.score == 1.0 for row in dspy_otel.examples(path).rows)


def test_a_score_is_of_its_own_answer(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument(capture_content="span_only")
    first, second = Asking("Ask back."), Asking("Answer.")
    with dspy.context(lm=DummyLM([{"answer": "right"}] * 40)):
        for place in range(8):
            with telemetry.tracer.start_as_current_span("request"):
                first(question=f"question {place}")
                second(question=f"question {place}")
    spans = telemetry.exporter.get_finished_spans()
    scored = [span for span in spans if span.attributes.get(semconv.PROGRAM_ID) == program_id(first)]
    scored = [span for span in scored if span.name.startswith("invoke_workflow")]
    path = tmp_path / "production.jsonl"
    path.write_text(otlp_json(spans) + "".join(score_log(span, 1.0, of_span=True) for span in scored))
    assert len(find_results(f"{path}#{program_id(first)}").rows) == 8
    # That of a request with two answers is of neither.
    with pytest.raises(CannotCompareError, match="none of the 8 answers of that program has a score"):
        find_results(f"{path}#{program_id(second)}")
    path.write_text(otlp_json(spans) + "".join(score_log(span, 1.0) for span in scored))
    with pytest.raises(CannotCompareError, match="none of the 8 answers of that program has a score"):
        find_results(f"{path}#{program_id(first)}")


def test_answers_without_inputs_are_paired_with_nothing(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument()
    old, new = Asking("Answer."), Asking("Answer in one word.")
    text = ""
    for program, score in ((old, 1.0), (new, 0.0)):
        spans = answers(telemetry, ["right"] * 8, program)
        text += otlp_json(spans) + "".join(score_log(span, score) for span in spans if span.parent is None)
    path = tmp_path / "production.jsonl"
    path.write_text(text)
    with pytest.raises(CannotCompareError, match="of A, 8 scored answers, of B, 8 have inputs that were not recorded"):
        dspy_otel.compare(f"{path}#{program_id(old)}", f"{path}#{program_id(new)}")


def test_inputs_that_were_cut_or_masked_name_no_example(telemetry: Any, tmp_path: Path) -> None:
    telemetry.instrument(capture_content="span_only", content_limit=200)
    questions = ["short", "shorter", *("x" * 300 + str(place) for place in range(3)), "sk-" + "a1B2" * 12]
    text = ""
    for program in (Asking("Answer."), Asking("Answer in one word.")):
        telemetry.clear()
        with dspy.context(lm=DummyLM([{"answer": "right"}] * len(questions))):
            for question in questions:
                program(question=question)
        spans = telemetry.exporter.get_finished_spans()
        text += otlp_json(spans) + "".join(score_log(span, 1.0) for span in spans if span.parent is None)
    path = tmp_path / "production.jsonl"
    path.write_text(text)
    found = find_results(f"{path}#{program_id(Asking('Answer.'))}")
    assert [row.key is None for row in found.rows] == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    "line",
    [
        '{"resourceLogs": 1}',
        f'{{"resourceLogs": [{{"scopeLogs": [{{"logRecords": [{{"eventName": "{RESULT}", "traceId": "z"}}]}}]}}]}}',
        '{"resourceSpans": [{"scopeSp',
    ],
)
def test_a_broken_line_is_one_sentence(files: tuple[str, str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Path(files[0]).open("a") as file:
        file.write(line + "\n")
    for command in (["compare", *files], ["runs", files[0]], ["show", files[0]], ["dataset", files[0]]):
        assert cli.main(command) == 2
        assert re.fullmatch(
            r"dspy-otel: .*a\.jsonl cannot be read: line \d+ is no OTLP JSON .*\n", capsys.readouterr().err
        )


def test_lines_of_other_signals_and_empty_values_are_passed_over(files: tuple[str, str]) -> None:
    empty = {"logRecords": [{"eventName": RESULT, "traceId": "01"}, {"body": {}}]}
    empty["logRecords"][0]["attributes"] = [{"key": "gen_ai.evaluation.score.value", "value": {}}]
    lines = [
        {"resourceMetrics": []},
        {"resourceSpans": None, "resourceLogs": None},
        {"resourceLogs": [{"scopeLogs": [empty]}]},
    ]
    with Path(files[0]).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    assert cli.main(["compare", *files, "--fail-on-regression"]) == 1


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(telemetry: Any, tmp_path: Path) -> tuple[str, str]:
    telemetry.instrument(capture_content="span_only")
    a, b = evaluate(telemetry, ["right"] * 12), evaluate(telemetry, ["right"] * 4 + ["wrong"] * 8)
    return write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)


def test_the_exit_status_is_a_gate(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = files
    gate = "--fail-on-regression"
    assert cli.main(["compare", a, b]) == 0
    assert cli.main(["compare", a, b, gate]) == 1
    assert cli.main(["compare", b, a, gate]) == 0
    assert cli.main(["compare", a, a, gate]) == 0
    assert cli.main(["compare", a, b, gate, "--max-drop", "0.7"]) == 0
    assert cli.main(["compare", a, b, gate, "--alpha", "0.0001"]) == 2
    assert capsys.readouterr().err.startswith("dspy-otel: Too few: 12 examples are scored by both")


@pytest.mark.parametrize("alpha", ["0", "1.1", "nan", "many"])
def test_a_level_is_a_share(alpha: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["compare", "a", "b", "--alpha", alpha])
    assert error.value.code == 2
    assert f"use a number above 0 and at most 1, not {alpha}" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["table", "markdown", "json", "junit"])
def test_every_format(files: tuple[str, str], form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *files, "--format", form]) == 0
    out = capsys.readouterr().out
    assert "exact" in out
    assert out.endswith("\n")


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("nothing.jsonl", "there is no nothing.jsonl: name a file that exists"),
        ("{a}#nothing", "there is no such part; there are "),
        ("{a}#best", "there is no finished optimization"),
        ("{tmp}/broken.jsonl", "broken.jsonl is no file of OTLP JSON"),
        ("{tmp}/empty.jsonl", "has no evaluation and no optimization with recorded examples."),
    ],
)
def test_what_is_not_there_is_one_sentence(
    files: tuple[str, str], tmp_path: Path, reference: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jsonl").write_text("nonsense\n")
    (tmp_path / "empty.jsonl").write_text("{}\n")
    given = reference.replace("{a}", files[0]).replace("{tmp}", str(tmp_path))
    for form in ("table", "markdown", "json", "junit"):
        assert cli.main(["compare", files[0], given, "--format", form]) == 2
        found = capsys.readouterr()
        assert reason in found.err
        assert found.err.count("\n") == 1
        assert (reason in found.out.replace("&quot;", '"').replace("\\", "")) is (form != "table")


def test_it_runs_without_dspy_and_mlflow(files: tuple[str, str]) -> None:
    code = (
        "import sys\n"
        "for name in ('dspy', 'mlflow', 'litellm', 'requests', 'packaging', 'filelock', 'platformdirs'):\n"
        "    sys.modules[name] = None\n"
        "from dspy_otel import cli\n"
        f"assert cli.main(['runs', {files[0]!r}]) == cli.main(['show', {files[0]!r}]) == 0\n"
        f"sys.exit(cli.main(['compare', {files[0]!r}, {files[1]!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"12 pairs: B better 0, worse 8, same 4", done.stdout)
