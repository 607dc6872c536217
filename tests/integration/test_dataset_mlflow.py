"""From traces in a real MLflow to a better program in use: people correct, an optimizer learns, the alias moves."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import dspy
import pytest
from opentelemetry import baggage, context

import dspy_otel
from dspy_otel import cli, program_id, semconv
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family
from dspy_otel.dataset import NoExamplesError
from dspy_otel.dataset import load_examples as load_saved
from dspy_otel.dataset.selection import Reason
from dspy_otel.mlflow import load_best
from tests.optimizers.common import quietly
from tests.support.mlflow_store import Store
from tests.support.nightly import at_night

pytest.importorskip("mlflow")
pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def named_by_the_environment(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)


class Person:
    """Somebody who looks at traces in MLflow, through its client."""

    def __init__(self, store: Store) -> None:
        from mlflow.entities import AssessmentSource
        from mlflow.tracing.client import TracingClient

        self.store, self.client = store, TracingClient(store.uri)
        self.source = AssessmentSource("HUMAN", "somebody")

    def traces(self) -> dict[str, str]:
        """Ids of the traces of production, by the first of their inputs."""
        found = self.store.client.search_traces(locations=[self.store.experiment_id], max_results=200)
        return {
            str(next(iter(trace.data.spans[0].inputs.values()))): trace.info.trace_id
            for trace in found
            if semconv.EVALUATION_ID not in trace.info.tags and semconv.OPTIMIZER_RUN_ID not in trace.info.tags
        }

    def judges(self, trace_id: str, value: Any, rationale: str | None = None) -> None:
        from mlflow.entities import Feedback

        self.client.log_assessment(
            trace_id, Feedback(name="thumbs", value=value, source=self.source, rationale=rationale)
        )

    def corrects(self, trace_id: str, field: str, value: Any) -> None:
        from mlflow.entities import Expectation

        self.client.log_assessment(trace_id, Expectation(name=field, value=value, source=self.source))


@pytest.mark.parametrize("uri", ["server", *at_night("sqlite")], indirect=True)
def test_run_correct_make_a_dataset_optimize_compare_promote(store: Store, tmp_path: Any, capsys: Any) -> None:
    pytest.importorskip("scipy")
    from dspy_otel.cli.demo.lm import embedded_lm

    store.instrument()
    lm = embedded_lm()
    names = load_examples("train", 24)
    with dspy.context(lm=lm):
        for place, name in enumerate(names):
            token = context.attach(baggage.set_baggage(semconv.SESSION_ID, f"session {place // 3}"))
            ColourFamily()(colour_name=name.colour_name)
            context.detach(token)
    store.flush()

    before = dspy_otel.examples(store.experiment, program="ColourFamily")
    assert (before.seen, len(before), before.skipped) == (24, 24, {})
    truth = {name.colour_name: name.family for name in names}
    wrong = [example.colour_name for example in before if example.family != truth[example.colour_name]]
    right = [example.colour_name for example in before if example.family == truth[example.colour_name]]
    assert len(wrong) >= 4
    assert right
    person, corrected = Person(store), wrong[:3]
    traces = person.traces()
    for name in corrected:
        person.corrects(traces[name], "family", truth[name])
    person.judges(traces[corrected[0]], False, "no, look again")
    person.judges(traces[wrong[3]], "no")
    person.judges(traces[right[0]], True)

    # From the command, as from Python.
    file = tmp_path / "train.jsonl"
    arguments = ["dataset", store.experiment, "--program-id", str(program_id(ColourFamily())), "-o", str(file)]
    assert cli.main([*arguments, "--since", "1h", "--split", "0.7"]) == 0
    printed = capsys.readouterr().out
    assert "23 examples of 24 answers: 3 of failed answers, 3 corrected by people" in printed
    assert "1 skipped: judged wrong, and nobody said what is right" in printed
    parts = load_saved(file), load_saved(tmp_path / "train.dev.jsonl")
    found = dspy_otel.examples(store.experiment)
    assert [len(part) for part in parts] == [len(part) for part in found.split(0.7)]
    assert sorted(row.id for part in parts for row in part.rows) == sorted(row.id for row in found.rows)
    assert not {row.session for row in parts[0].rows} & {row.session for row in parts[1].rows}

    assert {example.colour_name for example in found[:3]} == set(corrected)
    assert all(example.family == truth[example.colour_name] for example in found[:3])
    assert all(row.corrected == ("family",) and row.failed for row in found.rows[:3])
    assert found.skipped == {Reason.WRONG: 1}
    texts = [row.feedback for row in found.rows if row.inputs["colour_name"] == corrected[0]]
    assert texts == [("no, look again",)]
    (good,) = [row for row in found.rows if row.score == 1.0]
    assert good.inputs == {"colour_name": right[0]}
    only = dspy_otel.examples(store.experiment, feedback=True, unlabelled=True)
    assert (len(only), only.skipped) == (5, {Reason.NO_FEEDBACK: 19})

    # What people said is right, and a validation set of the same kind.
    val = load_examples("val", 10)
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=same_family, max_bootstrapped_demos=2, max_labeled_demos=8, num_candidate_programs=2, num_threads=2
    )
    with dspy.context(lm=lm):
        learned = quietly(optimizer.compile, ColourFamily(), trainset=found, valset=val)
    store.flush()
    runs = store.runs()
    (run,) = [one for one in runs.values() if "mlflow.parentRunId" not in one.data.tags]
    run_id = run.info.run_id
    compared = dspy_otel.compare(f"{run_id}#baseline", run_id)
    assert compared.b.program is not None
    assert compared.b.program.id == program_id(learned)
    assert compared.scores[0].result.difference >= 0
    assert cli.main(["compare", f"{run_id}#baseline", run_id, "--fail-on-regression"]) == 0
    assert cli.main(["promote", run_id, "--alias", "production"]) == 0
    loaded = load_best(ColourFamily(), alias="production", allow_unsafe_lm_state=True)
    assert program_id(loaded) == program_id(learned)

    # Its answers carry its id; those of the optimization are no production.
    with dspy.context(lm=lm):
        loaded(colour_name="a name of its own")
    store.flush()
    new = dspy_otel.examples(f"{store.experiment}#{program_id(loaded)}")
    assert [example.colour_name for example in new] == ["a name of its own"]
    assert dspy_otel.examples(program_id(loaded), experiment=store.experiment).rows == new.rows
    # The rows of a trial are those of its dataset, with their own labels and ids.
    trial = next(one for one in runs.values() if one.data.tags.get("dspy.winner") == "true")
    rows = dspy_otel.examples(trial.info.run_id)
    assert sorted(example.colour_name for example in rows) == sorted(example.colour_name for example in val)
    assert {example.colour_name: example.family for example in rows} == {
        example.colour_name: example.family for example in val
    }
    with pytest.raises(NoExamplesError, match="is no evaluation and no trial"):
        dspy_otel.examples(run_id)


def test_values_keep_their_types_and_what_is_lost_is_counted(store: Store) -> None:
    class Echo(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict("question -> answer")

        def forward(self, question: Any) -> Any:
            if question == "raise":
                raise LookupError("no")
            return dspy.Prediction(answer=question)

    values: list[Any] = [
        "text",
        1,
        1.0,
        0.5,
        2**100,
        True,
        None,
        [],
        {},
        {"a": [1, {"b": None}], "c_d": "é"},
        "1",
        "[1]",
    ]
    store.instrument(content_limit=2000)
    lost = {"raise": Reason.ERROR, "x" * 5000: Reason.CUT, "sk-proj-" + "aB3" * 20: Reason.MASKED}
    for value in [*values, object(), *lost]:
        with contextlib.suppress(LookupError):
            Echo()(question=value)
    store.flush()
    found = dspy_otel.examples(store.experiment, failures_first=False)
    unread: dict[Reason, int] = {}
    if store.uri.startswith("http"):  # a server of MLflow's fails to send such a number
        values.remove(2**100)
        unread = {Reason.NO_CONTENT: 1}
    assert json.dumps([example.question for example in found]) == json.dumps(values)
    assert json.dumps([example.answer for example in found]) == json.dumps(values)
    assert found.skipped == {**dict.fromkeys(lost.values(), 1), Reason.NO_VALUE: 1, **unread}


def test_answers_below_a_request_and_a_trace_with_two(store: Store) -> None:
    from dspy.utils import DummyLM

    store.instrument()
    program = dspy.Predict("question -> answer")
    tracer = store.provider.get_tracer("web")
    with dspy.context(lm=DummyLM([{"answer": "so"}] * 3)):
        with tracer.start_as_current_span("GET /"):
            program(question="a")
        with tracer.start_as_current_span("GET /"):
            program(question="b")
            program(question="c")
    store.flush()
    person = Person(store)
    found = dspy_otel.examples(store.experiment)
    assert sorted(example.question for example in found) == ["a", "b", "c"]
    for trace_id in {row.trace_id for row in found.rows}:
        person.corrects(f"tr-{trace_id}", "answer", "but")
    found = dspy_otel.examples(store.experiment)
    assert ([one.answer for one in found], found.skipped) == (["but"], {Reason.UNCLEAR: 2})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("0" * 32, "There is no run 0000"),
        ("no-such-experiment", "MLflow has no experiment 'no-such-experiment'."),
        ("0" * 16, "There is no answer of a program there"),
        ("Default", "There is no answer of a program there"),
    ],
)
def test_what_is_not_there_is_one_sentence(store: Store, source: str, reason: str, capsys: Any) -> None:
    store.provider.get_tracer("t").start_span("s").end()
    store.flush()
    capsys.readouterr()  # what MLflow says of a new store
    assert cli.main(["dataset", source, "--experiment", store.experiment]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
