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
import pydantic
from opentelemetry import _logs, baggage, context, metrics, trace

from dspy_otel.content.digest import digest
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

# How a secret may stand in a text or a value that is content: written by whoever makes its canary.
WRITTEN = {
    "capitals": "PASSWORD={}",
    "colon": "password: {}",
    "flag": "--api-key {}",
    "header": "Authorization: Bearer  {}",
    "cookie": "Set-Cookie: session={}; Path=/",
    "user of a url": "https://{}@example.com/a",
    "password of a url": "postgres://acme:{}@db.example.com/a",
    "query string": "https://example.com/a?access_token={}&b=1",
    "connection string": "AccountName=acme;AccountKey={};EndpointSuffix=example.com",
    "escaped JSON": '{{\\"client_secret\\": \\"{}\\"}}',
}
IN_TEXTS = ("input", "output", "tool argument", "tool result", "error", "demo", "feedback", "row")
MADE_UP = {
    *("server model", "server id", "server finish reason", "server tool name", "server request id", "tool name key"),
    *("session", "user", "rollout", "effort", "metric name key", "name of a parameter", "value of a parameter"),
}
"""Names that others make up, with a key in them."""
SECRET |= {f"{how} in {where}" for how in WRITTEN for where in IN_TEXTS} | MADE_UP
SECRET |= {f"{how} of {where}" for how in ("pair", "named value", "nested") for where in ("input", "tool argument")}

PICTURES = ("picture", "demo picture", "tool picture", "listed picture", "model picture", "picture in a text")
BINARY = {*PICTURES, "bytes", "audio", "file"}
"""Media: never there by default, even with content on."""

NAMES = {"tool name", "metric name", "program name"}
"""Names of things are always told: they are what telemetry groups by."""


def plant() -> None:
    """Make all canaries, in one order."""
    for place in sorted(CONTENT | BINARY | NAMES):
        text(place)
    looks = {"prompt key", "completion key", "error key", "demo key", "feedback key", "instructions key", *MADE_UP}
    for place in sorted(SECRET):
        key(place, "sk-proj-" if place in looks else "")


plant()


def written(where: str) -> str:
    """A text with a secret in each form."""
    return "\n".join(form.format(key(f"{how} in {where}")) for how, form in WRITTEN.items())


def structured(where: str) -> dict[str, Any]:
    """Values with a secret in each form."""
    return {
        "headers": [("Authorization", key(f"pair of {where}"))],
        "settings": [{"name": "api_key", "value": key(f"named value of {where}")}],
        "login": {"acme": {"HF-Token": key(f"nested of {where}")}},
    }


def data_of(place: str) -> bytes:
    """What stands for the bytes of a picture."""
    return text(place).encode() * 30


def url_of(place: str, kind: str = "image/png") -> str:
    """A picture as a data URL."""
    return f"data:{kind};base64," + base64.b64encode(data_of(place)).decode()


class Page(pydantic.BaseModel):
    """A model with a picture in it."""

    picture: dspy.Image
    raw: bytes = data_of("bytes")


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


class Naming(dspy.BaseLM):
    """A server that puts a key wherever it makes up a name."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        call = SimpleNamespace(
            id="1", type="function", function=SimpleNamespace(name=key("server tool name"), arguments="{}")
        )
        message = SimpleNamespace(content=f"{prompt}", tool_calls=[call])
        choices = [SimpleNamespace(message=message, finish_reason=key("server finish reason"))]
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        return SimpleNamespace(model=key("server model"), id=key("server id"), choices=choices, usage=usage)


class Refused(Exception):
    """An error of a server with an id."""

    def __init__(self) -> None:
        super().__init__("refused")
        self.request_id = key("server request id")


class Refusing(dspy.BaseLM):
    """A server that refuses."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        raise Refused


def look_up(place: str, **more: Any) -> Any:
    if place == "nowhere":
        raise LookupError(text("tool error"), {"api_key": key("error value")})
    pictures = {
        "photo": dspy.Image(url_of("tool picture")),
        "photos": [url_of("listed picture"), {"b": [data_of("bytes")]}],
    }
    found = f"{text('tool result')} {written('tool result')} see {url_of('picture in a text')}"
    return {"found": found, "password": key("tool result password"), **pictures}


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
        demo = f"{text('demo')} {key('demo key')} {written('demo')}"
        self.ask.demos = [dspy.Example(question=demo, picture=dspy.Image(url_of("demo picture")), answer="7")]
        self.tool = dspy.Tool(look_up, name=text("tool name"), desc=text("tool description"))
        self.fails = module.fails

    def forward(self, question: str) -> Any:
        place = f"{text('tool argument')} {written('tool argument')}"
        self.tool(place=place, api_key=key("tool argument key"), **structured("tool argument"))
        if question.startswith("fail"):
            self.fails(self.tool)
        picture = dspy.Image(url_of("picture"))
        return self.ask(question=question, picture=picture, config={"api_key": key("config api_key")})


MODULE = """
def fails(tool):
    try:
        tool(place="nowhere")
    except LookupError as error:
        try:
            raise KeyError("{cause}") from error
        except KeyError as inner:
            raise ValueError("{program} {error} ENVIRONMENT says {environment}, then {late}" + {written!r}) from inner
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
        "written": written("error"),
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
    feedback = f"{text('metric feedback')} {key('feedback key')} {written('feedback')}"
    return dspy.Prediction(score=score, feedback=feedback)


class Mine(dspy.teleprompt.Teleprompter):
    """An optimizer of the user's own."""

    def __init__(self, note: str, api_key: str, settings: dict[str, Any]) -> None:
        self.note, self.api_key, self.settings = note, api_key, settings

    def compile(self, student: Any, *, trainset: Any, access_token: str = "", **more: Any) -> Any:
        return student


class Shows(dspy.Module):
    """Gives back what it was given, with secrets and pictures of its own."""

    def forward(self, **inputs: Any) -> Any:
        sound = dspy.Audio(data=base64.b64encode(data_of("audio")).decode(), audio_format="wav")
        file = dspy.File(file_data=url_of("file", "application/pdf")) if hasattr(dspy, "File") else None
        pages = [Page(picture=dspy.Image(url_of("model picture")))]
        return dspy.Prediction(text=written("output"), pages=pages, sound=sound, file=file, given=inputs)


def made_up_names() -> None:
    """Whoever may make up a name makes up one with a key in it."""
    with contextlib.suppress(ValueError):  # DSPy 3.5 knows which efforts there are.
        Naming("acme/names")("a prompt", reasoning_effort=key("effort"), rollout_id=key("rollout"))
    _expect(Refused, Refusing("acme/refuses"), "a prompt")
    dspy.Tool(lambda: 1, name=key("tool name key"))()
    given = baggage.set_baggage("user.id", key("user"), baggage.set_baggage("session.id", key("session")))
    token = context.attach(given)
    try:
        Shows()(
            question=written("input"), page=Page(picture=dspy.Image(url_of("model picture"))), **structured("input")
        )
    finally:
        context.detach(token)

    def judge(*_: Any) -> float:
        return 1.0

    judge.__name__ = key("metric name key")
    few = [dspy.Example(question="q").with_inputs("question")]
    dspy.Evaluate(devset=few, metric=judge, num_threads=1, display_progress=False)(Shows())
    own = {key("name of a parameter"): 1, "kind": key("value of a parameter")}
    Mine("n", "k", {}).compile(Shows(), trainset=few, **own)


def rows(count: int, first: str = "ask") -> list[Any]:
    return [
        dspy.Example(
            question=f"{first} {number} {text('dataset input')} {written('row')}",
            answer=text("dataset label"),
            password=key("dataset password"),
        ).with_inputs("question")
        for number in range(count)
    ]


def guesses() -> set[str]:
    """What whoever knows the rows can work out: their plain digests, and those of the datasets they are in."""
    known = [digest(dict(row.items())) for row in (*rows(5), *rows(1, "raise"), *rows(1, "fail"))]
    return {*known, digest([*known[:3], *known[5:]]), digest(known[:3]), digest(known[3:5])}


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
        made_up_names()
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
