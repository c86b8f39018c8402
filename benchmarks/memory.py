"""The memory that MoE exchange and experts take, at 1, 4 and 16 times the tokens and a fixed `moe_max_num_tokens`.

    launch/mpirun.sh -n 4 benchmarks/memory.py

One MoE layer through PipelinedMoE, without attention. x, ids and weights are the caller's and exist before; the
result's bytes are subtracted. The rest of the peak (process_memory.py: of the process, or of the GPU as its driver sees
it) is what pipemoe takes. In the capped modes it must stay within 5 % however many tokens there are; without the cap it
grows with them. The exit status is 1 if a capped mode grows.

On a GPU that several ranks share, the driver's figure is the memory of all, and each rank counts with an equal share.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, RankParser, positive, run_on_ranks
from benchmarks.process_memory import MemoryMark, use_exact_malloc
from pipemoe.errors import ConfigError
from pipemoe.plan.config import MODES, UNCAPPED_MODES

if TYPE_CHECKING:
    from pipemoe import World

FACTORS = (1, 4, 16)
MAX_GROWTH = 1.05


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Peak memory of MoE exchange and experts against the number of tokens.")
    parser.add_device()
    parser.add_argument("--modes", default=",".join(MODES), help="default: %(default)s")
    parser.add_argument("--tokens", type=positive(int), help="per rank at 1 x (default: 1024 on a CPU, else 4096)")
    parser.add_argument(
        "--moe-max-num-tokens",
        type=positive(int),
        help="default: half of --tokens, so that both double buffers are in use at 1 x",
    )
    parser.add_argument("--hidden", type=positive(int), help="default: 1024 on a CPU, else 2048")
    parser.add_argument("--intermediate", type=positive(int), help="default: 64 on a CPU, else 768")
    parser.add_argument("--num-experts", type=positive(int), default=32, help="default: %(default)s")
    parser.add_argument("--top-k", type=positive(int), default=2, help="default: %(default)s")
    parser.add_argument(
        "--json", type=Path, default=Path("out/memory.json"), metavar="FILE", help="results (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    options.device = parser.device_of(options)
    options.modes = options.modes.split(",")
    if any(mode not in MODES for mode in options.modes):
        parser.error(f"--modes {','.join(options.modes)}: choose from {', '.join(MODES)}")
    if options.top_k > options.num_experts:
        parser.error(f"--top-k {options.top_k} is more than --num-experts {options.num_experts}")
    return options


def run(world: World, options: argparse.Namespace) -> int:
    """All cases on every rank. Returns the exit status, 1 if a capped mode grew."""
    on_gpu = world.device.type == "cuda"
    tokens = options.tokens or (4096 if on_gpu else 1024)
    cap = options.moe_max_num_tokens or max(1, tokens // 2)
    if cap > tokens:
        raise ConfigError(
            f"--moe-max-num-tokens {cap} is more than --tokens {tokens}, so the first case would be below the cap"
        )
    use_exact_malloc()
    progress = Progress(world.rank)
    weights = make_weights(world, options)
    rows = []
    for done, mode in enumerate(options.modes):
        # A warm-up: libraries set themselves up at first use, which must not count.
        measure(world, options, weights, mode, tokens * FACTORS[-1], cap)
        for factor in FACTORS:
            found = measure(world, options, weights, mode, tokens * factor, cap)
            rows.append(
                {
                    "mode": mode,
                    "num_ranks": world.size,
                    "factor": factor,
                    "tokens_per_rank": tokens * factor,
                    "moe_max_num_tokens": cap,
                    **found,
                }
            )
        progress.count(done + 1, len(options.modes), mode)
    for row in rows:
        first = next(r for r in rows if r["mode"] == row["mode"])
        row["growth"] = row["peak_bytes"] / max(first["peak_bytes"], 1)
        row["capped"] = row["mode"] not in UNCAPPED_MODES
    if world.rank == 0:
        print(memory_table(rows))
        document = results_schema.results_document("memory", rows)
        results_schema.write_results(document, options.json)
        results_schema.print_results(document)
    return 1 if grown(rows) else 0


def grown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The capped modes that take over 5 % more than at 1 x."""
    return sorted({row["mode"] for row in rows if row["capped"] and row["growth"] > MAX_GROWTH})


def make_weights(world: World, options: argparse.Namespace) -> list[Any]:
    """This rank's experts of one layer; their values do not matter here."""
    import torch

    from pipemoe.experts import ExpertWeights, local_range

    own = local_range(options.num_experts, world.size, world.rank)
    hidden, intermediate = _dimensions(world, options)
    kind = {"dtype": torch.bfloat16 if world.device.type == "cuda" else torch.float32, "device": world.device}
    gate_up = torch.full((len(own), 2 * intermediate, hidden), 0.01, **kind)
    return [ExpertWeights(gate_up, torch.full((len(own), hidden, intermediate), 0.01, **kind), first_expert=own.start)]


def measure(
    world: World, options: argparse.Namespace, weights: list[Any], mode: str, num_tokens: int, cap: int
) -> dict[str, int]:
    """Peak and workspace of one configuration, from its making to the end of its second call; largest over ranks."""
    import torch

    import pipemoe

    hidden, _ = _dimensions(world, options)
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.ones((num_tokens, hidden), dtype=weights[0].gate_up.dtype, device=world.device)
    ids = (
        torch.rand((num_tokens, options.num_experts), generator=generator)
        .topk(options.top_k)
        .indices.int()
        .to(world.device)
    )
    topk_weights = torch.ones((num_tokens, options.top_k), device=world.device)
    gc.collect()
    world.all_gather(b"", "before a case")
    mark = MemoryMark(world.device)
    world.all_gather(b"", "start of a case")  # ranks may share a GPU: nobody allocates before everybody has looked
    config = pipemoe.Config(
        mode=mode, moe_max_num_tokens=cap, max_tokens_per_rank=num_tokens, num_slots=options.num_slots
    )
    moe = pipemoe.PipelinedMoE(world, weights, num_experts=options.num_experts, top_k=options.top_k, config=config)
    for _ in range(2):
        y = moe(x, ids, topk_weights)
        result_bytes = y.numel() * y.element_size()
        del y
    world.all_gather(b"", "end of a case")
    peak = mark.peak_bytes()
    found = {
        "peak": peak,
        "result": result_bytes,
        "workspace": moe.runtime.workspace_bytes,
        "device": str(world.device),
    }
    everywhere = [json.loads(p) for p in world.all_gather(json.dumps(found).encode(), "peaks")]
    if world.device.type == "cuda":  # the device's figure holds all its ranks' memory
        for of_rank in everywhere:
            of_rank["peak"] //= sum(other["device"] == of_rank["device"] for other in everywhere)
    return {
        "peak_bytes": max(of_rank["peak"] - of_rank["result"] for of_rank in everywhere),
        "workspace_bytes": max(of_rank["workspace"] for of_rank in everywhere),
    }


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """One aligned line per case."""
    lines = [f"{'mode':10} {'capped':>6} {'tokens':>7} {'peak MiB':>9} {'workspace MiB':>13} {'growth':>6}"]
    for row in rows:
        lines.append(
            f"{row['mode']:10} {'yes' if row['capped'] else 'no':>6} {row['tokens_per_rank']:7d} "
            f"{row['peak_bytes'] / 2**20:9.1f}"
            f" {row['workspace_bytes'] / 2**20:13.1f} {row['growth']:6.2f}"
        )
    return "\n".join(lines)


def _dimensions(world: World, options: argparse.Namespace) -> tuple[int, int]:
    """Hidden and intermediate."""
    on_gpu = world.device.type == "cuda"
    return options.hidden or (2048 if on_gpu else 1024), options.intermediate or (768 if on_gpu else 64)


if __name__ == "__main__":
    options = parse()
    sys.exit(
        run_on_ranks("memory.py", lambda world: run(world, options), device=options.device, num_slots=options.num_slots)
    )
