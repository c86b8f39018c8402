"""A wave whose rows arrive in parts: one call per part, in the order of arrival, and one call behind the last part.

    python benchmarks/arrivals.py

Runs on one GPU. Another stream stands for the dispatch to one of R ranks: this rank's own rows are there at once, those
of the others come in groups. A group takes the latency of a small group of broadcasts, as benchmarks/comm measured it,
and its rows at --gbps. Forms:

    whole       one group; one call behind it
    per_part    a call for each part, in the order of arrival

Per row: `ms` from the start of the dispatch to the end of the experts, `resident_ms` for a call with all rows there
before, and `bound_ms`: the real tiles of both GEMMs of a call on all rows, each started on the first free
multiprocessor when its rows are there (first the tiles that could start first), and the sums behind. A tile's time
there is what makes the same schedule take as long as the resident call, if all rows are there. Both forms leave the
same multiprocessors to collectives, and must give the same bits before anything is timed, with rows that are copied to
where experts read them when they arrive. While the clock runs the rows lie there already: copies would take
multiprocessors that a broadcast does not.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, RankParser, positive
from benchmarks.kernels.cases import LAYERS, Layer, make_rows, make_weights
from pipemoe.errors import ConfigError

FORMS = ("whole", "per_part")
SMS_FOR_COLLECTIVES = 16  # two slots of four thread blocks each, for two communicators
HEAD_START_CYCLES = 6_000_000  # about 3 ms, in which the host enqueues a whole round
CASES = (
    ("qwen3-30b-a3b", 4096),
    ("qwen3-30b-a3b", 16384),
    ("deepseek-v3", 1024),
    ("deepseek-v3", 4096),
    ("deepseek-v3", 16384),
)
COMM = Path(__file__).parent / "results/h100_x2/comm.json"
_COLUMNS = ("layer", "tokens", "groups", "latency", "form", "ms", "spread %", "last", "resident", "bound")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Time experts calls whose rows arrive in parts.")
    parser.add_argument(
        "--cases",
        default=",".join(f"{name}:{tokens}" for name, tokens in CASES),
        help="layer:tokens (default: %(default)s)",
    )
    parser.add_argument("--ranks", type=positive(int), default=4, help="with equal rows (default: %(default)s)")
    parser.add_argument("--groups", default="1,2", help="of the other ranks' rows, at most 7 (default: %(default)s)")
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
        options.groups = [positive(int)(count) for count in options.groups.split(",")]
        options.latencies = [float(us) for us in options.latencies.split(",")] if options.latencies else None
    except ValueError as error:
        parser.error(f"--groups, --latencies: {error}")
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


def split(num_rows: int, num_parts: int) -> list[int]:
    """Rows of each of `num_parts` parts, as equal as possible."""
    bounds = [num_rows * i // num_parts for i in range(num_parts + 1)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def list_schedule(tiles: Sequence[tuple[float, tuple[int, int]]], times: tuple[float, float], num_sms: int) -> float:
    """End of a schedule of two GEMMs' tiles on `num_sms` multiprocessors, in ms.

    tiles: for each row tile, when its rows are there, and how many tiles of columns it has in each GEMM (a row tile of
    the second one may start when the first one's tiles of the same rows are done). times: of a tile of each GEMM.
    """
    free = [0.0] * num_sms
    waiting = [(there, 0, number) for number, (there, counts) in enumerate(tiles) for _ in range(counts[0])]
    heapq.heapify(waiting)
    left = [counts[0] for _, counts in tiles]
    end = 0.0
    while waiting:
        there, gemm, number = heapq.heappop(waiting)
        stop = max(there, heapq.heappop(free)) + times[gemm]
        heapq.heappush(free, stop)
        end = max(end, stop)
        if gemm == 0:
            left[number] -= 1
            if not left[number]:  # tiles of one row tile start in order, so this one ends last
                for _ in range(tiles[number][1][1]):
                    heapq.heappush(waiting, (stop, 1, number))
    return end


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
            weights, weights_of = make_weights(LAYERS[name], torch.device("cuda")), name
        wave = DelayedWave(LAYERS[name], num_tokens, options.ranks, weights, options.gbps)
        for num_groups in options.groups:
            for latency_us in latencies:
                wave.arrange(num_groups, latency_us)
                results += measure(name, wave, options)
        progress.say(f"{name}, {num_tokens} tokens")
    document = results_schema.results_document("arrivals", results)
    results_schema.write_results(document, options.json)
    results_schema.print_results(document)
    return 0


def measure(name: str, wave: DelayedWave, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Check and time all forms on one case; a row of results each."""
    import torch

    layer, num_tokens = wave.layer, len(wave.source)
    wanted = torch.full_like(wave.out, torch.nan)
    wave.experts(0, wave.source, wanted, wave.scratch)
    for form in FORMS:
        wave.received.buffer.fill_(0xAB)
        wave.out.fill_(torch.nan)
        wave.round(form, copies=True)
        torch.cuda.synchronize()
        if not torch.equal(wave.out, wanted):
            raise ConfigError(f"{form} on {name}, {num_tokens} tokens: not the bits of a call on all rows at once")
    wave.received.buffer.copy_(wave.source.buffer)
    times: dict[str, list[float]] = {form: [] for form in (*FORMS, "resident")}
    lasts: dict[str, list[float]] = {form: [] for form in times}
    for _ in range(options.rounds):
        for form in times:
            start, last, stop = wave.round(form)
            torch.cuda.synchronize()
            times[form].append(start.elapsed_time(stop))
            lasts[form].append(start.elapsed_time(last))
    resident = statistics.median(times.pop("resident"))
    bound, results = wave.bound_ms(resident), []
    for form, ms in times.items():
        result = {
            **{"layer": name, "H": layer.hidden, "I": layer.intermediate, "experts": layer.num_experts},
            **{"local_experts": layer.num_local_experts, "top_k": layer.top_k, "tokens": num_tokens},
            **{"part_rows": wave.part_rows, "gbps": options.gbps, "latency_us": wave.latency_us},
            **{"sms_for_collectives": SMS_FOR_COLLECTIVES, "form": form},
            **{"ms": statistics.median(ms), "ms_rounds": ms},
            **{"last_arrival_ms": statistics.median(lasts[form]), "resident_ms": resident, "bound_ms": bound},
        }
        results.append(result)
        spread = 100 * (max(ms) - min(ms)) / result["ms"]
        figures = [f"{result['ms']:.4f}", f"{spread:.0f}"]
        figures += [f"{result[key]:.4f}" for key in ("last_arrival_ms", "resident_ms", "bound_ms")]
        print(_line((name, num_tokens, len(wave.part_rows) - 1, wave.latency_us, form, *figures)))
    return results


class DelayedWave:
    """One wave, its receive buffer, and a stream that stands for the dispatch."""

    def __init__(self, layer: Layer, num_tokens: int, num_ranks: int, weights: Any, gbps: float):
        import torch

        from pipemoe.experts import make_experts
        from pipemoe.runtime.lanes import stream_lanes
        from pipemoe.wire import WireFormat

        self.layer, self.gbps = layer, gbps
        self.wire = wire = WireFormat(layer.hidden, layer.top_k, torch.bfloat16)
        self.source = make_rows(layer, num_tokens, torch.device("cuda"))
        self.received = wire.rows(torch.zeros_like(self.source.buffer))
        settings = {"top_k": layer.top_k, "hidden": layer.hidden, "device": "cuda", "dtype": torch.bfloat16}
        experts = make_experts([weights], implementation="hopper", num_experts=layer.num_experts, **settings)
        self.experts = experts.with_free_sms(SMS_FOR_COLLECTIVES)
        self.scratch = self.experts.new_scratch(num_tokens)
        self.out = torch.zeros((num_tokens, layer.hidden), dtype=torch.bfloat16, device="cuda")
        self.flush = torch.zeros(64 << 20, device="cuda")
        self.total = torch.zeros((), device="cuda")
        self.dispatch = stream_lanes(torch.device("cuda"), 1).slots[0].dispatch.stream
        self.cycles_of_ms = _cycles_of_ms()
        self.own_rows = split(num_tokens, num_ranks)[0]
        self.combine_ms, self.index_ms = self._combine_ms(), self._index_ms()
        torch.cuda.synchronize()

    def arrange(self, num_groups: int, latency_us: float) -> None:
        """Let the other ranks' rows come in so many groups."""
        num_tokens = len(self.source)
        self.part_rows = [self.own_rows, *split(num_tokens - self.own_rows, num_groups)]
        self.latency_us = latency_us
        bounds = [0, *itertools.accumulate(self.part_rows)]
        self.slices = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self.launch_ms = _median_ms(lambda: self._wait(1e-5))

    def _bring(self, rows: slice) -> None:
        self.received.buffer[rows].copy_(self.source.buffer[rows])

    def _group_ms(self, num_rows: int) -> float:
        return self.latency_us / 1e3 + num_rows * self.wire.row_bytes / self.gbps / 1e6

    def _wait(self, ms: float) -> None:
        import torch

        if ms > 0:
            torch.cuda._sleep(int(ms * self.cycles_of_ms))

    def _transfer(self, num_rows: int) -> None:
        self._wait(self._group_ms(num_rows) - self.launch_ms)

    def round(self, form: str, *, copies: bool = False) -> tuple[Any, Any, Any]:
        """Enqueue one call in a form. Returns events of its start, of the last part's arrival, and of its end."""
        import torch

        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        there = [torch.cuda.Event(enable_timing=True) for _ in self.slices]
        torch.sum(self.flush, dim=0, out=self.total)
        if copies:
            self._bring(self.slices[0])
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        if form == "resident":
            self.experts(0, self.source, self.out, self.scratch)
            stop.record()
            return start, stop, stop
        with torch.cuda.stream(self.dispatch):
            self.dispatch.wait_event(start)
            if form == "whole":
                there = there[:1]
                self._transfer(len(self.source) - self.own_rows)
                if copies:
                    self._bring(slice(self.own_rows, len(self.source)))
            for event, rows in zip(there, self.slices):
                if form != "whole" and rows.start:
                    self._transfer(rows.stop - rows.start)
                    if copies:
                        self._bring(rows)
                event.record()
        whole = slice(0, len(self.source))
        for event, rows in zip(there, [whole] if form == "whole" else self.slices, strict=True):
            torch.cuda.current_stream().wait_event(event)
            self.experts(0, self.received[rows], self.out[rows], self.scratch)
        stop.record()
        return start, there[-1], stop

    def bound_ms(self, resident_ms: float) -> float:
        """See the top."""
        import numpy as np

        shape = self.experts._shape(0, len(self.source))
        layer, ids = self.layer, self.source.ids.cpu().numpy()
        ends = np.cumsum(self.part_rows)
        there = [0.0]
        for rows in self.part_rows[1:]:
            there.append(there[-1] + self._group_ms(rows))
        columns = (-(-layer.intermediate * 2 // 256), -(-layer.hidden // 256))
        tiles = []
        for expert in range(layer.num_local_experts):
            tokens = np.nonzero((ids == expert).any(1))[0]
            for first in range(0, len(tokens), shape.rows):
                last = tokens[min(first + shape.rows, len(tokens)) - 1]
                tiles.append((there[int(np.searchsorted(ends, last, side="right"))], columns))
        ratio = layer.intermediate / layer.hidden  # of the second GEMM's tiles, by their steps

        def end(of_tile: float, resident: bool) -> float:
            known = [(0.0, counts) for _, counts in tiles] if resident else tiles
            return list_schedule(known, (of_tile, of_tile * ratio), self.experts.num_sms)

        gemms_ms = max(1e-3, resident_ms - self.index_ms - self.combine_ms)
        return end(gemms_ms / end(1.0, True), False) + self.combine_ms

    def _combine_ms(self) -> float:
        from pipemoe_kernels.combine_lanes import combine_lanes
        from pipemoe_kernels.launch.kernel import Stream

        self.experts(0, self.source, self.out, self.scratch)
        rows, num_rows = self.source, len(self.source)
        y, positions = self.scratch.y[: num_rows * self.layer.top_k], self.scratch.positions[:num_rows]
        return _median_ms(
            lambda: combine_lanes(
                Stream.current(y.device), y, positions, rows.ids, 0, rows.weights, None, self.out, may_start_early=False
            )
        )

    def _index_ms(self) -> float:
        from pipemoe_kernels.index.hopper import index_local_pairs
        from pipemoe_kernels.launch.kernel import Stream

        scratch, rows, num_local = self.scratch, self.source, self.layer.num_local_experts
        positions, offsets = scratch.positions[: len(rows)], scratch.offsets[:num_local]
        how = (0, num_local, scratch.block_counts, offsets, positions, scratch.tokens)
        return _median_ms(lambda: index_local_pairs(Stream.current(rows.ids.device), rows.ids, *how))


def _median_ms(work: Callable[[], None]) -> float:
    """What a piece of work takes on the GPU."""
    import torch

    found = []
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop))
    return statistics.median(found)


def _cycles_of_ms() -> float:
    """Cycles of torch.cuda._sleep in a millisecond."""
    cycles = 2_000_000
    import torch

    return cycles / _median_ms(lambda: torch.cuda._sleep(cycles))


def _line(cells: Sequence[Any]) -> str:
    widths = (18, 6, 6, 7, 9, 9, 8, 9, 9, 9)
    return " ".join(
        f"{cell:<{w}}" if i in (0, 4) else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )


if __name__ == "__main__":
    try:
        sys.exit(run(parse()))
    except ConfigError as error:
        print(f"arrivals.py: {error}", file=sys.stderr)
        sys.exit(2)
