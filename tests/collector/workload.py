"""A real DSPy service and two real optimizations, for `opentelemetry-instrument` to watch and backends to show.

    opentelemetry-instrument python workload.py [production] [evaluation] [MIPROv2] [GEPA]

It talks to the OpenAI-compatible server in OPENAI_BASE_URL, so that every call has tokens and a price. Some answers
cannot be parsed, some calls fail. CANARIES are texts that a content guard has to find: they go in as a user's input, an
instruction, a tool's result, an exception's message, a user's name, and on another instrumentation's span.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from typing import Any

import dspy
from opentelemetry import baggage, context, trace

from dspy_otel.cli.demo.task import ColourFamily, load_examples, same_family, same_family_with_feedback

for name in ("dspy", "gepa", "optuna"):
    logging.getLogger(name).setLevel(logging.ERROR)

SECRET = "sk-" + "canary0secret0" * 3
CANARIES = {
    "input": "canary plum",
    "instruction": "Think of a canary instruction.",
    "result": "canary-result",
    "exception": "canary exception",
    "user": "canary-user@example.org",
    "foreign": "canary foreign text",
}
"""What must not reach a backend that may not see content. SECRET reaches none."""
SESSIONS = ("chat-1", "chat-2", "chat-3")


def look_up(word: str) -> str:
    """What a dictionary says about a word."""
    if word == "nothing":
        raise LookupError(f"no such word; {CANARIES['exception']}")
    return f"{word} is the name of a colour, says the {CANARIES['result']}"


class Dictionary(dspy.Module):
    """Looks the word up, then answers."""

    def __init__(self) -> None:
        super().__init__()
        self.tool = dspy.Tool(look_up)
        self.answer = dspy.Predict(dspy.Signature("word, entry -> meaning", instructions=CANARIES["instruction"]))

    def forward(self, word: str) -> Any:
        return self.answer(word=word, entry=self.tool(word=word))


class Greeter(dspy.Module):
    """Has no predictors, so no version; asks an LM, and an agent that it makes on its way."""

    def forward(self, word: str) -> Any:
        dspy.ReAct("word -> meaning", tools=[look_up], max_iters=1)(word=word)
        return dspy.Prediction(meaning=dspy.settings.lm(f"Greet {word}.")[0])


@contextlib.contextmanager
def conversation(session: str, user: str) -> Any:
    here = baggage.set_baggage("user.id", user, baggage.set_baggage("session.id", session))
    token = context.attach(here)
    try:
        yield
    finally:
        context.detach(token)


def production(seconds: float = 6.0) -> None:
    """Calls of four programs, some of which go wrong, for some seconds: rates need time."""
    program, dictionary, until = ColourFamily(), Dictionary(), time.monotonic() + seconds
    agent = dspy.ReAct("word -> meaning", tools=[look_up], max_iters=2)
    number = 0
    names = [
        CANARIES["input"],
        "unreadable once",
        *(example.colour_name for example in load_examples("val", 18)),
    ]
    while time.monotonic() < until or number < len(names):
        with conversation(SESSIONS[number % 3], CANARIES["user"]):
            program(colour_name=names[number % len(names)])
            with contextlib.suppress(LookupError):
                dictionary(word="nothing" if number % 5 == 0 else f"plum {number}")
            if number % 7 == 0:
                with contextlib.suppress(Exception):
                    dictionary(word="unreadable always")
                with trace.get_tracer("web").start_as_current_span("POST /ask"):
                    agent(word=f"plum {number}")
                    Greeter()(word=f"plum {number}")
                    with contextlib.suppress(Exception):  # no LM answers it
                        agent(word=f"fails always {number}")
        number += 1
        time.sleep(0.2)
    asyncio.run(streamed(program))
    unreliable()
    # What an HTTP client's or another library's instrumentation may record in the same process.
    with trace.get_tracer("another.instrumentation").start_as_current_span("POST") as span:
        span.set_attribute("url.full", f"https://name:{SECRET}@example.org/?q={CANARIES['foreign']}")
        span.set_attribute("llm.input_messages.0.message.content", CANARIES["foreign"])
        span.set_attribute("http.request.header.authorization", f"Bearer {SECRET}")
        span.set_attribute("note", f"the key {SECRET} is in a text, {CANARIES['foreign']}")
        span.add_event("gen_ai.content.prompt", {"gen_ai.prompt": CANARIES["foreign"]})


async def streamed(program: Any) -> None:
    """Answers that arrive in chunks."""
    for number in range(5):
        async for _ in dspy.streamify(program, is_async_program=False)(colour_name=f"streamed plum {number}"):
            pass
        await asyncio.sleep(0.3)


def unreliable() -> None:
    """Calls that fail once and are tried again, and calls that fail for good."""
    answer = dspy.Predict("word -> meaning")
    for number in range(4):
        with dspy.context(lm=dspy.settings.lm.copy(num_retries=1)):
            answer(word=f"fails once {number}")
        with contextlib.suppress(Exception):
            answer(word=f"fails always {number}")


def evaluation() -> None:
    """The same program, evaluated twice."""
    for _ in range(2):
        dspy.Evaluate(devset=load_examples("val", 8), metric=same_family, num_threads=2)(ColourFamily())
        time.sleep(2)


def mipro() -> None:
    """A small MIPROv2 run of some seconds."""
    lm = dspy.settings.lm
    optimizer = dspy.MIPROv2(
        metric=slowly,
        prompt_model=lm,
        task_model=lm,
        auto=None,
        num_candidates=3,
        max_bootstrapped_demos=2,
        max_labeled_demos=2,
        num_threads=2,
    )
    options = {"num_trials": 4, "minibatch_size": 5, "minibatch_full_eval_steps": 2}
    optimizer.compile(ColourFamily(), trainset=load_examples("train", 16), valset=load_examples("val", 10), **options)


def gepa() -> None:
    """A small GEPA run."""
    optimizer = dspy.GEPA(
        metric=same_family_with_feedback, reflection_lm=dspy.settings.lm, max_metric_calls=40, num_threads=2
    )
    optimizer.compile(ColourFamily(), trainset=load_examples("train", 12), valset=load_examples("val", 6))


def slowly(example: Any, prediction: Any, trace: Any = None) -> bool:
    time.sleep(0.2)  # a run that one can watch
    return same_family(example, prediction)


PARTS = {"production": production, "evaluation": evaluation, "MIPROv2": mipro, "GEPA": gepa}

if __name__ == "__main__":
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    dspy.configure(
        lm=dspy.LM(
            "openai/gpt-4o-mini",
            api_base=os.environ["OPENAI_BASE_URL"],
            api_key="sk-test-0123456789abcdef",
            num_retries=0,
        )
    )
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
