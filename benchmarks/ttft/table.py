"""The ttft benchmark's table: one line per mode, as text for a terminal or as Markdown.

python benchmarks/ttft/table.py results.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.results_schema import read_results


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f}"


def tokens_text(value: Sequence[int] | str) -> str:
    """[4096, 16, 16, 16] as "4096, 16 x 3"; a trace by its name."""
    if isinstance(value, str):
        return value
    runs: list[list[int]] = []  # [tokens, how often in a row]
    for tokens in value:
        if runs and runs[-1][0] == tokens:
            runs[-1][1] += 1
        else:
            runs.append([tokens, 1])
    return ", ".join(f"{tokens} x {count}" if count > 1 else str(tokens) for tokens, count in runs)


_Column = tuple[str, Callable[[Any], str]]

# field of a row -> heading, and how to write a value that is not null
COLUMNS: Mapping[str, _Column] = {
    "mode": ("mode", str),
    "mean_ttft_ms": ("TTFT mean ms", _milliseconds),
    "p50_ttft_ms": ("p50", _milliseconds),
    "p90_ttft_ms": ("p90", _milliseconds),
    "p99_ttft_ms": ("p99", _milliseconds),
    "ttft_ms_median_rank": ("median rank", _milliseconds),
    "ttft_ms_slowest_rank": ("slowest rank", _milliseconds),
    "exposed_comm_ms": ("exposed comm ms", _milliseconds),
    "overlap_pct": ("overlap %", lambda value: f"{value:.0f}"),
    "peak_workspace_bytes": ("workspace MiB", _mebibytes),
    "parity": ("parity", lambda value: "yes" if value else "NO"),
}
# What tells tables apart; it gets a column if the rows differ in it.
CONTEXT: Mapping[str, _Column] = {
    "model": ("model", str),
    "layers": ("layers", str),
    "num_ranks": ("ranks", str),
    "rank_tokens": ("tokens per rank", tokens_text),
}
_UNKNOWN = "-"


def ttft_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading and one line of cells per row."""
    differing = {name: column for name, column in CONTEXT.items() if len({str(row.get(name)) for row in rows}) > 1}
    columns = {**differing, **COLUMNS}
    lines = [[heading for heading, _ in columns.values()]]
    for row in rows:
        values = [(row.get(name), write) for name, (_, write) in columns.items()]
        lines.append([_UNKNOWN if value is None else write(value) for value, write in values])
    return lines


def ttft_context(rows: Sequence[Mapping[str, Any]]) -> str:
    """What all rows share: "model qwen3, layers 8, ranks 4"."""
    shared = {name: column for name, column in CONTEXT.items() if len({str(row.get(name)) for row in rows}) == 1}
    return ", ".join(
        f"{heading} {write(rows[0][name])}" for name, (heading, write) in shared.items() if name in rows[0]
    )


def ttft_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The aligned table for a terminal: words to the left, numbers to the right."""
    cells = ttft_cells(rows)
    num_words = sum(heading in ("mode", "model", "tokens per rank") for heading in cells[0])
    return f"{ttft_context(rows)}\n{aligned(cells, num_words)}".lstrip("\n")


def aligned(cells: Sequence[Sequence[str]], num_words: int) -> str:
    """Lines of cells: the first `num_words` columns to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(f"{cell:{'<' if column < num_words else '>'}{widths[column]}}" for column, cell in enumerate(line))
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, description="The results of the ttft benchmark as a table.")
    parser.add_argument("results", help="its JSON file")
    print(ttft_table(read_results(parser.parse_args().results)["rows"]))
