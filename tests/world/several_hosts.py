"""The program of test_several_hosts.py: the same steps as ranks of one host, and as ranks that believe to be on two."""

from __future__ import annotations

import sys

import torch

import pipemoe
from pipemoe.comm.mpi import MpiTransport
from pipemoe.world import meet
from tests.moe_cases import make_layers
from tests.runtime.sources import RowsSource, make_runtime


def sums_of_steps(world) -> list[torch.Tensor]:
    """This rank's rows of some steps, all layers."""
    layers, found = make_layers(3, world.device, torch.float32), []
    for mode in ("chunked", "per_rank"):
        runtime = make_runtime(world, layers, mode=mode, debug=True)
        for num_tokens in (3 + 20 * world.rank, 0 if world.rank == 1 else 5):
            source = RowsSource(num_tokens, runtime)
            runtime.submit_step([num_tokens] if num_tokens else [], source).result()
            found += source.sums
    return found


def main() -> None:
    torch.set_num_threads(1)
    with pipemoe.init("cpu", num_slots=2) as world:
        rank, on_one_host = world.rank, sums_of_steps(world)
        assert world.shared is not None
    host = meet._host()
    meet._host = lambda: f"{host} {rank // 2}"
    with pipemoe.init("cpu", num_slots=2) as world:
        on_two_hosts = sums_of_steps(world)
        assert world.shared is None and isinstance(world.transport, MpiTransport)
    for one, two in zip(on_one_host, on_two_hosts, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    print(f"rank {rank}: {len(on_two_hosts)} sums are the same", file=sys.stderr)


main()
