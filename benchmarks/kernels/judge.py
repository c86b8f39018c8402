"""The bars for the kernel benchmark's figures, and the verdicts on one run in one table.

Cells are compared with the best of the field (field.py) by their ratios to the floor, each by the ceilings of its own
run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.field import FIELD

Row = Mapping[str, Any]

PER_CELL = 1.03  # of the best of the field's ratio to the floor
GEOMETRIC_MEAN = 1.10
SHARE_OF_DENSE = {7168: 0.80, 2048: 0.72, 4096: 0.92}  # by H, at SHARE_TOKENS
SHARE_TOKENS = 16384
MEMORY_BOUND_TOKENS, MEMORY_BOUND_FLOOR_MS, MEMORY_BOUND = (64, 512), 0.2, 1.08
INDEX_SHARE_TOKENS, INDEX_SHARE = 4096, 0.05
INDEX_TOKENS, INDEX_US = 64, 15.0
HOST_US = 40.0
FP8_CELL, FP8_GAIN, FP8_TFLOPS = ("deepseek-v3", 16384), 1.6, 850.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bar. found: None if the run has no figure for it; then met is False."""

    bar: str
    wanted: str
    found: str | None
    met: bool


def judge(rows: Sequence[Row], ours: str = "pipemoe") -> list[Verdict]:
    """All bars, for the implementation `ours` of the rows."""
    timed = [row for row in rows if row["impl"] == ours and row["ms"] is not None]
    bf16 = {(row["layer"], row["tokens"]): row for row in timed if row["dtype"] == "bf16"}
    known = {cell: row for cell, row in bf16.items() if cell in FIELD}
    return [
        *_cells(known),
        _mean(known),
        *_shares(known),
        *_memory_bound(known),
        *_parts(list(bf16.values())),
        *_fp8(rows, bf16),
    ]


def _cells(known: Mapping[tuple[str, int], Row]) -> list[Verdict]:
    verdicts = []
    for cell, best in FIELD.items():
        most = PER_CELL * best.ratio_to_floor
        ratio = known[cell]["ratio_to_floor"] if cell in known else None
        found = None if ratio is None else f"{ratio:.3f}, {best.ratio_to_floor / ratio:.2f} x as fast"
        wanted = f"at most {most:.3f} ({best.name} {best.ratio_to_floor:.3f})"
        verdicts.append(
            Verdict(f"{cell[0]}, {cell[1]} tokens: ratio to floor", wanted, found, ratio is not None and ratio <= most)
        )
    return verdicts


def _mean(known: Mapping[tuple[str, int], Row]) -> Verdict:
    gains = [FIELD[cell].ratio_to_floor / row["ratio_to_floor"] for cell, row in known.items()]
    mean = math.exp(sum(map(math.log, gains)) / len(gains)) if gains else None
    found = None if mean is None else f"{mean:.3f} over {len(gains)} cells"
    met = mean is not None and len(gains) == len(FIELD) and mean >= GEOMETRIC_MEAN
    return Verdict(
        "geometric mean against the best of the field", f"at least {GEOMETRIC_MEAN} over {len(FIELD)} cells", found, met
    )


def _shares(known: Mapping[tuple[str, int], Row]) -> list[Verdict]:
    found = {hidden: [] for hidden in SHARE_OF_DENSE}
    for (_, tokens), row in known.items():
        if tokens == SHARE_TOKENS:
            found[row["H"]].append(row["tflops"] / row["dense_tflops"])
    return [
        _least(
            f"H {hidden}, {SHARE_TOKENS} tokens: share of the dense rate",
            least,
            found[hidden],
            lambda share: f"{100 * share:.0f} %",
        )
        for hidden, least in SHARE_OF_DENSE.items()
    ]


def _memory_bound(known: Mapping[tuple[str, int], Row]) -> list[Verdict]:
    verdicts = []
    for (layer, tokens), row in known.items():
        if tokens in MEMORY_BOUND_TOKENS and row["floor_ms"] > MEMORY_BOUND_FLOOR_MS:
            bar = f"{layer}, {tokens} tokens: memory-bound, ratio to floor"
            verdicts.append(_most(bar, MEMORY_BOUND, [row["ratio_to_floor"]], lambda ratio: f"{ratio:.3f}"))
    return verdicts


def _parts(rows: Sequence[Row]) -> list[Verdict]:
    indexed = [row for row in rows if row["routing_us"] is not None and row["index_us"] is not None]
    shares = [
        (row["routing_us"] + row["index_us"]) / row["ms"] / 1e3
        for row in indexed
        if row["tokens"] >= INDEX_SHARE_TOKENS
    ]
    times = [row["routing_us"] + row["index_us"] for row in indexed if row["tokens"] == INDEX_TOKENS]
    hosts = [row["host_us"] for row in rows if row["host_us"] is not None]
    return [
        _most(
            f"routing + index, {INDEX_SHARE_TOKENS} tokens and more: share of the call",
            INDEX_SHARE,
            shares,
            lambda share: f"{100 * share:.1f} %",
        ),
        _most(f"routing + index, {INDEX_TOKENS} tokens: us", INDEX_US, times, lambda us: f"{us:.1f}"),
        _most("host, eager call: us", HOST_US, hosts, lambda us: f"{us:.1f}"),
    ]


def _fp8(rows: Sequence[Row], bf16: Mapping[tuple[str, int], Row]) -> list[Verdict]:
    fp8 = [
        row
        for row in rows
        if row["dtype"] == "fp8" and row["ms"] is not None and (row["layer"], row["tokens"]) == FP8_CELL
    ]
    gains = [bf16[FP8_CELL]["ms"] / row["ms"] for row in fp8 if FP8_CELL in bf16]
    bar = f"fp8, {FP8_CELL[0]}, {FP8_CELL[1]} tokens"
    return [
        _least(f"{bar}: x bf16", FP8_GAIN, gains, lambda gain: f"{gain:.2f}"),
        _least(f"{bar}: TFLOP/s", FP8_TFLOPS, [row["tflops"] for row in fp8], lambda rate: f"{rate:.0f}"),
    ]


def _least(bar: str, least: float, values: Sequence[float], text: Callable[[float], str]) -> Verdict:
    found = text(min(values)) if values else None
    return Verdict(bar, f"at least {text(least)}", found, bool(values) and min(values) >= least)


def _most(bar: str, most: float, values: Sequence[float], text: Callable[[float], str]) -> Verdict:
    found = text(max(values)) if values else None
    return Verdict(bar, f"at most {text(most)}", found, bool(values) and max(values) <= most)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """One line per bar, aligned."""
    lines = [("bar", "wanted", "found", "")]
    lines += [
        (v.bar, v.wanted, v.found or "-", "met" if v.met else "not measured" if v.found is None else "NOT MET")
        for v in verdicts
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in lines
    )
    return f"{text}\n{sum(v.met for v in verdicts)} of {len(verdicts)} bars met"
