"""A budget: what it counts, when it warns, and how everything that DSPy runs stops when it is used up."""

from __future__ import annotations

import asyncio
import functools
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from opentelemetry import context as otel_context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import dspy_otel
from dspy_otel import BudgetAlert, BudgetExceeded, BudgetRefused, budget, program_id
from dspy_otel.budgets import Budget
from tests.optimizers import common, test_inert
from tests.optimizers.common import quietly, scripted_lm, trials
from tests.support.openai_server import OpenAIServer
from tests.support.spans import Recorder
from tests.support.waiting import wait_for

ENDS_ITSELF = {"GEPA", "MIPROv2", "BootstrapFewShotWithOptuna"}


class Priced(dspy.BaseLM):
    """Answers at once: 100 + 10 tokens, ten cents."""

    cost: float | None = 0.1
    usage: dict[str, int] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        super().__init__("test/priced", cache=False)
        self.meanwhile = meanwhile
        self.asked = 0
        self.lock = threading.Lock()

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        with self.lock:
            self.asked += 1
        self.meanwhile()
        message = SimpleNamespace(content="[[ ## answer ## ]]\n42\n\n[[ ## completed ## ]]")
        return SimpleNamespace(
            id="x",
            model=self.model,
            choices=[SimpleNamespace(message=message, finish_reason="stop")],
            usage=self.usage,
            _hidden_params={"response_cost": self.cost},
        )

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return self.forward(prompt, messages, **kwargs)


class Unpriced(Priced):
    cost = None


class Uncounted(Priced):
    usage: dict[str, int] = {}


def predict(lm: Any) -> Callable[..., Any]:
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    return functools.partial(program, question="what?")


def until_stopped(call: Callable[[], Any], most: int = 100) -> BudgetExceeded:
    with pytest.raises(BudgetExceeded) as stopped:
        for _ in range(most):
            call()
    return stopped.value


ROWS = [dspy.Example(question=f"q{number}", answer="42").with_inputs("question") for number in range(40)]


# --- what it counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "calls", "words"),
    [
        ({"lm_calls": 1}, 1, "1 LM call is used up: 1 LM call"),
        ({"lm_calls": 3}, 3, "3 LM calls is used up: 3 LM calls"),
        ({"cost": 1.0}, 10, "$1.00 is used up: $1.00"),  # ten times 0.1 is less than 1
        ({"cost": 0.25}, 3, "$0.25 is used up: $0.30"),
        ({"tokens": 330}, 3, "330 tokens is used up: 330 tokens"),
        ({"tokens": 331}, 4, "331 tokens is used up: 440 tokens"),
        ({"tokens": 1_000_000, "lm_calls": 2}, 2, "2 LM calls is used up: 2 LM calls"),
    ],
)
def test_the_call_after_the_limit_is_not_made(
    telemetry: Recorder, limits: dict[str, Any], calls: int, words: str
) -> None:
    telemetry.instrument()
    lm = Priced()
    with budget(**limits) as spending:
        stopped = until_stopped(predict(lm))
    assert lm.asked == calls
    assert str(stopped) == f"A budget of {words}."
    assert stopped.limit == spending.exceeded in limits
    assert (stopped.program, stopped.trial, stopped.score) == (None, None, None)
    spent = stopped.spent
    assert spent is not None
    assert (spent.lm_calls, spent.tokens, round(spent.cost, 6)) == (calls, 110 * calls, round(0.1 * calls, 6))
    predict(lm)()  # outside of the block nothing is limited


def test_a_block_that_ends_at_its_limit_is_fine(telemetry: Recorder) -> None:
    telemetry.instrument()
    lm = Priced()
    before = otel_context.get_current()
    with budget(lm_calls=2) as spending:
        predict(lm)()
        assert spending.exceeded is None
        predict(lm)()
    assert spending.exceeded == "lm_calls"
    assert otel_context.get_current() is before


def test_seconds_are_those_of_the_block(telemetry: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry.instrument()
    now = [1000.0]
    monkeypatch.setattr("dspy_otel.budgets.time.monotonic", lambda: now[0])

    def tick() -> None:
        now[0] += 10

    lm = Priced(tick)
    with budget(seconds=25) as spending:
        stopped = until_stopped(predict(lm))
    tick()
    assert lm.asked == 3
    assert str(stopped) == "A budget of 25 s is used up: 30 s."
    assert spending.spent.seconds == 30


def test_answers_from_the_cache_use_nothing(telemetry: Recorder, server: OpenAIServer) -> None:
    telemetry.instrument()
    lm = server.lm(cache=True)
    ask = predict(lm)
    with budget(lm_calls=2) as spending:
        for _ in range(5):
            ask()
        assert spending.spent.lm_calls == 1
        assert spending.exceeded is None
    with budget(cost=0.01):
        ask()  # It has no price, and needs none.


def test_all_threads_of_an_evaluation_count_and_stop(telemetry: Recorder) -> None:
    telemetry.instrument()
    lm = Priced()
    program = dspy.Predict("question -> answer")
    evaluate = dspy.Evaluate(devset=ROWS, metric=lambda *_: 1.0, num_threads=4, max_errors=1000, display_progress=False)
    with dspy.context(lm=lm), budget(lm_calls=12), pytest.raises(BudgetExceeded) as stopped:
        evaluate(program)
    assert 12 <= lm.asked <= 15, "more than the calls in flight"
    assert stopped.value.spent is not None
    assert 12 <= stopped.value.spent.lm_calls <= lm.asked


@pytest.mark.parametrize("threads", [1, 3])
def test_parallel_and_batch_stop_too(telemetry: Recorder, threads: int) -> None:
    telemetry.instrument()
    lm = Priced()
    program = dspy.Predict("question -> answer")
    pairs = [(program, row.inputs()) for row in ROWS]
    with dspy.context(lm=lm):
        with budget(lm_calls=4), pytest.raises(BudgetExceeded):
            dspy.Parallel(num_threads=threads, max_errors=1000, disable_progress_bar=True)(pairs)
        with budget(lm_calls=4), pytest.raises(BudgetExceeded):
            program.batch(ROWS, num_threads=threads, max_errors=1000, disable_progress_bar=True)
    assert 8 <= lm.asked <= 8 + 2 * (threads - 1)


def test_an_agent_does_not_take_it_for_a_failing_tool(telemetry: Recorder) -> None:
    telemetry.instrument()
    lm = Priced()
    inner = predict(lm)

    def tool(question: str) -> str:
        """Ask."""
        return str(inner().answer)

    class Thinks(Priced):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            answer = super().forward()
            fields = {"next_thought": "Ask.", "next_tool_name": "tool", "next_tool_args": '{"question": "q"}'}
            answer.choices[0].message.content = "\n".join(
                f"[[ ## {name} ## ]]\n{text}" for name, text in fields.items()
            )
            return answer

    agent = dspy.ReAct("question -> answer", tools=[tool])
    with dspy.context(lm=Thinks()), budget(lm_calls=3), pytest.raises(BudgetExceeded):
        agent(question="what?")
    assert lm.asked == 1


def test_threads_of_ones_own_count_with_bind(telemetry: Recorder) -> None:
    telemetry.instrument()
    lm = Priced()
    with budget(lm_calls=10) as spending:
        for function in (predict(lm), dspy_otel.bind(predict(lm))):
            thread = threading.Thread(target=function)
            thread.start()
            thread.join()
    assert spending.spent.lm_calls == 1


def test_tasks_count_and_async_with_works(telemetry: Recorder) -> None:
    telemetry.instrument()
    lm = Priced()

    async def main() -> Budget:
        program = dspy.Predict("question -> answer")
        with dspy.context(lm=lm):
            async with budget(lm_calls=5) as spending:
                await asyncio.gather(*(program.acall(question="q") for _ in range(5)))
                with pytest.raises(BudgetExceeded):
                    await program.acall(question="q")
                with pytest.raises(BudgetExceeded):
                    await asyncio.gather(program.acall(question="q"))
                with pytest.raises(BudgetExceeded):
                    await dspy.asyncify(program)(question="q")
            await program.acall(question="q")
        return spending

    spending = asyncio.run(main())
    assert spending.spent.lm_calls == 5
    assert lm.asked == 6


def test_nested_budgets_all_count(telemetry: Recorder) -> None:
    telemetry.instrument()
    lm = Priced()
    ask = predict(lm)
    with budget(cost=0.45) as outer:
        ask()
        with budget(lm_calls=2) as inner:
            stopped = until_stopped(ask)
        assert stopped.limit == "lm_calls"
        assert (inner.spent.lm_calls, outer.spent.lm_calls) == (2, 3)
        with budget(lm_calls=100) as second:
            stopped = until_stopped(ask)
        assert stopped.limit == "cost"
        assert (second.spent.lm_calls, outer.spent.lm_calls) == (2, 5)
        with pytest.raises(BudgetExceeded):
            ask()


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{}, {"cost": 0}, {"tokens": -1}, {"seconds": float("nan")}, {"lm_calls": True}])
def test_limits_are_numbers_above_zero(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="budget"):
        budget(**limits)


def test_it_does_not_begin_where_nothing_is_counted(telemetry: Recorder) -> None:
    with pytest.raises(RuntimeError, match=r"call dspy_otel.instrument\(\)"), budget(lm_calls=1):
        pass
    telemetry.instrument()
    with suppress_instrumentation(), pytest.raises(RuntimeError, match="is off here"), budget(lm_calls=1):
        pass
    once = budget(lm_calls=1)
    with once:
        pass
    with pytest.raises(RuntimeError, match="for one block"), once:
        pass


def test_it_says_when_instrumentation_is_switched_off_inside(
    telemetry: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry.instrument()
    with budget(lm_calls=1):
        dspy_otel.uninstrument()
    assert "did not count to its end" in caplog.text


def test_a_limit_in_dollars_is_refused_at_the_first_call_without_a_price(telemetry: Recorder) -> None:
    telemetry.instrument()
    lm = Unpriced()
    with budget(cost=5), pytest.raises(BudgetRefused) as refused:
        predict(lm)()
    assert lm.asked == 1
    assert str(refused.value) == (
        "A budget of $5.00 cannot be enforced: DSPy knows no price of an LM call (test/priced). "
        "Limit tokens or lm_calls instead."
    )
    with budget(tokens=1000) as spending:
        predict(lm)()
    assert spending.spent.unpriced_calls == 1


def test_a_limit_in_tokens_is_refused_at_the_first_call_that_reports_none(telemetry: Recorder) -> None:
    telemetry.instrument()
    with budget(tokens=1000), pytest.raises(BudgetRefused, match="reports no tokens"):
        predict(Uncounted())()
    with budget(lm_calls=1000) as spending:
        predict(Uncounted())()
    assert spending.spent.uncounted_calls == 1


def test_a_refused_budget_stops_an_evaluation_and_an_optimizer(telemetry: Recorder) -> None:
    telemetry.instrument()
    lm = Unpriced()
    evaluate = dspy.Evaluate(devset=ROWS, metric=lambda *_: 1.0, num_threads=2, max_errors=1000)
    search = dspy.BootstrapFewShotWithRandomSearch(metric=lambda *_: 1.0, num_candidate_programs=1, num_threads=2)
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=lm):
        with budget(cost=5), pytest.raises(BudgetRefused):
            quietly(evaluate, program)
        with budget(cost=5), pytest.raises(BudgetRefused):
            quietly(search.compile, program, trainset=ROWS)
    assert lm.asked <= 4


def test_what_was_reached_before_a_refusal_is_not_lost(telemetry: Recorder) -> None:
    """As with a model that one step has made, and that has no price."""
    telemetry.instrument()
    lm = Priced()
    student = dspy.Predict("question -> answer")

    class Twice(dspy.teleprompt.Teleprompter):
        def compile(self, student: Any, **kwargs: Any) -> Any:
            evaluate = dspy.Evaluate(devset=ROWS[:3], metric=lambda *_: 1.0, display_progress=False, num_threads=1)
            evaluate(student)
            lm.cost = None
            evaluate(student)

    with (
        dspy.context(lm=lm),
        budget(cost=5),
        pytest.raises(BudgetRefused, match=r"cannot be enforced.*trial 1, score 1\.") as error,
    ):
        Twice().compile(student)
    refused = error.value
    assert (program_id(refused.program), refused.trial, refused.score) == (program_id(student), 1, 1.0)
    assert refused.spent is not None
    assert (refused.limit, refused.spent.lm_calls, refused.spent.unpriced_calls) == ("cost", 4, 1)
    copied = pickle.loads(pickle.dumps(BudgetRefused("text", limit="cost", trial=1)))
    assert (str(copied), copied.limit, copied.trial) == ("text", "cost", 1)


# --- what it says on the way ----------------------------------------------------------------------------------------


def alerts_of(telemetry: Recorder) -> list[tuple[Any, Any]]:
    events = [event for span in telemetry.spans for event in span.events if event.name == "dspy.budget.alert"]
    return [(event.attributes["dspy.budget.limit"], event.attributes["dspy.budget.percent"]) for event in events]


def test_it_warns_once_each_at_50_80_and_100_percent(telemetry: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    telemetry.instrument()
    program = dspy.Predict("question -> answer")
    evaluate = dspy.Evaluate(devset=ROWS, metric=lambda *_: 1.0, num_threads=4, display_progress=False)
    alerts: list[BudgetAlert] = []
    with dspy.context(lm=Priced()), budget(lm_calls=10, cost=100, on_warning=alerts.append):
        with pytest.raises(BudgetExceeded):
            evaluate(program)
        with pytest.raises(BudgetExceeded):
            program(question="q")
    assert [(alert.limit, alert.percent, alert.allowed) for alert in alerts] == [
        ("lm_calls", percent, 10) for percent in (50, 80, 100)
    ]
    logged = [record.getMessage() for record in caplog.records if record.name == "dspy_otel"]
    assert [line.split(":")[1].strip() for line in logged] == [
        "50 % of a budget is used",
        "80 % of a budget is used",
        "a budget of 10 LM calls is used up",
    ]
    # On the outermost span of the block that was open.
    assert [span.name for span in telemetry.spans for event in span.events if event.name == "dspy.budget.alert"] == [
        "evaluate Predict"
    ] * 3
    assert alerts_of(telemetry) == [("lm_calls", percent) for percent in (50, 80, 100)]
    points = telemetry.metric("dspy.budget.alerts")
    assert sorted((point.attributes["dspy.budget.percent"], point.value) for point in points) == [
        (50, 1),
        (80, 1),
        (100, 1),
    ]


def test_a_call_that_passes_several_warns_of_the_highest(telemetry: Recorder) -> None:
    telemetry.instrument()
    alerts: list[BudgetAlert] = []
    with telemetry.tracer.start_as_current_span("request"), budget(tokens=120, on_warning=alerts.append):
        predict(Priced())()
    assert [str(alert) for alert in alerts] == ["80 % of a budget is used: 110 tokens of 120 tokens"]


def test_without_a_program_it_warns_on_the_span_around_the_block(telemetry: Recorder) -> None:
    telemetry.instrument()
    with telemetry.tracer.start_as_current_span("request"), budget(tokens=120):
        Priced()("what?")
    request = telemetry.only("request")
    assert [event.name for event in request.events] == ["dspy.budget.alert"]
    assert dict(request.events[0].attributes or {}) == {
        "dspy.budget.limit": "tokens",
        "dspy.budget.percent": 80,
        "dspy.budget.spent": 110.0,
        "dspy.budget.allowed": 120.0,
    }


@pytest.mark.injects_faults
def test_a_callback_that_fails_costs_one_warning(telemetry: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    telemetry.instrument()

    def bad(alert: BudgetAlert) -> None:
        raise OSError("content")

    lm = Priced()
    with budget(lm_calls=10, on_warning=bad):
        until_stopped(predict(lm))
    assert lm.asked == 10
    assert caplog.text.count("on_warning of a budget has raised OSError") == 1
    assert "content" not in caplog.text


# --- where nothing is recorded --------------------------------------------------------------------------------------


def instrument_without_a_provider(telemetry: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    dspy_otel.instrument()


def instrument_a_disabled_sdk(telemetry: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    dspy_otel.instrument()


def instrument_sampled_out(telemetry: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry.tracer_provider.sampler = ALWAYS_OFF
    telemetry.instrument()


def instrument_without_traces_of_examples(telemetry: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry.instrument(optimization_traces="none", metrics=False)


HOW = [
    instrument_without_a_provider,
    instrument_a_disabled_sdk,
    instrument_sampled_out,
    instrument_without_traces_of_examples,
]


@pytest.mark.parametrize("instrument", HOW, ids=lambda function: function.__name__)
def test_it_holds_where_nothing_is_recorded(
    telemetry: Recorder, monkeypatch: pytest.MonkeyPatch, instrument: Callable[..., None]
) -> None:
    instrument(telemetry, monkeypatch)
    alerts: list[BudgetAlert] = []
    lm = Priced()
    with budget(lm_calls=4, on_warning=alerts.append):
        until_stopped(predict(lm))
    assert lm.asked == 4
    assert [alert.percent for alert in alerts] == [50, 100]
    common.asked.clear()
    with budget(lm_calls=60), pytest.raises(BudgetExceeded) as stopped:
        quietly(common.run_copro, scripted_lm())
    assert 60 <= len(common.asked) <= 61
    assert program_id(stopped.value.program)


# --- optimizers -----------------------------------------------------------------------------------------------------


@functools.cache
def calls_of(name: str) -> int:
    """How many LM calls a whole optimization makes."""
    common.asked.clear()
    quietly(common.RUNS[name], scripted_lm())
    return len(common.asked)


@pytest.mark.parametrize("name", common.RUNS)
def test_each_optimizer_stops(telemetry: Recorder, name: str) -> None:
    limit = calls_of(name) * 6 // 10
    telemetry.instrument()
    common.asked.clear()
    program, stopped = None, None
    with budget(lm_calls=limit) as spending:
        try:
            program, _ = quietly(common.RUNS[name], scripted_lm())
        except BudgetExceeded as error:
            stopped = error
        with pytest.raises(BudgetExceeded):  # It is used up, for whatever comes after the optimization, too.
            dspy.settings.lm("one more")
    made = len(common.asked)
    wait_for(lambda: spending.spent.lm_calls == made, "the calls in flight")
    assert spending.exceeded == "lm_calls"
    compiled = telemetry.named(f"compile {name}")[0]
    events = [event.attributes["dspy.budget.percent"] for event in compiled.events if "budget" in event.name]
    assert events == [50, 80, 100]
    if name in ENDS_ITSELF:
        assert stopped is None
        assert limit <= made < calls_of(name)
        assert compiled.attributes["dspy.optimizer.outcome"] == "finished"
        assert compiled.attributes["dspy.program.id"] == program_id(program)
        return
    assert stopped is not None
    assert limit <= made <= limit + 1  # two threads
    assert compiled.attributes["dspy.optimizer.outcome"] == "interrupted"
    assert compiled.attributes["error.type"] == "dspy_otel.budgets.BudgetExceeded"
    scored = [
        trial for trial in trials(telemetry, stopped.optimizer) if {"trial.score", "candidate.id"} <= trial.keys()
    ]
    best = next(trial for trial in scored if trial["trial.number"] == stopped.trial)
    assert best["trial.score"] == stopped.score == max(trial["trial.score"] for trial in scored)
    assert program_id(stopped.program) == best["candidate.id"]
    assert f"trial {stopped.trial}, score" in str(stopped)
    dspy.configure(lm=scripted_lm())
    assert stopped.program(colour_name="navy").family


@pytest.mark.parametrize("name", common.RUNS)
def test_each_optimizer_stops_before_its_first_trial(telemetry: Recorder, name: str) -> None:
    telemetry.instrument()
    common.asked.clear()
    with budget(lm_calls=2), pytest.raises(BudgetExceeded, match="No candidate has been scored yet") as stopped:
        quietly(common.RUNS[name], scripted_lm())
    threads = 8 if name == "BetterTogether" else 2  # of DSPy's settings, where it evaluates with those
    assert len(common.asked) <= 2 + threads - 1  # calls in flight
    assert stopped.value.program is None


@pytest.mark.parametrize("name", test_inert.FIXED)
def test_a_budget_that_is_not_reached_changes_nothing(telemetry: Recorder, name: str) -> None:
    bare = test_inert.outcome(name, 1)
    telemetry.instrument()
    with budget(lm_calls=1_000_000, cost=1_000, tokens=10**9, seconds=10**6):
        assert test_inert.outcome(name, 1) == bare


def test_the_best_program_is_a_copy(telemetry: Recorder) -> None:
    """COPRO goes on to change the program that it evaluates."""
    telemetry.instrument()
    student = dspy.Predict("question -> answer")

    class Changing(dspy.teleprompt.Teleprompter):
        def compile(self, student: Any, **kwargs: Any) -> Any:
            evaluate = dspy.Evaluate(devset=ROWS[:2], metric=lambda *_: 1.0, display_progress=False, num_threads=1)
            for number in range(9):
                evaluate(student)
                student.signature = student.signature.with_instructions(f"Version {number}")

    before = program_id(student)
    with dspy.context(lm=Priced()), budget(lm_calls=5), pytest.raises(BudgetExceeded) as stopped:
        Changing().compile(student)
    assert stopped.value.program is not student
    assert program_id(stopped.value.program) == before
    assert stopped.value.trial == 1


def test_a_budget_inside_of_compile_leaves_its_evaluations_trials(telemetry: Recorder) -> None:
    telemetry.instrument()

    class Careful(dspy.teleprompt.Teleprompter):
        def compile(self, student: Any, **kwargs: Any) -> Any:
            evaluate = dspy.Evaluate(devset=ROWS[:2], metric=lambda *_: 1.0, display_progress=False, num_threads=1)
            try:
                with budget(lm_calls=3):
                    for _ in range(9):
                        evaluate(student)
            except BudgetExceeded as stopped:
                return stopped.program
            raise AssertionError("not stopped")

    with dspy.context(lm=Priced()):
        program = Careful().compile(dspy.Predict("question -> answer"))
    assert [trial.get("trial.score") for trial in trials(telemetry, "Careful")] == [1.0, None]
    assert telemetry.only("compile Careful").attributes["dspy.program.id"] == program_id(program)


def test_gepa_keeps_the_callbacks_that_it_was_given(telemetry: Recorder) -> None:
    telemetry.instrument()
    polled: list[Any] = []

    def stopper(state: Any) -> bool:
        polled.append(state)
        return len(polled) > 2

    for given in (stopper, [stopper]):
        polled.clear()
        with budget(lm_calls=100_000):
            quietly(common.run_gepa, scripted_lm(), gepa_kwargs={"stop_callbacks": given})
        assert len(polled) == 3


def test_gepa_without_dspys_class_ends_itself_too(telemetry: Recorder) -> None:
    runs = pytest.importorskip("tests.optimizers.gepa_runs")
    telemetry.instrument()
    lm = Priced()
    program = dspy.Predict("question -> answer")
    program.set_lm(lm)
    polled: list[Any] = []
    with budget(lm_calls=20):
        result = runs.optimize(runs.Adapter(program=program), stop_callbacks=lambda state: bool(polled.append(state)))
    assert result.best_candidate.keys() == runs.SEED.keys()
    assert 20 <= lm.asked < 60
    assert polled
    with budget(lm_calls=2), pytest.raises(BudgetExceeded, match="No candidate has been scored yet"):
        runs.optimize(runs.Adapter(program=program))

    def evaluator(candidate: str, example: Any) -> float:
        return float(program(question="q").answer == candidate)

    lm.asked = 0
    with budget(lm_calls=12):
        runs.optimize_anything(evaluator, parallel=False)
    assert 12 <= lm.asked < 40


def test_it_can_be_pickled(telemetry: Recorder) -> None:
    telemetry.instrument()
    with budget(lm_calls=1):
        stopped = until_stopped(predict(Priced()))
    copied = pickle.loads(pickle.dumps(stopped))
    assert (str(copied), copied.spent, copied.limit) == (str(stopped), stopped.spent, stopped.limit)
