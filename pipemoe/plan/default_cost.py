"""Costs derived from a device's peak rates and a model's dimensions, where nothing has been measured."""

from __future__ import annotations

from dataclasses import fields

from pipemoe.plan.cost import KINDS, AttendCost, ContentionCost, CoresCost, CostModel, ExchangeCost, ExpertsCost, HostCost, SmsCost
from pipemoe.plan.devices import Device
from pipemoe.plan.dimensions import Dimensions

# Of the peak, what sustained work reaches in whole steps: fitted to 4 ranks on quarters of an H200. There cuBLAS alone keeps 70 % of
# the dense peak, a copy 88 % of the bandwidth; NCCL's rings between GPUs about 330 of 450 GB/s.
# A model's own modules also pass over each row some seventy times in elementwise kernels.
_DENSE_PERMILLE, _GROUPED_PERMILLE, _ATTENTION_PERMILLE, _MEMORY_PERMILLE, _LINK_PERMILLE = 500, 550, 300, 800, 700
_PASSES = 70
_CROWD_PERMILLE = 150  # ranks that share a GPU share its memory as well
_HOST_ON_CPU = HostCost(
    attend_ns=30_000, graph_rows=0, pack_ns=30_000, dispatch_ns=60_000, experts_ns=30_000, combine_ns=60_000, finish_ns=30_000, idle_ns=15_000
)
# On cores, computation shares them, and the threads that move transfers along compete with one another. Ranks on one GPU copy on it,
# and few thread blocks limit a transfer, not the memory.
_ON_CORES = {f.name: 1000 for f in fields(ContentionCost)} | {f"{a}_beside_{b}": 667 for a in KINDS[2:] for b in KINDS[2:]}
_ONE_GPU = {f"{a}_beside_{b}": 950 for a in KINDS[2:] for b in KINDS[2:]}
_ONE_GPU_LINK = 25 * 10**9  # bytes per second: 4 ranks on one H200, NCCL 2.30, one thread block per collective (with four about 100)


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
    """value_bytes: of weights and dispatched values. sum_bytes: of combined ones. ranks_per_device: ranks share a GPU's rates.
    row_bytes: of a token in a dispatch; None: of one in the model's dtype. ctas: see SmsCost.

    Units of the result: see CostModel. Good to tell plans apart; `pipemoe tune` measures better ones.
    """
    shape = dimensions.shape
    flops, bandwidth = device.flops // ranks_per_device, device.memory_bandwidth // ranks_per_device
    link = _ONE_GPU_LINK if ranks_per_device > 1 else device.link_bandwidth * _LINK_PERMILLE // 1000

    def compute_ps(operations: int, permille: int) -> int:
        return operations * 10**15 // (flops * permille)

    def read_ns(num_values: int) -> int:
        return num_values * value_bytes * 10**12 // (bandwidth * _MEMORY_PERMILLE)

    # Where ranks outnumber the cores, whoever is to go on next first waits for one; the engines that poll take turns as well.
    waiting = max(1, 2 * num_ranks // device.cores) if device.cores else 1

    def exchange(row_bytes: int) -> ExchangeCost:
        volume_ps = row_bytes * 10**12 // link if num_ranks > 1 else 0
        if device.cores:  # every peer copies every row, and MPI goes on only when polled
            return ExchangeCost(300_000 * waiting, 50_000 * waiting, max(num_ranks - 1, 0) * volume_ps)
        return ExchangeCost(25_000 * ranks_per_device if num_ranks > 1 else 5_000, 4_000, volume_ps)

    row_bytes = row_bytes or -(-(shape.hidden * value_bytes + 8 * shape.top_k) // 128) * 128
    # The experts also read and write each local row a few times: gathered rows, activations, sums.
    glue_ps = (4 * shape.hidden + 3 * shape.intermediate) * value_bytes * 10**15 // (bandwidth * _MEMORY_PERMILLE)
    passes_ps = read_ns(1000 * _PASSES * shape.hidden)
    pair_fs = compute_ps(1000 * dimensions.pair_flops, _ATTENTION_PERMILLE)
    return CostModel(
        attend=AttendCost(
            fixed_ns=400_000 * waiting if device.cores else 100_000,
            weights_ns=read_ns(dimensions.dense_weights),
            row_ps=compute_ps(2 * dimensions.dense_weights, _DENSE_PERMILLE) + passes_ps,
            pair_fs=pair_fs,
            crowd_permille=_CROWD_PERMILLE if ranks_per_device > 1 else 0,
            dense_row_ps=dimensions.num_dense_layers * (compute_ps(2 * dimensions.dense_layer_weights, _DENSE_PERMILLE) + passes_ps),
            dense_pair_fs=dimensions.num_dense_layers * pair_fs,
        ),
        experts=ExpertsCost(
            fixed_ns=200_000 * waiting if device.cores else 60_000,
            expert_ns=read_ns(dimensions.expert_weights),
            pair_ps=compute_ps(2 * dimensions.expert_weights, _GROUPED_PERMILLE) + glue_ps,
            row_ps=shape.top_k * 1000,
            tile_rows=4 if device.cores else 64,
            sliced_permille=0 if device.cores else 350,
        ),
        dispatch=exchange(row_bytes),
        combine=exchange(shape.hidden * sum_bytes),
        host=_HOST_ON_CPU if device.cores else HostCost(),
        cores=CoresCost(1000 * device.cores, 200) if device.cores else CoresCost(),
        contention=ContentionCost(**_ON_CORES) if device.cores else ContentionCost(**_ONE_GPU) if ranks_per_device > 1 else ContentionCost(),
        sms=SmsCost(device.num_sms // ranks_per_device, ctas),
        gap_permille=1000 if device.cores else 750,
        start_ns=500_000 * waiting if device.cores else 1_300_000,
        finish_ns=300_000 if device.cores else 200_000,
    )
