"""The cost model by which a runtime plans: the measured one that the configuration names, or one derived from the
device.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import replace
from statistics import median_low
from typing import TYPE_CHECKING, Any

from pipemoe.arguments import look
from pipemoe.comm.exchange import encode_error, raise_first
from pipemoe.config import Config
from pipemoe.errors import ConfigError, PipemoeError
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import cpu, gpu_named
from pipemoe.plan.cost.dimensions import Dimensions
from pipemoe.plan.cost.file import cost_of_bytes, read_cost_bytes
from pipemoe.plan.cost.model import CostModel
from pipemoe.runtime.core_speed import slowness
from pipemoe.version import __version__
from pipemoe.warn_once import warn_once

if TYPE_CHECKING:
    import torch

    from pipemoe.wire import WireFormat
    from pipemoe.world.world import World


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
    num_sms: int | None = 0,
) -> tuple[CostModel, bool, dict[str, Any], PipemoeError | None]:
    """The cost model, whether it is from a file, the subject of a file that would hold it, and this rank's own error;
    every rank calls.

    graph_rows: most tokens whose attention is launched as a graph. graph_cuts: also where sequences are cut.
    num_sms: of this rank's experts; None if there are no experts, which is an error later.

    Costs derived for a CPU follow the speed of its cores, as all ranks measure it, once in a process.

    If some rank cannot read its file, all raise ConfigError. A file of another subject or version is refused with a
    warning, by rank 0 and by every rank whose file differs from rank 0's. Costs are compared like everything else that
    plans depend on, so it is an error on all ranks if one rank has another file.
    """
    import torch

    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    cores = len(os.sched_getaffinity(0))
    place = f"{socket.gethostname()} {world.device if world.device.type == 'cuda' else ''}"
    found, error = look(
        world.rank, "cost file", lambda: b"" if config.cost is None else read_cost_bytes(config.cost), ConfigError
    )
    file = found or b""
    if error is not None and not str(error).startswith("rank "):
        error = ConfigError(f"rank {world.rank}: cost file {error}")
    slow = slowness() if world.device.type == "cpu" else 1000
    own = [name, cores, place, num_sms, slow, hashlib.sha256(file).hexdigest(), encode_error(error).decode()]
    everywhere = [json.loads(p) for p in world.all_gather(json.dumps(own).encode(), "exchange of device names")]
    raise_first([text.encode() for *_, text in everywhere])
    name, cores, *_ = everywhere[0]  # rank 0 speaks for all: ranks must plan alike
    places, files = [row[2] for row in everywhere], [row[5] for row in everywhere]
    as_here: dict[str, Any] = {
        "graph_rows": graph_rows,
        "graph_cuts": graph_cuts,
        "num_sms": min((row[3] for row in everywhere if row[3] is not None), default=0),
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
        "pipemoe": __version__,
    }
    if config.cost is not None:
        try:
            return _as_here(cost_of_bytes(file, config.cost, subject), **as_here), True, subject, None
        except ConfigError as refusal:
            text, aloud = (
                f"cost file refused, defaults used: {refusal}",
                world.rank == 0 or files[world.rank] != files[0],
            )
            _, error = look(
                world.rank, "a warning made an error", lambda: warn_once(world, text, aloud=aloud), ConfigError
            )
    ranks_per_device = sharing if world.device.type == "cuda" else 1
    cost = default_cost(
        device,
        dimensions,
        world.size,
        value_bytes=dtype.itemsize,
        sum_bytes=sum_dtype.itemsize,
        ranks_per_device=ranks_per_device,
        row_bytes=wire.row_bytes,
        slowness=median_low(row[4] for row in everywhere),
    )
    return _as_here(cost, **as_here), False, subject, error


def _as_here(
    cost: CostModel,
    graph_rows: int,
    graph_cuts: bool,
    num_sms: int,
    ctas: int,
) -> CostModel:
    host = replace(cost.host, graph_rows=graph_rows, graph_cuts=int(graph_cuts))
    return replace(cost, host=host, sms=replace(cost.sms, num_sms=num_sms, ctas=ctas))


def model_key(dimensions: Dimensions) -> list[int]:
    """The sizes that decide a model's costs. The number of MoE layers is not among them."""
    shape = dimensions.shape
    dense = [dimensions.num_dense_layers, dimensions.dense_layer_weights] if dimensions.num_dense_layers else []
    return [
        shape.hidden,
        shape.intermediate,
        shape.num_experts,
        shape.top_k,
        dimensions.dense_weights,
        dimensions.pair_flops,
        *dense,
    ]
