"""From production and back: a service answers, people correct it, GEPA learns from that, the better version takes over.

    pip install 'dspy-otel[demo,decide]' fastapi uvicorn
    python examples/production_loop.py

Everything runs here, on a small embedded model, with MLflow's store in a file: a service on FastAPI, people who ask
and give feedback over HTTP, and the improvement of the program. Each step is what you would do; only the people are
made up: they know the colour survey's own answers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else an import may wait for a download
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")

import dspy
import uvicorn
from fastapi import Body, FastAPI
from mlflow.entities import AssessmentSource
from opentelemetry import baggage, context, trace

import dspy_otel
import mlflow
from dspy_otel.cli.demo.lm import embedded_lm
from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family, same_family_with_feedback
from dspy_otel.dataset import Examples
from dspy_otel.mlflow import load_best
from dspy_otel.mlflow.promote import promote

EXPERIMENT = "production-loop"
ALIAS = "production"


# --- the service ----------------------------------------------------------------------------------------------------


def service(program: Any) -> FastAPI:
    """What runs in production: it answers, takes feedback, and can load the version that has the alias."""
    app = FastAPI()
    serving = {"program": program}
    tracer = trace.get_tracer("service")

    @app.post("/ask")
    def ask(name: str = Body(), session: str = Body()) -> dict[str, str]:
        # opentelemetry-instrumentation-fastapi makes such a span by itself; docs/web.md has more about sessions.
        token = context.attach(baggage.set_baggage("session.id", session))
        try:
            with tracer.start_as_current_span("POST /ask") as span:
                answer = serving["program"](colour_name=name)
                return {"family": answer.family, "answer": f"{span.get_span_context().trace_id:032x}"}
        finally:
            context.detach(token)

    @app.post("/feedback")
    def feedback(answer: str = Body(), right: bool = Body(), family: str | None = Body(default=None)) -> None:
        given: Any = {"trace_id": f"tr-{answer}", "source": AssessmentSource("HUMAN", "somebody")}
        mlflow.log_feedback(name="right", value=right, **given)
        if family is not None:
            mlflow.log_expectation(name="family", value=family, **given)

    @app.post("/reload")
    def reload() -> dict[str, str | None]:
        serving["program"] = load_best(ColourFamily(), alias=ALIAS, allow_unsafe_lm_state=True)
        return {"program": dspy_otel.program_id(serving["program"])}

    return app


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The service, on a free port of this machine; its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


# --- the people -----------------------------------------------------------------------------------------------------


def post(address: str, **body: Any) -> Any:
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as response:
        return json.load(response)


def people_ask(url: str, rows: list[Any], name: str) -> list[dict[str, str]]:
    """Each asks three questions in a session of their own."""
    return [post(f"{url}/ask", name=row.colour_name, session=f"{name} {place // 3}") for place, row in enumerate(rows)]


def people_say(url: str, rows: list[Any], answers: list[dict[str, str]]) -> None:
    """All say whether it was right. Of those who got a wrong answer, every sixth does not say what is right."""
    wrong = 0
    for row, answer in zip(rows, answers, strict=True):
        right = answer["family"] == row.family
        wrong += not right
        correction = {} if right or wrong % 6 == 0 else {"family": row.family}
        post(f"{url}/feedback", answer=answer["answer"], right=right, **correction)


def share(rows: list[Any], answers: list[dict[str, str]]) -> str:
    right = sum(answer["family"] == row.family for row, answer in zip(rows, answers, strict=True))
    return f"{right} of {len(rows)} right"


# --- the improvement ------------------------------------------------------------------------------------------------


def optimize(lm: Any, train: Examples, dev: Examples) -> Any:
    optimizer = dspy.GEPA(
        metric=same_family_with_feedback,
        reflection_lm=lm,
        max_metric_calls=900,
        reflection_minibatch_size=60,
        num_threads=4,
        seed=0,
    )
    return optimizer.compile(ColourFamily(), trainset=train, valset=dev)


def delivered() -> None:
    """Wait until MLflow has what was recorded so far."""
    provider: Any = trace.get_tracer_provider()
    provider.force_flush(120_000)


def main() -> None:
    parser = argparse.ArgumentParser(description="A service that gets better by what people say.")
    parser.add_argument("--tracking-uri", default="sqlite:///production-loop.db", help="MLflow's")
    uri = parser.parse_args().tracking_uri
    for name in ("dspy", "gepa", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)

    dspy_otel.configure(mlflow=uri, experiment=EXPERIMENT, capture_content="span_only", service_name="colours")
    mlflow.set_tracking_uri(uri)
    lm = embedded_lm()
    dspy.configure_cache(enable_disk_cache=False)
    dspy.configure(lm=lm)
    old = ColourFamily()
    before = dspy_otel.program_id(old)

    with running(service(old)) as url:
        rows = load_examples("train", 360)
        answers = people_ask(url, rows, "monday")
        print(f"1. The service answers with program {before}: {share(rows, answers)}.")

        delivered()
        people_say(url, rows, answers)
        print("2. People say so in MLflow, and mostly what would have been right.")

        found = dspy_otel.examples(f"{EXPERIMENT}#{before}", feedback=True, tracking_uri=uri)
        rest, test = found.split(0.6)
        train, dev = rest.split(0.7)
        print(f"3. The dataset: {found.summary()}")
        print(
            f"   Sessions stay whole: {len(train)} to train on, {len(dev)} to choose by, {len(test)} to compare with."
        )

        # A model with a price has one in dollars: budget(cost=5.0).
        with dspy_otel.budget(lm_calls=5_000) as budget, contextlib.redirect_stdout(io.StringIO()):
            new = optimize(lm, train, dev)
        delivered()
        after, origin = dspy_otel.program_id(new), dspy_otel.optimization(new)
        assert origin is not None
        print(f"4. GEPA makes program {after} of it, with {budget.spent.lm_calls:,} LM calls of 5,000 allowed.")

        evaluate = dspy.Evaluate(devset=test, metric=same_family, num_threads=4, display_progress=False)
        evaluate(old)
        evaluate(new)
        delivered()
        compared = dspy_otel.compare(str(before), str(after), experiment=EXPERIMENT, tracking_uri=uri)
        result = compared.scores[0].result
        print(f"5. On the third part, which nobody has seen: {result.a:.2f} -> {result.b:.2f}, p = {result.p:.2g}.")
        if compared.verdict != "better":
            raise SystemExit(f"   {compared.verdict}: the old version stays.")

        done = promote(str(origin.mlflow_run_id), ALIAS, tracking_uri=uri)
        print(f"6. It is better: {done.name} version {done.version} is {ALIAS} now.")

        loaded = post(f"{url}/reload")["program"]
        more = load_examples("val", 30)
        print(f"7. The service has loaded {loaded}: {share(more, people_ask(url, more, 'tuesday'))}.")
        delivered()
        seen = dspy_otel.examples(f"{EXPERIMENT}#{loaded}", tracking_uri=uri).seen
        print(f"   {seen} traces carry the new id, for the next round.")


if __name__ == "__main__":
    main()
