"""Time to the first token of a prompt on each rank: pipemoe, an older pipemoe, and vLLM, in one run on one machine.

    python benchmarks/forward.py --model qwen3-30b-a3b --before ../older --vllm

Each implementation is a process of its own that stays alive and warm (case_server.py). For each case they are visited
in the order A B C C B A, several rounds a visit behind some to warm up. All get the same seeded prompts and, as far as
can be, the same weights, whose router spreads tokens evenly over the experts (or as --router-skew says). Medians over
all rounds; least and most are kept.

Several ranks are a job of their own for each implementation. On one GPU, two builds side by side:

    python benchmarks/forward.py --before ../older --num-ranks 4 --launcher "launch/one_gpu.sh 4" --layers 32 \\
        --at-once 2 --moe-max-num-tokens 8192 --rank-tokens 2048,2048,2048,2048 --rank-tokens 4096,16,16,16

A row's time is that of the slowest rank; `median rank` and `rank_ttft_ms` say what the others had.

The boundary is the same: token ids on the host to the first token's id on the host. For pipemoe that is the call of
`prefill`; for vLLM its engine's time from scheduling to the token, so without its message queues, which
`client_ttft_ms` includes.

Where memory does not hold all models at once, there are several phases: pipemoe beside the older one, then pipemoe
beside vLLM, or one after the other. Each row says its phase and its order; compare rows of one phase.

Routing (`active_experts`, `expert_load_max_over_mean`) is counted in a step outside the timing. vLLM's is that of
pipemoe's step if it has pipemoe's weights; `same_first_tokens` is the share of rounds in which it found pipemoe's first
tokens. `issue_us_per_layer` is the host's time of issuing a layer of a cohort: all of a round's, divided by layers and
cohorts; in an older pipemoe, which does not count it, the median over layers of steps with every operation timed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, positive
from benchmarks.ttft.models import BenchModel
from benchmarks.ttft.table import aligned, tokens_text
from benchmarks.visits import PIPEMOE, Forward
from pipemoe.doctor import installed_gpus
from pipemoe.errors import InputError, PipemoeError
from pipemoe.output_path import check_output_file
from pipemoe.traffic.request_trace import parse_rank_tokens

TOKENS = {"cpu": "1,16,64", "cuda": "1,16,64,512,2048,4096,8192"}
# field of a row -> heading, and how to write a value that is not null
COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "impl": ("implementation", str),
    "tokens": ("tokens", str),
    "ttft_ms": ("TTFT ms", "{:.2f}".format),
    "median_rank_ttft_ms": ("median rank", "{:.2f}".format),
    "ttft_ms_least": ("least", "{:.2f}".format),
    "ttft_ms_most": ("most", "{:.2f}".format),
    "pipemoe_over_it": ("pipemoe / it", "{:.3f}".format),
    "median_rank_over_it": ("median ranks", "{:.3f}".format),
    "client_ttft_ms": ("at the client", "{:.2f}".format),
    "predicted_ttft_ms": ("predicted", "{:.2f}".format),
    "peak_memory_gib": ("GiB", "{:.1f}".format),
    "issue_us_per_layer": ("issue us", "{:.0f}".format),
    "active_experts": ("active experts", "{:.1f}".format),
    "active_experts_expected": ("expected", "{:.1f}".format),
    "expert_load_max_over_mean": ("load max / mean", "{:.2f}".format),
    "same_first_tokens": ("same tokens", "{:.0%}".format),
    "sm_clock_mhz": ("MHz", "{:.0f}".format),
    "phase": ("phase", str),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Time to first token of one prompt, beside an older version and vLLM."
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="as of benchmarks/ttft, random weights (default: small; qwen3-30b-a3b on a GPU)")
    model.add_argument("--layers", type=positive(int), help="only the first N decoder layers (default: all)")
    model.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32; bfloat16 on a GPU"
    )
    model.add_argument("--seed", type=int, default=0, help="of weights and token ids")
    model.add_argument(
        "--router-skew",
        type=float,
        default=0.0,
        metavar="S",
        help="experts' load as rank ** -S, a Zipf law (default: 0, even)",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--tokens", help=f"of every rank's prompt, one case each (default: {TOKENS['cuda']} on a GPU)")
    run.add_argument("--rank-tokens", action="append", metavar="T,T,...", help="a case; may be repeated")
    run.add_argument("--moe-max-num-tokens", type=positive(int), help="pipemoe's (default: all tokens in one wave)")
    run.add_argument(
        "--rounds", type=positive(int), default=5, help="timed, in each of two visits (default %(default)s)"
    )
    run.add_argument("--warm-up", type=int, default=3, help="rounds before those, not timed (default %(default)s)")
    run.add_argument("--gap-ms", type=float, default=20.0, help="of quiet before each round (default %(default)s)")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument("--num-ranks", type=positive(int), default=1)
    run.add_argument("--launcher", help="words before pipemoe's scripts (default: launch/mpirun.sh -n NUM_RANKS)")
    run.add_argument("--mode", help="pipemoe's (default: broadcast for one rank, else auto)")
    run.add_argument("--attention", help="pipemoe's Config(attention=...)")
    run.add_argument("--cost", metavar="FILE", help="measured costs for pipemoe (pipemoe tune)")
    run.add_argument(
        "--start-seconds", type=positive(float), default=420.0, help="an implementation that takes longer is left out"
    )
    run.add_argument(
        "--at-once", type=positive(int), help="implementations in memory (default: as many as fit by their weights)"
    )
    peers = parser.add_argument_group("beside it")
    peers.add_argument("--before", type=Path, metavar="FOLDER", help="the source tree of an older pipemoe")
    peers.add_argument("--vllm", action="store_true", help="vLLM, left out with a word if it is not installed")
    peers.add_argument("--vllm-path", metavar="FOLDER", help="where vLLM is installed, if not where Python looks")
    parser.add_argument("--json", type=Path, default=Path("out/forward.json"), metavar="FILE", help="%(default)s")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if installed_gpus() else "cpu")
    options.model = options.model or ("small" if options.device == "cpu" else "qwen3-30b-a3b")
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    options.mode = options.mode or ("broadcast" if options.num_ranks == 1 else "auto")
    tokens = options.tokens or ("" if options.rank_tokens else TOKENS[options.device])
    try:
        counts = [positive(int)(text) for text in tokens.split(",")] if tokens else []
    except ValueError:
        parser.error(f"--tokens {options.tokens}: whole numbers of at least 1 are wanted, as in 1,16,64")
    options.cases = [[count] * options.num_ranks for count in counts]
    for text in options.rank_tokens or []:
        try:
            case = parse_rank_tokens(text, options.num_ranks)
        except InputError as error:
            parser.error(str(error))
        if not any(case):
            parser.error(f"--rank-tokens {text}: at least one rank must have tokens")
        if options.vllm and not all(case):
            parser.error(f"--rank-tokens {text}: vLLM needs a prompt for every rank")
        options.cases.append(case)
    if options.before is not None and not (options.before / "pipemoe" / "__init__.py").is_file():
        parser.error(f"--before {options.before}: there is no pipemoe in it")
    return options


def forward_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading and one line of cells per row; columns without any value are left out. `pipemoe / it` compares with
    pipemoe's row of the same phase.
    """

    def case_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["phase"], row["tokens"], *row.get("rank_tokens", ())

    ours = {case_of(row): row for row in rows if row["impl"] == PIPEMOE}
    filled = []
    for row in rows:
        row, beside = dict(row), None if row["impl"] == PIPEMOE else ours.get(case_of(row))
        if len(set(row.get("rank_tokens", ()))) > 1:
            row["tokens"] = tokens_text(row["rank_tokens"])
        if beside is not None:
            row["pipemoe_over_it"] = beside["ttft_ms"] / row["ttft_ms"]
        if row["num_ranks"] == 1:
            row["median_rank_ttft_ms"] = None  # the same
        elif beside is not None:
            row["median_rank_over_it"] = beside["median_rank_ttft_ms"] / row["median_rank_ttft_ms"]
        filled.append(row)
    columns = {name: column for name, column in COLUMNS.items() if any(row.get(name) is not None for row in filled)}
    lines = [[heading for heading, _ in columns.values()]]
    for row in filled:
        values = [(row.get(name), write) for name, (_, write) in columns.items()]
        lines.append(["-" if value is None else write(value) for value, write in values])
    return lines


def forward_context(rows: Sequence[Mapping[str, Any]]) -> str:
    """What all rows share."""
    row = rows[0]
    orders = " | ".join(dict.fromkeys(r["order"] for r in rows))
    return f"{row['model']}, layers {row['layers']}, {row['dtype']}, ranks {row['num_ranks']}; order {orders}"


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the results' file. Returns the document."""
    document = results_schema.results_document("forward", rows)
    results_schema.write_results(document, options.json)
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    progress = Progress(0)
    try:
        check_output_file("--json", options.json, may_make_folder=True)
        model = BenchModel(options.model, options.layers)
        with model.source(model.num_layers) as source, TemporaryDirectory(prefix="pipemoe_forward_") as folder:
            if not isinstance(source, dict):
                raise InputError(f"--model {options.model}: a config is wanted, as all weights are random ones")
            config = Path(folder) / "config.json"
            config.write_text(json.dumps(source))
            bench = Forward(options, model, config, progress, lambda rows: write(options, rows))
            bench.run()
    except PipemoeError as error:
        print(f"benchmarks/forward.py: {error}", file=sys.stderr)
        return 2
    if bench.rows:
        print(forward_context(bench.rows), aligned(forward_cells(bench.rows), 1), sep="\n")
        results_schema.print_results(write(options, bench.rows))
    for impl, why in bench.left_out.items():
        print(f"benchmarks/forward.py: {impl}: {why}", file=sys.stderr)
    return 1 if bench.failed or not bench.rows else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not before the servers have ended
    sys.exit(main())
