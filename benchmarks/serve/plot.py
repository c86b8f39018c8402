"""The serve benchmark's pictures: TTFT against the rate, and the distribution of TTFT, for each policy.

python benchmarks/serve/plot.py results.json FOLDER
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.results_schema import read_results
from benchmarks.serve.table import serve_context
from pipemoe.output_path import write_whole

Rows = Sequence[Mapping[str, Any]]


def plot_rates(rows: Rows, path: str | os.PathLike[str]) -> None:
    """Write a PNG: p95 of the TTFT of all and of the short half against the rate, a point per load, medians over seeds.
    Upright lines are capacities.
    """

    def draw(axes: Sequence[Any]) -> None:
        loads = [row for row in rows if row["what"] == "load"]
        for label in labels_of(loads):
            own = [row for row in loads if row["label"] == label]
            rates = sorted({row["rate_rps"] for row in own})
            color = None
            for ax, field in zip(axes, ("ttft_ms_p95", "ttft_ms_p95_short"), strict=True):
                points = [[row[field] for row in own if row["rate_rps"] == rate and row[field]] for rate in rates]
                known = [(rate, median(values)) for rate, values in zip(rates, points, strict=True) if values]
                color = (
                    ax.plot(*zip(*known, strict=True), "o-", label=label, color=color)[0].get_color()
                    if known
                    else color
                )
                capacities = [row["capacity_rps"] for row in own if row["capacity_rps"]]
                if capacities:
                    ax.axvline(median(capacities), color=color, linestyle=":")
                ax.set_xlabel("requests per second (dotted: capacity)")
        axes[0].set_ylabel("95 % of all first tokens by, ms")
        axes[1].set_ylabel("95 % of the short prompts' by, ms")

    _write(draw, rows, path)


def plot_distributions(rows: Rows, path: str | os.PathLike[str]) -> None:
    """Write a PNG: the share of requests that had their first token by a time, at the lowest and the highest load."""

    def draw(axes: Sequence[Any]) -> None:
        loads = [row for row in rows if row["what"] == "load" and row["ttft_curve_ms"]]
        shown = sorted({row["load"] for row in loads})
        for ax, load in zip(axes, [*shown[:1], *shown[-1:]], strict=False):
            at_load = [row for row in loads if row["load"] == load]
            for label in labels_of(at_load):
                curves = [row["ttft_curve_ms"] for row in at_load if row["label"] == label]
                ax.plot([median(values) for values in zip(*curves, strict=True)], range(101), label=label)
            ax.set_xscale("log")
            ax.set_xlabel(f"time to first token at load {load:g}, ms")
            ax.set_ylabel("requests served by then, %")

    _write(draw, rows, path)


def labels_of(rows: Rows) -> list[str]:
    """Policies, in the order of the rows."""
    return list(dict.fromkeys(row["label"] for row in rows))


def _write(draw: Callable[[Sequence[Any]], None], rows: Rows, path: str | os.PathLike[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    draw(axes)
    for ax in axes:
        ax.grid(which="both", alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    figure.suptitle(serve_context(rows), fontsize=10)
    figure.tight_layout()
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, description="The results of the serve benchmark as pictures.")
    parser.add_argument("results", help="its JSON file")
    parser.add_argument("folder", type=Path, help="for the PNG files")
    options = parser.parse_args()
    found = read_results(options.results)["rows"]
    for trace in sorted({row["trace"] for row in found}):
        of_trace = [row for row in found if row["trace"] == trace]
        plot_rates(of_trace, options.folder / f"serve_{trace}_rates.png")
        plot_distributions(of_trace, options.folder / f"serve_{trace}_ttft.png")
