"""Who is ahead of whom in results of ttft: mode auto against the fixed modes, and predictions against measured times.

    python benchmarks/ttft/judge.py benchmarks/results/h200_one_gpu/ttft.json

The best fixed mode of a workload is picked on the odd rounds and judged, as auto is, on the even ones. It is the one
with the lowest mean TTFT whose slowest rank is within the makespan budget of the earliest, which is how auto itself
chooses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.results_schema import read_results
from benchmarks.ttft.table import aligned, tokens_text
from pipemoe.errors import InputError

Row = Mapping[str, Any]
# Predicted field and measured field.
_PREDICTIONS = (("predicted_ttft_ms", "ttft_ms_slowest_rank"), ("predicted_median_rank_ms", "ttft_ms_median_rank"))


def by_workload(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """The rows of each workload by mode, in order. Raises InputError for rows without odd or even rounds."""
    found: dict[str, dict[str, Row]] = {}
    for number, row in enumerate(rows):
        if row.get("even_mean_ttft_ms") is None:
            raise InputError(f"row {number}: no even rounds; benchmarks/ttft needs --rounds 2 or more")
        of_workload = found.setdefault(str(row["rank_tokens"]), {})
        of_workload.setdefault(row["mode"], row)
    return list(found.values())


def best_fixed(modes: Mapping[str, Row]) -> str | None:
    """The fixed mode that is best on the odd rounds, within the budget that auto has."""
    budget = 1 + modes["auto"]["makespan_budget"] if "auto" in modes else 1.1
    fixed = {mode: row for mode, row in modes.items() if mode.split()[0] != "auto"}
    allowed = min((row["odd_slowest_rank_ms"] for row in modes.values()), default=0) * budget
    within = [mode for mode, row in fixed.items() if row["odd_slowest_rank_ms"] <= allowed]
    return min(within or fixed, key=lambda mode: fixed[mode]["odd_mean_ttft_ms"], default=None)


def verdict(modes: Mapping[str, Row]) -> dict[str, Any]:
    """Auto's figures on the even rounds over others' (below 1: auto is ahead), and by how much its predictions were too
    long (0.1: by a tenth). Null if a mode was not run, or nothing predicted.
    """
    auto, name = modes.get("auto"), best_fixed(modes)

    def over(mode: str | None, figure: str) -> float | None:
        return None if auto is None or mode not in modes else auto[figure] / modes[mode][figure]

    def error(predicted: str, measured: str) -> float | None:
        return None if auto is None or not auto.get(predicted) else auto[predicted] / auto[measured] - 1

    row = next(iter(modes.values()))
    return {
        "rank_tokens": row["rank_tokens"],
        "trace": row.get("trace"),
        "best_fixed": name,
        "mean_over_best": over(name, "even_mean_ttft_ms"),
        "mean_over_padded": over("padded", "even_mean_ttft_ms"),
        "mean_over_lockstep": over("broadcast", "even_mean_ttft_ms"),
        "median_rank_over_lockstep": over("broadcast", "ttft_ms_median_rank"),
        "slowest_rank_over_lockstep": over("broadcast", "even_slowest_rank_ms"),
        "median_rank_predicted": error(*_PREDICTIONS[1]),
        "slowest_rank_predicted": error(*_PREDICTIONS[0]),
    }


def prediction_errors(rows: Sequence[Row]) -> list[float]:
    """|predicted / measured - 1| of the slowest and the median rank of every row."""
    return [
        abs(row[predicted] / row[measured] - 1)
        for row in rows
        for predicted, measured in _PREDICTIONS
        if row.get(predicted)
    ]


def front(rows: Sequence[Row]) -> list[Row]:
    """Rows of mode auto that no other of their workload beats in both mean and slowest TTFT, ordered by slowest."""
    auto = [row for row in rows if row["mode"].split()[0] == "auto"]

    def beaten(row: Row) -> bool:
        names = ("mean_ttft_ms", "ttft_ms_slowest_rank")
        return any(all(o[n] <= row[n] for n in names) and any(o[n] < row[n] for n in names) for o in auto)

    return sorted((row for row in auto if not beaten(row)), key=lambda row: row["ttft_ms_slowest_rank"])


def verdict_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Heading and one line per workload, and one of the geometric means over the drawn ones."""
    verdicts = [verdict(modes) for modes in by_workload(rows)]
    ratios = [name for name in verdicts[0] if "_over_" in name]
    errors = [name for name in verdicts[0] if name.endswith("_predicted")]
    lines = [["tokens per rank", "best fixed mode", *(name.replace("_", " ") for name in (*ratios, *errors))]]
    for v in verdicts:
        cells = ["-" if v[name] is None else f"{v[name]:.3f}" for name in ratios]
        cells += ["-" if v[name] is None else f"{100 * v[name]:+.0f} %" for name in errors]
        lines.append([tokens_text(v["rank_tokens"]), str(v["best_fixed"]), *cells])
    drawn = [v for v in verdicts if v["trace"] is not None]
    if drawn:
        means = [[v[name] for v in drawn if v[name] is not None] for name in ratios]
        lines.append(
            [
                "geometric mean of draws",
                "",
                *(f"{geometric_mean(m):.3f}" if m else "-" for m in means),
                *("" for _ in errors),
            ]
        )
    return lines


def judgement(rows: Sequence[Row]) -> str:
    """The whole judgement as text."""
    text = [aligned(verdict_cells(rows), num_words=2)]
    if errors := prediction_errors(rows):
        text.append(
            f"predicted TTFT of slowest and median rank: median error {100 * median(errors):.1f} %, largest "
            f"{100 * max(errors):.1f} %"
        )
    for modes in by_workload(rows):
        if sum(mode.split()[0] == "auto" for mode in modes) > 1:
            lines = [["makespan budget", "mean ms", "slowest ms"]]
            lines += [
                [f"{row['makespan_budget']:.0%}", f"{row['mean_ttft_ms']:.1f}", f"{row['ttft_ms_slowest_rank']:.1f}"]
                for row in front(list(modes.values()))
            ]
            text.append(
                f"front of mode auto, {tokens_text(next(iter(modes.values()))['rank_tokens'])}:\n"
                f"{aligned(lines, num_words=1)}"
            )
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Say who is ahead of whom in results of ttft.")
    parser.add_argument("results", help="a JSON file that benchmarks/ttft wrote")
    options = parser.parse_args()
    try:
        document = read_results(options.results)
        if document["benchmark"] != "ttft":
            raise InputError(f"{options.results} holds results of {document['benchmark']}, not of ttft")
        print(judgement(document["rows"]))
    except InputError as error:
        parser.exit(1, f"ttft/judge.py: {error}\n")


if __name__ == "__main__":
    main()
