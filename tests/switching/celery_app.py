"""A Celery application in the current directory: a worker's module, and as a program its caller."""

import os
from pathlib import Path

import dspy
from celery import Celery
from celery.signals import worker_process_shutdown
from opentelemetry import baggage, context, trace

import dspy_otel
from tests.switching.app import App, EchoLM

FOLDER = Path.cwd()
for name in ("queue", "control", "results"):
    (FOLDER / name).mkdir(exist_ok=True)

celery = Celery("tests.switching.celery_app", broker="filesystem://", backend=f"file://{FOLDER}/results")
celery.conf.broker_transport_options = {
    "data_folder_in": f"{FOLDER}/queue",
    "data_folder_out": f"{FOLDER}/queue",
    "control_folder": f"{FOLDER}/control",
    "polling_interval": 0.05,
}
# In the caller, and in the worker before it forks its pool: telemetry is inherited.
dspy_otel.configure()
dspy.configure(lm=EchoLM(model="test/echo"))
program = App()


@worker_process_shutdown.connect
def flush(**_):
    dspy_otel.flush()


@celery.task
def answer(question, carrier):
    with dspy_otel.attach(carrier) as attached:
        text = program(question=question).answer
    return text, os.getpid(), attached.usage()


def main():
    program(question="The exporter has run in this process.")
    with trace.get_tracer("application").start_as_current_span("request"):
        here = baggage.set_baggage("session.id", "s1")
        context.attach(baggage.set_baggage("dspy.optimizer.run.id", "run7", here))
        with dspy_otel.budget(tokens=10**6) as budget:
            # At once, so that neither of the pool's two processes has all of them.
            jobs = [answer.delay(f"q{number}", dspy_otel.inject(usage=True)) for number in range(4)]
            answers = [job.get() for job in jobs]
            for _, _, usage in answers:
                dspy_otel.add_usage(usage)
    print([text for text, _, _ in answers], len({process for _, process, _ in answers} - {os.getpid()}) > 0)
    print(budget.spent.lm_calls, budget.spent.tokens, budget.spent.unanswered_tasks)


if __name__ == "__main__":
    main()
