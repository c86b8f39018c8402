"""The README's small table: times to first token of vLLM, of lockstep and of pipemoe, taken from results on disk.

`python benchmarks/readme_table.py README.md` puts it there. A row names a run, so that machine and command are one link
away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.results_schema import read_results
from benchmarks.ttft.words import LOCKSTEP
from pipemoe.errors import InputError

_LEVEL = 0.02  # times this near to the best are told as best, too


class _Step(NamedTuple):
    """Prompts of `length` in one step of a ttft run, one prompt on each rank."""

    file: str
    rank_tokens: tuple[int, ...]
    length: int
    work: str
    run: str


class _Alone(NamedTuple):
    """One prompt on one rank, in a forward run."""

    file: str
    tokens: int
    work: str
    run: str


_TWO = "[two H100s](docs/results.md#qwen3-30b-a3b)"
_FOUR = "[four ranks on one H200](docs/results.md#four-ranks-on-one-h200)"
_ONE = "[one H200](docs/results.md#one-h200-one-rank-beside-vllm)"
_ROWS: tuple[_Step | _Alone, ...] = (
    _Step("h200_one_gpu/ttft.json", (4096, 16, 16, 16), 16, "16 tokens on three ranks, beside 4096", _FOUR),
    _Step("h200_one_gpu/ttft.json", (4096, 16, 16, 16), 4096, "those 4096 tokens", _FOUR),
    _Step("h200_one_gpu/ttft.json", (2048,) * 4, 2048, "2048 tokens on each of four ranks", _FOUR),
    _Step("h100_x2/ttft_qwen3-30b-a3b.json", (4096, 16), 16, "16 tokens, beside 4096 on the other GPU", _TWO),
    _Step("h100_x2/ttft_qwen3-30b-a3b.json", (4096, 16), 4096, "those 4096 tokens", _TWO),
    _Step("h100_x2/ttft_qwen3-30b-a3b.json", (2048, 2048), 2048, "2048 tokens on each GPU", _TWO),
    _Alone("h200/forward.json", 4096, "4096 tokens, no other GPU", _ONE),
    _Alone("h200/forward.json", 64, "64 tokens, no other GPU", _ONE),
    _Alone("h200/forward.json", 1, "1 token, no other GPU", _ONE),
)


def front_cells(results: Path) -> list[list[str]]:
    """Heading and rows. results: the folder benchmarks/results. Raises InputError if a run lacks what a row names."""
    heading = ["prompt", "vLLM 0.26", "lockstep", "pipemoe", "machine and command"]
    return [heading, *(_cells(row, read_results(results / row.file)["rows"]) for row in _ROWS)]


def _cells(row: _Step | _Alone, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = _of_step(row, rows) if isinstance(row, _Step) else _alone(row, rows)
    best = min(ms for ms in found if ms is not None)
    figures = ["-" if ms is None else f"**{ms:.1f}**" if ms <= best * (1 + _LEVEL) else f"{ms:.1f}" for ms in found]
    return [row.work, *figures, row.run]


def _of_step(row: _Step, rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float, float]:
    """vLLM, the lockstep mode of the least mean, and auto."""
    modes = {r["mode"]: r for r in rows if r["rank_tokens"] == list(row.rank_tokens) and r.get("trace") is None}
    lockstep = [modes[mode] for mode in LOCKSTEP if mode in modes]
    if "auto" not in modes or not lockstep:
        raise InputError(f"{row.file}: no modes auto and lockstep of {list(row.rank_tokens)}")

    def ttft_ms(of_mode: Mapping[str, Any]) -> float:
        return 1e3 * fmean(s for n, s in zip(of_mode["input_lens"], of_mode["ttfts"]) if n == row.length)

    return None, ttft_ms(min(lockstep, key=lambda r: r["mean_ttft_ms"])), ttft_ms(modes["auto"])


def _alone(row: _Alone, rows: Sequence[Mapping[str, Any]]) -> tuple[float, None, float]:
    """vLLM and pipemoe in the phase that both took part in."""
    peers = [r for r in rows if r["impl"] == "vllm" and r["tokens"] == row.tokens]
    ours = [
        r for r in rows if r["impl"] == "pipemoe" and r["tokens"] == row.tokens and r["phase"] == peers[0]["phase"]
    ] if peers else []  # fmt: skip
    if not ours:
        raise InputError(f"{row.file}: no phase of vllm and pipemoe with {row.tokens} tokens")
    return peers[0]["ttft_ms"], None, ours[0]["ttft_ms"]
