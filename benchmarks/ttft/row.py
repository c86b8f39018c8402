"""A row of the ttft benchmark: what one mode did with one set of requests.

Names, units and percentiles are those of vLLM's serving benchmark where it has them (`mean_ttft_ms`, `ttfts` in
seconds, `input_lens`, ...; percentiles as numpy's, linear between samples). Figures over ranks are ours. In a step a
rank's TTFT is that of its latest request; `slowest_rank` is the largest over ranks, and `median_rank` the median over
the ranks that had requests, each a mean over steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.results_schema import plain
from pipemoe.errors import InputError

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """One request and the time from its arrival to its first token."""

    rank: int
    input_tokens: int
    ttft_s: float
    step: int = 0  # the step that served it


def ttft_row(
    *,
    mode: str,
    model: str,
    layers: int,
    num_ranks: int,
    rank_tokens: Sequence[int] | str,  # tokens per rank, or the trace's name
    requests: Sequence[ServedRequest],
    duration_s: float,
    exposed_comm_ms: float | None,
    overlap_pct: float | None,
    peak_workspace_bytes: int | None,
    parity: bool,
) -> dict[str, Any]:
    """The row, with raw per-request lists in the order of `requests`. Raises InputError without requests."""
    if not requests:
        raise InputError(f"mode {mode}: no request was served, so there is no time to first token")
    ttft_ms = np.array([request.ttft_s for request in requests]) * 1e3  # [requests]
    ranks = np.array([request.rank for request in requests])
    steps = np.array([request.step for request in requests])
    of_steps = [
        [ttft_ms[(steps == step) & (ranks == rank)].max() for rank in np.unique(ranks[steps == step])]
        for step in np.unique(steps)
    ]
    input_lens = [request.input_tokens for request in requests]
    percentiles = {p: float(np.percentile(ttft_ms, p)) for p in PERCENTILES}
    return plain(
        {
            "mode": mode,
            "model": model,
            "layers": layers,
            "num_ranks": num_ranks,
            "rank_tokens": rank_tokens if isinstance(rank_tokens, str) else list(rank_tokens),
            "ttft_ms_p50": percentiles[50],
            "ttft_ms_p99": percentiles[99],
            "ttft_ms_slowest_rank": float(np.mean([max(of_step) for of_step in of_steps])),
            "ttft_ms_median_rank": float(np.mean([np.median(of_step) for of_step in of_steps])),
            "exposed_comm_ms": exposed_comm_ms,
            "overlap_pct": overlap_pct,
            "peak_workspace_bytes": peak_workspace_bytes,
            "parity": parity,
            "completed": len(requests),
            "duration": duration_s,
            "total_input_tokens": sum(input_lens),
            "request_throughput": len(requests) / duration_s if duration_s > 0 else None,
            "input_throughput": sum(input_lens) / duration_s if duration_s > 0 else None,
            "mean_ttft_ms": float(ttft_ms.mean()),
            "median_ttft_ms": float(np.median(ttft_ms)),
            "std_ttft_ms": float(ttft_ms.std()),
            **{f"p{p}_ttft_ms": value for p, value in percentiles.items()},
            "input_lens": input_lens,
            "ttfts": [request.ttft_s for request in requests],
            "ranks": ranks,
            "steps": steps,
        }
    )
