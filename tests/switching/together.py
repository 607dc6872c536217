"""A program with every neighbour switched on in its process: prints what came of it as JSON, for both orders.

Argument: the address of an OpenAI-compatible server. All is imported once, with nothing switched on, and two forks of
that process do the work: half the time.
"""

import asyncio
import json
import os
import shutil
import sys
import threading
from collections import Counter
from pathlib import Path

import dspy
import httpx
import litellm
import logfire
import openai
from dspy.utils.callback import BaseCallback
from openinference.instrumentation.dspy import DSPyInstrumentor as OpenInference
from openinference.instrumentation.litellm import LiteLLMInstrumentor
from opentelemetry import trace
from opentelemetry.instrumentation.genai.dspy import DSPyInstrumentor as Official
from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.instrumentation.threading import ThreadingInstrumentor
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

import dspy_otel
import mlflow
from tests.support.spans import Recorder

SERVER = sys.argv[1]
telemetry = Recorder()
measured = InMemoryMetricReader()


# --- the user's program -----------------------------------------------------------------------------------------------
class Counting(BaseCallback):
    """Callbacks of the user's own."""

    def __init__(self):
        self.calls = Counter()


for point in ("module", "lm", "tool", "adapter_format", "adapter_parse", "evaluate"):
    for end in ("start", "end"):
        name = f"on_{point}_{end}"
        setattr(Counting, name, lambda self, *_, name=name, **__: self.calls.update([name]))


class SDKLM(dspy.BaseLM):
    """An LM of the user's own, on OpenAI's SDK."""

    client = openai.OpenAI(base_url=SERVER, api_key="sk-own")

    def forward(self, prompt=None, messages=None, **kwargs):
        return self.client.chat.completions.create(model="gpt-sdk", messages=messages)


def look_up(k: int) -> str:
    """Asks over HTTP."""
    return httpx.get(SERVER.removesuffix("/v1") + "/colbert", params={"query": "sky", "k": k}).json()["topk"][0]["text"]


class App(dspy.Module):
    def __init__(self):
        super().__init__()
        self.reply = dspy.ChainOfThought("question, found -> answer")
        self.tool = dspy.Tool(look_up)

    def forward(self, question):
        return self.reply(question=question, found=self.tool(k=1))

    async def aforward(self, question):
        return await self.reply.acall(question=question, found="")


def metric(example, prediction, trace=None):
    return float(prediction.answer == example.answer)


callbacks = Counting()
app = App()
rows = [dspy.Example(question=str(number), answer="the answer").with_inputs("question") for number in range(2)]


def work(phase):
    """One run of everything; the callbacks that fired, and the answers."""
    callbacks.calls.clear()
    # LiteLLM keeps a client for each key, and a client keeps what it had been patched with.
    options = {"api_base": SERVER, "api_key": f"sk-test-{phase}", "cache": False}
    native = dspy.LM("openai/gpt-native", **options)
    lite = dspy.LM("openai/gpt-litellm", engine="litellm", **options)
    answers = []
    for lm in (native, lite, SDKLM(model="openai/gpt-sdk")):
        with dspy.context(lm=lm):
            answers.append(app(question="?").answer)
    with dspy.context(lm=lite):
        answers.append(asyncio.run(app.acall(question="?")).answer)
        parallel = dspy.Parallel(num_threads=2, disable_progress_bar=True)
        answers += [each.answer for each in parallel([(app, row.inputs()) for row in rows])]
        answers.append(dspy.Evaluate(devset=rows, metric=metric, num_threads=2, display_progress=False)(app).score)
    return answers, callbacks.calls


# --- everybody else ---------------------------------------------------------------------------------------------------
def neighbours():
    """Switch them all on, on the provider that Logfire sets."""
    logfire.configure(
        send_to_logfire=False,
        console=False,
        inspect_arguments=False,
        metrics=logfire.MetricsOptions(additional_readers=[measured]),
        additional_span_processors=[SimpleSpanProcessor(telemetry.exporter)],
    )
    # By its default it hides what is below it, the official instrumentation of HTTPX among it.
    logfire.instrument_openai(suppress_other_instrumentation=False)
    for other in (
        ThreadingInstrumentor,
        HTTPXClientInstrumentor,
        OpenAIInstrumentor,
        LiteLLMInstrumentor,
        OpenInference,
        Official,
    ):
        other().instrument(raise_exception_on_conflict=True)
    mlflow.set_tracking_uri(f"sqlite:///{Path.cwd()}/mlflow.db")
    mlflow.dspy.autolog()


def exported():
    """The finished spans so far, and forget them."""
    spans = [
        {
            "name": span.name,
            "scope": span.instrumentation_scope.name,
            "id": span.context.span_id,
            "parent": span.parent and span.parent.span_id,
            "trace": span.context.trace_id,
        }
        for span in telemetry.spans
    ]
    telemetry.clear()
    return spans


def in_mlflow():
    """How many traces MLflow's own instrumentation has stored so far."""
    mlflow.flush_trace_async_logging()
    return len(mlflow.search_traces(return_type="list"))


def run(order):
    """Everything in one order, ours ``first`` or ``last``."""
    dspy.configure(callbacks=[callbacks])
    report = {"bare": {"came": work("bare")}}
    for switch_on in (dspy_otel.instrument, neighbours) if order == "first" else (neighbours, dspy_otel.instrument):
        switch_on()
    for phase in ("together", "suppressed", "without us"):
        if phase == "without us":
            dspy_otel.uninstrument()
        with trace.get_tracer("application").start_as_current_span("request"):
            if phase == "suppressed":
                with suppress_instrumentation():
                    came = work(phase)
            else:
                came = work(phase)
        report[phase] = {"came": came, "spans": exported(), "mlflow": in_mlflow()}
    report["durations"] = sorted(
        scope.scope.name
        for resource in measured.get_metrics_data().resource_metrics
        for scope in resource.scope_metrics
        for each in scope.metrics
        if each.name == "gen_ai.client.operation.duration"
    )
    return report


def main():
    assert litellm.__file__  # imported by DSPy at the first call that needs it, else
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.search_traces(return_type="list")  # makes the tables
    assert threading.active_count() == 1  # a fork has one thread
    orders = {}
    for order in ("first", "last"):
        here = Path(order)
        here.mkdir()
        shutil.copy("mlflow.db", here)
        orders[order] = os.fork()
        if orders[order] == 0:
            os.chdir(here)
            Path("report.json").write_text(json.dumps(run(order)))
            sys.exit()
    for order, process in orders.items():
        assert os.waitpid(process, 0)[1] == 0, order
    print(json.dumps({order: json.loads(Path(order, "report.json").read_text()) for order in orders}))


if __name__ == "__main__":
    main()
