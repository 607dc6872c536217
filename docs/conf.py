"""The documentation as a site: `make docs` builds it with Sphinx into site/, and fails for a link that leads nowhere.

The pages are the same files that GitHub shows.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
# GitHub looks for these at the top of the repository; in the site they are pages too, by other names.
ELSEWHERE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security-policy.md"}

# In the margin of the site; GitHub's reader of index.md would see it as code.
PAGES = {
    "Begin": "first-ten-minutes concepts",
    "How to": "optimizers gepa mlflow backends notebook web workers deployment from-autolog from-openinference queries "
    "coexistence security",
    "Decide": "compare why budget dataset",
    "Reference": "configuration semantic-conventions proposal-optimization-spans performance versions licences "
    "changelog",
    "More": "troubleshooting architecture contributing security-policy",
}

project = "dspy-otel"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = "dspy-otel"
html_show_copyright = False
html_copy_source = False
highlight_language = "none"
myst_heading_anchors = 4  # links to headings, as GitHub has them
myst_fence_as_directive = ["mermaid"]

_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]*)(#[^)\s]*)?\)")


def _links(text: str) -> str:
    """Point links to pages from elsewhere at their names here; of a link to a file of the source, its text stays."""

    def there(match: re.Match[str]) -> str:
        shown, target, anchor = match[1], match[2].removeprefix("docs/"), match[3] or ""
        name = ELSEWHERE.get(target.removeprefix("../"), target)
        return shown if name.startswith("../") else f"[{shown}]({name}{anchor})"

    return _LINK.sub(there, text)


def _bring(app: Any) -> None:
    for source, name in ELSEWHERE.items():
        shutil.copyfile(DOCS.parent / source, DOCS / name)


def _take_away(app: Any, _: Exception | None) -> None:
    for name in ELSEWHERE.values():
        (DOCS / name).unlink(missing_ok=True)


def _read(app: Any, name: str, source: list[str]) -> None:
    source[0] = _links(source[0])
    if name == "index":
        for caption, pages in PAGES.items():
            entries = "\n".join(pages.split())
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def setup(app: Any) -> None:
    """Connect this file to Sphinx."""
    app.connect("builder-inited", _bring)
    app.connect("source-read", _read)
    app.connect("build-finished", _take_away)
