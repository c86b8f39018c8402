"""`pipemoe report FOLDER`: tables, distributions of TTFT, timelines and capacities of a benchmark, to look at.

The file holds everything, also the timelines, so it can be sent to somebody and opened without a network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pipemoe.errors import InputError
from pipemoe.output_path import check_output_file, write_whole
from pipemoe.report.traffic import campaigns

_SCHEMA = "pipemoe.bench/1"
_BENCHMARKS = ("ttft", "serve")
_KINDS = ("attend", "dispatch", "experts", "combine", "finish")  # as numbers in the page
_LANES = ("compute", "dispatch", "combine")
# Of a row of results, what the page shows.
_FIELDS = (
    "mode",
    "mean_ttft_ms",
    "p50_ttft_ms",
    "p90_ttft_ms",
    "p99_ttft_ms",
    "ttft_ms_median_rank",
    "ttft_ms_slowest_rank",
    "exposed_comm_ms",
    "peak_workspace_bytes",
    "parity",
    "ttfts",
)


def add_report_parser(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser(
        "report",
        help="a benchmark's results as one HTML file",
        description="Writes one HTML file with tables, distributions of TTFT, and the timelines of two modes one above "
        "the other, or TTFT against the rate of requests. It needs no network.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, help="what benchmarks/ttft or benchmarks/serve has written (its --out)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in that folder")


def run(options: argparse.Namespace) -> int:
    """Write the page. Raises InputError for a folder that holds no results."""
    out = options.out or options.folder / "report.html"
    page = report_page(options.folder)
    check_output_file("--out", out)
    write_whole(out, page)
    print(f"report: {out}")
    return 0


def report_page(folder: Path) -> str:
    """The HTML page of a folder of results: ttft.json with timeline_WORKLOAD_MODE.json beside it, and serve.json."""
    files = [folder / f"{benchmark}.json" for benchmark in _BENCHMARKS]
    found = [file for file in files if file.is_file()] or files[:1]
    data: dict[str, Any] = {"about": [], "workloads": [], "campaigns": []}
    for file in found:
        _add(data, _read(file, file.stem), file)
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # "</" would end the script that holds the data, whatever quotes it stands in.
    return template.replace("PIPEMOE_DATA", json.dumps(data, allow_nan=False).replace("</", "<\\/"))


def _read(path: Path, benchmark: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; a report is of a folder that benchmarks/ttft or benchmarks/serve has written"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != _SCHEMA or document.get("benchmark") != benchmark:
        raise InputError(f"{path}: not the results of benchmarks/{benchmark} (schema {_SCHEMA})")
    return document


def _add(data: dict[str, Any], document: Mapping[str, Any], file: Path) -> None:
    """Add a benchmark's results to what the page's script reads."""
    try:
        machine = document["machine"]
        rows = document["rows"]
        gpus = [gpu["name"] for gpu in machine["gpus"]]
        device = f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine['num_cores']} cores of {machine['cpu']}"
        about = f"{device}; commit {document['commit'] or 'unknown'}"
        data["about"].append({"facts": about, "command": document["command"]})
        if document["benchmark"] == "serve":
            data["campaigns"] += campaigns(rows)
            return
        workloads: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            workloads.setdefault(json.dumps(row["rank_tokens"]), []).append(row)
        data["workloads"] += [_workload(of_workload, file.parent) for of_workload in workloads.values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: a row lacks what every row has ({error!r})") from None


def _workload(rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    first, tokens = rows[0], rows[0]["rank_tokens"]
    stem = tokens if isinstance(tokens, str) else "_".join(map(str, tokens))
    timelines = {}
    for row in rows:
        path = folder / f"timeline_{stem}_{row['mode']}.json"
        if path.is_file():
            timelines[row["mode"]] = timeline_lanes(json.loads(path.read_text(encoding="utf-8")))
    return {
        "name": tokens if isinstance(tokens, str) else f"tokens per rank: {', '.join(map(str, tokens))}",
        "facts": f"{first['model']}, {first['layers']} layers, {first['num_ranks']} ranks",
        "rows": [{name: row.get(name) for name in _FIELDS} for row in rows],
        "timelines": timelines,
    }


def timeline_lanes(document: Mapping[str, Any]) -> dict[str, Any]:
    """A Chrome trace of `pipemoe.trace.chrome_trace` as rows: names of lanes, and spans [lane, kind, cohort, layer,
    wave, begin us, length us]. Lanes without spans are left out.
    """
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    keys = sorted({(e["pid"], e["args"]["cohort"], _LANES.index(e["cat"])) for e in spans})
    lane_of = {key: lane for lane, key in enumerate(keys)}
    return {
        "lanes": [f"rank {rank} cohort {cohort} {_LANES[lane]}" for rank, cohort, lane in keys],
        "spans": [
            [
                lane_of[e["pid"], e["args"]["cohort"], _LANES.index(e["cat"])],
                _KINDS.index(e["name"]),
                *(e["args"][name] for name in ("cohort", "layer", "wave")),
                round(e["ts"], 2),
                round(e["dur"], 2),
            ]
            for e in spans
        ],
    }
