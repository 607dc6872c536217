"""A program, its evaluation and two small optimizations, with a canary in every place that can hold one.

Everything is real but the model: DSPy, its optimizers, and an HTTP server that answers as OpenAI's API does.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import logging
import os
import sys
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import dspy
from opentelemetry import _logs, metrics, trace

from tests.support.canaries import Canaries
from tests.support.openai_server import OpenAIServer, Reply, openai_server

PLACES = Canaries()
text, key = PLACES.text, PLACES.key

# --- what is content: gone with content off, there with it on --------------------------------------------------------

CONTENT = {
    *("prompt", "instructions", "field description", "demo", "completion", "reasoning"),
    *("tool description", "tool argument", "tool result", "tool error", "program error", "cause of an error"),
    *("provider error", "unparsable completion", "query", "passage", "embedded text", "stop sequence", "executed code"),
    *("dataset input", "dataset label", "metric feedback", "metric error", "candidate instruction"),
    *("optimizer parameter", "optimizer setting", "file path"),
}

# --- what is a secret: never there -----------------------------------------------------------------------------------

SECRET = {
    *("constructor api_key", "call api_key", "config api_key", "authorization header", "key header", "environment"),
    *("late environment", "embedder api_key", "url password", "prompt key", "completion key", "tool argument key"),
    *("tool result password", "error key", "error value", "demo key", "dataset password", "feedback key"),
    *(
        "optimizer api_key",
        "optimizer header",
        "compile token",
        "instructions key",
        "exporter header",
        "MLflow password",
    ),
}

BINARY = {"picture"}
"""Media: never there by default, even with content on."""

NAMES = {"tool name", "metric name", "program name"}
"""Names of things are always told: they are what telemetry groups by."""


def plant() -> None:
    """Make all canaries, in one order."""
    for place in sorted(CONTENT | BINARY | NAMES):
        text(place)
    looks = {"prompt key", "completion key", "error key", "demo key", "feedback key", "instructions key"}
    for place in sorted(SECRET):
        key(place, "sk-proj-" if place in looks else "")


plant()

ENVIRONMENT = {
    "ACME_API_KEY": key("environment"),
    "OTEL_EXPORTER_OTLP_HEADERS": f"x-acme-key={key('exporter header')}",
}
"""Set before the program starts."""


# --- the parts --------------------------------------------------------------------------------------------------------


class Answers(OpenAIServer):
    """Says canaries, in the form that is asked for."""

    def reply(self, body: dict[str, Any]) -> Reply:
        reply = super().reply(body)
        if reply.text == "Hello from the server.":  # nobody's form: GEPA's reflection
            return Reply(f"```\n{text('candidate instruction')} {zlib.crc32(str(body).encode()) % 1000}\n```")
        return reply

    def answer(self, name: str, prompt: str) -> str:
        number = zlib.crc32(prompt.encode()) % 10
        return {
            "answer": f"{number} {text('completion')} {key('completion key')}",
            "reasoning": text("reasoning"),
            "proposed_instruction": f"{text('candidate instruction')} {number}",
        }.get(name, f"the {name}")


class Echo(dspy.BaseLM):
    """A user's own LM, which says what it was asked."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        message = SimpleNamespace(content=f"{prompt} {messages}")
        choices = [SimpleNamespace(message=message, finish_reason="stop")]
        return SimpleNamespace(model="echo", choices=choices, usage={"prompt_tokens": 1, "completion_tokens": 1})


def look_up(place: str, api_key: str | None = None) -> Any:
    if place == "nowhere":
        raise LookupError(text("tool error"), {"api_key": key("error value")})
    return {"found": text("tool result"), "password": key("tool result password")}


def embed(texts: list[str]) -> list[list[float]]:
    return [[float(len(one)), 1.0] for one in texts]


class ZqprogramnameQz(dspy.Module):
    """The program."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        signature = dspy.Signature("question, picture: dspy.Image -> reasoning, answer")
        signature = signature.with_instructions(f"{text('instructions')} {key('instructions key')}")
        signature = signature.with_updated_fields("question", desc=text("field description"))
        self.ask = dspy.Predict(signature)
        self.ask.demos = [dspy.Example(question=f"{text('demo')} {key('demo key')}", answer="7")]
        self.tool = dspy.Tool(look_up, name=text("tool name"), desc=text("tool description"))
        self.fails = module.fails

    def forward(self, question: str) -> Any:
        self.tool(place=text("tool argument"), api_key=key("tool argument key"))
        if question.startswith("fail"):
            self.fails(self.tool)
        picture = dspy.Image("data:image/png;base64," + base64.b64encode(text("picture").encode() * 30).decode())
        return self.ask(question=question, picture=picture, config={"api_key": key("config api_key")})


MODULE = """
def fails(tool):
    try:
        tool(place="nowhere")
    except LookupError as error:
        try:
            raise KeyError("{cause}") from error
        except KeyError as inner:
            raise ValueError("{program} {error} ENVIRONMENT says {environment}, then {late}") from inner
"""


def write_module(folder: Path) -> ModuleType:
    """A module of the user's in a folder whose name is a canary: its path stands in tracebacks."""
    place = folder / text("file path") / "user_module.py"
    place.parent.mkdir(parents=True)
    parts = {
        "cause": text("cause of an error"),
        "program": text("program error"),
        "error": key("error key"),
        "environment": key("environment"),
        "late": key("late environment"),
    }
    place.write_text(MODULE.format(**parts), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("user_module", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ZqmetricnameQz(
    example: Any, prediction: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> Any:
    if "raise" in example.question:
        raise ArithmeticError(text("metric error"))
    score = int(prediction.answer.split()[0]) / 9
    return dspy.Prediction(score=score, feedback=f"{text('metric feedback')} {key('feedback key')}")


class Mine(dspy.teleprompt.Teleprompter):
    """An optimizer of the user's own."""

    def __init__(self, note: str, api_key: str, settings: dict[str, Any]) -> None:
        self.note, self.api_key, self.settings = note, api_key, settings

    def compile(self, student: Any, *, trainset: Any, access_token: str = "") -> Any:
        return student


def rows(count: int, first: str = "ask") -> list[Any]:
    return [
        dspy.Example(
            question=f"{first} {number} {text('dataset input')}",
            answer=text("dataset label"),
            password=key("dataset password"),
        ).with_inputs("question")
        for number in range(count)
    ]


# --- the run ----------------------------------------------------------------------------------------------------------


def run(server: OpenAIServer, folder: Path, optimize: bool = True) -> None:
    """Do everything once. What DSPy prints and logs itself is dropped."""
    noisy = [logging.getLogger(name) for name in ("dspy", "optuna", "gepa", "LiteLLM")]
    for logger in noisy:
        logger.setLevel(logging.CRITICAL + 1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        os.environ["ACME_LATE_API_KEY"] = key("late environment")  # as load_dotenv() does it
        try:
            _run(server, folder, optimize)
        finally:
            del os.environ["ACME_LATE_API_KEY"]
            sys.modules.pop("user_module", None)


def _run(server: OpenAIServer, folder: Path, optimize: bool) -> None:
    headers = {"Authorization": f"Bearer {key('authorization header')}", "X-Acme-Key": key("key header")}
    # With headers DSPy takes LiteLLM, which takes 20 s to import.
    options = {"extra_headers": headers} if optimize else {}
    lm = server.lm(num_retries=0, api_key=key("constructor api_key"), **options)
    program = ZqprogramnameQz(write_module(folder))
    program.set_lm(lm)
    retriever = dspy.Embeddings([f"{text('passage')} {number}" for number in range(3)], dspy.Embedder(embed), k=1)
    with dspy.context(lm=lm, disable_history=True, rm=lambda query, k: [dspy.Example(long_text=text("passage"))]):
        program(question=f"{text('prompt')} {key('prompt key')} {key('constructor api_key')}")
        Echo("acme/echo", extra_headers=headers)(f"{headers}")
        lm("a prompt", api_key=key("call api_key"), stop=[text("stop sequence"), key("call api_key")])
        for question in ("fail now", "fail again"):
            _expect(ValueError, program, question=question)
        _provider_fails(server, lm)
        server.replies.append(Reply(f"{text('unparsable completion')} {key('call api_key')}"))
        _expect(Exception, dspy.Predict("question -> number: int"), question="what?")
        server.replies.clear()
        retriever(text("query"))
        dspy.Retrieve(k=1)(text("query"))
        dspy.Embedder(embed, caching=False)([text("embedded text")])
        if optimize:  # LiteLLM, too
            away = dspy.Embedder(
                "openai/embed", caching=False, api_base="http://127.0.0.1:1", api_key=key("embedder api_key")
            )
            _expect(Exception, away, [text("embedded text") + key("embedder api_key")])
        address = f"http://acme:{key('url password')}@127.0.0.1:1/v1"
        _expect(Exception, dspy.LM("openai/away", api_base=address, api_key="sk-none", num_retries=0), address)
        interpret()
        dataset = [*rows(3), *rows(1, "raise"), *rows(1, "fail")]
        evaluate = dspy.Evaluate(
            devset=dataset, metric=ZqmetricnameQz, num_threads=2, max_errors=50, display_progress=False
        )
        evaluate(program)
        settings = {"note": text("optimizer setting"), "Authorization": f"Bearer {key('optimizer header')}"}
        mine = Mine(text("optimizer parameter"), key("optimizer api_key"), settings)
        mine.compile(program, trainset=dataset, access_token=key("compile token"))
        if optimize:
            for optimizer in (mipro, gepa):
                optimizer(program, lm)


def _provider_fails(server: OpenAIServer, lm: Any) -> None:
    said = f"{text('provider error')}: Incorrect API key provided: {key('constructor api_key')}"
    server.replies.append(Reply(said, status=401))
    _expect(Exception, lm, "a prompt")


def _expect(kind: type[Exception], function: Any, *args: Any, **kwargs: Any) -> None:
    try:
        function(*args, **kwargs)
    except kind:
        return
    raise AssertionError(f"{function} did not raise")


def interpreter() -> Any:
    try:
        from dspy.primitives.local_interpreter import LocalInterpreter
    except ImportError:  # DSPy 3.3
        return None
    return LocalInterpreter


def interpret() -> None:
    kind = interpreter()
    if kind is not None:
        running = kind()
        running.execute(f"print('{text('executed code')}')")
        running.shutdown()


def mipro(program: Any, lm: Any) -> None:
    optimizer = dspy.MIPROv2(
        metric=ZqmetricnameQz,
        prompt_model=lm,
        task_model=lm,
        teacher_settings={"lm": lm},
        auto=None,
        num_candidates=2,
        max_bootstrapped_demos=1,
        max_labeled_demos=1,
        num_threads=2,
        max_errors=50,
        metric_threshold=0.5,
        seed=1,
    )
    data = rows(5)
    optimizer.compile(
        program, trainset=data[:3], valset=data[3:], num_trials=2, minibatch=False, tip_aware_proposer=True
    )


def gepa(program: Any, lm: Any) -> None:
    optimizer = dspy.GEPA(metric=ZqmetricnameQz, reflection_lm=lm, max_metric_calls=12, num_threads=2, seed=1)
    data = rows(5)
    optimizer.compile(program, trainset=data[:3], valset=data[3:])


LOGS = ("dspy_otel", "opentelemetry", "mlflow", "alembic", "sqlalchemy")
"""Loggers whose records are searched too."""


def expected_content() -> set[str]:
    """The content that this DSPy has a place for."""
    return CONTENT - (set() if interpreter() else {"executed code"})


def main(folder: Path, log: Path) -> None:
    """In a process of its own: everything, with telemetry as the environment says."""
    handler = logging.FileHandler(log)
    for name in LOGS:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("dspy_otel").setLevel(logging.DEBUG)
    import dspy_otel

    dspy_otel.configure(adapter_spans=True)
    with openai_server() as server:
        server.__class__ = Answers
        run(server, folder)
    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider(), _logs.get_logger_provider()):
        provider.shutdown()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
