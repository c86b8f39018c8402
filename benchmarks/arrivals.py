"""A wave whose rows arrive in parts: one arrival-driven launch, one call per part, and one call behind the last part.

    python benchmarks/arrivals.py

Runs on one GPU. Another stream stands for the dispatch. For each part it waits as long as a broadcast takes at --gbps,
copies the part's rows to where the experts read them, and says that they are there. The first part is this rank's own
and is there at once. Per row: `ms` from the start of the dispatch to the end of the experts, `last_arrival_ms` until
the last part was there, and `resident_ms` for a call with all rows there before. All forms leave the same
multiprocessors to collectives, and must give the same bits before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
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

FORMS = ("whole", "groups", "arrivals")
SMS_FOR_COLLECTIVES = 8
HEAD_START_CYCLES = 6_000_000  # about 3 ms, in which the host enqueues a whole round
CASES = (
    ("qwen3-30b-a3b", 4096),
    ("qwen3-30b-a3b", 16384),
    ("deepseek-v3", 1024),
    ("deepseek-v3", 4096),
    ("deepseek-v3", 16384),
)
_COLUMNS = ("layer", "tokens", "parts", "form", "ms", "spread %", "last arrival", "resident")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Time experts calls whose rows arrive in parts.")
    parser.add_argument(
        "--cases",
        default=",".join(f"{name}:{tokens}" for name, tokens in CASES),
        help="layer:tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--parts", type=positive(int), default=4, help="of equal length, at most 8 (default: %(default)s)"
    )
    parser.add_argument(
        "--gbps", type=positive(float), default=330.0, help="of the broadcasts, in GB/s (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive(int), default=7, help="default: %(default)s")
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
    return options


def split(num_rows: int, num_parts: int) -> list[int]:
    """Rows of each of `num_parts` parts, as equal as possible."""
    bounds = [num_rows * i // num_parts for i in range(num_parts + 1)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def run(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise ConfigError("benchmarks/arrivals.py times kernels of Hopper GPUs; there is none")
    progress, results = Progress(0), []
    print(_line(_COLUMNS))
    weights, weights_of = None, None
    for name, num_tokens in options.cases:
        if weights_of != name:
            weights = None  # frees the last layer's before the next one's are made
            weights, weights_of = make_weights(LAYERS[name], torch.device("cuda")), name
        results += measure(name, LAYERS[name], num_tokens, weights, options)
        progress.say(f"{name}, {num_tokens} tokens")
    document = results_schema.results_document("arrivals", results)
    results_schema.write_results(document, options.json)
    results_schema.print_results(document)
    return 0


def measure(
    name: str, layer: Layer, num_tokens: int, weights: Any, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Check and time all forms on one case; a row of results each."""
    import torch

    part_rows = split(num_tokens, options.parts)
    wave = DelayedWave(layer, num_tokens, part_rows, weights, options.gbps)
    wanted = torch.full_like(wave.out, torch.nan)
    wave.experts(0, wave.source, wanted, wave.scratch)
    for form in FORMS:
        wave.received.buffer.fill_(0xAB)
        wave.out.fill_(torch.nan)
        wave.round(form)
        torch.cuda.synchronize()
        if not torch.equal(wave.out, wanted):
            raise ConfigError(f"{form} on {name}, {num_tokens} tokens: not the bits of a call on all rows at once")
    times, arrivals = {form: [] for form in (*FORMS, "resident")}, []
    for _ in range(options.rounds):
        for form in times:
            start, last, stop = wave.round(form)
            torch.cuda.synchronize()
            times[form].append(start.elapsed_time(stop))
            if form == "whole":
                arrivals.append(start.elapsed_time(last))
    resident, results = times.pop("resident"), []
    for form, ms in times.items():
        result = {
            **{"layer": name, "H": layer.hidden, "I": layer.intermediate, "experts": layer.num_experts},
            **{
                "local_experts": layer.num_local_experts,
                "top_k": layer.top_k,
                "tokens": num_tokens,
                "part_rows": part_rows,
            },
            **{
                "gbps": options.gbps,
                "sms_for_collectives": SMS_FOR_COLLECTIVES,
                "form": form,
                "ms": statistics.median(ms),
                "ms_rounds": ms,
            },
            **{"last_arrival_ms": statistics.median(arrivals), "resident_ms": statistics.median(resident)},
        }
        results.append(result)
        spread = 100 * (max(ms) - min(ms)) / result["ms"]
        figures = (
            f"{result['ms']:.4f}",
            f"{spread:.0f}",
            f"{result['last_arrival_ms']:.4f}",
            f"{result['resident_ms']:.4f}",
        )
        print(_line((name, num_tokens, options.parts, form, *figures)))
    return results


class DelayedWave:
    """One wave, its receive buffer, and a stream that stands for the dispatch."""

    def __init__(self, layer: Layer, num_tokens: int, part_rows: list[int], weights: Any, gbps: float):
        import torch

        from pipemoe.experts import make_experts
        from pipemoe.experts.arrivals import ArrivingExperts
        from pipemoe.runtime.lanes import stream_lanes
        from pipemoe.wire import WireFormat

        wire = WireFormat(layer.hidden, layer.top_k, torch.bfloat16)
        self.source = make_rows(layer, num_tokens, torch.device("cuda"))
        self.received = wire.rows(torch.zeros_like(self.source.buffer))
        settings = {"top_k": layer.top_k, "hidden": layer.hidden, "device": "cuda", "dtype": torch.bfloat16}
        self.experts = make_experts([weights], implementation="hopper", **settings).with_free_sms(SMS_FOR_COLLECTIVES)
        self.arriving = ArrivingExperts(self.experts)
        self.scratch, self.arrivals = self.experts.new_scratch(num_tokens), self.arriving.new_arrivals(num_tokens)
        self.arriving.warm_up(self.arrivals, self.scratch)
        self.out = torch.zeros((num_tokens, layer.hidden), dtype=torch.bfloat16, device="cuda")
        self.flush = torch.zeros(64 << 20, device="cuda")
        self.total = torch.zeros((), device="cuda")
        self.dispatch = stream_lanes(torch.device("cuda"), 1).slots[0].dispatch.stream
        self.part_rows = part_rows
        bounds = [0, *itertools.accumulate(part_rows)]
        self.slices = [slice(*pair) for pair in itertools.pairwise(bounds)]
        cycles_of_ms = _cycles_of_ms()
        self.delays = [0, *(int(rows * wire.row_bytes / gbps / 1e6 * cycles_of_ms) for rows in part_rows[1:])]
        torch.cuda.synchronize()

    def round(self, form: str) -> tuple[Any, Any, Any]:
        """Enqueue one call in a form. Returns events of its start, of the last part's arrival, and of its end."""
        import torch

        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        there = [torch.cuda.Event(enable_timing=True) for _ in self.slices]
        if form == "arrivals":
            self.arriving.expect(self.arrivals, 0, self.received, self.part_rows)
        torch.sum(self.flush, dim=0, out=self.total)
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        if form == "resident":
            self.experts(0, self.source, self.out, self.scratch)
            stop.record()
            return start, stop, stop
        with torch.cuda.stream(self.dispatch):
            self.dispatch.wait_event(start)
            for i, (rows, delay) in enumerate(zip(self.slices, self.delays, strict=True)):
                if delay:
                    torch.cuda._sleep(delay)
                self.received.buffer[rows].copy_(self.source.buffer[rows])
                if form == "arrivals":
                    self.arriving.arrived(self.arrivals, i)
                there[i].record()
        call: dict[str, Callable[[], None]] = {"whole": lambda: self.whole(there), "groups": lambda: self.groups(there)}
        call.get(form, lambda: self.arriving(self.arrivals, self.out, self.scratch))()
        stop.record()
        return start, there[-1], stop

    def whole(self, there: Sequence[Any]) -> None:
        import torch

        torch.cuda.current_stream().wait_event(there[-1])
        self.experts(0, self.received, self.out, self.scratch)

    def groups(self, there: Sequence[Any]) -> None:
        import torch

        for rows, event in zip(self.slices, there, strict=True):
            torch.cuda.current_stream().wait_event(event)
            self.experts(0, self.received[rows], self.out[rows], self.scratch)


def _cycles_of_ms() -> float:
    """Cycles of torch.cuda._sleep in a millisecond."""
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(5):
        start.record()
        torch.cuda._sleep(2_000_000)
        stop.record()
        torch.cuda.synchronize()
        found.append(2_000_000 / start.elapsed_time(stop))
    return statistics.median(found)


def _line(cells: Sequence[Any]) -> str:
    widths = (18, 6, 8, 9, 9, 8, 12, 9)
    return " ".join(
        f"{cell:<{w}}" if i in (0, 3) else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )


if __name__ == "__main__":
    try:
        sys.exit(run(parse()))
    except ConfigError as error:
        print(f"arrivals.py: {error}", file=sys.stderr)
        sys.exit(2)
