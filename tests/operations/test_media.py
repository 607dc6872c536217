"""Images in messages: bare base64 as the GenAI conventions want it, or text that says what is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import textwrap
import urllib.parse
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

import dspy_otel
from dspy_otel.content.encoder import Content, base64_size
from dspy_otel.mlflow.translate import translate
from dspy_otel.operations.messages import described, input_messages
from tests.support.chat import chat
from tests.support.spans import Recorder

DATA = bytes(range(256)) * 2
BASE64 = base64.b64encode(DATA).decode()


def base64_lines(data: bytes, width: int, ending: str) -> str:
    """``data`` in lines of base64, the last one without an end."""
    return ending.join(textwrap.wrap(base64.b64encode(data).decode(), width))


def ask(telemetry: Recorder, url: str, **options: Any) -> tuple[list[Any], Any]:
    """The parts on the span, and the content that MLflow is shown."""
    telemetry.instrument(capture_content="span_only", **options)
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    chat(DummyLM([{"answer": "a"}]), [{"role": "user", "content": content}])
    span = telemetry.only("chat")
    (message,) = json.loads(span.attributes["gen_ai.input.messages"])
    (shown,) = translate([span])
    return message["parts"], json.loads(shown.attributes["mlflow.spanInputs"])["messages"][0]["content"]


def test_media_that_is_kept(telemetry: Recorder) -> None:
    parts, shown = ask(telemetry, f"data:image/png;base64,{BASE64}", capture_media=True)
    assert parts[1] == {"type": "blob", "modality": "image", "mime_type": "image/png", "content": BASE64}
    assert shown[1] == {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}}


@pytest.mark.parametrize("data", [DATA, b"tiny", bytes(1000)])
def test_media_that_is_not_kept_is_named_by_type_and_size(telemetry: Recorder, data: bytes) -> None:
    parts, shown = ask(telemetry, f"data:image/png;base64,{base64.b64encode(data).decode()}")
    assert parts[1] == {"type": "text", "content": f"<image/png, {len(data)} bytes>"}
    assert shown == f"What?\n<image/png, {len(data)} bytes>"


def test_media_that_is_too_large_is_named_too(telemetry: Recorder) -> None:
    parts, _ = ask(telemetry, f"data:image/png;base64,{BASE64}", capture_media=True, content_limit=500)
    assert parts[1] == {"type": "text", "content": "<image/png, 512 bytes>"}


def test_media_that_together_is_too_large_is_never_cut_in_two(telemetry: Recorder) -> None:
    blob = {"type": "blob", "modality": "image", "mime_type": "image/png", "content": BASE64}
    shown = json.loads(Content(1200, media=True).json([{"role": "user", "parts": [blob, blob]}]))
    assert [part["content"] for part in shown[0]["parts"]] == ["<512 bytes>", "<512 bytes>"]


def test_an_address_and_data_that_is_not_base64() -> None:
    def part(url: str) -> Any:
        content = [{"type": "image_url", "image_url": {"url": url}}]
        return input_messages((), {"messages": [{"role": "user", "content": content}]})[1][0]["parts"][0]

    assert part("https://host.example/a.png") == {
        "type": "uri",
        "modality": "image",
        "uri": "https://host.example/a.png",
    }
    drawing = part("data:image/svg+xml,%3Csvg/%3E")
    assert (drawing["mime_type"], base64.b64decode(drawing["content"].encoded())) == ("image/svg+xml", b"<svg/>")
    assert described([{"parts": [drawing]}], 0)[0]["parts"] == [{"type": "text", "content": "<image/svg+xml, 6 bytes>"}]


@pytest.mark.parametrize("size", range(9))
def test_size_leaves_padding_out(size: int) -> None:
    assert base64_size("xx" + base64.b64encode(bytes(size)).decode(), 2) == size


def test_a_saved_program_has_no_media_unless_asked_for_and_says_so(telemetry: Recorder) -> None:
    """DSPy saves an image of a demo as a text with a data URL in its middle, and audio as base64 inside JSON."""
    image = dspy.Image(url=f"data:image/png;base64,{BASE64}")
    audio = dspy.Audio(data=BASE64, audio_format="wav")
    row = dspy.Example(picture=image, voice=audio, more=[image, {"inner": image}], answer="a")
    rows = [row.with_inputs("picture", "voice")]

    def compiled(**options: Any) -> tuple[Any, Any]:
        telemetry.clear()
        telemetry.instrument(capture_content="span_only", **options)
        program = dspy.LabeledFewShot(k=1).compile(dspy.Predict("picture: dspy.Image, voice -> answer"), trainset=rows)
        (span,) = telemetry.named("compile")
        return program, span.attributes

    program, attributes = compiled()
    assert BASE64[:64] not in str(dict(attributes))
    assert "data:image/png;base64,<512 bytes>" in attributes["dspy.program.state"]
    assert attributes["dspy.program.state"].count("<512 bytes>") == 4
    assert attributes["dspy.program.state.complete"] is False
    dspy_otel.uninstrument()
    program, attributes = compiled(capture_media=True)
    assert "dspy.program.state.complete" not in attributes
    loaded = dspy.Predict("picture: dspy.Image, voice -> answer")
    loaded.load_state(json.loads(attributes["dspy.program.state"]))
    assert loaded.dump_state()["demos"] == program.dump_state()["demos"]


@pytest.mark.parametrize("where", ["a prompt with {} inside", "{}", "x={}, y", '{{"data": "{}"}}'])
def test_base64_anywhere_in_a_text_is_named_by_size(where: str) -> None:
    text = where.format(BASE64)
    assert Content(65536).text(text) == where.format("<512 bytes>")
    assert Content(65536).json([text]) == json.dumps([where.format("<512 bytes>")])
    assert Content(65536, media=True).text(text) == text


RANDOM = random.Random(3).randbytes(1200)
SVG = "%3Csvg%20xmlns='a'%20d='M(1,2)'%3E" * 20
FORMS = {
    "76 columns": (base64.encodebytes(RANDOM).decode().rstrip("\n"), "<1200 bytes>"),
    "76 columns, last line full": (base64.encodebytes(RANDOM[:1140]).decode().rstrip("\n"), "<1140 bytes>"),
    "64 columns": (base64_lines(RANDOM, 64, "\n"), "<1200 bytes>"),
    "64 columns, CRLF": (base64_lines(RANDOM, 64, "\r\n"), "<1200 bytes>"),
    "76 columns, escaped": (base64_lines(RANDOM, 76, "\\n"), "<1200 bytes>"),
    "URL-safe": (base64.urlsafe_b64encode(RANDOM).decode(), "<1200 bytes>"),
    "URL-safe, no padding": (base64.urlsafe_b64encode(RANDOM[:1000]).decode().rstrip("="), "<1000 bytes>"),
    "quoted": (f"data:image/svg+xml,{SVG}", f"data:image/svg+xml,<{len(urllib.parse.unquote(SVG))} bytes>"),
    "quoted, charset": (f"data:image/svg+xml;charset=utf-8,{SVG}", "data:image/svg+xml;charset=utf-8,<"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "where", ["{}", "see {} and", 'x = "{}"', "words " * 300 + "\n{}\n" + "words " * 300, "語" * 300 + "\n{}"]
)
def test_media_in_other_forms_is_named_by_size_too(form: str, where: str) -> None:
    data, size = FORMS[form]
    before, _, after = where.partition("{}")
    for text in (
        Content(65536).text(where.format(data)),
        json.loads(Content(65536).json([where.format(data)]))[0],
        json.loads(Content(65536).json({"a": {"b": where.format(data)}}))["a"]["b"],
    ):
        assert text.startswith(before + size)
        assert text.endswith(after)
        assert len(text) < len(where) + 100
    assert Content(65536, media=True).text(where.format(data)) == where.format(data)


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_where_a_text_is_cut_are_not_shown_in_part(form: str) -> None:
    data = FORMS[form][0]
    for before in range(0, 1100, 37):
        shown = Content(1000).text("ä " * (before // 2) + f"{data} " + "z " * 5000)
        assert data[60:100] not in shown
        assert data[-60:-20] not in shown


@pytest.mark.parametrize("before", [0, 1, 100, 200, 900, 1000])
def test_media_at_the_place_where_a_text_is_cut_is_not_shown_in_part(before: int) -> None:
    long = base64.b64encode(bytes(range(256)) * 2000).decode()
    shown = Content(1000).text("ä " * (before // 2) + f"data:image/png;base64,{long} and {long} " + "z " * 5000)
    assert long[:48] not in shown


def test_what_only_looks_like_media_stays() -> None:
    path = "/" + "/".join(["usr"] * 100)
    words = "-".join(["Step", "one", "of", "2"] * 100)
    lines = [hashlib.sha256(bytes([n])).hexdigest() + "\n" for n in range(40)]
    for text in (
        "-" * 400,
        words,
        words.replace("-", "_"),
        "".join(lines),
        ("ACGT" * 15 + "\n") * 20,
        "data:image/png,abc%20",
        "data:a/b," + "1,2, 3%, " * 100,
        '"DATA:" 50% ' * 100,
        "a" * 600,
        "ACGT" * 200,
        "0123456789" * 60,
        path,
        "data: a, b",
        "x" * 255 + " " + "Y1" * 120,
    ):
        assert Content(65536).text(text) == text
