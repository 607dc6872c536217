"""A program that has its DSPy module work in a task and in an actor of a Ray cluster of its own."""

import os

import dspy
import ray
from opentelemetry import baggage, context, trace

import dspy_otel
from tests.switching.app import EchoLM


class Greeter(dspy.Module):
    """Of ``__main__``: goes to the workers by value."""

    def __init__(self):
        super().__init__()
        self.reply = dspy.Predict("question -> answer")

    def forward(self, question):
        return self.reply(question=question)


def switch_on():
    """In every worker process, before its first task."""
    dspy_otel.configure(service_name="worker")


def work(program, carrier):
    with dspy.context(lm=EchoLM(model="test/echo")), dspy_otel.attach(carrier):
        answer = program(question="?").answer
    dspy_otel.flush()  # Ray ends its workers without their exit handlers.
    return answer, os.getpid()


@ray.remote
def task(program, carrier):
    return work(program, carrier)


@ray.remote
class Actor:
    def __init__(self):
        self.program = Greeter()

    def ask(self, carrier):
        return work(self.program, carrier)


def main():
    dspy_otel.configure(service_name="caller")
    program = Greeter()
    with dspy.context(lm=EchoLM(model="test/echo")):
        program(question="It has been used before it is sent.")
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        runtime_env={"worker_process_setup_hook": switch_on},
    )
    with trace.get_tracer("application").start_as_current_span("request"):
        here = baggage.set_baggage("session.id", "s1")
        context.attach(baggage.set_baggage("dspy.optimizer.run.id", "run7", here))
        carrier = dspy_otel.inject()
        jobs = [Actor.remote().ask.remote(carrier), task.remote(program, carrier)]
        answers = ray.get(jobs)
    ray.shutdown()
    print([text for text, _ in answers], len({process for _, process in answers} - {os.getpid()}) > 0)


if __name__ == "__main__":
    main()
