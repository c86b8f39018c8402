"""Requests over time: rolling steps against lockstep, on the same engine, with the same arrivals.

    launch/mpirun.sh -n 4 benchmarks/serve                                      # small model, real trace scaled down
    launch/one_gpu.sh 4 benchmarks/serve --layers 48 --arrivals trace,poisson   # Qwen3-30B-A3B's dimensions

Requests come when they are due, whether or not earlier ones are done (open loop). What is measured, and in which order,
stands in pipemoe/traffic/campaign.py, which `pipemoe plan --trace-arrivals` plays on a simulated engine. Rows have TTFT
by length class, the wait for admission, throughput, and the capacity: the largest rate at which 95 % of every class's
requests are within the class's limit. The last line of standard output is the results as one JSON document
(results_schema.py). --out gets the same as serve.json, pictures (TTFT against rate, distributions), and for each policy
a timeline of the requests, for Perfetto. `python benchmarks/serve/judge.py results.json` says who is ahead of whom.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, check_output, run_on_ranks
from benchmarks.serve.options import parse, requests_of, resolve, settings_of
from benchmarks.serve.player import IDLE_S, RankPlayer
from benchmarks.ttft.models import BenchModel
from pipemoe.errors import ConfigError, PipemoeError
from pipemoe.traffic.campaign import Campaign
from pipemoe.traffic.policy import Policy, policies_of
from pipemoe.traffic.served import Served

if TYPE_CHECKING:
    from pipemoe import Model, World


def run(world: World, options: argparse.Namespace) -> int:
    """The whole benchmark on every rank. Returns the exit status."""
    import torch

    import pipemoe
    from benchmarks.serve.board import shared_board

    progress = Progress(world.rank)
    options = resolve(options, world.device.type)
    error, inputs = None, None
    try:
        if world.rank == 0:  # who writes
            check_output(options)
        model = BenchModel(options.model, options.layers)
        policies = policies_of(options.policies, options.step_tokens, options.routing)
        requests = {path: requests_of(options, path, model.positions) for path in options.trace}
        inputs = model, policies, requests, config_of(options, requests)
    except PipemoeError as found:
        error = found
    world.agree(error, {}, "reading the inputs")
    assert inputs is not None  # or `agree` has raised
    model, policies, requests, config = inputs
    progress.say(
        f"{model.name}, {options.dtype}, {world.size} ranks on {world.device.type}: loading {model.num_layers} layers"
    )
    with model.source(model.num_layers) as source:
        loaded = pipemoe.load_model(
            source, world, random_weights=model.random_weights, config=config, dtype=getattr(torch, options.dtype)
        )
    progress.say("loaded")
    longest = max(r.input_tokens for seeds in requests.values() for of_seed in seeds.values() for r in of_seed)
    ids = np.random.default_rng(0).integers(loaded.decoder.vocab_size, size=2 * longest)
    board = shared_board(world, max(options.num_requests, 3 * options.alone, 8 * world.size))

    def open_engine(policy: Policy, num_requests: int) -> Any:
        return pipemoe.Engine(
            loaded,
            policy=policy.name,
            step_tokens=policy.step_tokens,
            num_slots=options.num_slots,
            max_queue=num_requests,
            delay_seconds=options.delay_ms / 1e3,
        )

    player = RankPlayer(board, open_engine, ids)
    rows: list[dict[str, Any]] = []
    campaigns: dict[str, Campaign] = {}
    for path, seeds in requests.items():
        name = Path(path).stem
        about = {
            "trace": name,
            "model": model.name,
            "layers": model.num_layers,
            "num_ranks": world.size,
            "dtype": options.dtype,
            "moe_max_num_tokens": options.moe_max_num_tokens,
            "num_requests": options.num_requests,
            "scale": options.scale,
        }
        keep = partial(write_on_rank_0, world, options, about, tuple(rows))  # should a later part fail
        campaigns[name] = campaign = Campaign(
            player, policies, seeds.__getitem__, settings_of(options), progress.say, keep
        )
        campaign.add_alone(Policy("closed_step"), closed_steps(world, loaded, ids, campaign.lengths_alone))
        rows += [{**about, **row} for row in campaign.run()]
    if world.rank == 0:
        report(options, rows, campaigns)
    return 0


def write_on_rank_0(
    world: World,
    options: argparse.Namespace,
    about: Mapping[str, Any],
    before: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
) -> None:
    """Write the rows of earlier traces, and those found so far."""
    if world.rank == 0:
        write(options, [*before, *({**about, **row} for row in found)])


def config_of(options: argparse.Namespace, requests: dict[str, dict[int, list]]) -> Any:
    """Raises ConfigError if a step could not take the longest request."""
    from pipemoe import Config

    needed = max(r.input_tokens for seeds in requests.values() for of_seed in seeds.values() for r in of_seed)
    if options.max_tokens_per_rank is not None and options.max_tokens_per_rank < needed:
        raise ConfigError(f"--max-tokens-per-rank is {options.max_tokens_per_rank}, but a request has {needed} tokens")
    return Config(
        moe_max_num_tokens=options.moe_max_num_tokens,
        max_tokens_per_rank=options.max_tokens_per_rank or max(needed, *options.step_tokens),
        num_slots=options.num_slots,
        experts=options.experts,
        cost=options.cost,
    )


def closed_steps(world: World, model: Model, ids: np.ndarray, lengths: Sequence[int]) -> list[Served]:
    """The same requests one at a time on an idle system, each by a closed step of its own (Model.prefill), after one to
    warm up.
    """
    own = []
    for number, tokens in enumerate([lengths[-1], *lengths]):
        is_mine = number % world.size == world.rank
        time.sleep(IDLE_S)
        world.all_gather(b"", "start of a step")
        found = model.prefill([ids[:tokens]] if is_mine else [])
        own.append(found.ttft_seconds[0] if is_mine else 0.0)
    gathered = [np.frombuffer(p) for p in world.all_gather(np.array(own).tobytes(), "times to first token")]
    ttfts = np.sum(gathered, axis=0)[1:]
    return [
        Served(n, (n + 1) % world.size, t, 0.0, 0.0, float(s))
        for n, (t, s) in enumerate(zip(lengths, ttfts, strict=True))
    ]


def write(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the results' files. Returns the document."""
    document = results_schema.results_document("serve", rows)
    for path in (options.out / "serve.json", *([options.json] if options.json else [])):
        results_schema.write_results(document, path)
    return document


def report(options: argparse.Namespace, rows: list[dict[str, Any]], campaigns: dict[str, Campaign]) -> None:
    """Write files, table and last line; on rank 0."""
    from benchmarks.serve.judge import verdicts
    from benchmarks.serve.plot import plot_distributions, plot_rates
    from benchmarks.serve.table import serve_table
    from benchmarks.serve.timeline import write_timeline

    document = write(options, rows)
    for name, campaign in campaigns.items():
        of_trace = [row for row in rows if row["trace"] == name]
        plot_rates(of_trace, options.out / f"serve_{name}_rates.png")
        plot_distributions(of_trace, options.out / f"serve_{name}_ttft.png")
        for policy, served in campaign.kept.items():
            write_timeline(served, options.out / f"timeline_{name}_{policy.label.replace(' ', '_')}.json")
    print(serve_table(rows))
    print("\n" + "\n".join(verdicts(rows)))
    print(f"results, pictures and timelines: {options.out}\n")
    results_schema.print_results(document)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_on_ranks(
        "benchmarks/serve", lambda world: run(world, options), device=options.device, num_slots=options.num_slots
    )


if __name__ == "__main__":
    sys.exit(main())
