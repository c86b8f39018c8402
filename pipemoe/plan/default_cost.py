"""Costs derived from a device's peak rates and a model's dimensions, where nothing has been measured."""

from __future__ import annotations

from pipemoe.plan.cost import AttendCost, CostModel, ExchangeCost, ExpertsCost, HostCost, SharingCost
from pipemoe.plan.devices import Device
from pipemoe.plan.dimensions import Dimensions

# Of the peak, what sustained work reaches. GPU: on an H200 cuBLAS keeps 70 % of the dense peak, a copy 88 % of the bandwidth,
# grouped GEMMs of library kernels about half of the peak, NCCL's rings about 330 of 450 GB/s.
# A model's own modules also pass over each row some forty times in elementwise kernels.
_DENSE_PERMILLE, _GROUPED_PERMILLE, _ATTENTION_PERMILLE, _MEMORY_PERMILLE, _LINK_PERMILLE = 600, 500, 350, 800, 700
_PASSES = 40
_HOST_ON_CPU = HostCost(
    attend_ns=30_000, graph_rows=0, pack_ns=30_000, dispatch_ns=60_000, experts_ns=30_000, combine_ns=60_000, finish_ns=30_000, idle_ns=15_000
)
_ONE_GPU_LINK = 100 * 10**9  # bytes per second; measured between 2, 4, 8 ranks on one H200 with NCCL 2.30: 145, 98, 78 GB/s


def default_cost(
    device: Device, dimensions: Dimensions, num_ranks: int, *, value_bytes: int, sum_bytes: int, ranks_per_device: int = 1, row_bytes: int | None = None
) -> CostModel:
    """value_bytes: of weights and dispatched values. sum_bytes: of combined ones. ranks_per_device: ranks share a GPU's rates.
    row_bytes: of a token in a dispatch; None: of one in the model's dtype.

    Units of the result: see CostModel. Good to tell plans apart; `pipemoe tune` measures better ones.
    """
    shape = dimensions.shape
    flops, bandwidth = device.flops // ranks_per_device, device.memory_bandwidth // ranks_per_device
    link = _ONE_GPU_LINK if ranks_per_device > 1 else device.link_bandwidth * _LINK_PERMILLE // 1000

    def compute_ps(operations: int, permille: int) -> int:
        return operations * 10**15 // (flops * permille)

    def read_ns(num_values: int) -> int:
        return num_values * value_bytes * 10**12 // (bandwidth * _MEMORY_PERMILLE)

    def exchange(row_bytes: int) -> ExchangeCost:
        volume_ps = row_bytes * 10**12 // link if num_ranks > 1 else 0
        if device.cores:  # every peer copies every row, and MPI goes on only when polled
            return ExchangeCost(300_000, 50_000, max(num_ranks - 1, 0) * volume_ps)
        return ExchangeCost(25_000 * ranks_per_device if num_ranks > 1 else 5_000, 4_000, volume_ps)

    row_bytes = row_bytes or -(-(shape.hidden * value_bytes + 8 * shape.top_k) // 128) * 128
    # The experts also read and write each local row a few times: gathered rows, activations, sums.
    glue_ps = (4 * shape.hidden + 3 * shape.intermediate) * value_bytes * 10**15 // (bandwidth * _MEMORY_PERMILLE)
    return CostModel(
        attend=AttendCost(
            fixed_ns=400_000 if device.cores else 60_000,
            weights_ns=read_ns(dimensions.dense_weights),
            row_ps=compute_ps(2 * dimensions.dense_weights, _DENSE_PERMILLE) + read_ns(1000 * _PASSES * shape.hidden),
            pair_fs=compute_ps(1000 * dimensions.pair_flops, _ATTENTION_PERMILLE),
        ),
        experts=ExpertsCost(
            fixed_ns=200_000 if device.cores else 60_000,
            expert_ns=read_ns(dimensions.expert_weights),
            pair_ps=compute_ps(2 * dimensions.expert_weights, _GROUPED_PERMILLE) + glue_ps,
            row_ps=shape.top_k * 1000,
            tile_rows=4 if device.cores else 64,
        ),
        dispatch=exchange(row_bytes),
        combine=exchange(shape.hidden * sum_bytes),
        host=_HOST_ON_CPU if device.cores else HostCost(),
        sharing=SharingCost(1000 * device.cores, 200, 0, 1, 1000, 500) if device.cores else SharingCost(),
        finish_ns=300_000 if device.cores else 200_000,
    )
