"""From measured times to a cost model: non-negative least squares on relative errors, by kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import numpy as np

from pipemoe.plan.cost.fit import AttendSample, fit_attend, least_squares
from pipemoe.plan.cost.model import (
    ContentionCost,
    CostModel,
    ExchangeCost,
    ExpertsCost,
    HostCost,
    SmsCost,
    experts_busy,
    rates_of,
)
from pipemoe.plan.schedule import ModelShape

_LEAST_SPEED = 0.05  # nothing stops for good
Speeds = Mapping[tuple[str, str], tuple[float, float]]  # of pairs of operations side by side, as shares of full speed


@dataclass
class Samples:
    """What was measured, all times in ns. host: by the names of HostCost, without the unit."""

    attend: list[AttendSample] = field(default_factory=list)  # on one rank
    crowded: list[AttendSample] = field(default_factory=list)  # the same while every other rank attends to as much
    experts: list[tuple[int, float]] = field(default_factory=list)  # rows of the wave
    dispatch: list[tuple[int, int, float]] = field(default_factory=list)  # segments, rows that the busiest link carries
    combine: list[tuple[int, int, float]] = field(default_factory=list)
    host: dict[str, list[float]] = field(default_factory=dict)
    taped: list[float] = field(default_factory=list)  # issuing a layer from a tape: all its operations
    # tokens and pairs: to the first MoE layer's attention
    start: list[tuple[int, int, float]] = field(default_factory=list)
    finish: list[float] = field(default_factory=list)


def fit_cost(samples: Samples, start: CostModel, shape: ModelShape, num_ranks: int) -> CostModel:
    """`start`, with all that the samples show replaced. Raises ValueError if a kind of operation was never measured."""
    # Other threads and full queues sometimes hold up a conductor, so the quick samples show what issuing takes.
    host = {f"{name}_ns": round(float(np.percentile(values, 25))) for name, values in samples.host.items() if values}
    host_cost = replace(start.host, **host)
    by_graphs = host_cost.graph_rows > 0
    issue_ns = host_cost.graph_ns if by_graphs else host_cost.attend_ns
    attend = fit_attend(samples.attend, samples.crowded, start.attend, issue_ns, by_graphs)
    start_ns = start.start_ns
    # A rank that was held up in its other layers looks as if it had begun before the call.
    begun = [(rows, pairs, ns) for rows, pairs, ns in samples.start if ns > 0]
    typical = {
        size: float(np.median([ns for *of_size, ns in begun if tuple(of_size) == size]))
        for size in sorted({sample[:2] for sample in begun})
    }
    if typical:
        begin, row, pair = least_squares([(1, rows, pairs) for rows, pairs in typical], list(typical.values()))
        start_ns = round(begin)
        attend = replace(attend, first_weights_ns=0, first_row_ps=round(row * 1e3), first_pair_fs=round(pair * 1e6))
    return replace(
        start,
        attend=attend,
        experts=_fit_experts(samples.experts, start, shape, num_ranks, host_cost),
        dispatch=_fit_exchange(samples.dispatch),
        combine=_fit_exchange(samples.combine),
        host=_of_tape(host_cost, samples.taped),
        start_ns=start_ns,
        finish_ns=round(float(np.median(samples.finish))) if samples.finish else start.finish_ns,
    )


def fit_contention(speeds: Speeds) -> ContentionCost:
    """From the measured speeds of pairs of operations (first and second, as shares of full speed) to the table."""
    found = {}
    for (a, b), (a_speed, b_speed) in speeds.items():
        second = f"{b}_under_{a}" if {a, b} <= {"attend", "experts"} else f"{b}_beside_{a}"
        mean = (a_speed + b_speed) / 2
        for name, speed in ((f"{a}_beside_{b}", a_speed), (second, b_speed)):
            speed = mean if f"{a}_beside_{b}" == second else speed  # two transfers of a kind have no first
            found[name] = round(1000 * min(max(speed, _LEAST_SPEED), 1.0))
    return ContentionCost(**found)


def fit_sms(start: SmsCost, usual: Speeds, crowded: Speeds, roomy: Speeds) -> SmsCost:
    """From measured speeds of experts and transfers side by side: usual, if the experts leave room for the transfers;
    crowded, if they leave none; roomy, if they leave twice as much. The first of each pair is "experts".
    """

    def permille(other: Speeds, side: int) -> int:
        return round(
            1000
            * float(
                np.mean(
                    [
                        max(speeds[side], _LEAST_SPEED) / max(usual[pair][side], _LEAST_SPEED)
                        for pair, speeds in other.items()
                    ]
                )
            )
        )

    return replace(
        start,
        crowded_experts_permille=permille(crowded, 0),
        crowded_transfers_permille=permille(crowded, 1),
        roomy_experts_permille=permille(roomy, 0),
        roomy_transfers_permille=permille(roomy, 1),
    )


def _of_tape(host: HostCost, taped: Sequence[float]) -> HostCost:
    """Operations that were issued one by one take their shares of what issuing a layer from a tape takes."""
    names = ("graph_ns", "pack_ns", "dispatch_ns", "experts_ns", "combine_ns")
    total = sum(getattr(host, name) for name in names)
    if not taped or not total:
        return host
    layer_ns = round(float(np.median(taped)))
    return replace(host, **{name: getattr(host, name) * layer_ns // total for name in names})


def _fit_experts(samples, start: CostModel, shape: ModelShape, num_ranks: int, host: HostCost) -> ExpertsCost:
    """Fits two scales, for what grows with the experts hit and for what grows with the rows, and the tile height that
    explains the samples best. (Rows that a tile lacks cost nothing while its weights are read.)
    """
    measured = np.array([ns for _, ns in samples], float)

    def busy(cost: ExpertsCost, rows: int) -> int:
        return experts_busy(rates_of(replace(start, experts=cost)), rows, shape.num_experts, shape.top_k, num_ranks)

    best, least = start.experts, np.inf
    for tile_rows in sorted({1, 4, 16, 64, start.experts.tile_rows}, reverse=True):
        old = replace(start.experts, tile_rows=tile_rows)
        hits, grows = replace(old, pair_ps=0, row_ps=0), replace(old, expert_ns=0)
        features = [(1, busy(hits, rows), busy(grows, rows)) for rows, _ in samples]
        fixed, read, compute = scales = least_squares(features, measured)
        error = float(np.sum((np.array(features) @ scales / measured - 1) ** 2))
        if error < least * (1 - 1e-3):
            least = error
            if fixed <= 1.2 * host.experts_ns and host.experts_ns > old.fixed_ns:
                fixed = old.fixed_ns
            by_scale = {
                "expert_ns": round(read * old.expert_ns),
                "pair_ps": round(compute * old.pair_ps),
                "row_ps": round(compute * old.row_ps),
            }
            best = replace(old, fixed_ns=round(fixed), **by_scale)
    return best


def _fit_exchange(samples) -> ExchangeCost:
    fixed, segment, row = least_squares(
        [(1, segments, rows) for segments, rows, _ in samples], [ns for *_, ns in samples]
    )
    return ExchangeCost(round(fixed), round(segment), round(row * 1e3))


_SCALES = {  # in thousandths
    # attention and experts alike, before either
    "compute": (600, 700, 800, 900, 1000, 1050, 1100, 1150, 1200, 1300, 1500, 2000),
    "attend": (700, 800, 900, 950, 1000, 1050, 1100, 1200, 1300),
    "experts": (700, 800, 900, 950, 1000, 1050, 1100, 1200, 1300),
    "crowd": (0, 500, 1000, 1500, 2000, 3000),
    "latency": (300, 500, 700, 850, 1000, 1150, 1300, 1600, 2000),
    "volume": (600, 800, 900, 1000, 1100, 1200, 1400),
    "host": (400, 600, 800, 900, 1000, 1100, 1200),
    # of computations side by side: in steps no worse than in pairs without a gap
    "contention": (0, 250, 500, 750, 1000),
    "crossing": (0, 250, 500, 750, 1000),  # of a transfer and anything, the same
    "slowdown": (0, 500, 1000, 2000, 4000),
    "gaps": (0, 250, 500, 750, 1000),  # as such, not scaled
}
_STARTS: tuple[dict[str, int], ...] = ({}, {"crossing": 0}, {"contention": 500})
_ATTEND_TIMES = ("fixed_ns", "weights_ns", "row_ps", "pair_fs", "first_weights_ns", "first_row_ps", "first_pair_fs")
_PASSES, _WORTHWHILE = 10, 2e-3  # over all scales; of the error


def calibrate(cost: CostModel, log_error: Callable[[CostModel], float]) -> CostModel:
    """Adjust the costs to whole steps, which show what single operations do not. log_error: how far off a cost model's
    predictions are. Scales one cost at a time for as long as that helps, from several starts.
    """
    error_of = cache(log_error)  # many scales make the same costs, above all where pairs have not been measured
    best, least = cost, error_of(cost)
    for start in _STARTS:
        at = dict.fromkeys(_SCALES, 1000) | {"gaps": cost.gap_permille} | start
        lowest = error_of(_scaled(cost, **at))
        for _ in range(_PASSES):
            before = lowest
            for name, values in _SCALES.items():
                for value in values:
                    error = error_of(_scaled(cost, **{**at, name: value}))
                    if error < lowest * (1 - _WORTHWHILE):
                        lowest, at[name] = error, value
            if lowest == before:
                break
        if lowest < least * (1 - _WORTHWHILE):
            best, least = _scaled(cost, **at), lowest
    return best


def _scaled(
    cost: CostModel,
    compute: int,
    attend: int,
    experts: int,
    crowd: int,
    latency: int,
    volume: int,
    host: int,
    contention: int,
    crossing: int,
    slowdown: int,
    gaps: int,
) -> CostModel:
    """Everything in thousandths of what it was; slowdown: of cores that ranks share."""

    def by(part, permille: int, *names: str):
        return replace(part, **{name: getattr(part, name) * permille // 1000 for name in names})

    def exchange(part: ExchangeCost) -> ExchangeCost:
        return by(by(part, latency, "fixed_ns", "segment_ns"), volume, "row_ps")

    least = round(1000 * _LEAST_SPEED)
    speeds = {}
    for name, speed in asdict(cost.contention).items():
        lost = (1000 - speed) * (crossing if "dispatch" in name or "combine" in name else contention)
        speeds[name] = max(least, 1000 - lost // 1000)
    return replace(
        cost,
        attend=by(by(cost.attend, compute * attend // 1000, *_ATTEND_TIMES), crowd, "crowd_permille"),
        experts=by(cost.experts, compute * experts // 1000, "fixed_ns", "expert_ns", "pair_ps", "row_ps"),
        dispatch=exchange(cost.dispatch),
        combine=exchange(cost.combine),
        host=by(cost.host, host, *(name for name in asdict(cost.host) if name.endswith("_ns"))),
        cores=by(cost.cores, slowdown, "slowdown_permille"),
        contention=ContentionCost(**speeds),
        gap_permille=gaps,
    )
