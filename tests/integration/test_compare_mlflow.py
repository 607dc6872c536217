"""Comparisons from a real MLflow, a server and a sqlite store: runs, experiments, and answers in production."""

from __future__ import annotations

import contextlib
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

import dspy_otel
from dspy_otel import cli, program_id, semconv
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family
from dspy_otel.decide import CannotCompareError, find_results, list_runs
from dspy_otel.decide.overview import grouped, summaries
from dspy_otel.decide.results import read_spans
from tests.decide.test_compare import ROWS, Asking, Failing, exact
from tests.optimizers.common import RUNS, quietly, scripted_lm
from tests.support.mlflow_store import Store
from tests.support.nightly import at_night

pytest.importorskip("mlflow")
pytest.importorskip("scipy")
pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def named_by_the_environment(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)


def test_an_optimization_says_the_same_from_mlflow_and_from_memory(store: Store, capsys: Any) -> None:
    lm = scripted_lm()
    store.instrument()
    program, _ = quietly(RUNS["MIPROv2"], lm)
    store.flush()
    runs = store.runs()
    (top,) = [run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags]
    run_id = top.info.run_id
    found = dspy_otel.compare(f"{run_id}#baseline", run_id)
    spans = store.spans.get_finished_spans()
    best = find_results(spans)
    expected = {row.key: (row.scores, row.example.prediction, row.example.inputs) for row in best.rows}
    assert {row.key: (row.scores, row.example.prediction, row.example.inputs) for row in found.b.rows} == expected
    assert found.b.program is not None
    assert found.b.program.id == program_id(program)
    assert found.programs_known
    assert found.b.metrics == best.metrics
    assert (found.b.parse_failures, found.b.size) == (best.parse_failures, best.size)
    assert found.b.models == best.models
    assert found.b.usage.lm_calls == best.usage.lm_calls
    assert len(found.b.seconds) == len(best.seconds) == 8
    # Other names for the same: the experiment, and the run of the trial itself.
    assert find_results(store.experiment).rows == found.b.rows
    winner = next(run for run in runs.values() if run.data.tags.get("dspy.winner") == "true")
    assert find_results(winner.info.run_id).rows == found.b.rows
    number = winner.data.tags[semconv.TRIAL_NUMBER]
    assert find_results(f"{run_id}#{number}").rows == found.b.rows
    assert cli.main(["compare", f"{run_id}#baseline", run_id, "--fail-on-regression"]) == int(found.regression)
    assert "MIPROv2 ColourFamily" in capsys.readouterr().out


def test_evaluations_and_the_verdicts_of_people(store: Store) -> None:
    store.instrument()
    for answers, program in ((["right"] * 12, Asking("Answer.")), (["right"] * 12, Failing("Answer in a word."))):
        with dspy.context(lm=DummyLM([{"answer": answer} for answer in answers])):
            dspy.Evaluate(devset=ROWS, metric=exact, num_threads=1, display_progress=False, max_errors=100)(program)
    store.flush()
    good, bad = sorted(store.runs().values(), key=lambda run: run.info.start_time)
    found = dspy_otel.compare(good.info.run_id, bad.info.run_id)
    (score,) = found.scores
    failing = sum(row.question.endswith(("1", "2")) for row in ROWS)
    assert (score.failed.b, score.result.pairs, score.result.losses) == (failing, 12, failing)
    by_program = dspy_otel.compare(
        program_id(Asking("Answer.")),
        f"{store.experiment}#{program_id(Failing('Answer in a word.'))}",
        experiment=store.experiment,
    )
    assert by_program.scores == found.scores

    # A person's verdict on the same traces is another metric.
    from mlflow.entities import AssessmentSource, Feedback
    from mlflow.tracing.client import TracingClient

    traces = {run.info.run_id: store.traces(run) for run in (good, bad)}
    for run_id, of_run in traces.items():
        for trace in of_run:
            source = AssessmentSource("HUMAN", "somebody")
            feedback = Feedback(name="helpful", value=run_id == good.info.run_id, source=source)
            TracingClient(store.uri).log_assessment(trace.info.trace_id, feedback)
    found = dspy_otel.compare(good.info.run_id, bad.info.run_id)
    assert [score.metric for score in found.scores] == ["exact", "helpful"]
    assert (found.scores[1].result.losses, found.scores[1].regression) == (12, True)


def test_answers_in_production_with_feedback(store: Store) -> None:
    from mlflow.entities import AssessmentSource, Feedback
    from mlflow.tracing.client import TracingClient

    store.instrument()
    programs = Asking("Answer."), Asking("Answer in a word.")
    for program in programs:
        with dspy.context(lm=DummyLM([{"answer": "right"}] * 9)):
            for place in range(9):
                program(question=f"question {place}{' is long' * 1000}")  # MLflow's preview has the beginning
    store.flush()
    ids = [program_id(program) for program in programs]
    with pytest.raises(CannotCompareError, match="none of the 9 answers of that program has a score"):
        dspy_otel.compare(*ids, experiment=store.experiment)
    client = TracingClient(store.uri)
    for trace in store.client.search_traces(locations=[store.experiment_id], include_spans=False, max_results=100):
        value = "yes" if trace.info.tags[semconv.PROGRAM_ID] == ids[0] else "no"
        feedback = Feedback(name="thumbs", value=value, source=AssessmentSource("HUMAN", "somebody"))
        client.log_assessment(trace.info.trace_id, feedback)
    found = dspy_otel.compare(*ids, experiment=store.experiment)
    (score,) = found.scores
    assert (score.metric, score.result.pairs, score.result.losses) == ("thumbs", 9, 9)
    assert found.a.what == "9 answers with a score, of 9"
    assert len(found.a.seconds) == 9
    assert found.a.usage.lm_calls == 9
    assert [change.name for change in found.predictors] == ["ask"]


def test_answers_below_requests(store: Store) -> None:
    from mlflow.entities import AssessmentSource, Feedback
    from mlflow.tracing.client import TracingClient

    store.instrument()
    programs = Asking("Answer."), Asking("Answer in a word.")
    tracer = store.provider.get_tracer("a web framework")
    for version, program in enumerate(programs):
        # They were evaluated, too, before they went there; and what people say goes before that.
        with dspy.context(lm=DummyLM([{"answer": "right"}] * 12)):
            dspy.Evaluate(devset=ROWS, metric=exact, num_threads=1, display_progress=False)(program)
        with dspy.context(lm=DummyLM([{"answer": "right"}] * 9)):
            for place in range(9):
                # Some are called without a request, and count as well.
                with tracer.start_as_current_span(f"POST /v{version}") if place % 3 else contextlib.nullcontext():
                    program(question=f"question {place}")
    store.flush()
    client = TracingClient(store.uri)
    found = dspy_otel.compare(*map(program_id, programs), experiment=store.experiment)
    assert found.a.what == "evaluation of Asking"  # as long as nobody has said anything
    for trace in store.client.search_traces(locations=[store.experiment_id], include_spans=False, max_results=100):
        tags = trace.info.tags
        if semconv.EVALUATION_ID in tags:
            continue
        first = tags["mlflow.traceName"] == "POST /v0" or tags.get(semconv.PROGRAM_ID) == program_id(programs[0])
        value = "yes" if first else "no"
        feedback = Feedback(name="thumbs", value=value, source=AssessmentSource("HUMAN", "somebody"))
        client.log_assessment(trace.info.trace_id, feedback)
    found = dspy_otel.compare(*map(program_id, programs), experiment=store.experiment)
    (score,) = found.scores
    assert (score.metric, score.result.pairs, score.result.losses) == ("thumbs", 9, 9)
    assert found.a.what == "9 answers with a score (and not: evaluation of Asking)"
    assert len(found.a.seconds) == 9
    # A version that has served nobody yet is compared by what both have: their evaluations.
    third = Asking("Answer as a rhyme.")
    with dspy.context(lm=DummyLM([{"answer": "right"}] * 12)):
        dspy.Evaluate(devset=ROWS, metric=exact, num_threads=1, display_progress=False)(third)
    store.flush()
    found = dspy_otel.compare(program_id(programs[0]), program_id(third), experiment=store.experiment)
    assert found.a.what == "evaluation of Asking (and not: 9 answers with a score)"
    assert [score.metric for score in found.scores] == ["exact"]


@pytest.mark.parametrize("uri", ["sqlite", *at_night("server")], indirect=True)
def test_what_a_metric_evaluates_is_part_of_the_optimization(store: Store) -> None:
    judge = Asking("Judge.")

    def judged(example: Any, prediction: Any, trace: Any = None) -> bool:
        dspy.Evaluate(devset=ROWS[:1], metric=exact, num_threads=1, display_progress=False)(judge)
        return exact(example, prediction)

    store.instrument()
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=judged, num_candidate_programs=1, max_bootstrapped_demos=1, max_labeled_demos=1, num_threads=1
    )
    with dspy.context(lm=DummyLM([{"answer": "right"}] * 40)):
        optimizer.compile(Asking(), trainset=ROWS[:2], valset=ROWS[:2])
    store.flush()
    (of_spans,) = summaries(read_spans(store.spans.get_finished_spans()))
    ((found,),) = (group.runs for group in list_runs(experiment=store.experiment))
    assert (found.title, found.best, found.usage.lm_calls) == (of_spans.title, 1, of_spans.usage.lm_calls)
    with pytest.raises(CannotCompareError, match="no answers and no evaluations of that program"):
        find_results(program_id(judge), experiment=store.experiment)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("0" * 32, "There is no run 0000"),
        ("no-such-experiment", "MLflow has no experiment 'no-such-experiment'."),
        ("0" * 16, "no answers and no evaluations of that program"),
        ("Default", "has no optimization and no evaluation"),
    ],
)
def test_what_is_not_there_is_one_sentence(store: Store, reference: str, reason: str, capsys: Any) -> None:
    store.provider.get_tracer("t").start_span("s").end()
    store.flush()
    capsys.readouterr()  # what MLflow says of a new store
    assert cli.main(["compare", reference, reference, "--experiment", store.experiment]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("uri", ["sqlite", *at_night("server")], indirect=True)
def test_runs_and_one_of_them(store: Store, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspy_otel.mlflow.backends.rest._RUNS", 2)  # so that an answer does not have all of them
    lm = scripted_lm()
    store.instrument()
    quietly(RUNS["MIPROv2"], lm)
    quietly(RUNS["BootstrapFewShotWithRandomSearch"], lm)
    dspy.Evaluate(devset=load_examples("val", 8), metric=same_family, num_threads=2, display_progress=False)(
        ColourFamily()
    )
    store.flush()
    # All on the same eight examples with the same metric: one group, as from the spans alone.
    of_spans = grouped(summaries(read_spans(store.spans.get_finished_spans())))
    (group,) = list_runs(experiment=store.experiment, examples=True)
    (expected,) = of_spans
    assert (group.metric, group.digest, group.size) == (expected.metric, expected.digest, 8)
    ids = ("title", "outcome", "metric", "digest", "size", "trials", "program", "models")
    for one, other in zip(group.runs, expected.runs, strict=True):
        assert [getattr(one, name) for name in ids] == [getattr(other, name) for name in ids]
        assert (one.baseline, one.best) == pytest.approx((other.baseline, other.best), abs=1e-4)
        assert one.usage.lm_calls == other.usage.lm_calls
    assert group.examples is not None
    assert len(group.examples.runs) == 3
    assert cli.main(["runs", "--experiment", store.experiment, "--examples"]) == 0
    text = capsys.readouterr().out
    assert all(run.id in text for run in group.runs)
    winner = next(run for run in store.runs().values() if run.data.tags.get("dspy.winner") == "true")
    for run_id in (group.runs[-1].id, winner.info.run_id):
        assert cli.main(["show", run_id]) == 0
        assert "Baseline (A) against winner (B)" in capsys.readouterr().out
    assert cli.main(["show", group.runs[0].id]) == 0
    assert "evaluation of ColourFamily, finished" in capsys.readouterr().out
    for missing in ("0" * 32, "no run"):
        assert cli.main(["show", missing]) == 2
        assert f"There is no run {missing}" in capsys.readouterr().err


@pytest.mark.parametrize("uri", ["sqlite", *at_night("server")], indirect=True)
@pytest.mark.parametrize("optimizer", ["GEPA", "MIPROv2"])
def test_why_it_got_better_is_the_same_from_mlflow_and_from_memory(store: Store, optimizer: str, capsys: Any) -> None:
    lm = scripted_lm()
    store.instrument()
    program, _ = quietly(RUNS[optimizer], lm)
    store.flush()
    expected = dspy_otel.why(store.spans.get_finished_spans())
    (run_id,) = [one.info.run_id for one in store.runs().values() if "mlflow.parentRunId" not in one.data.tags]
    found = dspy_otel.why(run_id)
    assert (found.sentences, found.demos, found.leaks) == (expected.sentences, expected.demos, expected.leaks)
    assert found.leaks
    assert found.train_and_validation == expected.train_and_validation
    assert (found.rows_searched, found.rows_known, found.missing) == (24, 24, ())
    numbers = [(one.candidate, one.trial, one.changes, one.before, one.after, one.part_after) for one in expected.steps]
    assert [(one.candidate, one.trial, one.changes, one.before, one.after, one.part_after) for one in found.steps] == (
        numbers
    )
    assert found.lengths == expected.lengths
    assert [one.candidate for one in found.spending] == [one.candidate for one in expected.spending]
    assert dspy_otel.why(dspy_otel.optimization(program)) == found
    assert cli.main(["show", run_id, "--why"]) == 0
    assert capsys.readouterr().out.endswith(str(found))
