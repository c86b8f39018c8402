"""Who is ahead of whom in results of the serve benchmark: rolling steps against the best of lockstep in each figure.

python benchmarks/serve/judge.py results.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.results_schema import read_results

Rows = Sequence[Mapping[str, Any]]


class Verdict(NamedTuple):
    """One comparison, of one seed: seeds have different requests."""

    about: str
    seed: int
    rolling: float
    other: float
    best: str  # which policy has the other figure
    unit: str
    more_is_better: bool

    @property
    def ratio(self) -> float:
        """Over 1: rolling is ahead."""
        ratio = self.rolling / self.other
        return ratio if self.more_is_better else 1 / ratio

    def __str__(self) -> str:
        return (
            f"{self.about}, seed {self.seed}: rolling {self.rolling:.4g} {self.unit}, "
            f"{self.best} {self.other:.4g} {self.unit}: {self.ratio:.2f} x"
        )


def judge(rows: Rows) -> list[Verdict]:
    """All comparisons that the rows of one trace allow, each for every seed that has both sides."""
    found: list[Verdict] = []
    for process in sorted({row["arrivals"] for row in rows if row["what"] == "load"}):
        of_process = [row for row in rows if row["what"] == "load" and row["arrivals"] == process]
        found += _compared(of_process, "capacity_rps", f"{process}: capacity", "requests/s", True)
        for load in sorted({row["load"] for row in of_process}):
            at_load = [row for row in of_process if row["load"] == load]
            where = f"{process}, load {load:g}"
            found += _compared(at_load, "ttft_ms_p50", f"{where}: half of all first tokens", "ms", False)
            found += _compared(at_load, "ttft_ms_p95_short", f"{where}: 95 % of the short half's", "ms", False)
    saturated = [row for row in rows if row["what"] == "saturation"]
    found += _compared(saturated, "requests_per_s", "all at once: throughput", "requests/s", True)
    alone = [row for row in rows if row["what"] == "alone"]
    found += _compared(alone, "ttft_ms_p50", "one at a time", "ms", False, "closed_step")
    found += _compared(alone, "ttft_ms_p50", "one at a time", "ms", False)
    return found


def _compared(
    rows: Rows, field: str, about: str, unit: str, more_is_better: bool, policy: str = "lockstep"
) -> list[Verdict]:
    """Rolling's figure against the best of the policies whose names begin with `policy`, for each seed."""
    pick = max if more_is_better else min
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        figures = {row["label"]: row[field] for row in rows if row["seed"] == seed and row[field] is not None}
        rolling = [figures[label] for label in figures if label.startswith("rolling")]
        others = [(figures[label], label) for label in figures if label.startswith(policy)]
        if rolling and others:
            found.append(Verdict(about, seed, pick(rolling), *pick(others), unit, more_is_better))
    return found


def verdict_cells(rows: Rows) -> list[list[str]]:
    """Heading and a line of cells for each comparison, of one trace or of several."""
    lines = [["trace", "figure", "seed", "rolling", "the best other", "which", "rolling is ahead"]]
    for trace in sorted({row["trace"] for row in rows}):
        for v in judge([row for row in rows if row["trace"] == trace]):
            figures = [f"{value:.4g} {v.unit}" for value in (v.rolling, v.other)]
            lines.append([trace, v.about, str(v.seed), *figures, v.best, f"{v.ratio:.2f} x"])
    return lines


def verdicts(rows: Rows) -> list[str]:
    """A line for each comparison, by trace."""
    return [
        f"{trace}, {verdict}"
        for trace in sorted({row["trace"] for row in rows})
        for verdict in judge([row for row in rows if row["trace"] == trace])
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Who is ahead of whom in serve's results.")
    parser.add_argument("results", help="its JSON file")
    print("\n".join(verdicts(read_results(parser.parse_args().results)["rows"])))
