"""The program of test_several_hosts.py: the same steps as ranks of one host, and as ranks that believe to be on more.

Arguments: the ranks' hosts, as tests.hosts names them, and the same again for further runs.
"""

from __future__ import annotations

import sys

import torch

import pipemoe
from tests.hosts import pretend_hosts
from tests.moe_cases import TOKEN_COUNTS, make_layers
from tests.runtime.sources import RowsSource, make_runtime


def sums_of_steps(world) -> list[torch.Tensor]:
    """This rank's rows of some steps, all layers."""
    layers, found = make_layers(3, world.device, torch.float32), []
    for options in ({"mode": "chunked"}, {"mode": "per_rank"}, {"mode": "pipelined", "deterministic": True}):
        runtime = make_runtime(world, layers, debug=True, **options)
        for counts in TOKEN_COUNTS[:3]:
            num_tokens = counts[world.rank % len(counts)]
            source = RowsSource(num_tokens, runtime)
            runtime.submit_step([num_tokens] if num_tokens else [], source).result()
            found += source.sums
    return found


def main(*all_names: str) -> None:
    torch.set_num_threads(1)
    with pipemoe.init("cpu", num_slots=2) as world:
        rank, on_one_host = world.rank, sums_of_steps(world)
        assert world.shared_by_all is not None
    for names in all_names:
        pretend_hosts(names)
        with pipemoe.init("cpu", num_slots=2) as world:
            here = [r for r in range(world.size) if names[r] == names[rank]]
            shares = len(set(names)) < world.size
            assert world.shared_by_all is None
            assert (list(world.shared.ranks_here) if shares else world.shared) == (here if shares else None)
            on_hosts = sums_of_steps(world)
        for one, other in zip(on_one_host, on_hosts, strict=True):
            # If ranks share memory, an owner adds up in rank order, wherever the ranks are; MPI does as it likes.
            assert torch.equal(one, other) if shares else torch.allclose(one, other, rtol=1e-5, atol=1e-5)
        print(f"rank {rank}: {len(on_hosts)} sums are the same on {names}", file=sys.stderr)


main(*sys.argv[1:])
