"""The embedded language model of the demo: prompt in, completion out. Deterministic, no network, no weights.

It is a very small in-context learner about colours. What it knows by itself are eleven colour words (Berlin and Kay's
basic terms) with their stems ("purplish"), and that words like "dark" are tones. Everything else it must find in its
prompt, so that an optimizer's choice of instruction and demos is what moves a score:

* statements in the instruction and in long inputs: "teal and mint are green";
* demos: each word of a demo's input votes for that demo's answer, and a similar word (shared letter trigrams) too;
* an instruction's advice for the unknown: "When nothing fits, answer green".

Asked for an instruction (MIPROv2, GEPA, COPRO, InferRules) or for observations (MIPROv2's dataset summary), it writes
down what the examples or the feedback in that prompt show, in statements that it can read again. Ties, and the choice
of words where a length limit leaves some out, are settled by a hash of the prompt.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dspy_otel.cli.demo.prompt import Message, Prompt, read_examples, read_prompt, write_answer

BASIC_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "grey", "black", "white")
"""The eleven basic colour terms of Berlin and Kay (1969), in British spelling as in the survey."""

_STEMS = {"redd": "red", "orang": "orange", "blu": "blue", "purpl": "purple", "whit": "white"} | {
    colour: colour for colour in BASIC_COLOURS if colour != "red"
}
_INSTRUCTION_FIELDS = {"proposed_instruction", "new_instruction", "natural_language_rules"}
_SHORT_INPUT_WORDS = 5
_SIMILAR = 0.5
_STATED = 3  # a statement counts as much as this many demos
_LONGEST_LIST = 60  # words an instruction can list at most
_TONES = {"dark", "darkish", "deep", "light", "lightish", "pale", "bright", "very", "dusty", "dull", "dirty", "faded"}
_TONES |= {"muted", "soft", "warm", "cool", "with", "hint"}
_NOT_A_NAME = {"it", "this", "that", "which", "there", "they", "answer", "family", "colour", "name", "nothing"}


@dataclass(frozen=True)
class Completion:
    """The text of one answer and its token counts. A token is one word or one punctuation mark."""

    text: str
    input_tokens: int
    output_tokens: int


def complete(messages: Sequence[Message]) -> Completion:
    """Answer a prompt. The same messages always give the same completion."""
    prompt = read_prompt(messages)
    text = _answer_plain(prompt) if prompt.style == "plain" else write_answer(prompt.style, _answer_fields(prompt))
    return Completion(text, sum(count_tokens(m.text) for m in messages), count_tokens(text))


def count_tokens(text: str) -> int:
    """Words and punctuation marks in a text."""
    return len(re.findall(r"\w+|[^\w\s]", text))


class Memory:
    """Which words go with which label, and how often that was seen."""

    def __init__(self) -> None:
        self.seen: dict[str, Counter[str]] = defaultdict(Counter)
        self.labels: Counter[str] = Counter()

    def learn(self, words: Iterable[str], label: str, times: int = 1) -> None:
        """Note that each of these words was seen with this label. Basic colours and tones teach nothing new."""
        for word in words:
            if len(word) > 2 and not _basic(word) and word not in _TONES:
                self.seen[word][label] += times

    def recall(self, word: str) -> dict[str, float]:
        """Votes (0 to 1) of a word, or of the most similar known word, for each label."""
        known, likeness = word, 1.0
        if word not in self.seen:
            likeness, known = max(((_similarity(word, other), other) for other in self.seen), default=(0.0, ""))
            if likeness < _SIMILAR:
                return {}
        counts = self.seen[known]
        total = sum(counts.values())
        return {label: likeness * (n / total) * n / (total + 0.5) for label, n in counts.items()}


# --- answering ----------------------------------------------------------------------------------------------------


def _answer_fields(prompt: Prompt) -> dict[str, object]:
    labels = _labels(prompt)
    best, because = _judge(prompt, labels)
    values: dict[str, object] = {}
    for name in prompt.asked:
        if name in _INSTRUCTION_FIELDS:
            values[name] = _write_instruction(prompt)
        elif name in {"observations", "summary"}:
            values[name] = _state(_examples_memory(prompt), _LONGEST_LIST, prompt.text) or "COMPLETE"
        elif name.endswith("_description"):
            flows = re.findall(r"(\w+(?:, \w+)*) -> (\w+(?:, \w+)*)", prompt.text)
            values[name] = " Then ".join(f"it reads {given} and answers {asked}." for given, asked in flows)
        elif name in prompt.options or _options_from_demos(prompt, name):
            options = prompt.options.get(name) or _options_from_demos(prompt, name)
            values[name] = best if best in options else _pick(options, prompt.text)
        elif name in prompt.defaults:
            values[name] = prompt.defaults[name]
        else:
            values[name] = because
    return values


def _answer_plain(prompt: Prompt) -> str:
    """GEPA up to DSPy 3.3 asks for a new instruction in plain text, between ``` marks; anything else gets a remark."""
    if "# Example 1" in prompt.text:
        return f"```\n{_write_instruction(prompt)}\n```"
    return _judge(prompt, BASIC_COLOURS)[1]


def _labels(prompt: Prompt) -> tuple[str, ...]:
    for name in prompt.asked:
        if options := prompt.options.get(name) or _options_from_demos(prompt, name):
            return options
    return BASIC_COLOURS


def _options_from_demos(prompt: Prompt, name: str) -> tuple[str, ...]:
    """A field whose demo values are short and repeat has these values as its options."""
    values = [outputs[name] for _, outputs in prompt.demos if name in outputs]
    distinct = tuple(dict.fromkeys(values))
    short = all(len(value.split()) <= 2 for value in distinct)
    return distinct if len(values) > len(distinct) and short else ()


def _judge(prompt: Prompt, labels: Sequence[str]) -> tuple[str, str]:
    """The best label for a prompt's inputs, and a sentence that says why."""
    memory = Memory()
    _read_statements(prompt.instruction, memory)
    for inputs, outputs in prompt.demos:
        for text in outputs.values():
            _read_statements(text, memory)
        answers = [value for value in outputs.values() if value in labels]
        if answers:
            memory.learn((word for text in _short(inputs) for word in _words(text)), answers[-1])
            memory.labels[answers[-1]] += 1
    for text in prompt.inputs.values():
        if len(text.split()) > _SHORT_INPUT_WORDS:
            _read_statements(text, memory)
    votes: dict[str, float] = defaultdict(float)
    reasons: dict[str, tuple[float, str]] = {}
    for text in _short(prompt.inputs):
        words = _words(text)
        for position, word in enumerate(words, 1):
            head = 1 + position / len(words)  # in English the last word of a compound names the thing
            for label, vote in (_basic(word) or memory.recall(word)).items():
                if label in labels:
                    votes[label] += vote * head
                    reasons[label] = max(reasons.get(label, (0.0, "")), (vote * head, word))
    name = next(iter(_short(prompt.inputs)), "it")
    if votes:
        best = max(labels, key=lambda label: (votes.get(label, 0.0), -labels.index(label)))
        return best, f"In {name!r}, '{reasons[best][1]}' is {best}."
    advice = re.search(r"nothing fits, answer (\w+)", prompt.instruction)
    if advice and advice[1] in labels:
        return advice[1], f"Nothing is known about {name!r}."
    common = memory.labels.most_common(1)
    guess = common[0][0] if common and common[0][1] > 2 and common[0][0] in labels else _pick(labels, name)
    return guess, f"Nothing is known about {name!r}."


# --- writing what examples show -----------------------------------------------------------------------------------


def _examples_memory(prompt: Prompt) -> Memory:
    """What the examples and statements inside a proposer's prompt show."""
    memory = Memory()
    for text in [*prompt.inputs.values()] or [prompt.text]:
        _read_statements(text, memory)
        for shown, label in read_examples(text, BASIC_COLOURS):
            memory.learn(_words(shown), label)
            memory.labels[label] += 1
    return memory


def _write_instruction(prompt: Prompt) -> str:
    """The basic instruction, and after it as many learned statements as the prompt's tip asks for."""
    given = [prompt.inputs[key] for key in ("basic_instruction", "current_instruction") if key in prompt.inputs]
    fenced = re.search(r"```\n(.*?)\n```", prompt.text, re.DOTALL)
    base = given[0] if given else fenced[1] if fenced else "Answer the question."
    base = base.split(" Known words:")[0].split(" When nothing fits,")[0].strip()
    tip = prompt.inputs.get("tip", "")
    limit = 10 if "concise" in tip else 20 if tip and "descriptive" not in tip else _LONGEST_LIST
    memory = _examples_memory(prompt)
    parts = [base]
    if statements := _state(memory, limit, prompt.text):
        parts.append(f"Known words: {statements}")
    if memory.labels and "creative" not in tip:
        parts.append(f"When nothing fits, answer {memory.labels.most_common(1)[0][0]}.")
    return " ".join(parts)


def _state(memory: Memory, limit: int, salt: str) -> str:
    """Up to `limit` words that were only ever seen with one label, as statements like "mint and teal are green"."""
    clear = [word for word, counts in memory.seen.items() if len(counts) == 1]
    clear.sort(key=lambda word: (-sum(memory.seen[word].values()), _hash(salt + word)))
    by_label: dict[str, list[str]] = defaultdict(list)
    for word in clear[:limit]:
        by_label[next(iter(memory.seen[word]))].append(word)
    sentences = []
    for label, words in sorted(by_label.items()):
        words.sort()
        listed = ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
        sentences.append(f"{listed} {'are' if len(words) > 1 else 'is'} {label}")
    return "; ".join(sentences) + "." if sentences else ""


def _read_statements(text: str, memory: Memory) -> None:
    """Learn from each clause of the form "mint, sage and 'teal' are green"."""
    for clause in re.split(r"[.;:\n]|, (?=')", text.lower()):
        stated = re.fullmatch(rf"\s*([a-z', -]+?) (?:is|are) ({'|'.join(BASIC_COLOURS)})\s*", clause)
        if stated:
            words = [word.strip(" '") for word in re.split(r",| and ", stated[1])]
            if all(word and " " not in word and word not in _NOT_A_NAME for word in words):
                memory.learn(words, stated[2], _STATED)
                memory.labels[stated[2]] += len(words)


# --- words --------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'s)?", text.lower())


def _short(fields: dict[str, str]) -> list[str]:
    return [text for text in fields.values() if len(text.split()) <= _SHORT_INPUT_WORDS]


def _basic(word: str) -> dict[str, float]:
    """A basic colour word, or a word that begins or ends with one ("purplish", "greenblue"; the end counts more)."""
    if word in BASIC_COLOURS:
        return {word: 1.0}
    found = {}
    for stem, label in _STEMS.items():
        if word.startswith(stem):
            found[label] = 0.7
        if word.endswith(label):
            found[label] = 0.9
    return found


def _similarity(one: str, other: str) -> float:
    """Dice coefficient of the letter trigrams of two words, 0 to 1."""
    a, b = _trigrams(one), _trigrams(other)
    return 2 * len(a & b) / (len(a) + len(b))


def _trigrams(word: str) -> set[str]:
    padded = f"^{word}$"
    return {padded[i : i + 3] for i in range(len(padded) - 2)} or {padded}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha1(text.encode("utf-8", "replace")).digest()[:8], "big")


def _pick(options: Sequence[str], salt: str) -> str:
    return options[_hash(salt) % len(options)]
