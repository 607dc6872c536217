"""Write what masks secrets in `config/content.yaml`, from the table that dspy-otel masks with itself.

    python collector/make_content.py

The table is `src/dspy_otel/content/secret_rules.py`. What is recognised by its look alone goes to the redaction
processor, which puts `****` in place of a match. What stands under a name goes to the transform processor, which can
leave the name where it is: JSON stays JSON. A test compares the file with what this writes, and masks the same corpus
with both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dspy_otel.content.secret_rules import ELEMENTS, ESCAPE, FLAG, KEYS, NAMES, SHAPES, URLS, VALUES, Kind, Where

FILE = Path(__file__).parent / "config/content.yaml"
FIRST = "  # Made by collector/make_content.py from here: do not edit."
LAST = "  # To here."
MASK = "****"

AROUND = r"[ \t\\\"'`\[\]!]{0,6}"
"""What may stand between a name and the sign behind it."""
SUFFIX = r"(?:[0-9]{1,3}|[_\-]?b(?:ase)?64)?"
NAMED = r"(?:[\\\"']{0,4}[,\s]{1,40}[\\\"']{0,4}val(?:ue)?)?"
"""The name may itself be a value: `name: api_key, value: ...`."""


def words(*kinds: Kind, without: Where) -> str:
    """The names of these kinds as one expression, but not those that apply elsewhere only."""
    found = {word for row in NAMES if row.kind in kinds and row.where is not without for word in row.words}
    if without is Where.NAME:  # In a text, anything may stand before a name: it covers all that end in it.
        found = {word for word in found if not any(word != other and word.endswith(other) for other in found)}
    return "|".join(word.replace("_", r"[ _.\-]?") for word in sorted(found, key=lambda word: (-len(word), word)))


def looks() -> Iterator[str]:
    """Expressions whose whole match is a secret."""
    for key in KEYS:
        needles = "|".join(map(re.escape, key.needles))
        # `\b` does not see the end of a word at an underscore. It is masked with what follows.
        yield f"{key.before or chr(92) + 'b_?'}(?:{needles}){key.pattern}"
    yield from (shape.pattern for shape in SHAPES if not re.compile(shape.pattern).groups)


def under_names() -> Iterator[tuple[str, str]]:
    """Expressions with groups that stay, and what to put in place of a match."""
    keys = "|".join(f"(?:{'|'.join(map(re.escape, key.needles))}){key.pattern}" for key in KEYS if not key.before)
    yield one_of([f"({ESCAPE})(?:{keys})"])
    groups = [shape.pattern for shape in SHAPES if re.compile(shape.pattern).groups]
    yield one_of(groups)
    yield one_of([shape.pattern for shape in URLS])
    for value in VALUES:
        yield one_of(value.patterns, f"((?:{words(value.kind, without=Where.NAME)}){SUFFIX}{NAMED}{AROUND})", "(?i)")
    secret = words(Kind.SECRET, Kind.HEADER, without=Where.NAME)
    any_name = words(*Kind, without=Where.NAME)
    yield one_of(
        [
            FLAG.replace(r"([\w\-]{2,64})", rf"[\w\-]{{0,64}}(?:{any_name})"),
            *(one.replace(r"([\w:.\-]{2,64})", rf"[\w:.\-]{{0,64}}(?:{secret})") for one in ELEMENTS),
        ],
        flags="(?i)",
    )


def one_of(patterns: Iterable[str], first: str = "", flags: str = "") -> tuple[str, str]:
    """One expression for all, and its replacement: what stands before the secret, the mask, and what stands behind it.

    Args:
        patterns: the alternatives, with one or two groups each.
        first: what stands before all of them, in a group of its own, or nothing.
        flags: of the expression.
    """
    before, after, number = ("${1}", "", 2) if first else ("", "", 1)
    for pattern in patterns:
        groups = re.compile(pattern).groups
        before += f"${{{number}}}"
        after += f"${{{number + 1}}}" if groups > 1 else ""
        number += groups
    return f"{flags}{first}(?:{'|'.join(patterns)})", before + MASK + after


def scalar(text: str) -> str:
    """A text for the Collector: in single quotes of YAML, with `$` doubled, for one alone names a variable."""
    return "'" + text.replace("$", "$$").replace("'", "''") + "'"


def ottl(text: str) -> str:
    """A text in a statement."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def section() -> str:
    """What stands between the two marks."""
    lines = [
        FIRST,
        "  redaction/secrets:",
        "    allow_all_keys: true",
        "    summary: silent # else each span tells which of its attributes were masked",
        "    blocked_key_patterns: # never a plain `token`: it would mask gen_ai.usage.input_tokens",
        f"      - {scalar(f'(?i)(?:^|[._ -])(?:{words(Kind.SECRET, without=Where.TEXT)})$')}",
        "    blocked_values: # masks the match, not the whole value: JSON stays JSON",
        *(f"      - {scalar(pattern)}" for pattern in looks()),
        "  transform/secrets:",
        "    error_mode: propagate # a failure drops the batch rather than let it pass",
    ]
    rules = list(under_names())
    for signal, kinds in (("trace_statements", ("span", "spanevent")), ("log_statements", ("log",))):
        lines.append(f"    {signal}:")
        for kind in kinds:
            lines.append("      - statements:")
            for pattern, replacement in rules:
                arguments = f"{ottl(pattern)}, {ottl(replacement)}"
                statement = f'replace_all_patterns({kind}.attributes, "value", {arguments})'
                lines.append(f"          - {scalar(statement)}")
                if kind == "log":
                    lines.append(
                        f"          - {scalar(f'replace_pattern(log.body, {arguments}) where IsString(log.body)')}"
                    )
    return "\n".join((*lines, LAST))


def made(text: str) -> str:
    """The file's text with its section made anew."""
    head, _, rest = text.partition(FIRST)
    return head + section() + rest.partition(LAST)[2]


if __name__ == "__main__":
    FILE.write_text(made(FILE.read_text(encoding="utf-8")), encoding="utf-8")
