"""Which cost model a runtime plans by: the measured one that the configuration names, or one derived from the device."""

from __future__ import annotations

import json
import os
import socket
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipemoe.config import Config
from pipemoe.errors import ConfigError
from pipemoe.plan.cost import CostModel
from pipemoe.plan.cost_file import read_cost
from pipemoe.plan.default_cost import default_cost
from pipemoe.plan.devices import cpu, gpu_named
from pipemoe.plan.dimensions import Dimensions

if TYPE_CHECKING:
    import torch

    from pipemoe.comm.world import World
    from pipemoe.wire import WireFormat


def runtime_cost(
    world: World,
    dimensions: Dimensions,
    config: Config,
    dtype: torch.dtype,
    sum_dtype: torch.dtype,
    wire: WireFormat,
    *,
    graph_rows: int = 0,
    graph_cuts: bool = False,
    sliced_permille: int = 0,
    arrivals_permille: int = 0,
    num_sms: int | None = 0,
) -> tuple[CostModel, dict[str, Any]]:
    """The cost model and the subject of a file that holds it; every rank calls. graph_rows: most tokens whose attention is launched
    as a graph, graph_cuts: also of cut sequences. sliced_permille, arrivals_permille, num_sms: of the experts that run here
    (None: there are none, for want of something that is an error later).

    A file of another subject is refused with a warning. What ranks then plan by is compared like everything else that plans
    depend on, so a rank alone with another file is an error on all of them.
    """
    import torch

    import pipemoe

    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    cores = len(os.sched_getaffinity(0))
    place = f"{socket.gethostname()} {world.device if world.device.type == 'cuda' else ''}"
    gathered = [json.loads(p) for p in world.all_gather(json.dumps([name, cores, place, num_sms]).encode(), "exchange of device names")]
    name, cores, *_ = gathered[0]  # rank 0 speaks for all: ranks must plan alike
    places = [where for _, _, where, _ in gathered]
    as_here = {
        "graph_rows": graph_rows,
        "graph_cuts": graph_cuts,
        "sliced_permille": sliced_permille,
        "arrivals_permille": arrivals_permille,
        "num_sms": min((count for *_, count in gathered if count is not None), default=0),
        "ctas": world.ctas,
    }
    sharing = max(places.count(where) for where in places)
    device = gpu_named(name) if world.device.type == "cuda" else cpu(cores)
    subject = {
        "device": name,
        "cores": cores,
        "num_ranks": world.size,
        "ranks_per_device": sharing,
        "dtype": str(dtype),
        "sum_dtype": str(sum_dtype),
        **({} if wire.dtype == dtype else {"dispatch_dtype": str(wire.dtype)}),
        "combine": config.combine,
        "experts": config.experts,
        "model": model_key(dimensions),
        "torch": torch.__version__,
        "pipemoe": pipemoe.__version__,
    }
    if config.cost is not None:
        try:
            return _as_here(read_cost(config.cost, subject), **as_here), subject
        except ConfigError as error:
            warnings.warn(f"cost file refused, defaults used: {error}", stacklevel=2)
    ranks_per_device = sharing if world.device.type == "cuda" else 1
    cost = default_cost(
        device, dimensions, world.size, value_bytes=dtype.itemsize, sum_bytes=sum_dtype.itemsize, ranks_per_device=ranks_per_device, row_bytes=wire.row_bytes
    )
    return _as_here(cost, **as_here), subject


def _as_here(
    cost: CostModel, graph_rows: int, graph_cuts: bool, sliced_permille: int, arrivals_permille: int, num_sms: int, ctas: int
) -> CostModel:
    host = replace(cost.host, graph_rows=graph_rows, graph_cuts=int(graph_cuts))
    experts = replace(cost.experts, sliced_permille=sliced_permille, arrivals_permille=arrivals_permille)
    return replace(cost, host=host, experts=experts, sms=replace(cost.sms, num_sms=num_sms, ctas=ctas))


def model_key(dimensions: Dimensions) -> list[int]:
    """What of a model decides its costs; not how many MoE layers it has."""
    shape = dimensions.shape
    dense = [dimensions.num_dense_layers, dimensions.dense_layer_weights] if dimensions.num_dense_layers else []
    return [shape.hidden, shape.intermediate, shape.num_experts, shape.top_k, dimensions.dense_weights, dimensions.pair_flops, *dense]
