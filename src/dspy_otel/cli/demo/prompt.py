"""What an LM can read from a prompt of DSPy's: the instruction, the demos, the inputs and the fields to answer.

Pure functions on text. The formats are those that DSPy's ChatAdapter, JSONAdapter and XMLAdapter write (3.3 and 3.4);
a message that has none of them is a plain prompt.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_HEADER = re.compile(r"^\[\[ ## (\w+) ## \]\]\s*", re.MULTILINE)
_XML_FIELD = re.compile(r"<(\w+)>\s*(.*?)\s*</\1>", re.DOTALL)
_ASKED = re.compile(r"Respond with (?:the corresponding output fields|a JSON object)")
_MISSING = "Not supplied for this"


@dataclass(frozen=True)
class Message:
    """One message: its role (`system`, `user`, `assistant`, ...) and its text."""

    role: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt, taken apart.

    `style` is `chat`, `json`, `xml` or `plain`; `asked` are the output fields in order; `options` gives a field's
    allowed values, `defaults` the simplest value of a field that is not text; `demos` are (inputs, outputs) pairs
    without fields that were not supplied.
    """

    style: str
    instruction: str
    text: str
    inputs: dict[str, str] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    demos: tuple[tuple[dict[str, str], dict[str, str]], ...] = ()


def read_prompt(messages: Sequence[Message]) -> Prompt:
    """Take a prompt apart. Never raises: what is not recognized is plain text."""
    system = "\n".join(m.text for m in messages if m.role in {"system", "developer"})
    turns = [m for m in messages if m.role not in {"system", "developer"}]
    last = turns[-1].text if turns else ""
    requests = list(_ASKED.finditer(last))
    if not requests:
        return Prompt("plain", system, last)
    body, request = last[: requests[-1].start()], last[requests[-1].start() :]
    if "[[ ## " in request:
        style, asked = "chat", re.findall(r"`\[\[ ## (\w+) ## \]\]`", request)
    elif "XML tags" in request:
        style, asked = "xml", re.findall(r"`<(\w+)>`", request)
    else:
        style, asked = "json", re.findall(r"`(\w+)`", request)
    asked = [name for name in asked if name != "completed"]
    instruction = system.rpartition("your objective is:")[2]
    options: dict[str, tuple[str, ...]] = {}
    defaults: dict[str, Any] = {}
    for name in asked:
        note = re.search(rf"\{{{name}\}} +# note: the value you produce (must .*)", system)
        if note is None:
            continue
        if "one of: " in note[1]:
            listed = note[1].rstrip().rstrip('",').split("one of: ", 1)[1]
            options[name] = tuple(part.strip() for part in listed.split(";"))
        else:
            defaults[name] = _default(note[1])
    demos = tuple(
        (read_fields(user.text), read_fields(answer.text))
        for user, answer in itertools.pairwise(turns)
        if user.role == "user" and answer.role == "assistant"
    )
    return Prompt(
        style, instruction.strip(), f"{system}\n{last}", read_fields(body), tuple(asked), options, defaults, demos
    )


def _default(note: str) -> Any:
    """The simplest value that a field's type note allows."""
    if note.startswith("must be True or False"):
        return True
    if note.startswith("must be a single"):
        return 0
    _, _, schema = note.partition("JSON schema: ")
    if schema.startswith('{\\"'):  # inside the JSON that JSONAdapter shows
        schema = schema.replace('\\"', '"')
    try:
        root, _ = json.JSONDecoder().raw_decode(schema)
    except ValueError:
        return {}

    def simplest(part: dict[str, Any]) -> Any:
        if "$ref" in part:
            return simplest(root["$defs"][part["$ref"].rsplit("/", 1)[1]])
        if "enum" in part:
            return part["enum"][0]
        if "anyOf" in part:
            return simplest(part["anyOf"][0])
        if part.get("type") == "object":
            return {key: simplest(part["properties"][key]) for key in part.get("required", ())}
        return {"array": [], "boolean": True, "integer": 0, "number": 0, "null": None}.get(part.get("type", ""), "")

    return simplest(root)


def read_fields(text: str) -> dict[str, str]:
    """The named fields of one message, in any adapter's format; fields that were not supplied are left out."""
    pieces = _HEADER.split(text)
    if len(pieces) > 1:
        found = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    elif text.lstrip().startswith("{"):
        try:
            found = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in json.loads(text).items()}
        except ValueError:
            found = {}
    else:
        found = dict(_XML_FIELD.findall(text))
    return {k: v.strip() for k, v in found.items() if k != "completed" and not v.strip().startswith(_MISSING)}


def write_answer(style: str, values: dict[str, object]) -> str:
    """The completion that the prompt's adapter parses, from the value of each asked field."""
    if style == "json":
        return json.dumps(values, ensure_ascii=False)
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}
    if style == "xml":
        return "\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in texts.items())
    parts = [f"[[ ## {name} ## ]]\n{text}" for name, text in texts.items()]
    return "\n\n".join([*parts, "[[ ## completed ## ]]"])


def read_examples(text: str, labels: Sequence[str]) -> list[tuple[str, str]]:
    """(input, label) pairs shown inside a proposer's or reflector's prompt.

    Understands the three shapes DSPy's optimizers show examples in: `Example({...})` reprs (dataset summaries),
    records with an `Inputs` and a `Feedback` part, as JSON or as Markdown (GEPA), and `Field Name: value` lines
    (MIPROv2's task demos). The label of a record is the quoted one in its feedback; in the other shapes it is the
    last value that is one of `labels`.
    """
    return _reprs(text, labels) or _records(text, labels) or _lines(text, labels)


def _pair(values: Sequence[str], labels: Sequence[str]) -> list[tuple[str, str]]:
    named = [value for value in values if value in labels]
    return [(values[0], named[-1])] if len(values) > 1 and named else []


def _reprs(text: str, labels: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for shown in re.findall(r"Example\((\{.*?\})\)", text, re.DOTALL):
        try:
            values = [str(value) for value in ast.literal_eval(shown).values()]
        except (ValueError, SyntaxError):
            continue
        pairs += _pair(values, labels)
    return pairs


def _records(text: str, labels: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    try:
        shown = json.loads(text)
        records = [(next(iter(r["Inputs"].values()), ""), str(r["Feedback"])) for r in shown]
    except (ValueError, TypeError, KeyError, AttributeError):
        records = []
        for part in re.split(r"^# Example \d+$", text, flags=re.MULTILINE)[1:]:
            given = re.search(r"^## Inputs\n+### \w+\n(.+)", part, re.MULTILINE)
            feedback = re.search(r"^## Feedback\n(.+)", part, re.MULTILINE)
            if given and feedback:
                records.append((given[1].strip(), feedback[1]))
    for given_text, feedback_text in records:
        quoted = [word for word in re.findall(r"'([^']+)'", feedback_text) if word in labels]
        pairs += [(str(given_text), quoted[0])] if quoted else []
    return pairs


def _lines(text: str, labels: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for block in re.split(r"\n\s*\n", text):
        pairs += _pair(re.findall(r"^[A-Z][\w ]*: (.+)$", block, re.MULTILINE), labels)
    return pairs
