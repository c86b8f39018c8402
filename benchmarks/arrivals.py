"""A wave whose rows arrive in parts, from the start of its dispatch to the end of its reduces, in several forms.

    python benchmarks/arrivals.py

Runs on one GPU. Other streams stand for the dispatch to one of R ranks, and for the combine: this rank's own rows are
there at once, those of the others come in groups. A group takes the latency of a small group of broadcasts, as
benchmarks/comm measured it, and its rows at --gbps; so does a group of reduces. Forms:

    whole        one group; one call behind it; one group of reduces
    own first    a call on the own rows at once, and one behind each of --groups; one group of reduces behind all
    passes       --passes waves of so many owners each: a group, a call and a group of reduces for each. Groups come in
                 two buffers, so the third one waits for the first call

Per row: `ms` from the start of the dispatch to the end of the experts, `reduced_ms` to the end of the last reduce,
`resident_ms` for a call with all rows there before, and `bound_ms`, of `ms`: the real tiles of both GEMMs of a call on
all rows, each started on the first free multiprocessor when its rows are there (first the tiles that could start
first), and the sums behind. A tile's time there is what makes the same schedule take as long as the resident call, if
all rows are there. `gain` is the time of `whole` over this one's, to the end of the experts and to the last reduce;
`/ bound` is `ms` over `bound_ms`.

All forms leave as many multiprocessors to collectives as plans do. They must give the same bits before anything is
timed, with rows that are copied to where experts read them when they arrive. While the clock runs the rows lie there
already: copies would take multiprocessors that a broadcast does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, RankParser, positive
from benchmarks.delayed_wave import DEVICE, DelayedWave, Form, forms_of
from benchmarks.kernels.cases import LAYERS, make_weights
from pipemoe.errors import ConfigError

CASES = (
    ("qwen3-30b-a3b", 4096),
    ("qwen3-30b-a3b", 16384),
    ("deepseek-v3", 1024),
    ("deepseek-v3", 4096),
    ("deepseek-v3", 16384),
)
COMM = Path(__file__).parent / "results/h100_x2/comm.json"
_COLUMNS = ("layer", "tokens", "latency", "form", "ms", "spread %", "reduced", "last", "resident", "bound")
_COLUMNS += ("gain", "reduced", "/ bound")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Time experts calls whose rows arrive in parts.")
    parser.add_argument(
        "--cases",
        default=",".join(f"{name}:{tokens}" for name, tokens in CASES),
        help="layer:tokens (default: %(default)s)",
    )
    parser.add_argument("--ranks", type=positive(int), default=4, help="with equal rows (default: %(default)s)")
    parser.add_argument("--groups", default="1,2", help="of the other ranks' rows (default: %(default)s)")
    parser.add_argument("--passes", default="2,4", help="over the owners (default: %(default)s)")
    parser.add_argument(
        "--gbps", type=positive(float), default=330.0, help="of the broadcasts, in GB/s (default: %(default)s)"
    )
    parser.add_argument(
        "--comm", type=Path, default=COMM, metavar="FILE", help="results of benchmarks/comm (default: %(default)s)"
    )
    parser.add_argument(
        "--latencies", metavar="US", help="of a group, in microseconds (default: the fastest and the median of --comm)"
    )
    parser.add_argument("--rounds", type=positive(int), default=15, help="default: %(default)s")
    parser.add_argument(
        "--json", type=Path, default=Path("out/arrivals.json"), metavar="FILE", help="results (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        options.cases = [
            (name, positive(int)(tokens)) for name, tokens in (case.split(":") for case in options.cases.split(","))
        ]
    except ValueError:
        parser.error(f"--cases {options.cases}: layer:tokens with commas between are wanted")
    if unknown := {name for name, _ in options.cases} - set(LAYERS):
        parser.error(f"--cases: {sorted(unknown)} are not among {', '.join(LAYERS)}")
    try:
        for name in ("groups", "passes"):
            setattr(options, name, [positive(int)(count) for count in getattr(options, name).split(",")])
        options.latencies = [float(us) for us in options.latencies.split(",")] if options.latencies else None
    except ValueError as error:
        parser.error(f"--groups, --passes, --latencies: {error}")
    return options


def measured_latencies(path: Path) -> list[float]:
    """Microseconds that the smallest group of broadcasts took: at the fastest, and the median."""
    rows = [
        row
        for row in json.loads(path.read_text())["rows"]
        if row["exchange"] == "grouped_broadcast" and row["counts"] == "equal"
    ]
    smallest = min(rows, key=lambda row: row["size"])
    return [round(smallest["time_us_min"], 1), round(smallest["time_us"], 1)]


def run(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise ConfigError("benchmarks/arrivals.py times kernels of Hopper GPUs; there is none")
    latencies = options.latencies or measured_latencies(options.comm)
    progress, results = Progress(0), []
    print(_line(_COLUMNS))
    weights, weights_of = None, None
    for name, num_tokens in options.cases:
        if weights_of != name:
            weights = None  # frees the last layer's before the next one's are made
            weights, weights_of = make_weights(LAYERS[name], torch.device(DEVICE)), name
        wave = DelayedWave(LAYERS[name], num_tokens, options.ranks, weights, options.gbps)
        forms = forms_of(num_tokens, wave.own_rows, options.groups, options.passes)
        check_bits(name, wave, forms)
        for latency_us in latencies:
            wave.latency_us = latency_us
            results += measure(name, wave, forms, options)
        document = results_schema.results_document("arrivals", results)
        results_schema.write_results(document, options.json)
        progress.say(f"{name}, {num_tokens} tokens")
    results_schema.print_results(document)
    return 0


def check_bits(name: str, wave: DelayedWave, forms: Sequence[Form]) -> None:
    """Raise ConfigError unless every form gives the bits of a call on all rows at once."""
    import torch

    wanted = torch.full_like(wave.out, torch.nan)
    wave.experts(0, wave.source, wanted, wave.scratch)
    for form in forms:
        wave.received.buffer.fill_(0xAB)
        wave.out.fill_(torch.nan)
        wave.round(form, copies=True)
        torch.cuda.synchronize()
        if not torch.equal(wave.out, wanted):
            raise ConfigError(f"{form.name} on {name}: not the bits of a call on all rows at once")
    wave.received.buffer.copy_(wave.source.buffer)


def measure(name: str, wave: DelayedWave, forms: Sequence[Form], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all forms on one case; a row of results each."""
    import torch

    layer, num_tokens = wave.layer, len(wave.source)
    rounds_of: list[list[list[float]]] = [[] for _ in (*forms, None)]
    for _ in range(options.rounds):
        for form, rounds in zip((*forms, None), rounds_of, strict=True):
            start, *marks = wave.round(form)
            torch.cuda.synchronize()
            rounds.append([start.elapsed_time(mark) for mark in marks])
    resident = statistics.median(ms for ms, *_ in rounds_of[-1])
    results = []
    for form, rounds in zip(forms, rounds_of):
        ms, reduced, last = ([of_round[i] for of_round in rounds] for i in range(3))
        result = {
            **{"layer": name, "H": layer.hidden, "I": layer.intermediate, "experts": layer.num_experts},
            **{"local_experts": layer.num_local_experts, "top_k": layer.top_k, "tokens": num_tokens},
            **{"form": form.name, "group_rows": form.groups, "gbps": options.gbps, "latency_us": wave.latency_us},
            **{"sms_for_collectives": wave.sms_left, "ms": statistics.median(ms), "ms_rounds": ms},
            **{"reduced_ms": statistics.median(reduced), "reduced_ms_rounds": reduced},
            **{"last_arrival_ms": statistics.median(last), "resident_ms": resident},
            **{"bound_ms": wave.bound_ms(form, resident)},
        }
        results.append(result)
        whole = results[0]  # the form that waits for all rows
        result["whole_over_it"] = whole["ms"] / result["ms"]
        result["whole_over_it_reduced"] = whole["reduced_ms"] / result["reduced_ms"]
        result["ms_over_bound"] = result["ms"] / result["bound_ms"]
        print(_line(_cells(result)), flush=True)
    return results


def arrivals_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading and one line of cells per row."""
    return [list(_COLUMNS), *map(_cells, rows)]


def _cells(row: Mapping[str, Any]) -> list[str]:
    spread = 100 * (max(row["ms_rounds"]) - min(row["ms_rounds"])) / row["ms"]
    times = ("reduced_ms", "last_arrival_ms", "resident_ms", "bound_ms")
    ratios = ("whole_over_it", "whole_over_it_reduced", "ms_over_bound")
    return [
        *(str(row[name]) for name in ("layer", "tokens", "latency_us", "form")),
        *(f"{row['ms']:.4f}", f"{spread:.0f}"),
        *(f"{row[name]:.4f}" for name in times),
        *(f"{row[name]:.3f}" for name in ratios),
    ]


def _line(cells: Sequence[Any]) -> str:
    widths = (18, 6, 7, 12, 9, 8, 9, 9, 9, 9, 7, 7, 7)
    return " ".join(
        f"{cell:<{w}}" if i in (0, 3) else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )


if __name__ == "__main__":
    try:
        sys.exit(run(parse()))
    except ConfigError as error:
        print(f"arrivals.py: {error}", file=sys.stderr)
        sys.exit(2)
