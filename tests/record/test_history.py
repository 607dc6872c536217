"""Spans of the real SDK to records: what is put together, in which order spans may come, and what stays bounded."""

from __future__ import annotations

import json
import random
from typing import Any

import dspy
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dspy_otel import semconv
from dspy_otel.record import history as history_module
from dspy_otel.record.history import History, optimizations
from dspy_otel.record.model import Candidate, Evaluation, Failure, Optimization, Trial, Usage

STATE = json.dumps({"qa": {"signature": {"instructions": "Answer."}, "demos": [{"q": "1"}]}})


class Spans:
    """Makes spans as the instrumentation makes them, and gives them to a history as they start and end."""

    def __init__(self, history: History | None = None) -> None:
        self.history = history or History()
        self.memory = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.memory))
        self.tracer = self.provider.get_tracer(semconv.SCOPE_NAME)

    def start(self, name: str, parent: Any = None, **attributes: Any) -> Any:
        context = trace.set_span_in_context(parent) if parent is not None else None
        at = {f"dspy.{key.replace('__', '.')}": value for key, value in attributes.items()}
        span = self.tracer.start_span(name, context=context, attributes=at)
        self.history.start(span)
        return span

    def end(self, span: Any, **attributes: Any) -> list[Any]:
        for key, value in attributes.items():
            span.set_attribute(f"dspy.{key.replace('__', '.')}", value)
        span.end()
        return self.history.end(span)

    def compile(self, id_: str = "r", **attributes: Any) -> Any:
        named = {"optimizer__run__id": id_, "optimizer__name": "Best", "program__name": "QA"}
        return self.start("compile Best", **named, **attributes)

    def trial(self, parent: Any, number: int, scores: tuple[float, ...] = (), **end: Any) -> list[Any]:
        stamps = {"optimizer__run__id": "r", "trial__number": number}
        span = self.start("trial", parent, trial__size=len(scores), **stamps)
        evaluation = self.start("evaluate QA", span, evaluation__id=f"e{number}", **stamps)
        for index, score in enumerate(scores):
            example = self.start("example QA", None, evaluation__id=f"e{number}", **stamps)
            self.end(example, example__index=index, example__score=score, module__inputs='{"q": 1}')
        self.end(evaluation)
        return self.end(span, **end)

    @property
    def ended(self) -> list[ReadableSpan]:
        return list(self.memory.get_finished_spans())


def last(records: list[Any], kind: type) -> Any:
    return [record for record in records if isinstance(record, kind)][-1]


def test_a_trial_says_what_it_is_and_what_had_been_spent() -> None:
    spans = Spans()
    compile_ = spans.compile(dataset__val__size=2, dataset__val__digest="d")
    kinds = ("baseline", "minibatch", "full")
    trials = [
        spans.trial(
            compile_,
            number,
            (1.0, 0.0),
            trial__kind=kind,
            trial__accepted=number == 3,
            usage__lm_calls=number,
            usage__task__lm_calls=number,
        )[0]
        for number, kind in enumerate(kinds, 1)
    ]
    assert [trial.spent.lm_calls for trial in trials] == [1, 3, 6]
    assert trials[-1].spent.by_role["task"] == Usage(lm_calls=6)
    assert [(trial.examples_so_far, trial.accepted_so_far, trial.rejected_so_far) for trial in trials] == [
        (2, None, 1),
        (4, None, 2),
        (6, 1, 2),
    ]
    assert [trial.dataset is not None for trial in trials] == [True, False, True]  # on the whole validation set
    assert [trial.evaluation for trial in trials] == ["e1", "e2", "e3"]
    record = spans.end(compile_, optimizer__outcome="finished", optimizer__winner__trial=3)[0]
    assert record.outcome == "finished"
    assert record.winning == record.trials[2]


def test_examples_are_kept_of_the_baseline_and_of_the_best_and_scores_of_all() -> None:
    spans = Spans()
    compile_ = spans.compile()
    spans.trial(compile_, 1, (0.0, 1.0), trial__kind="baseline", trial__is_best=True)
    for number in (2, 3, 4):
        spans.trial(compile_, number, (1.0, 1.0), trial__kind="full", trial__is_best=number != 4)
    record = spans.end(compile_)[0]
    assert {number: [one.score for one in examples] for number, examples in record.examples.items()} == {
        1: [0.0, 1.0],
        2: [1.0, 1.0],
        3: [1.0, 1.0],
        4: [1.0, 1.0],
    }
    known = {number: examples[0].inputs for number, examples in record.examples.items()}
    assert known == {1: {"q": 1}, 2: None, 3: {"q": 1}, 4: None}


def test_scores_of_examples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MAX_SCORES", 4)
    monkeypatch.setattr(history_module, "MAX_SAMPLED", 3)
    spans = Spans()
    compile_ = spans.compile()
    spans.trial(compile_, 1, (0.0, 1.0), trial__kind="baseline", trial__is_best=True)
    for number in (2, 3, 4):
        spans.trial(compile_, number, (1.0, 1.0), trial__kind="full", trial__is_best=number == 4)
    for number in (5, 6):
        spans.trial(compile_, number, (1.0, 1.0), trial__kind="sample")
    spans.trial(compile_, 7, (1.0, 1.0), trial__kind="minibatch")
    assert list(spans.end(compile_)[0].examples) == [1, 2, 4, 5]


def test_the_first_evaluation_of_a_trial_is_its_own_and_others_stand_for_themselves() -> None:
    spans = Spans()
    compile_ = spans.compile()
    stamps = {"optimizer__run__id": "r", "trial__number": 1}
    trial = spans.start("trial", compile_, **stamps)
    changed = [spans.end(spans.start("evaluate QA", trial, evaluation__id=id_, **stamps))[0] for id_ in ("a", "b")]
    assert [one.own for one in changed] == [False, True]
    assert spans.end(trial)[0].evaluation == "a"
    alone = spans.start("evaluate QA", evaluation__id="c")
    example = spans.start("example QA", None, evaluation__id="c")
    spans.end(example, example__score=0.5)
    found = spans.history.trace(example)
    assert found is not None
    assert (found.evaluation, found.optimization, found.root) == ("c", None, True)
    assert spans.end(alone)[0].examples[0].score == 0.5


def test_an_optimization_in_a_phase_counts_to_the_phase_and_nothing_counts_twice() -> None:
    spans = Spans()
    outer = spans.compile("r")
    phase = spans.start("search", outer, optimizer__run__id="r", optimizer__phase="search")
    inner = spans.start(
        "compile Inner", phase, optimizer__run__id="i", optimizer__parent_run__id="r", optimizer__parent_phase="search"
    )
    spans.end(inner, usage__lm_calls=3)
    spans.end(phase, usage__lm_calls=5)
    (found,) = spans.end(outer, usage__lm_calls=6)[0].phases
    assert (found.name, found.times, found.usage.lm_calls) == ("search", 1, 5)


def test_it_is_described_further_while_it_runs() -> None:
    spans = Spans()
    compile_ = spans.compile()
    compile_.set_attribute(semconv.OPTIMIZER_PARAMS_PREFIX + "metric", "exact")
    (record,) = spans.history.start(compile_)
    assert (record.params, record.metric, record.outcome, record.ended) == (
        {"metric": "exact"},
        "exact",
        "running",
        None,
    )
    assert spans.history.start(compile_) == []  # nothing new


def test_what_runs_when_the_program_ends_is_interrupted() -> None:
    spans = Spans()
    compile_ = spans.compile()
    spans.trial(compile_, 1, (1.0,))
    trial = spans.start("trial", compile_, optimizer__run__id="r", trial__number=2)
    spans.start("evaluate QA", trial, evaluation__id="e2", optimizer__run__id="r", trial__number=2)
    spans.end(spans.start("example QA", None, evaluation__id="e2"), example__score=1.0)
    found = spans.history.stop(7)
    assert [type(one) for one in found] == [Evaluation, Trial, Optimization]
    assert {(one.ended, one.failure) for one in found} == {(7, Failure(None, "The program ended before it did."))}
    assert len(found[0].examples) == 1
    assert (found[2].outcome, [one.number for one in found[2].trials]) == ("interrupted", [1])
    assert spans.history.stop(8) == []


@pytest.mark.parametrize(
    ("error", "interrupted"), [("builtins.ValueError", False), ("KeyboardInterrupt", True), (None, False)]
)
def test_a_failure_has_a_type_and_says_whether_somebody_stopped_it(error: str | None, interrupted: bool) -> None:
    spans = Spans()
    compile_ = spans.compile()
    compile_.set_status(trace.Status(trace.StatusCode.ERROR, "why"))
    if error is not None:
        compile_.set_attribute(semconv.ERROR_TYPE, error)
    failure = spans.end(compile_)[0].failure
    assert (failure.interrupted, str(failure)) == (interrupted, f"{error or 'error'}: why")


def test_a_resumed_run_goes_on_with_its_trials_when_all_of_it_is_there() -> None:
    spans = Spans()
    first = spans.compile()
    spans.trial(first, 1)
    spans.end(first, optimizer__outcome="interrupted")
    second = spans.compile(optimizer__attempt=2, optimizer__resumed=True)
    spans.trial(second, 2)
    (live,) = [one for one in spans.end(second) if isinstance(one, Optimization)]
    assert [trial.number for trial in live.trials] == [2]
    found = optimizations(spans.ended)
    assert [[trial.number for trial in one.trials] for one in found] == [[1], [1, 2]]
    assert [(one.attempt, one.resumed) for one in found] == [(None, False), (2, True)]


def test_models_are_known_by_role() -> None:
    spans = Spans()
    compile_ = spans.compile()
    for model, role in (("b", "task"), ("a", "task"), ("c", "proposer")):
        call = spans.start("chat m", compile_, optimizer__run__id="r", lm__role=role)
        call.set_attribute(semconv.GEN_AI_OPERATION_NAME, semconv.OPERATION_CHAT)
        call.set_attribute(semconv.GEN_AI_REQUEST_MODEL, model)
        spans.end(call)
    assert spans.end(compile_)[0].models == {"task": ("a", "b"), "proposer": ("c",)}


def test_states_of_candidates_come_once_and_are_known_to_trials_that_score_them_once_more() -> None:
    spans = Spans()
    compile_ = spans.compile()
    one = spans.trial(compile_, 1, candidate__id="c", program__state=STATE)[0]
    other = spans.trial(compile_, 2, candidate__id="c")[0]
    assert one.program == other.program == Candidate("c", STATE)
    assert other.program.predictors["qa"].demos == ({"q": "1"},)
    record = spans.end(compile_)[0]
    assert [trial.program for trial in record.trials] == [None, None]
    assert record.candidates == {"c": Candidate("c", STATE)}
    assert record.content


class Odd(dspy.Module):
    """Has a predictor with the name of a part of a predictor's state."""

    def __init__(self) -> None:
        super().__init__()
        self.signature = dspy.Predict("q -> a")


@pytest.mark.parametrize("program", [dspy.Predict("q -> a"), dspy.ChainOfThought("q -> a"), Odd()])
def test_predictors_have_dspys_names_also_one_that_is_a_program_itself(program: Any) -> None:
    program = program.deepcopy()
    ((name, predictor),) = program.named_predictors()
    predictor.demos = [dspy.Example(q="1", a="2")]
    found = Candidate("c", json.dumps(program.dump_state())).predictors
    assert list(found) == [name]
    assert (found[name].instructions, found[name].demos) == (predictor.signature.instructions, ({"q": "1", "a": "2"},))


@pytest.mark.parametrize(("state", "complete"), [(STATE, True), (STATE[:20], False)], ids=["whole", "the SDK cut it"])
def test_a_state_that_lost_something_says_so(state: str, complete: bool) -> None:
    assert Candidate("c", state).complete is complete
    assert not Candidate("c", state, altered=True).complete


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MAX_PROGRAMS", 10 * len(STATE))
    monkeypatch.setattr(history_module, "MAX_CONTENT", 50)
    monkeypatch.setattr(history_module, "MAX_EXAMPLES", 3)
    spans = Spans()
    initial = {"optimizer__initial_program__id": "first", "optimizer__initial_program__state": STATE}
    compile_ = spans.compile(**initial)
    for number in range(1, 31):
        spans.trial(compile_, number, candidate__id=f"c{number}", program__state=STATE)
    spans.trial(compile_, 31, (1.0,) * 5, trial__kind="baseline", candidate__id="c31")
    evaluation = spans.start("evaluate QA", evaluation__id="e")
    for index in range(4):
        example = spans.start("example QA", None, evaluation__id="e", module__inputs=json.dumps({"q": "x" * 20}))
        spans.end(example, example__index=index)
    done = spans.end(evaluation)[0]
    assert [one.inputs is not None for one in done.examples] == [True, False, False, False]
    assert done.without_content == 3
    record = spans.end(compile_)[0]
    assert list(record.candidates) == ["first", *(f"c{number}" for number in range(22, 31))]
    assert len(record.examples[31]) == 3


def test_what_belongs_to_something_unknown_does_no_harm() -> None:
    spans = Spans()
    stray = spans.trial(None, 1, (1.0,))
    assert [one.number for one in stray] == [1]
    ended = Spans(History()).compile()
    ended.end()
    assert spans.history.end(ended) == []
    assert not spans.history._orphans
    for name in ("trial", "compile X", "evaluate P", "example P", "search", "chat m", "nothing of ours"):
        with spans.tracer.start_as_current_span(name) as span:
            assert spans.history.start(span) == []
        assert spans.history.end(span) == []
        assert spans.history.trace(span) is None


def test_ended_spans_may_come_in_any_order() -> None:
    spans = Spans()
    compile_ = spans.compile()
    for number in (1, 2, 3):
        spans.trial(compile_, number, (1.0, 0.0), trial__kind="baseline" if number == 1 else "full", usage__lm_calls=2)
    spans.end(compile_)
    ordered = spans.ended
    (expected,) = optimizations(ordered)
    assert expected.examples[1][0].score == 1.0
    for seed in range(10):
        random.Random(seed).shuffle(ordered)
        assert optimizations(ordered) == [expected]
