"""Both grouped GEMMs of the "hopper" experts alone, with every size of row tile: which size is faster, by how much.

    python benchmarks/kernels/gemms.py
    python benchmarks/kernels/gemms.py --layers deepseek-v3 --tokens 4096,16384

One line per cell of benchmarks/kernels: microseconds of graph replays with a flushed L2 cache, interleaved over all
forms, and TFLOP/s. All sizes must give the same bits. Nothing is written to disk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.bench_main import RankParser, positive
from benchmarks.kernels.cases import LAYERS, TOKENS, Layer, enumerate_cells, make_rows, make_weights
from pipemoe.errors import ConfigError

if TYPE_CHECKING:
    from pipemoe.experts import ExpertWeights
    from pipemoe_kernels.gemm.tile_shape import TileShape


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Time the grouped GEMMs with every size of row tile.")
    parser.add_argument("--layers", default=",".join(LAYERS), help="default: %(default)s")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="default: %(default)s")
    parser.add_argument("--rounds", type=positive(int), default=7, help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.layers = options.layers.split(",")
    if unknown := set(options.layers) - set(LAYERS):
        parser.error(f"--layers: {sorted(unknown)} are not among {', '.join(LAYERS)}")
    options.tokens = [int(n) for n in options.tokens.split(",")]
    return options


def run(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise ConfigError("no Hopper GPU: benchmarks/kernels/gemms.py times its kernels alone")
    from benchmarks.kernels.timing import captured, interleaved_ms
    from pipemoe_kernels.gemm.tile_shape import SHAPES

    print(f"{'layer':<18} tokens   pairs  GEMM    " + "".join(f"{rows:>5} rows: us  TFLOP/s" for rows in SHAPES))
    weights, weights_of = None, None
    for name, layer, num_tokens in enumerate_cells(options.layers, options.tokens):
        if weights_of != name:
            weights = None  # frees the last layer's before the next one's are made
            weights, weights_of = make_weights(layer, torch.device("cuda")), name
        num_pairs, works = gemms(layer, num_tokens, weights, list(SHAPES.values()))
        times = interleaved_ms({key: captured(work) for key, work in works.items()}, options.rounds)
        for gemm, share in (("gate_up", 4), ("down", 2)):
            line = f"{name:<18} {num_tokens:>6} {num_pairs:>7}  {gemm:<7}"
            for rows in SHAPES:
                ms = statistics.median(times[f"{gemm} {rows}"])
                line += f"{1e3 * ms:>15.1f} {share * num_pairs * layer.hidden * layer.intermediate / ms / 1e9:>8.0f}"
            print(line, flush=True)
    return 0


def gemms(
    layer: Layer, num_tokens: int, weights: ExpertWeights, shapes: Sequence[TileShape]
) -> tuple[int, dict[str, Callable[[], None]]]:
    """Number of local pairs, and "gate_up" and "down" by each size's rows. All have run once, with the same bits."""
    import torch

    from pipemoe_kernels.gemm.packed_wgmma import down_rows, gate_up_rows
    from pipemoe_kernels.gemm.wgmma import grouped_kernel
    from pipemoe_kernels.index.hopper import MAX_BLOCKS, index_local_pairs
    from pipemoe_kernels.launch.kernel import Stream
    from pipemoe_kernels.launch.tensor_map import device_maps, tensor_map

    device = torch.device("cuda")
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    rows = make_rows(layer, num_tokens, device)
    num_local, num_pairs = layer.num_local_experts, rows.ids.numel()
    sizes = (MAX_BLOCKS * num_local, num_local, num_pairs, num_pairs)
    counts, offsets, positions, tokens = (torch.empty(size, dtype=torch.int32, device=device) for size in sizes)
    index_local_pairs(
        Stream.current(device), rows.ids, 0, num_local, counts, offsets, positions.view(rows.ids.shape), tokens
    )
    num_local_pairs = int(offsets[-1])
    works, results = {}, []
    for shape in shapes:
        kernels = [grouped_kernel(gated=gated, shape=shape) for gated in (True, False)]
        a, y = (
            torch.zeros((num_pairs, columns), dtype=torch.bfloat16, device=device)
            for columns in (layer.intermediate, layer.hidden)
        )
        maps = [
            device_maps([tensor_map(w.detach(), box) for box in kernel.w_boxes], device)
            for w, kernel in zip((weights.gate_up, weights.down), kernels, strict=True)
        ]
        a_maps = device_maps([tensor_map(a, box) for box in shape.x_boxes], device)

        def gate_up(kernel=kernels[0], maps=maps[0], a=a) -> None:
            gate_up_rows(
                Stream.current(device), kernel, rows.hidden, tokens, maps.data_ptr(), offsets, None, a, num_sms
            )

        def down(kernel=kernels[1], maps=maps[1], a_maps=a_maps, y=y) -> None:
            down_rows(
                Stream.current(device),
                kernel,
                a_maps.data_ptr(),
                maps.data_ptr(),
                offsets,
                layer.intermediate,
                y,
                num_sms,
            )

        gate_up()
        down()
        works[f"gate_up {shape.rows}"], works[f"down {shape.rows}"] = gate_up, down
        results.append((a, y))
    if not all(
        torch.equal(found, wanted) for result in results[1:] for found, wanted in zip(result, results[0], strict=True)
    ):
        raise ConfigError(f"{layer}, {num_tokens} tokens: sizes of row tiles give different bits")
    return num_local_pairs, works


if __name__ == "__main__":
    try:
        sys.exit(run(parse()))
    except ConfigError as error:
        print(f"gemms.py: {error}", file=sys.stderr)
        sys.exit(2)
