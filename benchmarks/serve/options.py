"""Options of the serve benchmark, and the requests and policies that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench_main import RankParser, positive
from pipemoe.errors import InputError
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.traffic.arrival_times import PROCESSES
from pipemoe.traffic.campaign import Settings, check_limits
from pipemoe.traffic.policy import POLICIES, ROUTINGS
from pipemoe.traffic.request_trace import TOO_LONG, UNITS, Request, cut, fit_lengths, read_trace, scale_lengths

TRACE = Path(__file__).resolve().parents[1] / "traces" / "azure2023_conv.csv"


class DeviceDefaults(NamedTuple):
    """Defaults of options, by device."""

    model: str
    layers: int | None  # of that model; another model keeps all its layers
    dtype: str
    scale: float
    num_requests: int
    moe_max_num_tokens: int
    step_tokens: str


DEFAULTS = {
    "cpu": DeviceDefaults("small", None, "float32", 0.1, 100, 256, "128,256,512"),
    "cuda": DeviceDefaults("qwen3-30b-a3b", 8, "bfloat16", 1.0, 200, 4096, "2048,4096,8192,16384"),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Exits with a message if an option is wrong."""
    parser = RankParser(description="Requests over time: rolling steps against lockstep, on the same engine.")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        help=f"{', '.join(MODEL_CONFIGS)}, or a checkpoint's path (default: small on a CPU, else qwen3-30b-a3b)",
    )
    model.add_argument(
        "--layers",
        type=positive(int),
        help="only the first N decoder layers (default: all; 8 where --model is not given on a GPU)",
    )
    model.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    model.add_argument("--moe-max-num-tokens", type=positive(int), help="default: 256 on a CPU, else 4096")
    model.add_argument(
        "--max-tokens-per-rank",
        type=positive(int),
        help="of one step (default: the longest request, or the largest of --step-tokens)",
    )
    model.add_argument("--cost", metavar="FILE", help="measured costs (pipemoe tune)")
    model.add_argument("--experts", default="auto", help="implementation of the experts")
    requests = parser.add_argument_group("requests")
    requests.add_argument(
        "--trace",
        action="append",
        default=[],
        metavar="FILE",
        help="their lengths and rhythm; may be repeated (default: azure2023_conv)",
    )
    requests.add_argument("--trace-unit", choices=tuple(UNITS), help="of its times (default: what its format says)")
    requests.add_argument(
        "--too-long",
        choices=TOO_LONG,
        default="error",
        help="what becomes of longer requests than the model, or --most-tokens, takes (default: %(default)s)",
    )
    requests.add_argument("--most-tokens", type=positive(int), help="of a request (default: what the model takes)")
    requests.add_argument(
        "--scale", type=positive(float), help="factor on the trace's lengths (default: 0.1 on a CPU, else 1)"
    )
    requests.add_argument(
        "--num-requests",
        type=positive(int),
        help="of each seed: seed s takes those from number s * N on (default: 100 on a CPU, else 200)",
    )
    requests.add_argument(
        "--arrivals",
        default="trace",
        help=f"when they come: of {', '.join(PROCESSES)}, separated by commas (default: %(default)s)",
    )
    requests.add_argument(
        "--loads", default="0.7", help="shares of the best lockstep policy's throughput, rising (default: %(default)s)"
    )
    requests.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    policy = parser.add_argument_group("policies")
    policy.add_argument("--policies", default=",".join(POLICIES), help="default: %(default)s")
    policy.add_argument(
        "--step-tokens",
        help="most tokens of a rank in a lockstep step, all that are to be tried (default: 128,256,512 on a CPU, else "
        "2048,4096,8192,16384)",
    )
    policy.add_argument(
        "--routing",
        choices=ROUTINGS,
        default=ROUTINGS[0],
        help="to ranks; lockstep_balanced is always least_tokens (default: %(default)s)",
    )
    policy.add_argument(
        "--delay-ms",
        type=positive(float),
        default=20.0,
        help="that a rank may wait for others in lockstep_delayed (default: %(default)s)",
    )
    policy.add_argument("--no-capacity", action="store_true", help="leave the search for the capacity out")
    policy.add_argument(
        "--rate-step", type=float, default=1.1, help="between the rates that it tries (default: %(default)s)"
    )
    policy.add_argument(
        "--limits-ms",
        metavar="S,M,L",
        help="time to first token that 95 %% of short, medium and long prompts shall have at capacity (default: five "
        "times that of the best policy for one prompt at a time)",
    )
    policy.add_argument(
        "--lowest-load", type=positive(float), default=0.2, help="of those rates (default: %(default)s)"
    )
    policy.add_argument(
        "--highest-load", type=positive(float), default=1.4, help="of those rates (default: %(default)s)"
    )
    policy.add_argument(
        "--alone",
        type=positive(int),
        default=4,
        metavar="N",
        help="requests of each length class served one at a time (default: %(default)s)",
    )
    parser.add_device()
    parser.add_output("serve")
    options = parser.parse_args(arguments)
    options.device = parser.device_of(options)
    options.policies = options.policies.split(",")
    try:
        options.loads = numbers(options.loads, float)
        options.seeds = numbers(options.seeds, int)
        options.step_tokens = options.step_tokens and numbers(options.step_tokens, int)
        options.limits_ms = options.limits_ms and numbers(options.limits_ms, float)
        check_limits(options.limits_ms)
        options.arrivals = tuple(options.arrivals.split(","))
        unknown = [name for name in options.arrivals if name not in PROCESSES]
        if unknown:
            raise InputError(f"--arrivals {unknown[0]}: must be of {', '.join(PROCESSES)}")
        if sorted(options.loads) != list(options.loads) or options.loads[0] <= 0:
            raise InputError("--loads: must be positive and rising")
        if options.rate_step <= 1:
            raise InputError(f"--rate-step {options.rate_step}: must be over 1")
    except InputError as error:
        parser.error(str(error))
    return options


def numbers(text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """ "1,2,3" as numbers. Raises InputError."""
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError:
        raise InputError(f"{text!r}: numbers are wanted, separated by commas") from None


def resolve(options: argparse.Namespace, device: str) -> argparse.Namespace:
    """The options, with the device's defaults for those not given."""
    defaults = DEFAULTS[device]
    resolved = argparse.Namespace(**vars(options))
    if options.model is None and options.layers is None:
        resolved.layers = defaults.layers
    for name in ("model", "dtype", "scale", "num_requests", "moe_max_num_tokens"):
        if getattr(options, name) is None:
            setattr(resolved, name, getattr(defaults, name))
    if options.step_tokens is None:
        resolved.step_tokens = numbers(defaults.step_tokens, int)
    resolved.trace = options.trace or [str(TRACE)]
    return resolved


def settings_of(options: argparse.Namespace) -> Settings:
    """What the campaign measures."""
    return Settings(
        processes=options.arrivals,
        loads=options.loads,
        seeds=options.seeds,
        rate_step=options.rate_step,
        lowest_load=options.lowest_load,
        highest_load=options.highest_load,
        per_class=options.alone,
        find_capacity=not options.no_capacity,
        limits_ms=options.limits_ms,
    )


def requests_of(options: argparse.Namespace, path: str, most: int) -> dict[int, list[Request]]:
    """A trace's requests for each seed. most: tokens that the model takes. Raises InputError."""
    trace = read_trace(path, options.trace_unit)
    found = {}
    for seed in options.seeds:
        requests = scale_lengths(cut(trace, options.num_requests, seed * options.num_requests), options.scale)
        try:
            found[seed], _ = fit_lengths(requests, min(most, options.most_tokens or most), options.too_long)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return found
