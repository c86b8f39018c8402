"""The serve benchmark's table: one line per policy, load and seed, as text for a terminal or as Markdown.

python benchmarks/serve/table.py results.json
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
from benchmarks.ttft.table import aligned


def _one_digit(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def _two_digits(value: float) -> str:
    return f"{value:.2f}"


# field of a row -> heading, and how to write a value that is not null
COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "label": ("policy", str),
    "what": ("requests", str),
    "arrivals": ("arrivals", str),
    "seed": ("seed", str),
    "load": ("load", _two_digits),
    "rate_rps": ("per s", _one_digit),
    "ttft_ms_p50": ("TTFT p50 ms", _one_digit),
    "ttft_ms_p95": ("p95", _one_digit),
    "ttft_ms_p99": ("p99", _one_digit),
    "ttft_ms_p50_short": ("short p50", _one_digit),
    "ttft_ms_p95_short": ("short p95", _one_digit),
    "ttft_ms_p95_long": ("long p95", _one_digit),
    "queueing_ms_p50": ("waiting p50", _one_digit),
    "tokens_per_s": ("tokens/s", lambda value: f"{value:.0f}"),
    "capacity_rps": ("capacity per s", _one_digit),
}
_CONTEXT = {"model": "model", "layers": "layers", "num_ranks": "ranks", "trace": "trace", "num_requests": "requests"}


def serve_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading and one line of cells per row."""
    lines = [[heading for heading, _ in COLUMNS.values()]]
    for row in rows:
        lines.append(["-" if row[name] is None else write(row[name]) for name, (_, write) in COLUMNS.items()])
    return lines


def serve_context(rows: Sequence[Mapping[str, Any]]) -> str:
    """What all rows share: "model small, layers 4, ranks 4, ..."."""
    shared = [name for name in _CONTEXT if len({row.get(name) for row in rows}) == 1 and name in rows[0]]
    return ", ".join(f"{_CONTEXT[name]} {rows[0][name]}" for name in shared)


def serve_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The aligned table for a terminal."""
    return f"{serve_context(rows)}\n{aligned(serve_cells(rows), 3)}".lstrip("\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, description="The results of the serve benchmark as a table.")
    parser.add_argument("results", help="its JSON file")
    print(serve_table(read_results(parser.parse_args().results)["rows"]))
