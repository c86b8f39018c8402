"""Puts results into a Markdown page, so that nobody types figures.

The page marks where a table goes, and its results; everything between the marks is replaced:

    <!-- results: benchmarks/results/h200_one_gpu/ttft.json -->
    <!-- end of results -->

With `verdicts:` in place of `results:`, for results of ttft: who is ahead of whom, as ttft/judge.py says. With `front:`
and the folder of all results: the README's small table, as front_table.py says.

python benchmarks/readme_table.py README.md            # rewrite the page
python benchmarks/readme_table.py --check README.md    # exit status 1 when the page is not what its results say
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.arrivals import arrivals_cells
from benchmarks.forward import forward_cells, forward_context
from benchmarks.front_table import front_cells
from benchmarks.kernels.table import kernels_cells, kernels_context
from benchmarks.overlap import overlap_cells
from benchmarks.results_schema import read_results
from benchmarks.serve import judge as serve_judge
from benchmarks.serve.table import serve_cells, serve_context
from benchmarks.ttft import judge as ttft_judge
from benchmarks.ttft.table import ttft_cells, ttft_context
from pipemoe.errors import InputError
from pipemoe.output_path import write_whole

_CHECKOUT = Path(__file__).resolve().parent.parent
_MARKED = re.compile(
    r"(<!-- (?P<kind>results|verdicts|front): (?P<results>\S+) -->\n)(?P<table>.*?)(?P<end><!-- end of results -->)",
    re.DOTALL,
)


def _plain_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Every field of the first row that is a single value, unchanged."""
    names = [name for name, value in rows[0].items() if not isinstance(value, (list, dict))]
    return [names, *(["-" if row.get(name) is None else str(row[name]) for name in names] for row in rows)]


def _memory_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    heading = ["mode", "capped", "tokens per rank", "peak MiB", "workspace MiB", "growth"]
    lines = [
        [
            row["mode"],
            "yes" if row["capped"] else "no",
            str(row["tokens_per_rank"]),
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['workspace_bytes'] / 2**20:.0f}",
            f"{row['growth']:.2f}",
        ]
        for row in rows
    ]
    return [heading, *lines]


def _ttft_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """All but the steps drawn from traces, which the verdicts cover."""
    return ttft_cells([row for row in rows if row.get("trace") is None])


# How rows become cells; those of other benchmarks are written as they are.
_CELLS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], list[list[str]]]] = {
    "ttft": _ttft_cells,
    "forward": forward_cells,
    "memory": _memory_cells,
    "overlap": overlap_cells,
    "kernels": kernels_cells,
    "serve": serve_cells,
    "arrivals": arrivals_cells,
}
_VERDICTS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], list[list[str]]]] = {
    "ttft": ttft_judge.verdict_cells,
    "serve": serve_judge.verdict_cells,
}
# What the rows have in common, for the line below the table.
_CONTEXT: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "ttft": ttft_context,
    "forward": forward_context,
    "kernels": kernels_context,
    "serve": serve_context,
}


def markdown_table(document: Mapping[str, Any], kind: str = "results") -> str:
    """The document's rows, or verdicts on them, as a Markdown table; below it machine, commit and the exact command."""
    rows = document["rows"]
    if not rows:
        raise InputError("the results have no rows")
    made = _VERDICTS if kind == "verdicts" else _CELLS
    cells = made.get(document["benchmark"], _plain_cells)
    table = _lines(cells(rows))
    context = _CONTEXT[document["benchmark"]](rows) if document["benchmark"] in _CONTEXT else ""
    machine = document["machine"]
    gpus = [gpu["name"] for gpu in machine.get("gpus", ())]
    device = f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine.get('cpu') or 'CPU'}, {machine.get('num_cores')} cores"
    facts = "; ".join(part for part in (context, device, f"commit {(document['commit'] or 'unknown')[:12]}") if part)
    return "\n".join([*table, "", f"{facts}; `{document['command']}`", ""])


def _lines(cells: Sequence[Sequence[str]]) -> list[str]:
    """A heading and rows as lines of Markdown; columns of figures to the right."""
    heading, *lines = cells
    numeric = [
        all(re.fullmatch(r"|-|\**[-+]?[\d.]+( %)?\**", line[column]) for line in lines)
        for column in range(len(heading))
    ]
    separator = ["---:" if is_numeric else "---" for is_numeric in numeric]
    return [
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in (heading, separator, *lines)
    ]


def fill_page(page: str) -> str:
    """`page` with every marked table rendered anew. Raises InputError if it marks none."""
    if not _MARKED.search(page):
        raise InputError("the page has no line <!-- results: path.json --> that <!-- end of results --> follows")

    def fill(match: re.Match[str]) -> str:
        if match["kind"] == "front":
            return match[1] + "\n".join([*_lines(front_cells(_CHECKOUT / match["results"])), match["end"]])
        document = read_results(_CHECKOUT / match["results"])
        return match[1] + markdown_table(document, match["kind"]) + match["end"]

    return _MARKED.sub(fill, page)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Put results into the marked places of a Markdown page."
    )
    parser.add_argument("page", type=Path)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 when the page is out of date"
    )
    options = parser.parse_args(arguments)
    page = options.page.read_text()
    filled = fill_page(page)
    if options.check and filled != page:
        print(f"{options.page}: its tables are not those of its results: run benchmarks/readme_table.py {options.page}")
        return 1
    if not options.check:
        write_whole(options.page, filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
