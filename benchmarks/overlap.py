"""How two operations slow each other down side by side: attention, experts, dispatch, combine, alone and in pairs.

    launch/one_gpu.sh 4 benchmarks/overlap.py

The known doubt about cohorts is that overlapping attention with experts slows both down. For every pair that a plan may
put side by side, both sides run repeatedly in lanes of their own, first alone and then together, so often that they
take about equally long (pipemoe.contention, which `pipemoe tune` uses too). Per row:

    a_slowdown, b_slowdown    time together / time alone of either side
    a_speed, b_speed          of either side while the other is under way, as a share of its speed alone
    gain                      (a alone + b alone) / both together: 1 is as good as one after the other, 2 is perfect
    overlap_pct               OSU's figure, 100 (1 - (together - compute) / communication); null for two computations
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, RankParser, positive, run_on_ranks
from benchmarks.ttft.models import BenchModel
from pipemoe.contention import COMMUNICATION, PAIRS, Operations, PairTimes, Timer, measure_pair
from pipemoe.errors import ConfigError
from pipemoe.plan.clock.sms import room_for_collectives
from pipemoe.trace import overlap_percent

if TYPE_CHECKING:
    from pipemoe import World


def operations(world: World, model: BenchModel, num_tokens: int, dtype: Any) -> Operations:
    """The operations of the model's first MoE layer, with `num_tokens` tokens from every rank."""
    from pipemoe.experts import make_experts
    from pipemoe.models.loading import load_decoder

    with model.source(model.first_moe_layer + 1) as source:
        place = {"rank": world.rank, "num_ranks": world.size, "device": world.device}
        decoder, weights = load_decoder(source, **place, dtype=dtype, random_weights=model.random_weights)
    experts = make_experts(
        weights,
        top_k=decoder.shape.top_k,
        hidden=decoder.shape.hidden,
        device=world.device,
        dtype=dtype,
        num_experts=decoder.shape.num_experts,
    )
    return Operations(
        world,
        decoder,
        experts.with_free_sms(room_for_collectives(experts.num_sms, world.ctas, world.num_slots)),
        num_tokens,
    )


def pair_row(names: tuple[str, str], times: PairTimes) -> dict[str, Any]:
    """The figures of one pair."""
    (a_alone, b_alone), (a, b), both = times.alone, times.together, times.both
    communicates = [name in COMMUNICATION for name in names]
    overlap = (
        overlap_percent(both, *((b_alone, a_alone) if communicates[0] else (a_alone, b_alone)))
        if any(communicates)
        else None
    )
    figures = {"a_alone": a_alone, "a_together": a, "b_alone": b_alone, "b_together": b, "both_together": both}
    a_speed, b_speed = times.speeds()
    return {
        "a": names[0],
        "b": names[1],
        "a_repeats": times.repeats[0],
        "b_repeats": times.repeats[1],
        **{f"{name}_ms": seconds * 1e3 for name, seconds in figures.items()},
        "a_slowdown": a / a_alone,
        "b_slowdown": b / b_alone,
        "a_speed": a_speed,
        "b_speed": b_speed,
        "gain": times.gain,
        "overlap_pct": overlap,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Slowdown of both sides when two operations overlap.")
    parser.add_device()
    parser.add_argument("--model", help="as of benchmarks/ttft (default: small on a CPU, else qwen3-30b-a3b)")
    parser.add_argument(
        "--tokens",
        type=positive(int),
        action="append",
        help="per rank; may be repeated (default: 64 on a CPU, else 16 and 2048)",
    )
    parser.add_argument(
        "--target-ms", type=positive(float), default=20.0, help="how long each side takes alone (default %(default)s)"
    )
    parser.add_argument("--rounds", type=positive(int), default=5, help="default: %(default)s")
    parser.add_argument(
        "--json", type=Path, default=Path("out/overlap.json"), metavar="FILE", help="results (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    options.device = parser.device_of(options)
    return options


def run(world: World, options: argparse.Namespace) -> int:
    """All pairs on every rank. Returns the exit status."""
    import torch

    if world.num_slots < 2 or world.size < 2:
        raise ConfigError(
            f"{world.size} ranks with {world.num_slots} slots have nothing to overlap; both must be at least 2"
        )
    on_gpu, progress, timer, rows = world.device.type == "cuda", Progress(world.rank), Timer(world), []
    model = BenchModel(options.model or ("qwen3-30b-a3b" if on_gpu else "small"))
    for num_tokens in options.tokens or ([16, 2048] if on_gpu else [64]):
        sides = operations(world, model, num_tokens, torch.bfloat16 if on_gpu else torch.float32)
        for names in PAIRS:
            times = measure_pair(timer, sides.pair(*names), options.target_ms / 1e3, options.rounds)
            rows.append(
                {"model": model.name, "num_ranks": world.size, "tokens_per_rank": num_tokens, **pair_row(names, times)}
            )
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
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, (15, 8, 8, 11, 11, 5, 9)))
        for line in overlap_cells(rows)
    )


if __name__ == "__main__":
    options = parse()
    sys.exit(
        run_on_ranks(
            "overlap.py", lambda world: run(world, options), device=options.device, num_slots=options.num_slots
        )
    )
