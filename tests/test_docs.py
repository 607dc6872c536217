"""The reference page and the names in the code are one list; pages can be read, and their links lead somewhere."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import dspy_otel
from dspy_otel import cli, semconv

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "semantic-conventions.md"
_NOT_EMITTED = {"SCHEMA_URL", "SCOPE_NAME", "OPTIMIZER_PARAMS_PREFIX"}


def emitted_names() -> dict[str, str]:
    constants = {name: value for name, value in vars(semconv).items() if name.isupper() and isinstance(value, str)}
    return {name: value for name, value in constants.items() if name not in _NOT_EMITTED}


def test_every_name_in_the_code_is_documented() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = {name: value for name, value in emitted_names().items() if value not in page}
    assert not missing


def test_every_documented_attribute_is_in_the_code() -> None:
    known = set(emitted_names().values())
    page = PAGE.read_text(encoding="utf-8")
    quoted = set(re.findall(r"`((?:gen_ai|dspy|openinference|input|output|exception|error|server)\.[a-z_.]+)`", page))
    code = {name for name in quoted if name.startswith("dspy.settings.")}
    unknown = {name for name in quoted - code if name not in known and not name.endswith(".")}
    assert not unknown


def prose(path: Path) -> list[tuple[int, str]]:
    """The lines of a page that are prose: not tables, code, pictures or headings."""
    found: list[tuple[int, str]] = []
    code = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        code ^= line.startswith("```")
        if not code and not line.startswith(("```", "|", "#", "![", "    ")):
            found.append((number, line))
    return found


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_at_most_120_characters_wide(page: Path) -> None:
    # What a report of versions and machines prints stands as it was printed.
    long = [number for number, line in prose(page) if len(line) > 120 and not line.startswith("Python ")]
    assert not long


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings; `-1`, `-2`, ... tell equal ones apart."""
    found: Counter[str] = Counter()
    code = False
    text = page.read_text(encoding="utf-8")
    for line in text.splitlines():
        code ^= line.startswith("```")
        if not code and (heading := re.match(r"#{1,6} +(.*?)(?: +#+)? *$", line)):
            words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])  # a link stands there as its text
            found[re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")] += 1
    numbered = {f"{slug}-{number}" for slug, times in found.items() for number in range(1, times)}
    return {*found, *numbered, *re.findall(r'<a (?:id|name)="([^"]+)"', text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
    wrong = []
    for target, anchor in links:
        there = page.parent / target if target else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            wrong.append(f"{target}#{anchor}")
    assert not wrong


def test_every_page_is_in_the_margin_of_the_site() -> None:
    tree = ast.parse((ROOT / "docs" / "conf.py").read_text(encoding="utf-8"))
    known = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    elsewhere = {name.removesuffix(".md") for name in ast.literal_eval(known["ELSEWHERE"]).values()}
    listed = [page for pages in ast.literal_eval(known["PAGES"]).values() for page in pages.split()]
    assert sorted(listed) == sorted(elsewhere | {page.stem for page in ROOT.glob("docs/*.md")} - {"index"})


COMMAND = re.compile(r"(?:^|[`;] ?)dspy-otel ([a-z]+(?: [^`\n|#]*)?)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_has_the_options_that_it_shows(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text(encoding="utf-8")
    quoted = "\n".join(re.findall(r"^```.*?^```|`dspy-otel [^`]*`", text, re.MULTILINE | re.DOTALL))
    for command in COMMAND.findall(quoted):
        name, *arguments = command.split()
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        shown = capsys.readouterr()
        assert ended.value.code == 0, f"{command}: {shown.err}"
        for option in (each.partition("=")[0] for each in arguments if each.startswith("-")):
            assert re.search(rf"(^|[ ,]){option}\b", shown.out, re.MULTILINE), f"dspy-otel {command}: {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_uses_what_there_is(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dspy_otel":
                assert hasattr(dspy_otel, node.attr), node.attr
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dspy_otel"):
                found = pytest.importorskip(str(node.module))
                assert all(hasattr(found, name.name) for name in node.names), ast.unparse(node)


SECURITY = ROOT / "docs" / "security.md"


def test_every_test_that_the_page_on_security_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", SECURITY.read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, function in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:async )?def {function or 'test_'}", text, re.MULTILINE), f"{file}::{function}"


def test_every_statement_in_its_tables_names_a_test() -> None:
    rows = [line for line in SECURITY.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    statements = [row for row in rows if not row.startswith(("| what |", "| place |", "|---"))]
    assert len(statements) > 10
    assert not [row for row in statements if "`tests/" not in row.split("|")[-2]]
