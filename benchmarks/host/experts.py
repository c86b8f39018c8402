"""The host's experts beside what the core could do: few rows an expert, weights that are not in any cache.

    python benchmarks/host/experts.py --json benchmarks/results/cpu_2_cores/host_experts.json

One call computes one layer's local experts of one rank. Its weights must be read once and its products computed once,
so it takes at least the longer of both: bytes over the rate at which this core reads long vectors, operations over the
rate of the library's GEMM of 512 x 512 matrices, each measured here. Calls go round more layers than the last cache
holds. Times are the thread's CPU time, which others on the machine disturb little; a row has the median over calls.
bfloat16 are the same weights in half the bytes, which are widened for each call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks import results_schema
from benchmarks.bench_main import positive
from pipemoe.experts.host import HostExperts
from pipemoe.experts.weights import ExpertWeights
from pipemoe.output_path import check_output_file
from pipemoe.wire import WireFormat

NUM_EXPERTS, TOP_K = 8, 4  # local ones, each as likely; the pairs are all local
ROWS = (1, 2, 4, 8, 16, 32, 64)  # an expert
SIZES = {"small": (128, 128), "qwen3-30b-a3b": (2048, 768)}  # hidden, intermediate
_GEMM, _READ_BYTES = 512, 256 << 20


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The host's experts beside memory's and arithmetic's floor.")
    parser.add_argument("--sizes", default=",".join(SIZES), help="default: %(default)s")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="an expert (default: %(default)s)")
    parser.add_argument(
        "--cold-mib", type=positive(int), default=192, help="weights of all layers (default %(default)s)"
    )
    parser.add_argument("--calls", type=positive(int), default=60, help="that are timed (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results")
    options = parser.parse_args(arguments)
    if options.json:
        check_output_file("--json", options.json, may_make_folder=True)
    return options


def rates() -> tuple[float, float]:
    """Bytes and operations a second of this core."""
    values, matrix = torch.ones(_READ_BYTES // 4), torch.ones(_GEMM, _GEMM)
    read = median(_seconds(values.sum) for _ in range(5))
    multiplied = median(_seconds(lambda: matrix @ matrix) for _ in range(9))
    return _READ_BYTES / read, 2 * _GEMM**3 / multiplied


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def measure(
    name: str, dtype: torch.dtype, rows_of: Sequence[int], options: argparse.Namespace, rate: tuple[float, float]
) -> list[dict[str, Any]]:
    hidden, intermediate = SIZES[name]
    of_layer = 3 * NUM_EXPERTS * hidden * intermediate
    num_layers = max(2, -(-(options.cold_mib << 20) // (of_layer * dtype.itemsize)))

    def matrix(*shape: int) -> torch.Tensor:
        return torch.full((NUM_EXPERTS, *shape), 0.01, dtype=dtype)

    weights = [
        ExpertWeights(matrix(2 * intermediate, hidden), matrix(hidden, intermediate), first_expert=0)
        for _ in range(num_layers)
    ]
    experts = HostExperts(weights, top_k=TOP_K, hidden=hidden, device=torch.device("cpu"), dtype=dtype)
    wire, found = WireFormat(hidden, TOP_K, dtype), []
    for rows_per_expert in rows_of:
        num_tokens = max(1, NUM_EXPERTS * rows_per_expert // TOP_K)
        ids = torch.arange(num_tokens * TOP_K).view(num_tokens, TOP_K).remainder(NUM_EXPERTS).int()
        rows = wire.rows(torch.zeros((num_tokens, wire.row_bytes), dtype=torch.uint8))
        rows.write(torch.ones(num_tokens, hidden, dtype=dtype), ids, torch.full((num_tokens, TOP_K), 0.25))
        scratch, out = experts.new_scratch(num_tokens), torch.empty(num_tokens, hidden)
        layers = [call % num_layers for call in range(num_layers + options.calls)]  # the first of each to warm up
        times = [_seconds(partial(experts, layer, rows, out, scratch)) for layer in layers]
        read_us, compute_us = (
            1e6 * of_layer * dtype.itemsize / rate[0],
            1e6 * 2 * TOP_K * num_tokens * 3 * hidden * intermediate / rate[1],
        )
        row = {
            "size": name,
            "dtype": str(dtype).removeprefix("torch."),
            "rows_per_expert": rows_per_expert,
            "us": 1e6 * median(times[num_layers:]),
            "read_floor_us": read_us,
            "compute_floor_us": compute_us,
        }
        floor = max(read_us, compute_us)
        print(
            f"{name:14} {row['dtype']:9} {rows_per_expert:3} rows  {row['us']:9.0f} us, {row['us'] / floor:.2f} x floor"
        )
        found.append(row)
    return found


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    rate = rates()
    print(f"this core reads {rate[0] / 1e9:.1f} GB/s and computes {rate[1] / 1e9:.1f} GFLOP/s")
    rows = []
    for name in options.sizes.split(","):
        for dtype in (torch.float32, torch.bfloat16):
            rows += measure(name, dtype, [int(n) for n in options.rows.split(",")], options, rate)
    document = results_schema.results_document("host_experts", rows)
    if options.json:
        results_schema.write_results(document, options.json)
    results_schema.print_results(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
