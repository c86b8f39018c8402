"""`pipemoe tune`: measures the costs that plans are chosen by, on this machine, for one model; every rank runs it.

    launch/mpirun.sh -n 4 -m pipemoe.cli tune --model qwen3-30b-a3b --out cost.json

1. Single operations at a handful of sizes, timed in steps of one cohort: attention on one rank and on all, experts on
   all, dispatch and combine, and how long the conductor's thread takes to issue each.
2. On GPUs: pairs of operations side by side (pipemoe.contention). Pairs of experts and transfers are also measured with
   experts that leave them no multiprocessors, and with experts that leave twice as many as usual.
3. Whole steps in several modes, to which everything is scaled (pipemoe.tune.fit).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipemoe.arguments import look
from pipemoe.config import Config
from pipemoe.errors import InputError
from pipemoe.model_facts.dimensions import dimensions_of
from pipemoe.model_facts.facts import cut_config, read_facts
from pipemoe.model_facts.known_models import MODEL_CONFIGS, model_config
from pipemoe.output_path import check_output_file
from pipemoe.plan.clock.sms import room_for_collectives
from pipemoe.plan.cost.file import write_cost
from pipemoe.runtime.costs import model_key
from pipemoe.tune.fit import calibrate, fit_contention, fit_cost, fit_sms
from pipemoe.tune.tuner import Tuner, say

_LEAST_TOKENS = 16  # of --max-tokens: costs per token cannot be told from fixed ones over fewer
_POOR_PERCENT = 20  # error of predictions after calibration, above which a file is not to be trusted


def add_tune_parser(subcommands: argparse._SubParsersAction, positive: Callable[[str], int]) -> None:
    parser = subcommands.add_parser(
        "tune",
        help="measure this machine's costs, for mode auto",
        description="Run it under the launcher with as many ranks as will be used: launch/mpirun.sh -n N -m "
        "pipemoe.cli tune ...",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model", required=True, help=f"{', '.join(MODEL_CONFIGS)}, or the path of a config.json or its directory"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="for the costs; Config(cost=FILE) uses them"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        help="most tokens of a rank that are tried, at least 16 (default: 512 on a CPU, else 4096)",
    )
    parser.add_argument(
        "--layers", type=positive, default=4, help="MoE layers to measure, at least 2 (default %(default)s)"
    )
    parser.add_argument("--slots", type=positive, help="cohorts under way at once (default: PIPEMOE_NUM_SLOTS, else 4)")
    parser.add_argument("--combine", choices=("reduce", "gather"), default="reduce")
    parser.add_argument(
        "--deterministic", action="store_true", help="for Config(deterministic=True), which combines by gather"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="of each measurement (default %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure, fit, write the file on rank 0."""
    import torch

    import pipemoe
    from pipemoe.contention import BESIDE_TRANSFERS, PAIRS
    from pipemoe.models.config import num_positions

    if options.layers < 2:
        raise InputError("--layers is 1; operations are timed in the layers after the first, so at least 2 are needed")
    if options.max_tokens is not None and options.max_tokens < _LEAST_TOKENS:
        raise InputError(
            f"--max-tokens is {options.max_tokens}; sizes are tried up to that, so at least {_LEAST_TOKENS} are needed"
        )
    config = model_config(options.model)
    dimensions = dimensions_of(config)
    cut = cut_config(config, read_facts(config).layers_for(options.layers))
    dtype = getattr(torch, options.dtype) if options.dtype else None
    with pipemoe.init(options.device, num_slots=options.slots) as world:
        world.agree(_refused(options.out) if world.rank == 0 else None, {}, "looking at --out")
        most = options.max_tokens or (512 if world.device.type == "cpu" else 4096)
        base = Config(
            mode="broadcast",
            max_tokens_per_rank=most,
            moe_max_num_tokens=most,
            num_slots=world.num_slots,
            combine=options.combine,
        )
        base = replace(base, deterministic=options.deterministic)
        say(world, f"loading {options.layers} MoE layers of {options.model}")
        model = pipemoe.load_model(cut, world, random_weights=True, config=base, dtype=dtype)
        positions = num_positions(model.decoder.config)
        too_many = None
        if positions is not None and most > positions:
            too_many = InputError(
                f"--max-tokens is {most}, but {options.model} has positions for {positions}; give at most as many"
            )
        world.agree(too_many, {}, "looking at --max-tokens")
        tuner = Tuner(world, model, most, options.repeats)
        samples = tuner.measure_operations()
        cost = fit_cost(samples, model.runtime.cost, model.runtime.shape, world.size)
        if world.device.type == "cuda" and min(world.size, world.num_slots) > 1:
            room = room_for_collectives(cost.sms.num_sms, cost.sms.ctas, 2)  # pairs are of two slots
            usual = tuner.measure_pairs(PAIRS, room)
            cost = replace(cost, contention=fit_contention(usual))
            if room:
                cost = replace(
                    cost,
                    sms=fit_sms(
                        cost.sms, usual, *(tuner.measure_pairs(BESIDE_TRANSFERS, left) for left in (0, 2 * room))
                    ),
                )
        steps = tuner.measure_steps(base)
        error = None
        if world.rank == 0:  # alone: ranks of one host would take the cores from one another, all to find the same
            before = tuner.log_error(cost, steps)
            cost = calibrate(cost, lambda trial: tuner.log_error(trial, steps))
            after = tuner.log_error(cost, steps)
            subject = {**model.runtime.cost_subject, "model": model_key(dimensions)}
            _, error = look(world.rank, f"--out {options.out}", lambda: write_cost(options.out, subject, cost))
        world.agree(error, {}, "writing the costs")
        if world.rank == 0:
            for line in tuner.compared(cost, steps):
                say(world, line)
            for line in accuracy(before, after):
                say(world, line)
            print(f"costs: {options.out}")
        world.all_gather(b"", "end of tuning")
    return 0


def _refused(out: Path) -> InputError | None:
    """Why the file cannot be written; asked before minutes of measuring. Only rank 0 writes: other hosts may not have
    the folder.
    """
    try:
        check_output_file("--out", out)
    except InputError as error:
        return error
    return None


def accuracy(before: float, after: float) -> list[str]:
    """How close predictions came to measured steps, in words. before, after calibration: what Tuner.log_error gave."""
    unfitted, fitted = (100 * math.expm1(error) for error in (before, after))
    lines = [
        f"predicted times of the whole steps were off by {unfitted:.0f} % on average; after calibration to the "
        f"measured times, {fitted:.0f} %"
    ]
    if fitted > _POOR_PERCENT:
        lines.append(
            f"over {_POOR_PERCENT} %: this file is poor; perhaps the machine was busy. Run pipemoe tune again when "
            "it is idle"
        )
    return lines
