"""The world: one per process, and ranks that do not call the same."""

import pytest
import torch

import pipemoe
from pipemoe.comm import world as world_module
from pipemoe.errors import ConfigError, MismatchError
from tests.moe_cases import make_layers
from tests.runtime.sources import RowsSource, make_runtime

pytestmark = pytest.mark.mpi


def test_a_process_has_one_world(world):
    with pytest.raises(ConfigError, match=f"rank {world.rank}: .* a process has one world"):
        pipemoe.init()


def test_a_new_world_after_the_last_was_closed(world, monkeypatch):
    monkeypatch.setattr(world_module, "_open_world", None)  # that of all tests lies idle meanwhile
    for _ in range(2):
        with pipemoe.init("cpu", num_slots=1) as new:
            assert new.all_gather(bytes([world.rank])) == [bytes([rank]) for rank in range(world.size)]


@pytest.mark.parametrize("size", [0, 5000])
def test_ranks_that_call_different_things_are_told(world, size):
    if world.size == 1:
        pytest.skip("needs two ranks")
    odd = world.size - 1
    runtime = make_runtime(world, make_layers(1, world.device, torch.float32))

    def step():
        runtime.submit_step([3], RowsSource(3, runtime)).result()

    with pytest.raises(MismatchError, match=rf"'exchange of step \d+' on rank 0.*; 'counting' on rank {odd}$"):
        if world.rank == odd:
            world.all_gather(bytes(size), "counting")
        else:
            step()
    step()
