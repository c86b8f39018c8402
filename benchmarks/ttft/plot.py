"""The ttft benchmark's picture: for each mode, the share of requests that had their first token by a given time.

python benchmarks/ttft/plot.py results.json picture.png
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.results_schema import read_results
from benchmarks.ttft.table import ttft_context
from pipemoe.errors import InputError
from pipemoe.output_path import write_whole


def plot_ttft(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write a PNG with one cumulative curve per row, from its `ttfts` (seconds)."""
    if not any(row.get("ttfts") for row in rows):
        raise InputError("no row has ttfts (seconds per request), so there is nothing to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in rows:
        ttfts_ms = np.sort(np.asarray(row.get("ttfts") or [], dtype=float)) * 1e3
        if len(ttfts_ms):
            # A step up at each request: from 0 before the first to 100 % at the last.
            shares = np.arange(len(ttfts_ms) + 1) / len(ttfts_ms) * 100
            axes.step(np.concatenate([ttfts_ms[:1], ttfts_ms]), shares, where="post", label=row["mode"])
    axes.set_xscale("log")
    axes.set_xlabel("time to first token, ms")
    axes.set_ylabel("requests served by then, %")
    axes.set_ylim(0, 101)
    axes.set_title(ttft_context(rows), fontsize=10)
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False, description="The results of the ttft benchmark as a picture.")
    parser.add_argument("results", help="its JSON file")
    parser.add_argument("picture", help="the PNG file to write")
    options = parser.parse_args()
    plot_ttft(read_results(options.results)["rows"], options.picture)
