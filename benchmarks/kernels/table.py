"""The kernel benchmark's table: one line per cell, pipemoe beside its peers; and a summary of all cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_OURS = "pipemoe"  # its variants' names begin with it: they are no peers
_CELL = ("layer", "dtype", "tokens")
_LARGE_TOKENS = 4096  # from here on the share of routing and index counts, below only their time

Row = Mapping[str, Any]


def _by_cell(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """For each cell, its rows by implementation."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in _CELL), {})[row["impl"]] = row
    return list(cells.values())


def kernels_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Heading and lines; times in ms."""
    others = [impl for impl in dict.fromkeys(row["impl"] for row in rows) if impl != _OURS]
    heading = ["H / I, experts, local", "tokens", "local pairs", "floor", "pipemoe", "over floor", "TFLOP/s"]
    heading += [*(other.replace("_", " ") for other in others), "routing us", "index us", "host us"]
    lines = []
    for cell in _by_cell(rows):
        any_row = next(iter(cell.values()))
        ours = cell.get(_OURS, {})
        dtype = "" if any_row["dtype"] == "bf16" else f", {any_row['dtype']}"
        name = f"{any_row['H']} / {any_row['I']}, {any_row['experts']}, {any_row['local_experts']}{dtype}"
        times = [_digits(cell.get(other, {}).get("ms")) for other in others]
        own = [_digits(ours.get("ms")), _digits(ours.get("ratio_to_floor"), 2), _digits(ours.get("tflops"), 0)]
        parts = [_digits(ours.get(part), 1) for part in ("routing_us", "index_us", "host_us")]
        lines.append(
            [name, str(any_row["tokens"]), str(any_row["pairs"]), _digits(any_row["floor_ms"]), *own, *times, *parts]
        )
    return [heading, *lines]


def kernels_context(rows: Sequence[Row]) -> str:
    first = rows[0]
    ceilings = (
        f"dense bf16 {first['dense_tflops']:.0f} TFLOP/s, copy {first['copy_tbps']:.2f} TB/s read + written in that run"
    )
    return f"milliseconds; {ceilings}"


def kernels_summary(rows: Sequence[Row]) -> str:
    """Against the best peer of the run, the largest share of routing and index, and the host's time: a line each."""
    cells = [cell for cell in _by_cell(rows) if _OURS in cell and cell[_OURS]["ms"] is not None]
    lines = []
    gains = []
    for cell in cells:
        peers = [row["ms"] for impl, row in cell.items() if not impl.startswith(_OURS) and row["ms"] is not None]
        if peers:
            gains.append(min(peers) / cell[_OURS]["ms"])
    if gains:
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        lines.append(
            f"against the best peer of each of {len(gains)} cells: {mean:.2f} x as fast (geometric mean), "
            f"{min(gains):.2f} at worst"
        )
    timed = [cell[_OURS] for cell in cells if cell[_OURS]["index_us"] is not None]
    times = [row["routing_us"] + row["index_us"] for row in timed if row["tokens"] < _LARGE_TOKENS]
    if times:
        lines.append(f"routing and index below {_LARGE_TOKENS} tokens: {max(times):.1f} us at most")
    shares = [(row["routing_us"] + row["index_us"]) / row["ms"] / 10 for row in timed if row["tokens"] >= _LARGE_TOKENS]
    if shares:
        lines.append(f"routing and index from {_LARGE_TOKENS} tokens on: {max(shares):.1f} % of the call at most")
    if timed:
        lines.append(f"host, eager call: {max(row['host_us'] for row in timed):.1f} us at most")
    return "\n".join(lines)


def _digits(value: float | None, places: int = 3) -> str:
    return "-" if value is None else f"{value:.{places}f}"
