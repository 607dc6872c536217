"""Objects that DSPy uses once, or asks for something: it gets the same of them, watched or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

from tests.inert import hostile
from tests.optimizers.common import quietly
from tests.support.spans import Recorder

ROWS = [dspy.Example(question=f"q{number}", answer="a").with_inputs("question") for number in range(3)]


def metric(example: Any, prediction: Any, trace: Any = None) -> float:
    return 1.0


def random_search(restrict: Any) -> Any:
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=metric, num_candidate_programs=2, max_bootstrapped_demos=1, num_threads=1
    )
    with dspy.context(lm=DummyLM([{"answer": "a"}] * 100)):
        program = quietly(
            lambda _: optimizer.compile(dspy.Predict("question -> answer"), trainset=ROWS, restrict=restrict), None
        )
    return sorted(candidate["seed"] for candidate in program.candidate_programs)


@pytest.mark.parametrize(
    "restrict",
    [
        lambda: iter([-3, -2]),
        lambda: (seed for seed in (-3, -2)),
        lambda: map(int, ["-3", "-2"]),
        lambda: {-3: 1, -2: 2},
    ],
    ids=["iterator", "generator", "map", "dictionary"],
)
def test_seeds_that_only_iterating_tells_are_all_left_to_dspy(restrict: Callable[[], Any], telemetry: Recorder) -> None:
    telemetry.instrument(capture_content="span_only")
    assert random_search(restrict()) == [-3, -2]
    trials = telemetry.named("trial")
    assert len(trials) == 2
    assert not any("dspy.trial.params.seed" in trial.attributes for trial in trials)  # not known: absent
    (compiled,) = telemetry.named("compile BootstrapFewShotWithRandomSearch")
    assert "dspy.optimizer.trials.planned" not in compiled.attributes


@pytest.mark.parametrize("restrict", [[-3, 1], (-3, 1), {-3, 1}, range(-3, 2, 4)])
def test_seeds_in_a_container_of_pythons_own_are_known(restrict: Any, telemetry: Recorder) -> None:
    telemetry.instrument()
    assert random_search(restrict) == [-3, 1]
    assert [trial.attributes["dspy.trial.params.seed"] for trial in telemetry.named("trial")] == [-3, 1]


SPY = hostile.spy("spy")


def bootstrap_with_verdicts_of_the_users_own() -> Any:
    verdict = SPY()
    optimizer = dspy.BootstrapFewShot(metric=lambda *_: verdict, max_bootstrapped_demos=2, max_labeled_demos=0)
    return optimizer.compile(dspy.Predict("question -> answer"), trainset=ROWS)


def demos_with_values_of_the_users_own() -> Any:
    program = dspy.Predict("question -> answer")
    program.demos = [dspy.Example(question=SPY(), answer="a")]
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=metric, num_candidate_programs=1, max_bootstrapped_demos=1, max_labeled_demos=1, num_threads=1
    )
    rows = [dspy.Example(question=f"q{number}", answer="a", note=SPY()).with_inputs("question") for number in range(3)]
    return optimizer.compile(program, trainset=rows)


def evaluation_of_a_callable_of_the_users_own() -> Any:
    evaluate = dspy.Evaluate(devset=ROWS, metric=metric, num_threads=1, display_progress=False)
    return evaluate(Answering())


class Answering:
    """Whatever it is asked for, it has."""

    def __call__(self, **inputs: Any) -> Any:
        return dspy.Prediction(answer="a")

    def __getattr__(self, name: str) -> Any:
        hostile.JOURNAL.append(("program", name))
        raise AttributeError(name)


def parameters_of_the_users_own() -> Any:
    optimizer = dspy.COPRO(metric=metric, breadth=2, depth=1)
    optimizer.note = SPY()
    return optimizer.compile(dspy.Predict("question -> answer"), trainset=ROWS, eval_kwargs={"num_threads": 1})


def embedder_with_an_address_of_the_users_own() -> Any:
    return dspy.Embedder(Embed(), caching=False, api_base=SPY())(["a"])


class Embed:
    def __call__(self, texts: list[str], **settings: Any) -> list[list[float]]:
        return [[1.0] for _ in texts]

    def __getattr__(self, name: str) -> Any:
        hostile.JOURNAL.append(("embedder", name))
        raise AttributeError(name)


CASES = [
    bootstrap_with_verdicts_of_the_users_own,
    demos_with_values_of_the_users_own,
    evaluation_of_a_callable_of_the_users_own,
    parameters_of_the_users_own,
    embedder_with_an_address_of_the_users_own,
]


@pytest.fixture
def journal() -> Iterator[list[tuple[str, str]]]:
    hostile.JOURNAL.clear()
    yield hostile.JOURNAL
    hostile.JOURNAL.clear()


@pytest.mark.parametrize("case", CASES)
def test_an_object_is_asked_for_the_same_watched_or_not(
    case: Callable[[], Any], telemetry: Recorder, journal: list[tuple[str, str]]
) -> None:
    def asked() -> list[tuple[str, str]]:
        journal.clear()
        answer = {"answer": "a", "proposed_instruction": "i", "proposed_prefix_for_output_field": "p"}
        with dspy.context(lm=DummyLM([answer] * 200)):
            quietly(lambda _: case(), None)
        return list(journal)

    bare = asked()
    telemetry.instrument(capture_content="span_and_event")
    assert asked() == bare
