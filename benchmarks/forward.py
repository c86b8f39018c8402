"""Time to the first token of one prompt per rank: pipemoe, an older pipemoe, and vLLM, in one run on one machine.

    python benchmarks/forward.py --model qwen3-30b-a3b --before ../older --vllm

Each implementation is a process of its own that stays alive and warm (case_server.py). For each case they are visited
in the order A B C C B A, several rounds a visit behind some to warm up. All get the same seeded prompts and, as far as
can be, the same weights, whose router spreads tokens evenly over the experts (or as --router-skew says). Medians over
all rounds; least and most are kept.

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
from benchmarks.ttft.table import aligned
from benchmarks.visits import PIPEMOE, Forward
from pipemoe.doctor import installed_gpus
from pipemoe.errors import InputError, PipemoeError
from pipemoe.output_path import check_output_file

TOKENS = {"cpu": "1,16,64", "cuda": "1,16,64,512,2048,4096,8192"}
# field of a row -> heading, and how to write a value that is not null
COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "impl": ("implementation", str),
    "tokens": ("tokens", str),
    "ttft_ms": ("TTFT ms", "{:.2f}".format),
    "ttft_ms_least": ("least", "{:.2f}".format),
    "ttft_ms_most": ("most", "{:.2f}".format),
    "pipemoe_over_it": ("pipemoe / it", "{:.3f}".format),
    "client_ttft_ms": ("at the client", "{:.2f}".format),
    "predicted_ttft_ms": ("predicted", "{:.2f}".format),
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
    run.add_argument("--tokens", help=f"of a rank's prompt, one case each (default: {TOKENS['cuda']} on a GPU)")
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
    run.add_argument("--in-turn", action="store_true", help="never more than two implementations in memory at once")
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
    try:
        options.tokens = [positive(int)(text) for text in (options.tokens or TOKENS[options.device]).split(",")]
    except ValueError:
        parser.error(f"--tokens {options.tokens}: whole numbers of at least 1 are wanted, as in 1,16,64")
    if options.before is not None and not (options.before / "pipemoe" / "__init__.py").is_file():
        parser.error(f"--before {options.before}: there is no pipemoe in it")
    return options


def forward_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading and one line of cells per row; columns without any value are left out. `pipemoe / it` compares with
    pipemoe's row of the same phase.
    """
    ours = {(row["phase"], row["tokens"]): row["ttft_ms"] for row in rows if row["impl"] == PIPEMOE}
    filled = []
    for row in rows:
        beside = None if row["impl"] == PIPEMOE else ours.get((row["phase"], row["tokens"]))
        filled.append({**row, "pipemoe_over_it": None if beside is None else beside / row["ttft_ms"]})
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
    sys.exit(main())
