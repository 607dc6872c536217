"""A program whose worker processes are spawned: they begin with nothing, and switch instrumentation on themselves."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import dspy

import dspy_otel
from tests.switching.app import App, EchoLM


def ask(question):
    with dspy.context(lm=EchoLM(model="test/echo", cache=False)):
        return App()(question=question).answer


def main():
    dspy_otel.instrument()
    spawn = multiprocessing.get_context("spawn")
    with dspy_otel.budget(tokens=10**6) as budget:
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=dspy_otel.instrument) as pool:
            answers = list(pool.map(dspy_otel.delegate(ask), "ab"))
        with spawn.Pool(1, dspy_otel.instrument) as another:
            answers += another.map(dspy_otel.delegate(ask), "c")
    print(answers, budget.spent.lm_calls, budget.spent.tokens, budget.spent.unanswered_tasks)


if __name__ == "__main__":
    main()
