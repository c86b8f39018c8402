"""The whole experts call, from wire rows to summed rows, on one GPU: pipemoe's kernels beside library ones.

    python benchmarks/kernels
    python benchmarks/kernels --layers deepseek-v3 --tokens 64,16384

A call must do 6 x pairs x H x I operations and read the weights of every expert that has a row. Its floor is the larger
of operations / dense rate and bytes / copy bandwidth, both measured first, in this run. Every implementation gets the
same rows and is checked against float64 on a sample of them before it is timed. Times are medians over interleaved
rounds of graph replays of the whole call with a flushed L2 cache. Beside pipemoe's times stand those of its router and
its index alone, and the host's time to enqueue a call that no graph has captured. liger-kernel takes part if it is
installed (liger.py). pipemoe_fp8 is pipemoe in e4m3, on the layers of FP8_LAYERS; its floor has half the bytes and
twice the rate. An implementation that fails, or a peer whose turn comes after `--seconds`, leaves a row without
figures. At the end the figures are compared with the bars (judge.py). The status is 1 if one of pipemoe's own rows is
missing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, RankParser, positive
from benchmarks.kernels.cases import LAYERS, TOKENS, Layer, enumerate_cells, expected_rows, make_rows, make_weights
from benchmarks.kernels.judge import judge, verdict_table
from benchmarks.kernels.table import kernels_summary
from pipemoe.errors import ConfigError

# Norm ratio; e4m3 itself costs about 6e-2 on normal data (see kernels/NOTES.md).
MAX_ERROR = {"bf16": 1e-2, "fp8": 8e-2}
SAMPLE = 24  # rows compared with float64
DEVICE = "cuda"
OURS = "pipemoe"  # and variants of it, pipemoe_...
FP8_LAYERS = ("deepseek-v3",)
IMPLS = ("pipemoe", "pipemoe_fp8", "grouped_mm", "cublas_loop", "liger")
_COLUMNS = ("layer", "tokens", "pairs", "impl", "ms", "spread %", "TFLOP/s", "GB/s", "floor", "ratio", "error")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Time the experts call against library kernels.")
    parser.add_argument("--layers", default=",".join(LAYERS), help="default: %(default)s")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="default: %(default)s")
    parser.add_argument("--impls", default=",".join(IMPLS), help="default: %(default)s")
    parser.add_argument("--rounds", type=positive(int), default=9, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=positive(float), default=130.0, help="then no more peers, only pipemoe (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("out/kernels.json"), metavar="FILE", help="results (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    options.layers, options.impls = options.layers.split(","), options.impls.split(",")
    if unknown := set(options.layers) - set(LAYERS):
        parser.error(f"--layers: {sorted(unknown)} are not among {', '.join(LAYERS)}")
    try:
        options.tokens = [positive(int)(n) for n in options.tokens.split(",")]
    except ValueError:
        parser.error(f"--tokens {options.tokens}: numbers with commas between are wanted")
    return options


def run(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("no GPU: benchmarks/kernels times GPU kernels")
    from benchmarks.kernels import liger as kernels_liger
    from benchmarks.kernels.peers import PEERS
    from benchmarks.kernels.timing import roofline

    if unknown := set(options.impls) - set(PEERS):
        raise ConfigError(f"--impls: {sorted(unknown)} are not among {', '.join(PEERS)}")
    begin, progress = time.monotonic(), Progress(0)
    if "liger" in options.impls and not kernels_liger.is_installed():
        progress.say("liger-kernel is not installed: its rows are left out")
        options.impls.remove("liger")
    ceilings = roofline()
    print(
        f"{torch.cuda.get_device_name()}: dense bf16 {ceilings['tflops']:.0f} TFLOP/s, copy "
        f"{ceilings['copy_tbps']:.2f} TB/s read + written"
    )
    print(_line(_COLUMNS))
    rows = []
    weights, weights_of = None, None
    for name, layer, num_tokens in enumerate_cells(options.layers, options.tokens):
        if weights_of != name:
            weights = None  # frees the last layer's before the next one's are made
            weights, weights_of = make_weights(layer, torch.device(DEVICE)), name
        impls = [impl for impl in options.impls if _dtype_of(impl) == "bf16" or name in FP8_LAYERS]
        is_late = time.monotonic() - begin > options.seconds
        if is_late:
            progress.say(f"{name}, {num_tokens} tokens: {options.seconds:.0f} s are over, pipemoe alone")
        rows += measure(name, layer, num_tokens, weights, ceilings, impls, options.rounds, ours_alone=is_late)
        gc.collect()
        torch.cuda.empty_cache()
        results_schema.write_results(results_schema.results_document("kernels", rows), options.json)
        progress.say(f"{name}, {num_tokens} tokens: done")
    print(kernels_summary(rows))
    for ours in dict.fromkeys(row["impl"] for row in rows if _is_ours(row["impl"])):
        print(f"\n{ours}\n{verdict_table(judge(rows, ours))}")
    results_schema.print_results(results_schema.results_document("kernels", rows))
    return 1 if any(row["ms"] is None for row in rows if _is_ours(row["impl"])) else 0


def measure(
    name: str,
    layer: Layer,
    num_tokens: int,
    weights: Any,
    ceilings: dict[str, float],
    impls: Sequence[str],
    rounds: int,
    *,
    ours_alone: bool = False,
) -> list[dict[str, Any]]:
    """Check and time all implementations on one cell. Returns a row each, without figures if it fails or is skipped."""
    import torch

    from benchmarks.kernels.peers import PEERS
    from benchmarks.kernels.timing import captured, host_us, interleaved_ms

    rows = make_rows(layer, num_tokens, torch.device(DEVICE))
    local = rows.ids[rows.ids < layer.num_local_experts]
    pairs, active = local.numel(), len(local.unique())
    operations = 6 * pairs * layer.hidden * layer.intermediate
    weight_bytes = active * layer.expert_bytes
    floor_ms = max(operations / ceilings["tflops"] / 1e9, weight_bytes / ceilings["copy_tbps"] / 1e9)
    sample = torch.linspace(0, num_tokens - 1, min(SAMPLE, num_tokens), device=DEVICE).long()
    wanted = expected_rows(rows, weights, sample)
    calls, outs, graphs, errors = {}, {}, {}, {}  # graphs use the memory of calls and outs: keep these
    for impl in impls:
        if ours_alone and not _is_ours(impl):
            continue
        try:
            call = PEERS[impl](weights, rows, layer.num_experts)
            out = torch.full((num_tokens, layer.hidden), torch.nan, dtype=torch.bfloat16, device=DEVICE)
            graph = captured(lambda call=call, out=out: call(out))
            out.fill_(torch.nan)
            graph.replay()
            errors[impl] = float((out[sample].double() - wanted).norm() / wanted.norm())
            most = MAX_ERROR[_dtype_of(impl)]
            if not (errors[impl] < most and bool(out.isfinite().all())):
                raise ConfigError(f"relative error {errors[impl]:.1e}, not under {most}, or values that are not finite")
        except Exception as error:  # noqa: BLE001  (whatever a library does, the others' figures count)
            print(
                f"{impl} on {name}, {num_tokens} tokens: {type(error).__name__}: {error}", file=sys.stderr, flush=True
            )
            continue
        calls[impl], outs[impl], graphs[impl] = call, out, graph
    parts = dict.fromkeys(("routing_us", "index_us", "host_us"))
    if OURS in calls:
        parts = {**time_parts(layer, weights, rows), "host_us": host_us(lambda: calls[OURS](outs[OURS]))}
    times_of = interleaved_ms(graphs, rounds)
    results = []
    for impl in impls:
        times, dtype = times_of.get(impl), _dtype_of(impl)
        ms = statistics.median(times) if times else None
        narrower = 2 if dtype == "fp8" else 1
        floor, num_bytes = floor_ms / narrower, weight_bytes / narrower
        result = {
            **{"layer": name, "H": layer.hidden, "I": layer.intermediate, "experts": layer.num_experts},
            **{"local_experts": layer.num_local_experts, "top_k": layer.top_k, "tokens": num_tokens, "pairs": pairs},
            **{"dtype": dtype, "impl": impl.removesuffix("_fp8"), "ms": ms, "ms_rounds": times, "floor_ms": floor},
            **{"tflops": ms and operations / ms / 1e9, "weight_gbps": ms and num_bytes / ms / 1e6},
            **{"ratio_to_floor": ms and ms / floor, "rel_err": errors.get(impl)},
            **(parts if impl == OURS else dict.fromkeys(parts)),
            **{"dense_tflops": ceilings["tflops"], "copy_tbps": ceilings["copy_tbps"]},
        }
        results.append(result)
        if ms is None:
            print(_line((name, num_tokens, pairs, impl, *["-"] * 4, f"{floor:.4f}", "-", "-")))
            continue
        spread = 100 * (max(times) - min(times)) / ms
        print(
            _line(
                (name, num_tokens, pairs, impl, f"{ms:.4f}", f"{spread:.0f}", f"{result['tflops']:.0f}")
                + (f"{result['weight_gbps']:.0f}", f"{floor:.4f}", f"{ms / floor:.3f}", f"{errors[impl]:.1e}")
            ),
            flush=True,
        )
    return results


def _is_ours(impl: str) -> bool:
    return impl.startswith(OURS)


def _dtype_of(impl: str) -> str:
    return "fp8" if impl.endswith("_fp8") else "bf16"


def time_parts(layer: Layer, weights: Any, rows: Any) -> dict[str, float | None]:
    """Microseconds of the router and of the index kernels, for these tokens; None where Hopper's do not run."""
    import torch

    if torch.cuda.get_device_capability() != (9, 0):
        return {"routing_us": None, "index_us": None}
    from benchmarks.kernels.parts import index_work, routing_work
    from benchmarks.kernels.timing import repeated_us

    return {
        "routing_us": repeated_us(routing_work(layer, len(rows))),
        "index_us": repeated_us(index_work(weights, rows)),
    }


def _line(cells: Sequence[Any]) -> str:
    widths = (18, 6, 7, 12, 9, 8, 8, 6, 8, 6, 8)
    return " ".join(
        f"{cell:<{w}}" if i in (0, 3) else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )


if __name__ == "__main__":
    try:
        sys.exit(run(parse()))
    except ConfigError as error:
        print(f"benchmarks/kernels: {error}", file=sys.stderr)
        sys.exit(2)
