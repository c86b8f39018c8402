"""Options of the main job, and what they ask for: workloads, and a configuration for each mode."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.bench_main import RankParser, positive
from benchmarks.ttft.inputs import Workload, drawn_workloads, rank_tokens_workload, trace_workload
from pipemoe.errors import ConfigError, InputError
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.plan.config import COMBINES, MODES, PlanConfig
from pipemoe.traffic.request_trace import TOO_LONG, UNITS

if TYPE_CHECKING:
    from pipemoe import Config

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
    long_prompt: int  # beside prompts of _SHORT_PROMPT tokens, if no inputs are asked for
    time_scale: float  # and the trace, so much faster


_SHORT_PROMPT = 16
DEFAULTS = {
    "cpu": DeviceDefaults("small", None, "float32", 0.1, 16, 3, 256, 512, 16.0),
    "cuda": DeviceDefaults("qwen3-30b-a3b", 8, "bfloat16", 1.0, 32, 5, 8192, 4096, 20.0),
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
    inputs = parser.add_argument_group(
        "inputs", "By default two workloads: one long prompt beside short ones, and a trace by its own clock."
    )
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
        help="when those of a step come; trace: by the trace's clock (default: together)",
    )
    inputs.add_argument(
        "--time-scale",
        type=positive(float),
        help="how much faster than the trace's clock (default: 1 with --requests trace)",
    )
    run = parser.add_argument_group("run")
    parser.add_device()
    run.add_argument("--modes", default=",".join(MODES), help="default: %(default)s")
    run.add_argument(
        "--budgets", default="", metavar="P,P,...", help="also mode auto with these makespan budgets, in percent"
    )
    run.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="MODE:NAME=VALUE,...",
        help="also this mode with other settings of pipemoe.Config, as in chunked:moe_max_num_tokens=2048",
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
        "--num-sms",
        type=positive(int),
        metavar="N",
        help="that the experts' kernels fill in every plan (default: as planned)",
    )
    run.add_argument("--combine-dtype", choices=("float32", "bfloat16", "float16"))
    run.add_argument("--deterministic", action="store_true")
    run.add_argument("--cost", metavar="FILE", help="measured costs for mode auto (pipemoe tune)")
    run.add_argument("--experts", default="auto", help="implementation of the experts")
    parser.add_output("ttft")
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
    options.by_default = not (options.trace or options.rank_tokens or options.draws or options.requests)
    if options.time_scale and not (options.by_default or options.requests == "trace"):
        parser.error("--time-scale is of --requests trace")
    try:
        options.budgets = [int(percent) for percent in options.budgets.split(",") if percent]
    except ValueError:
        parser.error(f"--budgets {options.budgets}: whole numbers of percent are wanted, as in 0,5,10")
    if options.budgets and "auto" not in options.modes:
        parser.error("--budgets are of mode auto, which is not among --modes")
    try:
        options.variants = [variant_of(text, options.modes) for text in options.variant]
    except ValueError as error:
        parser.error(f"--variant: {error}")
    return options


def variant_of(text: str, modes: Sequence[str]) -> tuple[str, dict[str, int | bool | str]]:
    """The mode of a variant, and its settings. Raises ValueError for what is no variant of one of `modes`."""
    mode, _, settings = text.partition(":")
    if mode not in modes:
        raise ValueError(f"{text}: {mode!r} is not among --modes")
    found: dict[str, int | bool | str] = {}
    for setting in settings.split(","):
        name, _, value = setting.partition("=")
        if name not in PlanConfig.__slots__ or name == "mode":
            raise ValueError(f"{text}: there is no setting {name!r}")
        found[name] = value == "True" if value in ("True", "False") else int(value) if value.isdigit() else value
    return mode, found


def resolve(options: argparse.Namespace, device: str) -> argparse.Namespace:
    """The options, with the device's defaults for those not given."""
    defaults = DEFAULTS[device]
    resolved = argparse.Namespace(**vars(options))
    if options.model is None and options.layers is None:
        resolved.layers = defaults.layers
    if options.requests == "trace" and options.time_scale is None:
        resolved.time_scale = 1.0
    resolved.long_prompt = defaults.long_prompt
    for name in ("model", "dtype", "scale", "num_requests", "rounds", "moe_max_num_tokens", "time_scale"):
        if getattr(resolved, name) is None:
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
    rank_tokens, time_scale = options.rank_tokens, None
    if options.by_default:
        rank_tokens = [",".join(map(str, [options.long_prompt] + [_SHORT_PROMPT] * (num_ranks - 1)))]
    if options.by_default or options.requests == "trace":
        time_scale = options.time_scale
    traces = options.trace or ([] if options.rank_tokens else [str(TRACE)])
    found = [rank_tokens_workload(text, num_ranks) for text in rank_tokens] + [
        replace(trace_workload(p, num_ranks, **shape), time_scale=time_scale) for p in traces
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

    # By a trace's clock a rank takes more than one request when several wait.
    by_clock = any(w.time_scale for w in workloads)
    needed = max(w.longest if w.time_scale else w.max_tokens_per_rank for w in workloads)
    if options.max_tokens_per_rank is not None and options.max_tokens_per_rank < needed:
        raise ConfigError(
            f"--max-tokens-per-rank is {options.max_tokens_per_rank}, but a step gives one rank {needed} tokens"
        )
    if by_clock:
        needed = max(options.moe_max_num_tokens, needed)
    return [
        Config(
            mode=mode,
            moe_max_num_tokens=options.moe_max_num_tokens,
            max_tokens_per_rank=options.max_tokens_per_rank or needed,
            num_slots=options.num_slots,
            combine=options.combine,
            num_sms=options.num_sms,
            combine_dtype=options.combine_dtype,
            deterministic=options.deterministic,
            experts=options.experts,
            cost=options.cost,
        )
        for mode in options.modes
    ]
