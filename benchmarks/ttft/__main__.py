"""Time to first token of an MoE model, every mode on the same inputs: the main job of this repository.

    launch/mpirun.sh -n 4 benchmarks/ttft                                      # small model, real trace scaled down
    launch/mpirun.sh -n 8 benchmarks/ttft --model qwen3-30b-a3b --rank-tokens 4096,16,16,16,16,16,16,16

1. Parity of every mode with the plain Hugging Face forward (parity.py). If a mode fails, that is reported, and the exit
   status is 1.
2. Timing (measure.py). The requests of a step arrive together when it starts, so this is prefill under skew, not
   queueing; `--requests trace` replays the trace's own clock with queueing instead (serve.py).
3. A table on standard output. Its last line is the results as one JSON document (results_schema.py). --out gets the
same
   as ttft.json, a picture of the TTFT distribution, and for each mode a timeline of the step with most tokens, for
   Perfetto (https://ui.perfetto.dev).

--rank-tokens and --trace may be given several times and together: each is a workload of its own, on the same loaded
models. --draws adds workloads of one step, with counts drawn from each trace; they are only timed. --budgets adds mode
auto under other makespan budgets: the front of mean against slowest TTFT. `python benchmarks/ttft/judge.py
results.json` says who is ahead of whom.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, RankParser, positive, run_on_ranks
from benchmarks.request_trace import TOO_LONG, UNITS
from benchmarks.ttft.inputs import (
    Step,
    Workload,
    drawn_workloads,
    rank_tokens_workload,
    shortened,
    trace_workload,
    without_last_rank,
)
from benchmarks.ttft.models import BenchModel
from benchmarks.ttft.table import ttft_table
from benchmarks.ttft.words import in_words
from pipemoe.errors import ConfigError, InputError, PipemoeError
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.output_path import check_output_file, check_output_folder, write_whole
from pipemoe.plan.config import COMBINES, MODES

if TYPE_CHECKING:
    from benchmarks.ttft.measure import Measured
    from benchmarks.ttft.parity import Parity
    from pipemoe import Config, Model, World

TRACE = Path(__file__).resolve().parents[1] / "traces" / "azure2023_conv.csv"


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """Defaults of options, by device. On a CPU the whole job should end within two minutes on two cores."""

    model: str
    layers: int | None  # of that model; another model keeps all its layers
    dtype: str
    scale: float
    num_requests: int
    rounds: int
    moe_max_num_tokens: int


DEFAULTS = {
    "cpu": DeviceDefaults("small", None, "float32", 0.1, 16, 3, 256),
    "cuda": DeviceDefaults("qwen3-30b-a3b", 8, "bfloat16", 1.0, 32, 5, 8192),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = RankParser(description="Time to first token, every mode on the same inputs.")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        help=f"{', '.join(MODEL_CONFIGS)}, or the path of a Hugging Face checkpoint (default: small on a CPU, else "
        "qwen3-30b-a3b)",
    )
    model.add_argument(
        "--layers",
        type=positive(int),
        help="only the first N decoder layers (default: all; 8 where --model is not given on a GPU)",
    )
    model.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    model.add_argument("--seed", type=int, default=0, help="of token ids, and of weights where there is no checkpoint")
    model.add_argument(
        "--router-skew",
        type=float,
        default=0.0,
        metavar="S",
        help="random routers give experts of popularity rank r about r ** -S of the tokens (default: 0, all the same)",
    )
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument(
        "--trace",
        action="append",
        default=[],
        help="CSV (ours, Azure's or BurstGPT's), or Mooncake's JSON lines (default: azure2023_conv)",
    )
    inputs.add_argument(
        "--rank-tokens",
        action="append",
        default=[],
        metavar="T,T,...",
        help="instead: one prompt per rank, of these lengths",
    )
    inputs.add_argument(
        "--trace-unit",
        choices=tuple(UNITS),
        help="of the times in --trace (default: what its format says, unless far too dense)",
    )
    inputs.add_argument(
        "--too-long",
        choices=TOO_LONG,
        default="error",
        help="what becomes of a trace's requests that are longer than the model takes (default: %(default)s)",
    )
    inputs.add_argument(
        "--scale", type=positive(float), help="factor on the trace's lengths (default: 0.1 on a CPU, else 1)"
    )
    inputs.add_argument("--num-requests", type=positive(int), help="of the trace (default: 16 on a CPU, else 32)")
    inputs.add_argument("--first-request", type=int, default=0, help="number of the trace's request to begin with")
    inputs.add_argument(
        "--requests-per-rank",
        type=positive(int),
        default=1,
        help="that a step of the trace gives each rank (default 1)",
    )
    inputs.add_argument(
        "--draws",
        type=int,
        default=0,
        metavar="N",
        help="also N steps with one request per rank, drawn from each trace",
    )
    inputs.add_argument(
        "--requests",
        choices=("together", "trace"),
        default="together",
        help="when those of a step come; trace: by the trace's clock",
    )
    inputs.add_argument(
        "--time-scale",
        type=positive(float),
        default=1.0,
        help="with --requests trace: how much faster than the trace's clock",
    )
    run = parser.add_argument_group("run")
    parser.add_device()
    run.add_argument("--modes", default=",".join(MODES), help="default: %(default)s")
    run.add_argument(
        "--budgets", default="", metavar="P,P,...", help="also mode auto with these makespan budgets, in percent"
    )
    run.add_argument(
        "--draw-rounds", type=positive(int), default=4, help="timed passes over each of --draws (default %(default)s)"
    )
    run.add_argument("--rounds", type=positive(int), help="timed passes per mode (default: 3 on a CPU, else 5)")
    run.add_argument(
        "--parity-layers",
        type=positive(int),
        help="layers compared with the plain forward (default: all in float32 on a CPU, else 4)",
    )
    run.add_argument(
        "--parity-tokens",
        type=positive(int),
        default=4096,
        help="prompts are cut to as many for parity (default %(default)s); longer ones would take most of the time",
    )
    run.add_argument("--moe-max-num-tokens", type=positive(int), help="default: 256 on a CPU, else 8192")
    run.add_argument("--max-tokens-per-rank", type=positive(int), help="default: what the inputs need")
    run.add_argument("--combine", choices=COMBINES, default="reduce")
    run.add_argument(
        "--combine-blocks",
        type=positive(int),
        metavar="N",
        help="blocks of columns of the sums (default: chosen in mode auto, else 1)",
    )
    run.add_argument(
        "--arrivals",
        choices=("on", "off"),
        help="whether waves are computed as they arrive (default: chosen in mode auto, else off)",
    )
    run.add_argument(
        "--num-sms",
        type=positive(int),
        metavar="N",
        help="that the experts' kernels fill in every plan (default: as planned)",
    )
    run.add_argument("--combine-dtype", choices=("float32", "bfloat16", "float16"))
    run.add_argument("--deterministic", action="store_true")
    run.add_argument("--cost", metavar="FILE", help="measured costs for mode auto (pipemoe tune)")
    run.add_argument("--experts", default="auto", help="implementation of the experts")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("out/ttft"),
        metavar="DIR",
        help="for results, pictures and timelines (default: %(default)s)",
    )
    output.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    options = parser.parse_args(arguments)
    options.device = parser.device_of(options)
    options.modes = options.modes.split(",")
    unknown = [mode for mode in options.modes if mode not in MODES]
    if unknown or len(set(options.modes)) != len(options.modes):
        parser.error(f"--modes {','.join(options.modes)}: give each once, of {', '.join(MODES)}")
    if options.trace_unit and not options.trace:
        parser.error("--trace-unit is of the times in --trace, which is not given")
    if options.requests == "trace" and (options.rank_tokens or options.draws):
        parser.error("--requests trace needs a trace; --rank-tokens and --draws have no times")
    try:
        options.budgets = [int(percent) for percent in options.budgets.split(",") if percent]
    except ValueError:
        parser.error(f"--budgets {options.budgets}: whole numbers of percent are wanted, as in 0,5,10")
    if options.budgets and "auto" not in options.modes:
        parser.error("--budgets are of mode auto, which is not among --modes")
    return options


def resolve(options: argparse.Namespace, device: str) -> argparse.Namespace:
    """The options, with the device's defaults for those not given."""
    defaults = DEFAULTS[device]
    resolved = argparse.Namespace(**vars(options))
    if options.model is None and options.layers is None:
        resolved.layers = defaults.layers
    for name in ("model", "dtype", "scale", "num_requests", "rounds", "moe_max_num_tokens"):
        if getattr(options, name) is None:
            setattr(resolved, name, getattr(defaults, name))
    if options.parity_layers is None:
        resolved.parity_layers = None if (device, resolved.dtype) == ("cpu", "float32") else 4
    return resolved


def workloads_of(options: argparse.Namespace, num_ranks: int, positions: int) -> list[Workload]:
    """The workloads that the options ask for. positions: tokens that a sequence of the model may have.

    Raises InputError for an impossible one.
    """
    shape = dict(
        first=options.first_request,
        num_requests=options.num_requests,
        scale=options.scale,
        prompts_per_step=options.requests_per_rank,
        unit=options.trace_unit,
        most=positions,
        too_long=options.too_long,
    )
    traces = options.trace or ([] if options.rank_tokens else [str(TRACE)])
    found = [rank_tokens_workload(text, num_ranks) for text in options.rank_tokens] + [
        trace_workload(p, num_ranks, **shape) for p in traces
    ]
    for path in options.trace or ([str(TRACE)] if options.draws else []):
        found += drawn_workloads(
            path,
            num_ranks,
            options.draws,
            scale=options.scale,
            most=min(options.moe_max_num_tokens, positions),
            unit=options.trace_unit,
        )
    for workload in found:
        if workload.longest > positions:
            raise InputError(
                f"--rank-tokens: a prompt of {workload.longest} tokens, but the model has positions for {positions}"
            )
    return found


def configs_of(options: argparse.Namespace, workloads: Sequence[Workload]) -> list[Config]:
    """One configuration per mode, alike in all else."""
    from pipemoe import Config

    needed = max(w.max_tokens_per_rank for w in workloads)
    if options.requests == "trace":  # a rank takes more than one request when several wait
        needed = max(w.longest for w in workloads)
    if options.max_tokens_per_rank is not None and options.max_tokens_per_rank < needed:
        raise ConfigError(
            f"--max-tokens-per-rank is {options.max_tokens_per_rank}, but a step gives one rank {needed} tokens"
        )
    if options.requests == "trace":
        needed = max(options.moe_max_num_tokens, needed)
    return [
        Config(
            mode=mode,
            moe_max_num_tokens=options.moe_max_num_tokens,
            max_tokens_per_rank=options.max_tokens_per_rank or needed,
            num_slots=options.num_slots,
            combine=options.combine,
            combine_blocks=options.combine_blocks,
            arrivals=None if options.arrivals is None else options.arrivals == "on",
            num_sms=options.num_sms,
            combine_dtype=options.combine_dtype,
            deterministic=options.deterministic,
            experts=options.experts,
            cost=options.cost,
        )
        for mode in options.modes
    ]


def run(world: World, options: argparse.Namespace) -> int:
    """The whole benchmark on every rank. Returns the exit status, 1 if a mode is not at parity."""
    import torch

    import pipemoe
    from benchmarks.ttft.measure import Bench
    from benchmarks.ttft.parity import check_parity, dtype_name
    from benchmarks.ttft.serve import serve

    progress = Progress(world.rank)
    options = resolve(options, world.device.type)
    error, inputs = None, None
    try:
        if world.rank == 0:  # who writes
            check_output_folder("--out", options.out)
            if options.json:
                check_output_file("--json", options.json, may_make_folder=True)
        model = BenchModel(options.model, options.layers)
        workloads = workloads_of(options, world.size, model.positions)
        inputs = model, workloads, configs_of(options, workloads)
    except PipemoeError as found:
        error = found
    world.agree(error, {}, "reading the inputs")
    model, workloads, configs = inputs
    dtype = getattr(torch, options.dtype)
    with ExitStack() as sources:
        # At least one layer with experts, or there is nothing to compare.
        layers = min(model.num_layers, max(options.parity_layers or model.num_layers, model.first_moe_layer + 1))
        progress.say(
            f"{model.name}, {options.dtype}, {world.size} ranks on {world.device.type}: parity of {len(configs)} "
            f"modes on {layers} layers"
        )
        parity = check_parity(
            world,
            sources.enter_context(model.source(layers)),
            layers,
            configs,
            parity_steps(workloads, options.parity_tokens),
            dtype=dtype,
            seed=options.seed,
            router_skew=options.router_skew,
            progress=progress,
        )
        progress.say(
            "parity "
            + ", ".join(f"{mode} {'yes' if p.ok else 'NO'}" for mode, p in parity.items())
            + f"; loading {model.num_layers} layers"
        )
        base = pipemoe.load_model(
            sources.enter_context(model.source(model.num_layers)),
            world,
            random_weights=model.random_weights,
            config=configs[0],
            dtype=dtype,
            seed=options.seed,
            router_skew=options.router_skew,
        )
    models = {c.mode: base if c is configs[0] else base.with_config(c) for c in configs}
    for percent in options.budgets:  # of the same model, at the same parity
        models[f"auto {percent} %"] = base.with_config(replace(models["auto"].config, makespan_budget=percent / 100))
    peak_bytes = _max_over_ranks(world, {mode: m.runtime.workspace_bytes for mode, m in models.items()})
    rows, measured = [], []
    for workload in workloads:
        progress.say(f"{workload.name}: {sum(map(len, workload.prompts))} requests in {len(workload.steps)} steps")
        load: dict[str, float | None] = {"active_experts": None, "expert_load_max_over_mean": None}
        if options.requests == "trace":
            found = serve(
                world,
                models,
                workload,
                rounds=options.rounds,
                time_scale=options.time_scale,
                seed=options.seed,
                progress=progress,
            )
        else:
            rounds = options.rounds if workload.trace is None else options.draw_rounds
            bench = Bench(world, models, workload, options.seed, progress)
            found = bench.measure(rounds, overlap=workload.trace is None)
            load |= bench.expert_load()
        if world.rank == 0:
            facts = {
                "model": model.name,
                "layers": model.num_layers,
                "num_ranks": world.size,
                "rank_tokens": workload.rank_tokens,
            }
            facts |= {
                "dtype": dtype_name(dtype),
                "moe_max_num_tokens": options.moe_max_num_tokens,
                "requests": options.requests,
                "router_skew": options.router_skew,
                **load,
            }
            facts |= {
                "trace": workload.trace,
                "clipped": workload.clipped,
                "dropped": workload.dropped,
                "rounds": options.rounds if workload.trace is None else options.draw_rounds,
            }
            for mode, model_of_mode in models.items():
                more = {"makespan_budget": model_of_mode.config.makespan_budget}
                if options.requests == "together":
                    more |= predicted_ms(model_of_mode, workload) | {
                        "steps_with_arrivals": steps_with_arrivals(model_of_mode, workload)
                    }
                rows.append(_row(mode, facts | more, found[mode], peak_bytes[mode], parity[mode.split()[0]]))
            measured.append((workload, found))
            write(options, rows)  # keep what was measured, should a later workload fail
    if world.rank == 0:
        report(options, rows, measured)
    return 0 if all(p.ok for p in parity.values()) else 1


def parity_steps(workloads: Sequence[Workload], most: int) -> list[Step]:
    """Every workload's first step, with prompts of at most `most` tokens; and once more the first workload's with
    nothing for the last rank.
    """
    steps = [shortened(w.steps[0], most) for w in workloads]
    bare = without_last_rank(steps[0])
    return steps + ([bare] if any(bare) and bare not in steps else [])


def predicted_ms(model: Model, workload: Workload) -> dict[str, float]:
    """The simulator's TTFT of the slowest and the median rank, mean over steps; to be compared with
    `ttft_ms_slowest_rank` and `ttft_ms_median_rank`.
    """
    from benchmarks.ttft.measure import step_lengths
    from pipemoe.plan.clock.prediction import simulate
    from pipemoe.plan.schedule import Facts

    runtime = model.runtime
    ttfts = [simulate(runtime.plan(Facts(step_lengths(step))), runtime.cost).ttft for step in workload.steps]
    of_steps = [[t / 1e6 for t in ttft if t is not None] for ttft in ttfts]
    return {"predicted_ttft_ms": fmean(map(max, of_steps)), "predicted_median_rank_ms": fmean(map(median, of_steps))}


def steps_with_arrivals(model: Model, workload: Workload) -> int:
    """How many steps have plans that compute waves as they arrive."""
    from benchmarks.ttft.measure import step_lengths
    from pipemoe.plan.schedule import Facts

    return sum(model.runtime.plan(Facts(step_lengths(step))).arrivals for step in workload.steps)


def _max_over_ranks(world: World, values: dict[str, int]) -> dict[str, int]:
    everywhere = [json.loads(p) for p in world.all_gather(json.dumps(values).encode(), "workspace sizes")]
    return {name: max(of_rank[name] for of_rank in everywhere) for name in values}


def _row(mode: str, facts: dict[str, Any], measured: Measured, peak_bytes: int, parity: Parity) -> dict[str, Any]:
    from benchmarks.ttft.row import ttft_row

    named = ("model", "layers", "num_ranks", "rank_tokens")
    exposed_s = measured.exposed_comm_s
    row = ttft_row(
        mode=mode,
        **{name: facts[name] for name in named},
        requests=measured.requests,
        duration_s=measured.duration_s,
        exposed_comm_ms=None if exposed_s is None else exposed_s * 1e3,
        overlap_pct=measured.overlap_pct,
        peak_workspace_bytes=peak_bytes,
        parity=parity.ok,
    )
    more = {name: value for name, value in facts.items() if name not in named}
    more |= {f"{name}_ms": seconds * 1e3 for name, seconds in measured.more_s.items()}
    more |= {
        "parity_norm_ratio": parity.norm_ratio,
        "parity_wrong_tokens": parity.wrong_tokens,
        "parity_layers": parity.layers,
    }
    return row | more


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the results' files. Returns the document."""
    document = results_schema.results_document("ttft", rows)
    for path in (options.out / "ttft.json", *([options.json] if options.json else [])):
        results_schema.write_results(document, path)
    return document


def report(
    options: argparse.Namespace, rows: list[dict[str, Any]], measured: Sequence[tuple[Workload, dict[str, Measured]]]
) -> None:
    """Write files, table and last line; on rank 0."""
    from benchmarks.ttft.plot import plot_ttft
    from pipemoe.trace import chrome_trace

    document = write(options, rows)
    for workload, found in measured:
        if workload.trace is not None:
            continue  # there are many
        plot_ttft(
            [row for row in rows if row["rank_tokens"] == workload.rank_tokens],
            options.out / f"ttft_{workload.name}.png",
        )
        for mode, figures in found.items():
            if figures.timelines:
                write_whole(
                    options.out / f"timeline_{workload.name}_{mode}.json", json.dumps(chrome_trace(figures.timelines))
                )
    print(ttft_table(rows))
    print("\n" + in_words([row for row in rows if row["trace"] is None]))  # drawn workloads are many
    print(f"results, pictures and timelines: {options.out}\n")
    results_schema.print_results(document)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_on_ranks(
        "benchmarks/ttft", lambda world: run(world, options), device=options.device, num_slots=options.num_slots
    )


if __name__ == "__main__":
    sys.exit(main())
