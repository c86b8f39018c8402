"""The exchanges alone, through pipemoe's transports: how long dispatch and combine take with nothing beside them.

    launch/mpirun.sh -n 4 benchmarks/comm
    launch/mpirun.sh -n 8 benchmarks/comm --max-bytes 256M --counts skewed

Columns are those of nccl-tests. size: bytes of the tokens' rows over all ranks (padding does not count, so it shows as
lower bandwidth). time: of the slowest rank, median over iterations, us. algbw = size / time, busbw = algbw x
nccl-tests' factor, GB/s. #wrong: wrong elements on all ranks, checked with real data. Before each timed exchange all
ranks meet, and a GPU's L2 cache is flushed. Times are CUDA events on a GPU, and the host's clock on a CPU (from posting
to completion).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, RankParser, positive, run_on_ranks
from benchmarks.comm.cases import EXCHANGES, Case, Exchange, rank_rows
from pipemoe.errors import ConfigError

if TYPE_CHECKING:
    from pipemoe import World

DEFAULTS = {"cpu": ("4M", 10, 2), "cuda": ("256M", 20, 5)}  # largest size, iterations, warm-up
L2_FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache
# Poll for so long between two looks of the conductor at its peers; it would rest, which suits only long steps.
BURST_S = 1e-3
COUNTS = ("equal", "skewed")
_COLUMNS = ("exchange", "counts", "size", "count", "type", "time", "algbw", "busbw", "#wrong")


def num_bytes(text: str) -> int:
    """ "64K" as 65536; K, M and G are powers of 1024."""
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip().upper())
    if not found or not int(found[1]):
        raise ValueError(text)
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Time the exchanges alone.")
    parser.add_device()
    parser.add_argument("--exchanges", default=",".join(EXCHANGES), help="default: %(default)s")
    parser.add_argument("--counts", default=",".join(COUNTS), help="of the ranks' rows (default: %(default)s)")
    parser.add_argument("--min-bytes", type=num_bytes, default=num_bytes("1K"), help="smallest size (default: 1K)")
    parser.add_argument("--max-bytes", type=num_bytes, help="largest size (default: 4M on a CPU, else 256M)")
    parser.add_argument(
        "--factor", type=positive(int), default=4, help="from one size to the next (default: %(default)s)"
    )
    parser.add_argument("--row-bytes", type=num_bytes, default=256, help="of one row (default: %(default)s)")
    parser.add_argument(
        "--combine-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, bfloat16 on a GPU",
    )
    parser.add_argument("--iterations", type=positive(int), help="timed (default: 10 on a CPU, else 20)")
    parser.add_argument(
        "--json", type=Path, default=Path("out/comm.json"), metavar="FILE", help="results (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    options.device = parser.device_of(options)
    options.exchanges, options.counts = options.exchanges.split(","), options.counts.split(",")
    for name, known in (("exchanges", EXCHANGES), ("counts", COUNTS)):
        if any(value not in known for value in getattr(options, name)):
            parser.error(f"--{name} {','.join(getattr(options, name))}: choose from {', '.join(known)}")
    if options.factor < 2:
        parser.error("--factor must be at least 2")
    if options.row_bytes % 4:
        parser.error(f"--row-bytes {options.row_bytes} is not a multiple of 4")
    return options


def run(world: World, options: argparse.Namespace) -> int:
    """All cases on every rank. Returns the exit status, 1 if data were wrong."""
    if world.size == 1:
        raise ConfigError("one rank has nobody to exchange with; start several (launch/mpirun.sh -n 4 benchmarks/comm)")
    if world.shared is not None:
        raise ConfigError("ranks that share memory exchange nothing; set PIPEMOE_HOST_TRANSPORT=mpi to measure MPI")
    import torch

    largest, iterations, warm_up = DEFAULTS[world.device.type]
    iterations, largest = options.iterations or iterations, options.max_bytes or num_bytes(largest)
    dtype = getattr(torch, options.combine_dtype or ("bfloat16" if world.device.type == "cuda" else "float32"))
    sizes = [options.min_bytes]
    while sizes[-1] * options.factor <= largest:
        sizes.append(sizes[-1] * options.factor)
    progress, timer, rows = Progress(world.rank), LaneTimer(world), []
    cases = [
        (EXCHANGES[name], counts, size) for name in options.exchanges for counts in options.counts for size in sizes
    ]
    if world.rank == 0:
        print(_line(_COLUMNS))
    for done, (exchange, counts, size) in enumerate(cases):
        row = measure(
            timer, exchange, counts, max(1, size // options.row_bytes), options.row_bytes, dtype, iterations, warm_up
        )
        rows.append(row)
        if world.rank == 0:
            print(
                _line(
                    [row["exchange"], row["counts"], row["size"], row["count"], row["type"]]
                    + [f"{row[name]:.2f}" for name in ("time_us", "algbw_gbs", "busbw_gbs")]
                    + [row["wrong"]]
                )
            )
        progress.count(done + 1, len(cases), exchange.name)
    if world.rank == 0:
        document = results_schema.results_document("comm", rows)
        results_schema.write_results(document, options.json)
        results_schema.print_results(document)
    return 1 if any(row["wrong"] for row in rows) else 0


def measure(
    timer: LaneTimer,
    exchange: Exchange,
    counts: str,
    num_rows: int,
    row_bytes: int,
    dtype: Any,
    iterations: int,
    warm_up: int,
) -> dict[str, Any]:
    """One row of the results; every rank calls and gets the same."""
    import torch

    world = timer.world
    dtype = torch.uint8 if exchange.combine is None else dtype
    rows = rank_rows(num_rows, world.size, counts)
    case = Case(world, exchange, rows, row_bytes // dtype.itemsize, dtype)
    case.fill()
    timer.run(case, warm=False)
    wrong = case.num_wrong()
    for _ in range(warm_up):
        timer.run(case)
    own = [timer.run(case) for _ in range(iterations)]
    gathered = [json.loads(p) for p in world.all_gather(json.dumps([wrong, own]).encode(), "times of an exchange")]
    seconds = np.max([of_rank[1] for of_rank in gathered], axis=0)  # [iterations], of the slowest rank
    median, size = float(np.median(seconds)), num_rows * row_bytes
    return {
        "exchange": exchange.name,
        "counts": counts,
        "num_ranks": world.size,
        "rank_rows": rows,
        "size": size,
        "count": size // dtype.itemsize,
        "type": str(dtype).removeprefix("torch."),
        "time_us": median * 1e6,
        "time_us_min": float(seconds.min()) * 1e6,
        "time_us_p90": float(np.percentile(seconds, 90)) * 1e6,
        "algbw_gbs": size / median / 1e9,
        "busbw_gbs": size / median / 1e9 * exchange.bus_factor(world.size),
        "wrong": sum(of_rank[0] for of_rank in gathered),
    }


class LaneTimer:
    """Times one exchange on the dispatch lane of slot 0, from the conductor's thread."""

    def __init__(self, world: World) -> None:
        import torch

        self.world = world
        self._flush = (
            torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=world.device) if world.device.type == "cuda" else None
        )

    def run(self, case: Case, warm: bool = True) -> float:
        """Seconds of one exchange; every rank calls. warm: its data may be anything, so the cache is flushed for it."""
        import torch

        if self._flush is not None:
            if warm:
                self._flush.zero_()
            torch.cuda.synchronize(self.world.device)
        self.world.all_gather(b"", "start of an exchange")
        return self.world.conductor.call(lambda: self._time(case))

    def _time(self, case: Case) -> float:
        lanes, conductor = self.world.lanes, self.world.conductor
        lanes.clock.start(True)
        event = lanes.slots[0].dispatch.submit(case.call(), timed=True)

        def done() -> bool:
            until = time.perf_counter() + BURST_S
            while not event.done() and time.perf_counter() < until:
                lanes.poll()
                time.sleep(0)  # ranks may share a core
            return event.done()

        conductor.wait(done, "a timed exchange")
        begin, end = event.span()
        return end - begin


def _line(cells: Sequence[Any]) -> str:
    widths = (18, 7, 10, 10, 8, 11, 8, 8, 7)
    return "  ".join(
        f"{cell!s:{'<' if i < 2 else '>'}{width}}" for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


if __name__ == "__main__":
    os.environ.setdefault("PIPEMOE_HOST_TRANSPORT", "mpi")
    options = parse()
    sys.exit(
        run_on_ranks(
            "benchmarks/comm", lambda world: run(world, options), device=options.device, num_slots=options.num_slots
        )
    )
