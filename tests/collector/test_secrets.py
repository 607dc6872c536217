"""The Collector's content guard masks what dspy-otel masks: both are made from one table."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import yaml
from collector.make_content import FILE, MASK, made

from tests.content import secrets_corpus

re2 = pytest.importorskip("re2")


def plain(text: str) -> str:
    """A scalar as the Collector reads it."""
    return text.replace("$$", "$")


@cache
def guard() -> tuple[list[Any], list[tuple[Any, str]]]:
    """What the file tells the two processors: whole matches, and matches with groups that stay."""
    processors = yaml.safe_load(FILE.read_text(encoding="utf-8"))["processors"]
    options = re2.Options()
    options.max_mem = 1 << 26
    whole = [re2.compile(plain(pattern), options) for pattern in processors["redaction/secrets"]["blocked_values"]]
    (statements,) = [
        group["statements"]
        for group in processors["transform/secrets"]["trace_statements"]
        if group["statements"][0].startswith("replace_all_patterns(span.")
    ]
    parts = []
    for statement in statements:
        texts = [json.loads(f'"{text}"') for text in re.findall(r'"((?:[^"\\]|\\.)*)"', plain(statement))]
        _, pattern, replacement = texts
        parts.append((re2.compile(pattern, options), re.sub(r"\$\{(\d+)\}", r"\\g<\1>", replacement)))
    return whole, parts


def collector(text: str) -> str:
    """``text`` as the content guard lets it pass."""
    whole, parts = guard()
    for pattern in whole:
        text = pattern.sub(MASK, text)
    for pattern, replacement in parts:
        groups = [int(number) for number in re.findall(r"\\g<(\d+)>", replacement)]
        before, _, after = replacement.partition(MASK)
        left, right = ([int(n) for n in re.findall(r"\\g<(\d+)>", side)] for side in (before, after))
        assert groups == left + right
        text = pattern.sub(
            lambda match, left=left, right=right: "".join(
                (*(match[n] or "" for n in left), MASK, *(match[n] or "" for n in right))
            ),
            text,
        )
    return text


def test_the_file_is_made_from_the_table() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert made(text) == text, "run: python collector/make_content.py"


def test_the_collector_masks_the_corpus_that_dspy_otel_masks() -> None:
    from dspy_otel.content.redaction import mask

    corpus = secrets_corpus.texts()
    ours = {secret.shape for secret in corpus if secret.secret not in mask(secret.content)}
    theirs = {secret.shape for secret in corpus if secret.secret not in collector(secret.content)}
    assert ours == theirs


def test_the_collector_leaves_ordinary_texts_alone() -> None:
    texts = list(secrets_corpus.ordinary())[::4]
    masked = [text for text in texts if collector(text) != text]
    assert len(masked) <= len(texts) // 1000


def test_json_stays_json() -> None:
    text = json.dumps(
        {"password": "hunter2x", "n": [1, "Authorization: Bearer abc123def456"], "api_key": "abcdef123456"}
    )
    shown = json.loads(collector(text))
    assert shown == {"password": MASK, "n": [1, f"Authorization: Bearer {MASK}"], "api_key": MASK}
