"""What a ttft table says, in a few sentences: who had first tokens sooner in `auto` than in lockstep, and who did not.

Lockstep is the best mode there in which all ranks wait for one another in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.ttft.table import tokens_text

LOCKSTEP = ("padded", "broadcast", "chunked", "two_batch")
_LEVEL = 0.02  # differences below are called level
_TIMES = 1.5  # from here on a gain is told in times, not in percent
_SHORT = 0.5  # prompts shorter than this share of the longest are short ones


def in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence or two for each workload among `rows`; empty where `auto` or all lockstep modes are missing."""
    workloads: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        workloads.setdefault(str(row["rank_tokens"]), []).append(row)
    return "\n".join(filter(None, map(_of_workload, workloads.values())))


def _of_workload(rows: Sequence[Mapping[str, Any]]) -> str:
    by_mode = {row["mode"]: row for row in rows}
    lockstep = [by_mode[mode] for mode in LOCKSTEP if mode in by_mode]
    if "auto" not in by_mode or not lockstep:
        return ""
    auto, best = by_mode["auto"], min(lockstep, key=lambda row: row["mean_ttft_ms"])
    name, against = tokens_text(auto["rank_tokens"]), f"in lockstep ({best['mode']})"
    if auto.get("time_scale"):
        name += f" by its own clock, {auto['time_scale']:g} times as fast, waiting included"
    lengths, ours, theirs = (np.array(values) for values in (auto["input_lens"], auto["ttfts"], best["ttfts"]))
    short = lengths < _SHORT * lengths.max()
    if not short.any() or isinstance(auto["rank_tokens"], str):
        means = ours.mean(), theirs.mean()
        return f"{name}: first tokens after {_ms(means[0])} on average, {_compared(*means, against)}."
    some = f"prompts of under {int(np.ceil(_SHORT * lengths.max()))} tokens had"
    long = "the long ones" if (~short).sum() > 1 else "the long one"
    return (
        f"{name}: {some} their first token after {_ms(ours[short].mean())}, "
        f"{_compared(ours[short].mean(), theirs[short].mean(), against)}; "
        f"{long} after {_ms(ours[~short].mean())}, {_compared(ours[~short].mean(), theirs[~short].mean(), 'there')}."
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:.0f} ms"


def _compared(ours: float, theirs: float, against: str) -> str:
    ratio = theirs / ours
    if abs(ratio - 1) <= _LEVEL:
        return f"as soon as {against}"
    if ratio >= _TIMES:
        return f"{ratio:.1f} times sooner than {against}"
    return f"{abs(1 / ratio - 1):.0%} {'sooner' if ratio > 1 else 'later'} than {against}"
