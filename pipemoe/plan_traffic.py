"""`pipemoe plan --trace-arrivals`: how requests over time would be served, on any machine: no GPU, no MPI, no model.

It plays what benchmarks/serve plays on real ranks (pipemoe/traffic/campaign.py) on a simulated engine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipemoe.errors import InputError
from pipemoe.plan.cost.model import CostModel
from pipemoe.plan.schedule import ModelShape
from pipemoe.plan_report import table
from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.engine_settings import engine_settings
from pipemoe.rolling.round_time import RoundTime
from pipemoe.traffic.arrival_times import PROCESSES
from pipemoe.traffic.campaign import Campaign, Settings, check_limits
from pipemoe.traffic.policy import POLICIES, ROUTINGS, Policy, policies_of
from pipemoe.traffic.request_trace import TOO_LONG, UNITS, Request, cut, fit_lengths, read_trace, scale_lengths
from pipemoe.traffic.simulator import Machine, SimulatedPlayer

_HIGHEST_LOAD = 10  # more is a slip: percent, perhaps


def add_traffic_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> tuple[str, ...]:
    """What says which requests come, and how they are served. Returns the options' names, as a namespace has them."""
    traffic, names = parser.add_argument_group("requests over time (--trace-arrivals)"), []

    def option(*words: str, **more: Any) -> None:
        names.append(traffic.add_argument(*words, **more).dest)

    option("--trace-unit", choices=tuple(UNITS), help="of the trace's times (default: as its format says)")
    option(
        "--too-long",
        choices=TOO_LONG,
        default="clip",
        help="what becomes of requests that the model, or --most-tokens, does not take (default %(default)s)",
    )
    option("--most-tokens", type=positive, help="of a request (default: what the model takes)")
    option("--scale", type=float, default=1.0, help="factor on the trace's lengths (default %(default)s)")
    option("--num-requests", type=positive, default=500, help="of each seed (default %(default)s)")
    option("--request-times", choices=tuple(PROCESSES), default="trace", help="when they come (default %(default)s)")
    option("--seeds", default="0", help="seed s takes the trace's requests from number s * N on (default %(default)s)")
    option("--policies", default=",".join(POLICIES), help="default %(default)s")
    option(
        "--step-tokens",
        default="2048,4096,8192,16384",
        help="most tokens of a rank in a lockstep step (default %(default)s)",
    )
    option("--routing", choices=ROUTINGS, default=ROUTINGS[0], help="to ranks (default %(default)s)")
    option(
        "--delay-ms",
        type=float,
        default=20.0,
        help="that ranks wait for others in lockstep_delayed (default %(default)s)",
    )
    option(
        "--loads",
        default="0.5,0.7,0.9",
        help="rates, as shares of the best lockstep policy's throughput (default %(default)s)",
    )
    option(
        "--rate-step", type=float, default=1.05, help="between the rates tried for the capacity (default %(default)s)"
    )
    option(
        "--limits-ms",
        metavar="S,M,L",
        help="time to first token that 95 %% of short, medium and long prompts shall have at capacity (default: five "
        "times that of the best policy for one prompt at a time)",
    )
    return tuple(names)


def run_traffic(
    options: argparse.Namespace, model: str, device: str, shape: ModelShape, cost: CostModel, positions: int
) -> int:
    """Print the report. Raises InputError and ConfigError for what cannot be."""
    path = options.trace_arrivals
    seeds = _numbers("--seeds", options.seeds, int)
    requests = {seed: _requests(options, path, seed, positions) for seed in seeds}
    longest = max(r.input_tokens for of_seed in requests.values() for r in of_seed)
    step_tokens = _numbers("--step-tokens", options.step_tokens, int)
    most = options.max_tokens_per_rank or max(longest, *step_tokens)

    def settings_of(policy: Policy) -> RollingSettings:
        return engine_settings(
            policy.name,
            policy.step_tokens,
            max_tokens_per_rank=most,
            num_ranks=options.ranks,
            cuts=True,
            num_slots=options.rolling_slots,
            times=times,
        )

    times = RoundTime(shape, cost, options.ranks, options.moe_max_num_tokens)
    machine = Machine(shape, cost, options.ranks, options.slots, options.moe_max_num_tokens, options.delay_ms / 1e3)
    policies = policies_of(options.policies.split(","), step_tokens, options.routing)
    rolling = next((settings_of(policy) for policy in policies if not policy.is_lockstep), None)
    rolling_slots = rolling.num_slots(machine.num_slots) if rolling else None
    limits = None if options.limits_ms is None else _numbers("--limits-ms", options.limits_ms, float)
    loads = _numbers("--loads", options.loads, float)
    if not 0 < min(loads) <= max(loads) <= _HIGHEST_LOAD:
        raise InputError(
            f"--loads {options.loads!r}: shares of the throughput are wanted, as in 0.7, over 0, up to {_HIGHEST_LOAD}"
        )
    if not options.rate_step > 1:
        raise InputError(f"--rate-step {options.rate_step}: must be over 1, since each rate is so many times the last")
    try:
        check_limits(limits)
    except InputError as error:
        raise InputError(f"--limits-ms {options.limits_ms!r}: {error}") from error
    settings = Settings(
        (options.request_times,),
        loads,
        seeds,
        options.rate_step,
        limits_ms=limits,
    )
    campaign = Campaign(SimulatedPlayer(machine, settings_of), policies, requests.__getitem__, settings)
    rows = campaign.run()
    assert campaign.limits is not None  # it has run
    limits_ms = {name: seconds * 1e3 for name, seconds in campaign.limits.seconds.items()}
    if options.json:
        about = {"model": model, "device": device, "trace": path.stem, "num_ranks": options.ranks}
        about |= {"rolling_slots": rolling_slots}
        print(json.dumps({**about, "limits_ms": limits_ms, "most_tokens": campaign.classes._asdict(), "rows": rows}))
        return 0
    print(f"{model} on {options.ranks} ranks of {device}, {shape.num_layers} MoE layers, {path.stem}\n")
    print(traffic_table(rows) + "\n")
    if rolling:
        beside = ", the short ones beside long rounds only" if rolling.beside_rows else ""
        print("rolling: in 1 slot" if rolling_slots == 1 else f"rolling: in {rolling_slots} slots{beside}")
    classes = campaign.classes
    bounds = (f"up to {classes.most_short}", f"up to {classes.most_medium}", "more")
    of_class = [
        f"{limits_ms[name]:.0f} ms for {bound}"
        for name, bound in zip(("short", "medium", "long"), bounds)
        if name in limits_ms
    ]
    print(f"capacity: requests a second of which 95 % have a first token within {', '.join(of_class)} tokens")
    return 0


def traffic_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per policy, load and seed."""
    columns = {
        "label": "policy",
        "what": "requests",
        "seed": "seed",
        "rate_rps": "per s",
        "load": "load",
        "ttft_ms_p50": "TTFT p50 ms",
        "ttft_ms_p95": "p95",
        "ttft_ms_p95_short": "short p95",
        "tokens_per_s": "tokens/s",
        "capacity_rps": "capacity per s",
    }
    lines = [list(columns.values())]
    for row in rows:
        values = [row[name] for name in columns]
        lines.append(["-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values])
    return table(lines)


def _requests(options: argparse.Namespace, path: Path, seed: int, positions: int) -> list[Request]:
    requests = cut(read_trace(path, options.trace_unit), options.num_requests, seed * options.num_requests)
    most = min(positions, options.most_tokens or positions)
    try:
        return fit_lengths(scale_lengths(requests, options.scale), most, options.too_long)[0]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        found = tuple(kind(word) for word in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text!r}: numbers are wanted, separated by commas") from None
    if any(not number >= 0 for number in found):
        raise InputError(f"{option} {text!r}: must not be negative")
    return found
