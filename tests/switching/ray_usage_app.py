"""A program that has a Ray cluster of its own ask an LM, in each of Ray's ways, and says what is counted here."""

import os
import signal
import sys
from pathlib import Path

import dspy
import ray

import dspy_otel
from tests.switching.app import App, EchoLM


def ask(question):
    with dspy.context(lm=EchoLM(model="test/echo", cache=False)):
        return App()(question=question).answer


def ask_and_fail(question):
    raise ValueError(ask(question))


def ask_and_die_once(marker):
    """Is killed after its LM call, the first time."""
    answer = ask("?")
    if not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return answer


@ray.remote(max_retries=1)
def run(work, *arguments):
    return work(*arguments)


@ray.remote
class Actor:
    def ask(self, question, carrier):
        with dspy_otel.attach(carrier) as attached:
            answer = ask(question)
        return answer, attached.usage()

    async def ask_async(self, work, question):
        return work(question)


def answer_batch(batch, carrier):
    with dspy_otel.attach(carrier) as attached:
        batch["answer"] = [ask(question) for question in batch["question"]]
    batch["usage"] = [attached.usage()] + [""] * (len(batch["question"]) - 1)
    return batch


def main(folder):
    dspy_otel.instrument()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        runtime_env={"worker_process_setup_hook": dspy_otel.instrument},
    )
    with dspy_otel.budget(tokens=10**6) as budget:

        def show(name):
            spent = budget.spent
            print(name, spent.lm_calls, spent.tokens, spent.unanswered_tasks)

        sent = [run.remote(dspy_otel.delegate(ask), f"q{number}") for number in range(3)]
        assert ray.get(sent) == ray.get(sent) == ["blue"] * 3
        show("tasks")
        actor = Actor.remote()
        answer, usage = ray.get(actor.ask.remote("q", dspy_otel.inject(usage=True)))
        dspy_otel.add_usage(usage)
        assert ray.get(actor.ask_async.remote(dspy_otel.delegate(ask), "q")) == answer == "blue"
        show("actor")
        try:
            ray.get(run.remote(dspy_otel.delegate(ask_and_fail), "q"))
        except ValueError:
            show("failed")
        assert ray.get(run.remote(dspy_otel.delegate(ask), "q")) == "blue"
        show("retried")
        assert ray.get(run.remote(dspy_otel.delegate(ask_and_die_once), f"{folder}/killed")) == "blue"
        show("killed")
        questions = ray.data.from_items([{"question": f"q{number}"} for number in range(6)])
        carrier = dspy_otel.inject(usage=True)
        for row in questions.map_batches(answer_batch, batch_size=2, fn_kwargs={"carrier": carrier}).iter_rows():
            assert row["answer"] == "blue"
            dspy_otel.add_usage(row["usage"])
        show("data")
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
