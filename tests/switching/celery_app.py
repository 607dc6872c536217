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
    trace.get_tracer_provider().force_flush()


@celery.task
def answer(question, carrier):
    with dspy_otel.attach(carrier):
        return program(question=question).answer, os.getpid()


def main():
    program(question="The exporter has run in this process.")
    with trace.get_tracer("application").start_as_current_span("request"):
        here = baggage.set_baggage("session.id", "s1")
        context.attach(baggage.set_baggage("dspy.optimizer.run.id", "run7", here))
        # At once, so that neither of the pool's two processes has all of them.
        jobs = [answer.delay(f"q{number}", dspy_otel.inject()) for number in range(4)]
        answers = [job.get() for job in jobs]
    print([text for text, _ in answers], len({process for _, process in answers} - {os.getpid()}) > 0)


if __name__ == "__main__":
    main()
