"""Attention alone, over packed pieces: pipemoe's kernel beside torch's flash kernel, cuDNN's and FlashAttention 3.

    python benchmarks/attention.py

Runs on one GPU. Per case, `ms` of a call in a graph, the median of rounds in which all take turns, and
`ratio_to_flash`, torch's time over it. cuDNN (through scaled_dot_product_attention) takes part where there is one whole
piece and no window, FlashAttention 3 where the wheel fa3-fwd is installed. `rel_err`: of sampled rows against float64.

Then the stall test: --lengths different lengths in random order, one call each, timed until the device is done.
`excess_ms` is the largest time over the median of those of similar length. cuDNN builds a plan for every new length.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, RankParser, positive
from pipemoe.errors import ConfigError

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = ("pipemoe", "torch_flash", "cudnn", "fa3")
GRAPH_US = 3000  # of repeated calls in a graph, about
NEIGHBOURS = 10  # lengths that a stall is measured against
SAMPLED_ROWS = 24
_COLUMNS = ("shape", "case", "impl", "ms", "spread %", "TFLOP/s", "x flash", "host us", "rel err")


@dataclass(frozen=True)
class Shape:
    """Heads of a model's attention."""

    heads: int
    key_heads: int
    head_dim: int
    value_dim: int


SHAPES = {"qwen3-30b-a3b": Shape(32, 4, 128, 128), "deepseek-v3": Shape(128, 128, 192, 128)}


@dataclass(frozen=True)
class Case:
    """Pieces, each with its queries and its keys."""

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    window: int | None = None

    @property
    def is_one_whole(self) -> bool:
        return self.queries == self.keys and len(self.queries) == 1 and self.window is None

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        total = 0
        for n, m in zip(self.queries, self.keys, strict=True):
            seen = range(m - n + 1, m + 1)
            total += sum(seen) if self.window is None else sum(min(s, self.window) for s in seen)
        return total


def cases_of(name: str) -> list[Case]:
    lengths = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    if name == "deepseek-v3":
        lengths = lengths[2:-1]
    found = [Case(str(n), (n,), (n,)) for n in lengths]
    mixed = (3000, 1, 700, 64, 129, 2000, 17, 1024)
    found += [
        Case("64 x 64", (64,) * 64, (64,) * 64),
        Case("8 x 512", (512,) * 8, (512,) * 8),
        Case("mixed lengths", mixed, mixed),
        Case("1024 after 7168", (1024,), (8192,)),
    ]
    if name != "deepseek-v3":
        found.append(Case("8192, window 1024", (8192,), (8192,), 1024))
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Time attention over packed pieces.")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="default: %(default)s")
    parser.add_argument("--rounds", type=positive(int), default=9, help="default: %(default)s")
    parser.add_argument("--lengths", type=positive(int), default=200, help="of the stall test (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("out/attention.json"), metavar="FILE", help="results (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    options.shapes = options.shapes.split(",")
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"--shapes: {sorted(unknown)} are not among {', '.join(SHAPES)}")
    return options


def run(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("benchmarks/attention.py times kernels of a GPU; there is none")
    progress, rows = Progress(0), []
    print(_line(_COLUMNS))
    for name in options.shapes:
        for case in cases_of(name):
            rows += measure(name, SHAPES[name], case, options.rounds)
        progress.say(name)
    for impl in IMPLEMENTATIONS[:3]:
        rows.append(stall(impl, options.lengths))
        progress.say(f"{options.lengths} lengths, {impl}: {rows[-1]['excess_ms']:.2f} ms at most over similar ones")
    document = results_schema.results_document("attention", rows)
    results_schema.write_results(document, options.json)
    results_schema.print_results(document)
    return 0


class Problem:
    """A case's rows on the GPU, and a call of each implementation that serves it."""

    def __init__(self, shape: Shape, case: Case):
        import torch

        self.shape, self.case, self.scale = shape, case, shape.head_dim**-0.5
        generator = torch.Generator("cuda").manual_seed(1)

        def rows(count: int, heads: int, dim: int) -> torch.Tensor:
            values = torch.randn((count, heads, dim), device="cuda", generator=generator, dtype=torch.float32)
            return values.bfloat16()

        self.queries = rows(sum(case.queries), shape.heads, shape.head_dim)
        self.keys = rows(sum(case.keys), shape.key_heads, shape.head_dim)
        self.values = rows(sum(case.keys), shape.key_heads, shape.value_dim)
        self.starts = [[sum(counts[:i]) for i in range(len(counts) + 1)] for counts in (case.queries, case.keys)]
        self.offsets = [torch.tensor(starts, dtype=torch.int32).cuda() for starts in self.starts]
        self.longest = max(case.queries), max(case.keys)

    def call(self, impl: str) -> Callable[[], torch.Tensor] | None:
        """None where `impl` cannot be called."""
        if impl == "cudnn" and not self.case.is_one_whole:
            return None
        if impl == "fa3" and importlib.util.find_spec("fa3_fwd") is None:
            return None
        return getattr(self, "_" + impl)

    def _pipemoe(self) -> torch.Tensor:
        from pipemoe.models.packed_attention import attend_pieces

        return attend_pieces(
            self.queries,
            self.keys,
            self.values,
            *self.offsets,
            max_query=self.longest[0],
            max_key=self.longest[1],
            scale=self.scale,
            window=self.case.window,
        )

    def _torch_flash(self) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        window, padding = self.case.window, self.shape.head_dim - self.shape.value_dim
        found = torch.ops.aten._flash_attention_forward(
            self.queries,
            self.keys,
            F.pad(self.values, (0, padding)) if padding else self.values,
            *self.offsets,
            *self.longest,
            0.0,
            True,
            False,
            scale=self.scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )[0]
        return found[..., : self.shape.value_dim]

    def _cudnn(self) -> torch.Tensor:
        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel

        rows = (t.transpose(0, 1).unsqueeze(0) for t in (self.queries, self.keys, self.values))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            found = F.scaled_dot_product_attention(*rows, is_causal=True, scale=self.scale, enable_gqa=True)
        return found[0].transpose(0, 1)

    def _fa3(self) -> torch.Tensor:
        import fa3_fwd._C  # noqa: F401  (registers the operator)
        import torch

        return torch.ops.fa3_fwd.fwd(
            self.queries,
            self.keys,
            self.values,
            cu_seqlens_q=self.offsets[0],
            cu_seqlens_k=self.offsets[1],
            max_seqlen_q=self.longest[0],
            max_seqlen_k=self.longest[1],
            softmax_scale=self.scale,
            is_causal=True,
            window_size_left=-1 if self.case.window is None else self.case.window - 1,
            window_size_right=-1 if self.case.window is None else 0,
            num_splits=1,
        )[0]

    def error(self, found: torch.Tensor) -> float:
        """Of sampled rows, relative to the largest value of theirs."""
        import torch

        chosen = random.Random(1)
        worst, largest = 0.0, 0.0
        group = self.shape.heads // self.shape.key_heads
        for _ in range(SAMPLED_ROWS):
            piece = chosen.randrange(len(self.case.queries))
            n, m = self.case.queries[piece], self.case.keys[piece]
            i, head = chosen.randrange(n), chosen.randrange(self.shape.heads)
            last = m - n + i + 1
            first = 0 if self.case.window is None else max(0, last - self.case.window)
            seen = slice(self.starts[1][piece] + first, self.starts[1][piece] + last)
            row = self.starts[0][piece] + i
            keys, values = (t[seen, head // group].double() for t in (self.keys, self.values))
            weights = torch.softmax(keys @ self.queries[row, head].double() * self.scale, 0)
            want = weights @ values
            worst = max(worst, (found[row, head].double() - want).abs().max().item())
            largest = max(largest, want.abs().max().item())
        return worst / largest


def measure(name: str, shape: Shape, case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row for each implementation."""
    from benchmarks.kernels.timing import captured, host_us, interleaved_ms, repeated_us

    problem = Problem(shape, case)
    calls = {impl: call for impl in IMPLEMENTATIONS if (call := problem.call(impl)) is not None}
    errors, hosts, graphs, repeats = {}, {}, {}, {}
    for impl, call in calls.items():
        try:
            errors[impl] = problem.error(call())
        except RuntimeError as error:  # such as cuDNN's for a single key
            if impl in ("pipemoe", "torch_flash"):
                raise
            print(f"{impl} refuses {name}, {case.name}: {error}", file=sys.stderr)
            continue
        hosts[impl] = host_us(call)
        repeats[impl] = max(1, min(40, int(GRAPH_US / repeated_us(call, 1))))
        graphs[impl] = captured(call, repeats[impl])
    interleaved_ms(graphs, 2)  # warm
    times = {impl: [t / repeats[impl] for t in found] for impl, found in interleaved_ms(graphs, rounds).items()}
    flash = statistics.median(times["torch_flash"])
    rows = []
    for impl, found in times.items():
        ms = statistics.median(found)
        row = {
            **{"shape": name, "heads": shape.heads, "key_heads": shape.key_heads, "head_dim": shape.head_dim},
            **{"value_dim": shape.value_dim, "case": case.name, "tokens": sum(case.queries), "keys": sum(case.keys)},
            **{"pieces": len(case.queries), "window": case.window, "impl": impl, "ms": ms, "ms_rounds": found},
            "tflops": 2 * shape.heads * (shape.head_dim + shape.value_dim) * case.pairs / ms / 1e9,
            **{"ratio_to_flash": flash / ms, "host_us": hosts[impl], "rel_err": errors[impl], "excess_ms": None},
        }
        rows.append(row)
        spread = f"{100 * (max(found) - min(found)) / ms:.0f}"
        figures = (f"{row['tflops']:.0f}", f"{row['ratio_to_flash']:.2f}", f"{hosts[impl]:.0f}", f"{errors[impl]:.1e}")
        print(_line((name, case.name, impl, f"{ms:.4f}", spread, *figures)), flush=True)
    return rows


def stall(impl: str, num_lengths: int) -> dict[str, Any]:
    """Each length once, after a few calls of another; the largest time over those of similar length."""
    import torch

    shape = SHAPES["qwen3-30b-a3b"]
    lengths = random.Random(3).sample(range(1, 8192), num_lengths)
    warm = Problem(shape, Case("", (8192,), (8192,)))
    for _ in range(5):
        warm.call(impl)()
    times = {}
    for length in lengths:
        call = Problem(shape, Case("", (length,), (length,))).call(impl)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times[length] = 1e3 * (time.perf_counter() - begin)
    return {
        **{"shape": "qwen3-30b-a3b", "heads": shape.heads, "key_heads": shape.key_heads, "head_dim": shape.head_dim},
        **{"value_dim": shape.value_dim, "case": f"{num_lengths} random lengths", "tokens": None, "keys": None},
        **{"pieces": 1, "window": None, "impl": impl, "ms": None, "ms_rounds": list(times.values())},
        **{"tflops": None, "ratio_to_flash": None, "host_us": None, "rel_err": None},
        "excess_ms": largest_excess(times),
    }


def largest_excess(times: dict[int, float], neighbours: int = NEIGHBOURS) -> float:
    """Of a length's time over the median of the times of the nearest lengths."""
    ordered = [times[length] for length in sorted(times)]
    excess = []
    for i, found in enumerate(ordered):
        first = max(0, min(i - neighbours // 2, len(ordered) - neighbours - 1))
        near = ordered[first:i] + ordered[i + 1 : first + neighbours + 1]
        excess.append(found - statistics.median(near))
    return max(excess)


def _line(cells: Sequence[Any]) -> str:
    widths = (14, 18, 12, 9, 9, 8, 8, 8, 8)
    return " ".join(
        f"{cell:<{w}}" if i < 3 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )


if __name__ == "__main__":
    try:
        sys.exit(run(parse()))
    except ConfigError as error:
        print(f"attention.py: {error}", file=sys.stderr)
        sys.exit(2)
