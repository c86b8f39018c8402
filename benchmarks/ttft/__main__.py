"""Time to first token of an MoE model, every mode on the same inputs: the main job of this repository.

    launch/mpirun.sh -n 4 benchmarks/ttft                                      # small model, real trace scaled down
    launch/mpirun.sh -n 8 benchmarks/ttft --model qwen3-30b-a3b --rank-tokens 4096,16,16,16,16,16,16,16

1. Parity of every mode with the plain Hugging Face forward (parity.py). If a mode fails, that is reported, and the exit
   status is 1.
2. Timing (measure.py). The requests of a step arrive together when it starts, so this is prefill under skew, not
   queueing; `--requests trace` replays the trace's own clock with queueing instead (serve.py). Without any input
   named, both: one long prompt beside short ones, and a trace by its clock, sped up.
3. A table on standard output. Its last line is the results as one JSON document (results_schema.py). --out gets the
   same as ttft.json, a picture of the TTFT distribution, and for each mode a timeline of the step with most tokens, for
   Perfetto (https://ui.perfetto.dev).

--rank-tokens and --trace may be given several times and together: each is a workload of its own, on the same loaded
models. --draws adds workloads of one step, with counts drawn from each trace; they are only timed. --budgets adds mode
auto under other makespan budgets: the front of mean against slowest TTFT. --variant adds a mode with other settings,
timed beside the others. `python benchmarks/ttft/judge.py results.json` says who is ahead of whom.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, check_output, run_on_ranks
from benchmarks.ttft.inputs import (
    Step,
    Workload,
    shortened,
    without_last_rank,
)
from benchmarks.ttft.models import BenchModel
from benchmarks.ttft.options import configs_of, parse, resolve, workloads_of
from benchmarks.ttft.table import ttft_table
from benchmarks.ttft.words import in_words
from pipemoe.errors import PipemoeError
from pipemoe.output_path import write_whole

if TYPE_CHECKING:
    from benchmarks.ttft.measure import Measured
    from benchmarks.ttft.parity import Parity
    from pipemoe import Model, World


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
            check_output(options)
        model = BenchModel(options.model, options.layers)
        workloads = workloads_of(options, world.size, model.positions)
        configs = configs_of(options, workloads)
        of_mode = {config.mode: config for config in configs}
        variants = [replace(of_mode[mode], **settings) for mode, settings in options.variants]
        inputs = model, workloads, configs, variants
    except PipemoeError as found:
        error = found
    world.agree(error, {}, "reading the inputs")
    model, workloads, configs, variants = inputs
    dtype = getattr(torch, options.dtype)
    with ExitStack() as sources:
        # At least one layer with experts, or there is nothing to compare.
        layers = min(model.num_layers, max(options.parity_layers or model.num_layers, model.first_moe_layer + 1))
        progress.say(
            f"{model.name}, {options.dtype}, {world.size} ranks on {world.device.type}: parity of {len(configs)} "
            f"modes on {layers} layers"
        )
        parity, models = check_parity(
            world,
            sources.enter_context(model.source(layers)),
            layers,
            configs,
            parity_steps(workloads, options.parity_tokens),
            dtype=dtype,
            seed=options.seed,
            router_skew=options.router_skew,
            progress=progress,
            keep=layers == model.num_layers,
        )
        progress.say("parity " + ", ".join(f"{mode} {'yes' if p.ok else 'NO'}" for mode, p in parity.items()))
        if not models:
            progress.say(f"loading {model.num_layers} layers")
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
    base = models[configs[0].mode]
    for percent in options.budgets:  # of the same model, at the same parity
        models[f"auto {percent} %"] = base.with_config(replace(models["auto"].config, makespan_budget=percent / 100))
    for text, config in zip(options.variant, variants, strict=True):
        models[text.replace(":", " ", 1)] = base.with_config(config)
    experts = next(iter(base.runtime.experts_with_free_sms.values())).implementation
    peak_bytes = _max_over_ranks(world, {mode: m.runtime.workspace_bytes for mode, m in models.items()})
    rows, measured = [], []
    for workload in workloads:
        progress.say(f"{workload.name}: {sum(map(len, workload.prompts))} requests in {len(workload.steps)} steps")
        load: dict[str, float | None] = {"active_experts": None, "expert_load_max_over_mean": None}
        if workload.time_scale is not None:
            found = serve(
                world,
                models,
                workload,
                rounds=options.rounds,
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
                "requests": "together" if workload.time_scale is None else "trace",
                "time_scale": workload.time_scale,
                "router_skew": options.router_skew,
                "experts": experts,
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
                if workload.time_scale is None:
                    more |= predicted_ms(model_of_mode, workload)
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
    ttfts = [simulate(runtime.plans.of_step(Facts(step_lengths(step))), runtime.cost).ttft for step in workload.steps]
    of_steps = [[t / 1e6 for t in ttft if t is not None] for ttft in ttfts]
    return {"predicted_ttft_ms": fmean(map(max, of_steps)), "predicted_median_rank_ms": fmean(map(median, of_steps))}


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
