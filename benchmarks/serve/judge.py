"""Who is ahead of whom in results of the serve benchmark: rolling steps against the best of lockstep in each figure.

python benchmarks/serve/judge.py results.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.results_schema import read_results

Rows = Sequence[Mapping[str, Any]]


class Verdict(NamedTuple):
    """One comparison; each figure is a median over seeds."""

    about: str
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
            f"{self.about}: rolling {self.rolling:.4g} {self.unit}, {self.best} {self.other:.4g} {self.unit}: "
            f"{self.ratio:.2f} x"
        )


def judge(rows: Rows) -> list[Verdict]:
    """All comparisons that the rows of one trace allow."""
    found = []
    for process in sorted({row["arrivals"] for row in rows if row["what"] == "load"}):
        of_process = [row for row in rows if row["what"] == "load" and row["arrivals"] == process]
        found.append(_compared(of_process, "capacity_rps", f"{process}: capacity", "requests/s", True))
        for load in sorted({row["load"] for row in of_process}):
            at_load = [row for row in of_process if row["load"] == load]
            where = f"{process}, load {load:g}"
            found.append(_compared(at_load, "ttft_ms_p50", f"{where}: half of all first tokens", "ms", False))
            found.append(_compared(at_load, "ttft_ms_p95_short", f"{where}: 95 % of the short half's", "ms", False))
    saturated = [row for row in rows if row["what"] == "saturation"]
    found.append(_compared(saturated, "requests_per_s", "all at once: throughput", "requests/s", True))
    alone = [row for row in rows if row["what"] == "alone"]
    found.append(_compared(alone, "ttft_ms_p50", "one at a time", "ms", False, "closed_step"))
    found.append(_compared(alone, "ttft_ms_p50", "one at a time", "ms", False))
    return [verdict for verdict in found if verdict is not None]


def _compared(
    rows: Rows, field: str, about: str, unit: str, more_is_better: bool, policy: str = "lockstep"
) -> Verdict | None:
    """Rolling's figure against the best of the policies whose names begin with `policy`. None without both."""
    by_label: dict[str, list[float]] = {}
    for row in rows:
        if row[field] is not None:
            by_label.setdefault(row["label"], []).append(row[field])
    figures = {label: median(values) for label, values in by_label.items()}
    others = {label: value for label, value in figures.items() if label.startswith(policy)}
    rolling = [value for label, value in figures.items() if label.startswith("rolling")]
    if not others or not rolling:
        return None
    pick = max if more_is_better else min
    best = pick(others, key=lambda label: others[label])
    return Verdict(about, pick(rolling), others[best], best, unit, more_is_better)


def verdict_cells(rows: Rows) -> list[list[str]]:
    """Heading and a line of cells for each comparison, of one trace or of several."""
    lines = [["trace", "figure", "rolling", "the best other", "which", "rolling is ahead"]]
    for trace in sorted({row["trace"] for row in rows}):
        for v in judge([row for row in rows if row["trace"] == trace]):
            figures = [f"{value:.4g} {v.unit}" for value in (v.rolling, v.other)]
            lines.append([trace, v.about, *figures, v.best, f"{v.ratio:.2f} x"])
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
