"""What running two operations side by side does to both: attention, experts, dispatch and combine, each alone and in pairs.

    launch/one_gpu.sh 4 benchmarks/overlap.py

The known doubt about cohorts is that overlapping attention with experts slows both down. For every pair that a plan may put
side by side, both sides run over and over in lanes of their own, first alone and then together, so often that they take about as
long. Per row:

    a_slowdown, b_slowdown    time together / time alone of either side
    gain                      (a alone + b alone) / both together: 1 is no better than one after the other, 2 is perfect
    overlap_pct               OSU's figure, 100 (1 - (together - compute) / communication); null for two computations
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import results_schema
from bench_main import Progress, RankParser, positive, run_on_ranks
from comm_cases import EXCHANGES, Case
from pipemoe.errors import ConfigError
from pipemoe.trace import overlap_percent
from pipemoe.wire import WireFormat
from ttft_models import BenchModel

if TYPE_CHECKING:
    from pipemoe import World
    from pipemoe.runtime.lanes import Lane

PAIRS = (
    ("attend", "attend"),
    ("attend", "experts"),
    ("experts", "experts"),
    ("attend", "dispatch"),
    ("attend", "combine"),
    ("experts", "dispatch"),
    ("experts", "combine"),
    ("dispatch", "combine"),
)
COMMUNICATION = ("dispatch", "combine")
MAX_REPEATS = 200


@dataclass(frozen=True, slots=True)
class Side:
    """One operation, and the lane that it runs in beside others."""

    lane: Lane
    work: Callable[[], Any]


class Operations:
    """The operations of one layer on this rank, `num_tokens` tokens from every rank."""

    def __init__(self, world: World, model: BenchModel, num_tokens: int, dtype: Any) -> None:
        import torch

        from pipemoe.experts import make_experts
        from pipemoe.models.loading import load_decoder
        from pipemoe.models.packing import Piece

        with model.source(model.first_moe_layer + 1) as source:
            self._decoder, weights = load_decoder(source, rank=world.rank, num_ranks=world.size, device=world.device, dtype=dtype)
        shape, rows = self._decoder.shape, num_tokens * world.size
        self._num_tokens, self._pieces = num_tokens, [Piece(0, 0, num_tokens, num_tokens)]
        self._experts = make_experts(weights, top_k=shape.top_k, hidden=shape.hidden, device=world.device, dtype=dtype)
        wire = WireFormat(shape.hidden, shape.top_k, dtype)
        self._rows = wire.rows(torch.zeros((rows, wire.row_bytes), dtype=torch.uint8, device=world.device))
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, shape.hidden, generator=generator)
        ids = torch.rand(rows, shape.num_experts, generator=generator).topk(shape.top_k).indices
        self._rows.write(hidden.to(world.device, dtype), ids.int().to(world.device), torch.full((rows, shape.top_k), 1 / shape.top_k, device=world.device))
        sums_dtype = dtype if world.device.type == "cuda" else torch.float32
        slots = world.lanes.slots[:2]
        self._exchanges = {
            "dispatch": Case(world, EXCHANGES["grouped_broadcast"], [num_tokens] * world.size, wire.row_bytes, torch.uint8),
            "combine": Case(world, EXCHANGES["grouped_reduce"], [num_tokens] * world.size, shape.hidden, sums_dtype),
        }
        self._sides: dict[tuple[str, int], Side] = {}
        for index, lanes in enumerate(slots):
            scratch, out = self._experts.new_scratch(rows), torch.empty((rows, shape.hidden), dtype=sums_dtype, device=world.device)
            world.engine.call(lambda lane=lanes.compute, s=scratch: run_all(world, [(Side(lane, lambda: self._experts.warm_up(s)), 1)]))
            self._sides["experts", index] = Side(lanes.compute, lambda s=scratch, o=out: self._experts(0, self._rows, o, s))
            self._sides["attend", index] = Side(lanes.compute, self._attend())
        self._sides["dispatch", 0] = Side(slots[0].dispatch, self._exchanges["dispatch"].call())
        self._sides["combine", 0] = Side(slots[0].combine, self._exchanges["combine"].call())

    def _attend(self) -> Callable[[], Any]:
        """Attention of the first MoE layer, again and again on the same tokens."""
        import torch

        state = self._decoder.start(self._decoder.new_step(), torch.zeros(self._num_tokens, dtype=torch.long), self._pieces)

        def work() -> None:
            state.layer = -1  # as before the first layer
            self._decoder.attend(state, 0, None)

        return work

    def pair(self, a: str, b: str) -> tuple[Side, Side]:
        """Two sides in lanes of their own: computation beside computation is that of two slots."""
        both_compute = a not in COMMUNICATION and b not in COMMUNICATION
        return self._sides[a, 0], self._sides[b, 1 if both_compute else 0]


def run_all(world: World, sides: Sequence[tuple[Side, int]]) -> list[tuple[float, float]]:
    """Run each side so many times, all at once; begin and end of each in seconds. Engine's thread."""
    world.lanes.clock.start(True)
    events: list[list[Any]] = [[] for _ in sides]
    for repeat in range(max(count for _, count in sides)):
        for of_side, (side, count) in zip(events, sides):
            if repeat < count:
                of_side.append(side.lane.submit(side.work))

    def done() -> bool:
        world.lanes.poll()
        return all(of_side[-1].done() for of_side in events)

    world.engine.wait(done, "operations side by side")
    return [(of_side[0].span()[0], of_side[-1].span()[1]) for of_side in events]


class Timer:
    """Times of sides, the same on every rank: the mean over ranks of each rank's span."""

    def __init__(self, world: World) -> None:
        self._world = world

    def seconds(self, sides: Sequence[tuple[Side, int]]) -> list[float]:
        """Of each side, and at the end of all together."""
        self._world.all_gather(b"", "start of a measurement")
        spans = self._world.engine.call(lambda: run_all(self._world, sides))
        own = [end - begin for begin, end in spans] + [max(e for _, e in spans) - min(b for b, _ in spans)]
        return np.mean([json.loads(p) for p in self._world.all_gather(json.dumps(own).encode(), "times")], axis=0).tolist()


def measure(timer: Timer, names: tuple[str, str], sides: tuple[Side, Side], target_s: float, rounds: int) -> dict[str, Any]:
    """One row; every rank calls and gets the same."""
    once = [timer.seconds([(side, 3)])[0] / 3 for side in sides for _ in range(2)][1::2]  # the second of two
    counts = [int(min(MAX_REPEATS, max(3, target_s / max(seconds, 1e-6)))) for seconds in once]
    alone: list[list[float]] = [[], []]
    together = []
    for _ in range(rounds):
        for of_side, side, count in zip(alone, sides, counts):
            of_side.append(timer.seconds([(side, count)])[0])
        together.append(timer.seconds(list(zip(sides, counts))))
    a_alone, b_alone = (float(np.median(of_side)) for of_side in alone)
    a, b, both = np.median(together, axis=0).tolist()
    communicates = [name in COMMUNICATION for name in names]
    overlap = overlap_percent(both, *((b_alone, a_alone) if communicates[0] else (a_alone, b_alone))) if any(communicates) else None
    figures = {"a_alone": a_alone, "a_together": a, "b_alone": b_alone, "b_together": b, "both_together": both}
    return {
        "a": names[0],
        "b": names[1],
        "a_repeats": counts[0],
        "b_repeats": counts[1],
        **{f"{name}_ms": seconds * 1e3 for name, seconds in figures.items()},
        "a_slowdown": a / a_alone,
        "b_slowdown": b / b_alone,
        "gain": (a_alone + b_alone) / both,
        "overlap_pct": overlap,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Slowdown of both sides when two operations overlap.")
    parser.add_device()
    parser.add_argument("--model", help="as of ttft.py (default: small on a CPU, else qwen3-30b-a3b)")
    parser.add_argument("--tokens", type=positive(int), action="append", help="per rank; may be repeated (default: 64 on a CPU, else 16 and 2048)")
    parser.add_argument("--target-ms", type=positive(float), default=20.0, help="how long each side takes alone (default %(default)s)")
    parser.add_argument("--rounds", type=positive(int), default=5, help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=Path("out/overlap.json"), metavar="FILE", help="results (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.device = parser.device_of(options)
    return options


def run(world: World, options: argparse.Namespace) -> int:
    """All pairs on every rank; the exit status."""
    import torch

    if world.num_slots < 2 or world.size < 2:
        raise ConfigError(f"{world.size} ranks with {world.num_slots} slots have nothing to overlap; both must be at least 2")
    on_gpu, progress, timer, rows = world.device.type == "cuda", Progress(world.rank), Timer(world), []
    model = BenchModel(options.model or ("qwen3-30b-a3b" if on_gpu else "small"))
    for num_tokens in options.tokens or ([16, 2048] if on_gpu else [64]):
        operations = Operations(world, model, num_tokens, torch.bfloat16 if on_gpu else torch.float32)
        for names in PAIRS:
            row = measure(timer, names, operations.pair(*names), options.target_ms / 1e3, options.rounds)
            rows.append({"model": model.name, "num_ranks": world.size, "tokens_per_rank": num_tokens, **row})
            progress.say(f"{num_tokens} tokens: {names[0]} beside {names[1]}")
    if world.rank == 0:
        print(overlap_table(rows))
        document = results_schema.results_document("overlap", rows)
        results_schema.write_results(document, options.json)
        results_schema.print_results(document)
    return 0


def overlap_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Heading and one line per pair."""
    heading = ["tokens per rank", "a", "b", "a slower by", "b slower by", "gain", "overlap %"]
    lines = []
    for row in rows:
        overlap = "-" if row["overlap_pct"] is None else f"{row['overlap_pct']:.0f}"
        figures = [f"{row[name]:.2f}" for name in ("a_slowdown", "b_slowdown", "gain")]
        lines.append([str(row["tokens_per_rank"]), row["a"], row["b"], *figures, overlap])
    return [heading, *lines]


def overlap_table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned for a terminal."""
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, (15, 8, 8, 11, 11, 5, 9))) for line in overlap_cells(rows))


if __name__ == "__main__":
    options = parse()
    sys.exit(run_on_ranks("overlap.py", lambda world: run(world, options), device=options.device, num_slots=options.num_slots))
