"""Pages lead somewhere: each test that docs/robustness.md names exists, and so does each file that a page links to. The
README is short, tables are those of their results, and the site builds without a warning.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import pipemoe
from benchmarks import readme_table
from tests.code_blocks import PAGES

_ROOT = Path(__file__).resolve().parents[1]
_LEAST_ROWS = 50  # a page that lost its tables must not pass


def test_the_tests_in_the_table_of_faults_exist():
    rows = [line for line in (_ROOT / "docs/robustness.md").read_text().splitlines() if "`tests/" in line]
    assert len(rows) >= _LEAST_ROWS
    missing = [name for row in rows for name in _named_tests(row) if not _exists(*name)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page):
    text = (_ROOT / page).read_text()
    links = {target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    assert links or page != "README.md"
    missing = [link for link in links if not _leads_somewhere(_ROOT / page, link)]
    assert not missing


def test_the_readme_is_short():
    lines = (_ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) < 160


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_tables_are_those_of_their_results(page):
    """Where this fails, run the command that it prints."""
    assert readme_table.main(["--check", str(_ROOT / page)]) == 0


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    # The variable silences the theme's news.
    run = subprocess.run(
        build, cwd=_ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0 and not run.stderr.strip(), run.stderr
    assert 'id="pipemoe.PipelinedMoE"' in (tmp_path / "api" / "index.html").read_text()


def test_every_public_name_is_on_the_page_of_the_api():
    shown = set(re.findall(r"^::: pipemoe\.(\w+)$", (_ROOT / "docs/api.md").read_text(), re.MULTILINE))
    assert set(pipemoe.__all__) - {"PipemoeError", "__version__"} <= shown


def test_every_setting_is_on_its_page_with_its_default():
    text = (_ROOT / "docs/settings.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(pipemoe.Config)}
    assert set(rows) == set(fields)
    said = {name: default for name, default in rows.items() if re.fullmatch(r"`.+`|[\d.]+", default)}
    assert {name: ast.literal_eval(default.strip("`")) for name, default in said.items()} == {
        n: fields[n] for n in said
    }


def _leads_somewhere(page: Path, link: str) -> bool:
    path, _, heading = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if target.name == "api.md":
        return not heading or f"::: {heading}\n" in target.read_text()
    return target.exists() and (not heading or heading in _headings(target))


def _headings(page: Path) -> set[str]:
    """As GitHub writes them in links."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _named_tests(row: str) -> list[tuple[str, str]]:
    """File and test's name, which is empty where a whole file is named."""
    named, path = [], ""
    for file, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+)(?:\[\w+\])?)?`", row):
        path = file or path
        named.append((path, test))
    return [(path, test) for path, test in named if path]


def _exists(path: str, test: str) -> bool:
    return (_ROOT / path).is_file() and (not test or test in _tests_of(path))


@cache
def _tests_of(path: str) -> frozenset[str]:
    tree = ast.parse((_ROOT / path).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
