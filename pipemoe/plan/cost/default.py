"""Costs derived from a device's peak rates and a model's dimensions, where nothing has been measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class _Reached(NamedTuple):
    """What whole steps reach, in thousandths of the peak rates; and how often a model's own modules pass over each row
    in elementwise kernels."""

    dense: int
    grouped: int
    attention: int
    memory: int
    passes: int


# On GPUs: fitted to measured steps (benchmarks/results: Qwen3-30B-A3B and DeepSeek-V3 on two H100s, Qwen3-30B-A3B on
# quarters of one), and 5 % off them, mean. On CPUs: fitted to benchmarks/ttft's small model on 2 and 4 ranks of two
# cores, 12 % off.
_ON_GPU, _ON_CPU = _Reached(550, 800, 400, 900, 60), _Reached(150, 700, 100, 800, 40)
_LINK_PERMILLE = 700  # NCCL's rings between GPUs: about 330 of 450 GB/s
_CROWD_PERMILLE = 150  # ranks that share a GPU share its memory as well
_HOST_ON_GPU = HostCost(
    attend_ns=1_000_000,
    graph_ns=27_000,
    pack_ns=110_000,
    dispatch_ns=45_000,
    experts_ns=60_000,
    combine_ns=53_000,
    finish_ns=450_000,
    idle_ns=16_000,
)
_HOST_ON_CPU = HostCost(
    attend_ns=30_000,
    graph_rows=0,
    pack_ns=30_000,
    dispatch_ns=60_000,
    experts_ns=30_000,
    combine_ns=60_000,
    finish_ns=30_000,
    idle_ns=15_000,
)


def _contention(beside: Sequence[Sequence[int]], under: Sequence[Sequence[int]]) -> ContentionCost:
    """From thousandths of its speed alone that an operation of each of KINDS (line) has beside another (column), and a
    computation under another."""
    speeds = {f"{a}_beside_{b}": speed for a, of_a in zip(KINDS, beside) for b, speed in zip(KINDS, of_a)}
    speeds |= {f"{a}_under_{b}": speed for a, of_a in zip(KINDS, under) for b, speed in zip(KINDS, of_a)}
    return ContentionCost(**speeds)


# On cores, computation shares them, and the threads that move transfers along compete with one another.
_ON_CORES = _contention([[1000] * 4] * 2 + [[1000, 1000, 667, 667]] * 2, [[1000] * 2] * 2)
# Pairs side by side as benchmarks/overlap.py measured them, with 2048 tokens per rank, on two H100s and on quarters of
# one; but where a transfer takes part half of what is lost there, as steps show.
_BETWEEN_GPUS = _contention(
    [[680, 325, 870, 900], [870, 670, 980, 980], [910, 815, 970, 970], [845, 780, 970, 970]], [[420, 280], [820, 520]]
)
_ON_ONE_GPU = _contention(
    [[775, 390, 835, 835], [910, 570, 950, 960], [890, 800, 980, 965], [825, 740, 965, 965]], [[245, 130], [630, 520]]
)
# what pipemoe tune found there, see SmsCost
_SMS_BETWEEN_GPUS, _SMS_ON_ONE_GPU = (750, 580, 1000, 1070), (690, 1000, 1000, 1110)
# bytes per second: 4 ranks, NCCL 2.30, one thread block per collective (with four about 100)
_ONE_GPU_LINK = 20 * 10**9


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
) -> CostModel:
    """value_bytes: of weights and dispatched values. sum_bytes: of combined ones. ranks_per_device: ranks share a GPU's
    rates. row_bytes: of a token in a dispatch; None: of one in the model's dtype. ctas: see SmsCost.

    Units of the result: see CostModel. Good to tell plans apart; `pipemoe tune` measures better ones.
    """
    shape, reached = dimensions.shape, _ON_CPU if device.cores else _ON_GPU
    flops, bandwidth = device.flops // ranks_per_device, device.memory_bandwidth // ranks_per_device
    link = _ONE_GPU_LINK if ranks_per_device > 1 else device.link_bandwidth * _LINK_PERMILLE // 1000

    def compute_ps(operations: int, permille: int) -> int:
        return operations * 10**15 // (flops * permille)

    def read_ns(num_values: int) -> int:
        return num_values * value_bytes * 10**12 // (bandwidth * reached.memory)

    # Where ranks outnumber the cores, whoever is to go on next first waits for one; the engines that poll take turns as
    # well.
    waiting = max(1, 2 * num_ranks // device.cores) if device.cores else 1

    def exchange(row_bytes: int) -> ExchangeCost:
        volume_ps = row_bytes * 10**12 // link if num_ranks > 1 else 0
        if device.cores:  # every peer copies every row, and MPI goes on only when polled
            return ExchangeCost(150_000 * waiting, 10_000 * waiting, max(num_ranks - 1, 0) * volume_ps)
        return ExchangeCost(15_000 * ranks_per_device if num_ranks > 1 else 5_000, 4_000, volume_ps)

    row_bytes = row_bytes or -(-(shape.hidden * value_bytes + 8 * shape.top_k) // 128) * 128
    # The experts also read and write each local row a few times: gathered rows, activations, sums.
    glue_ps = (4 * shape.hidden + 3 * shape.intermediate) * value_bytes * 10**15 // (bandwidth * reached.memory)
    passes_ps = read_ns(1000 * reached.passes * shape.hidden)
    pair_fs = compute_ps(1000 * dimensions.pair_flops, reached.attention)
    return CostModel(
        attend=AttendCost(
            fixed_ns=400_000 * waiting if device.cores else 50_000,
            weights_ns=read_ns(dimensions.dense_weights),
            row_ps=compute_ps(2 * dimensions.dense_weights, reached.dense) + passes_ps,
            pair_fs=pair_fs,
            crowd_permille=_CROWD_PERMILLE if ranks_per_device > 1 else 0,
            first_weights_ns=dimensions.num_dense_layers * read_ns(dimensions.dense_layer_weights),
            first_row_ps=dimensions.num_dense_layers
            * (compute_ps(2 * dimensions.dense_layer_weights, reached.dense) + passes_ps),
            first_pair_fs=dimensions.num_dense_layers * pair_fs,
        ),
        experts=ExpertsCost(
            fixed_ns=100_000 * waiting if device.cores else 30_000,
            expert_ns=read_ns(dimensions.expert_weights),
            pair_ps=compute_ps(2 * dimensions.expert_weights, reached.grouped) + glue_ps,
            row_ps=shape.top_k * 1000,
            tile_rows=4 if device.cores else 16,
            sliced_permille=0 if device.cores else 350,
        ),
        dispatch=exchange(row_bytes),
        combine=exchange(shape.hidden * sum_bytes),
        host=_HOST_ON_CPU if device.cores else _HOST_ON_GPU,
        cores=CoresCost(1000 * device.cores, 200) if device.cores else CoresCost(),
        contention=_ON_CORES if device.cores else _ON_ONE_GPU if ranks_per_device > 1 else _BETWEEN_GPUS,
        sms=SmsCost(
            device.num_sms // ranks_per_device, ctas, *(_SMS_ON_ONE_GPU if ranks_per_device > 1 else _SMS_BETWEEN_GPUS)
        ),
        gap_permille=1000 if device.cores else 500,
        start_ns=1_500_000 * waiting if device.cores else 2_000_000,
        finish_ns=300_000 if device.cores else 200_000,
    )
