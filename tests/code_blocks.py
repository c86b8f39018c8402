"""Code blocks of README.md and docs/, as tests take them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
NOT_RUN = ("text", "mermaid")  # what programs print, and drawings
_BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^>]+) -->\n)?```(?P<language>.*)\n(?P<code>(?s:.*?))^```$", re.MULTILINE
)


class CodeBlock(NamedTuple):
    page: str
    line: int
    language: str
    needs: str | None  # what a test does not have: "GPU", "network", ...
    code: str


def code_blocks(page: str, *languages: str) -> list[CodeBlock]:
    """The page's blocks in these languages, in order; of all languages if none is named."""
    text = (ROOT / page).read_text()
    assert text.count("\n```") % 2 == 0, f"{page}: a block does not end"
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        found.append(CodeBlock(page, line, match["language"], match["needs"], match["code"]))
    return [block for block in found if not languages or block.language in languages]
