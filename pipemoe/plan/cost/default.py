"""Costs derived from a device's peak rates and a model's dimensions, if nothing has been measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from pipemoe.plan.cost import tuned
from pipemoe.plan.cost.devices import Device
from pipemoe.plan.cost.dimensions import Dimensions
from pipemoe.plan.cost.model import (
    KINDS,
    AttendCost,
    ContentionCost,
    CoresCost,
    CostModel,
    ExchangeCost,
    ExpertsCost,
    HostCost,
    SmsCost,
)
from pipemoe.plan.row import row_bytes as row_bytes_of

_MOST_SLOWNESS = 100_000  # products of the planner still fit int64


def _contention(beside: Sequence[Sequence[int]], under: Sequence[Sequence[int]]) -> ContentionCost:
    """beside: the speed, in thousandths, of each of KINDS (line) beside another (column). under: of a computation that
    is `under` another one, see ContentionCost.
    """
    speeds = {f"{a}_beside_{b}": speed for a, of_a in zip(KINDS, beside) for b, speed in zip(KINDS, of_a)}
    speeds |= {f"{a}_under_{b}": speed for a, of_a in zip(KINDS, under) for b, speed in zip(KINDS, of_a)}
    return ContentionCost(**speeds)


def default_cost(
    device: Device,
    dimensions: Dimensions,
    num_ranks: int,
    *,
    value_bytes: int,
    sum_bytes: int,
    ranks_per_device: int = 1,
    row_bytes: int | None = None,
    ctas: int = 0,
    slowness: int = 1000,
) -> CostModel:
    """value_bytes: of weights and dispatched values. sum_bytes: of combined values. ranks_per_device: how many ranks
    share a GPU's rates. row_bytes: of a token in a dispatch; None: of one in the model's dtype. ctas: see SmsCost.
    slowness: how much longer everything takes, in thousandths.

    Good enough to tell plans apart; `pipemoe tune` measures better costs.
    """
    shape, on_cpu = dimensions.shape, device.cores > 0
    reached = tuned.REACHED_ON_CPU if on_cpu else tuned.REACHED_ON_GPU
    of_gpu = (
        (tuned.FIXED_ON_GPU, tuned.HOST_ON_GPU) if num_ranks > 1 else (tuned.FIXED_ON_LONE_GPU, tuned.HOST_ON_LONE_GPU)
    )
    fixed, host = (tuned.FIXED_ON_CPU, tuned.HOST_ON_CPU) if on_cpu else of_gpu
    flops, bandwidth = device.flops // ranks_per_device, device.memory_bandwidth // ranks_per_device
    link = tuned.ONE_GPU_LINK if ranks_per_device > 1 else device.link_bandwidth * tuned.LINK_PERMILLE // 1000

    def compute_ps(operations: int, permille: int) -> int:
        return operations * 10**15 // (flops * permille)

    def read_ns(num_values: int) -> int:
        return num_values * value_bytes * 10**12 // (bandwidth * reached["memory"])

    # If ranks outnumber the cores, every latency includes waiting for a core. Conductors that poll take turns as well.
    waiting = max(1, 2 * num_ranks // device.cores) if on_cpu else 1

    def exchange(bytes_of_row: int) -> ExchangeCost:
        volume_ps = bytes_of_row * 10**12 // link if num_ranks > 1 else 0
        group_ns, segment_ns = fixed["group_ns"], fixed["segment_ns"]
        if on_cpu:  # every peer copies every row, and MPI goes on only when polled
            return ExchangeCost(group_ns * waiting, segment_ns * waiting, max(num_ranks - 1, 0) * volume_ps)
        return ExchangeCost(group_ns * ranks_per_device, segment_ns, volume_ps)

    # The experts also read and write each local row a few times: gathered rows, activations, sums.
    glue_ps = (4 * shape.hidden + 3 * shape.intermediate) * value_bytes * 10**15 // (bandwidth * reached["memory"])
    passes_ps = read_ns(1000 * reached["passes"] * shape.hidden)
    pair_fs = compute_ps(1000 * dimensions.pair_flops, reached["attention"])
    cost = CostModel(
        attend=AttendCost(
            fixed_ns=fixed["attend_ns"] * waiting,
            weights_ns=max(read_ns(dimensions.dense_weights), fixed["attend_least_ns"]),
            row_ps=compute_ps(2 * dimensions.dense_weights, reached["dense"]) + passes_ps,
            pair_fs=pair_fs,
            crowd_permille=tuned.CROWD_PERMILLE if ranks_per_device > 1 else 0,
            first_weights_ns=dimensions.num_dense_layers * read_ns(dimensions.dense_layer_weights),
            first_row_ps=dimensions.num_dense_layers
            * (compute_ps(2 * dimensions.dense_layer_weights, reached["dense"]) + passes_ps),
            first_pair_fs=dimensions.num_dense_layers * pair_fs,
        ),
        experts=ExpertsCost(
            fixed_ns=fixed["experts_ns"] * waiting,
            expert_ns=read_ns(dimensions.expert_weights),
            pair_ps=compute_ps(2 * dimensions.expert_weights, reached["grouped"]) + glue_ps,
            row_ps=shape.top_k * 1000,
            tile_rows=fixed["tile_rows"],
        ),
        dispatch=exchange(row_bytes or row_bytes_of(shape.hidden, value_bytes, shape.top_k)),
        combine=exchange(shape.hidden * sum_bytes),
        host=HostCost(**host),
        cores=CoresCost(1000 * device.cores, tuned.CORES_SLOWDOWN_PERMILLE) if on_cpu else CoresCost(),
        contention=_contention(
            *(tuned.ON_CORES if on_cpu else tuned.ON_ONE_GPU if ranks_per_device > 1 else tuned.BETWEEN_GPUS)
        ),
        sms=SmsCost(
            device.num_sms // ranks_per_device,
            ctas,
            *(tuned.SMS_ON_ONE_GPU if ranks_per_device > 1 else tuned.SMS_BETWEEN_GPUS),
        ),
        gap_permille=fixed["gap_permille"],
        start_ns=fixed["start_ns"] * waiting,
        finish_ns=fixed["finish_ns"],
    )
    return _slower(cost, min(max(slowness, 1), _MOST_SLOWNESS))


def _slower(cost: CostModel, permille: int) -> CostModel:
    """All times of the cost model, times so many thousandths."""

    def slower(part: Any) -> Any:
        times = [f.name for f in fields(part) if f.name.endswith(("_ns", "_ps", "_fs"))]
        return replace(part, **{name: getattr(part, name) * permille // 1000 for name in times})

    parts = {name: slower(getattr(cost, name)) for name in ("attend", "experts", "dispatch", "combine", "host")}
    return slower(replace(cost, **parts))
