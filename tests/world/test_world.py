"""The world: one per process, and ranks that do not call the same."""

import os
import threading
import time

import pytest
import torch

import pipemoe
from pipemoe.comm.shared import memory
from pipemoe.errors import ConfigError, InputError, MismatchError
from pipemoe.world import connection as connection_module
from pipemoe.world import meet as meet_module
from pipemoe.world import world as world_module
from pipemoe.world.shared_host import VARIABLE
from pipemoe.world.warm_up import WarmUp
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


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_for_threads(num_threads: int) -> None:
    """Those of a world end soon after it was closed."""
    deadline = time.monotonic() + 20
    while threading.active_count() > num_threads:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.005)


def test_worlds_one_after_another_leave_nothing(world, monkeypatch):
    """But what the process keeps for the next one: communicators, and the last side channel."""
    monkeypatch.setattr(world_module, "_open_world", None)
    seen = []
    for _ in range(12):
        with pipemoe.init("cpu", num_slots=2) as new:
            new.all_gather(b"")
        seen.append((num_open_files(), len(meet_module._communicators._pairs) if world.size > 1 else 0))
        if len(seen) == 2:
            num_threads = threading.active_count()
    assert seen[2:] == [seen[1]] * 10
    wait_for_threads(num_threads)


def test_an_init_that_fails_half_way_leaves_room_for_the_next(world, monkeypatch):
    if world.size == 1:
        pytest.skip("needs two ranks")
    monkeypatch.setattr(world_module, "_open_world", None)
    monkeypatch.setenv(VARIABLE, "mpi")
    with pipemoe.init("cpu", num_slots=1):
        pass
    num_threads, num_files = threading.active_count(), num_open_files()

    class NoRoom(WarmUp):
        def __init__(self, rank, size, device):
            if rank == size - 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            super().__init__(rank, size, device)

    with monkeypatch.context() as patch:
        patch.setattr(connection_module, "WarmUp", NoRoom)
        for _ in range(2):
            with pytest.raises(ConfigError, match=rf"^rank {world.size - 1}: out of memory at set-up .*can't allocate"):
                pipemoe.init("cpu", num_slots=1)
    assert world_module._open_world is None and num_open_files() == num_files
    wait_for_threads(num_threads)
    with pipemoe.init("cpu", num_slots=1) as new:
        assert len(new.all_gather(b"")) == world.size


def test_a_forked_child_of_a_world_of_one_may_start_its_own(world, monkeypatch):
    """Of a larger one: tests/faults/test_lives.py."""
    if world.size > 1 or not hasattr(os, "fork"):
        pytest.skip("for one rank")
    monkeypatch.setattr(world_module, "_open_world", world)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            world.all_gather(b"")
        except InputError as error:
            with pipemoe.init("cpu") as own:
                os.write(write, f"{own.all_gather(b'own')} {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    assert said.startswith(f"[b'own'] rank 0: this process was forked from process {os.getpid()}"), said
    assert world.all_gather(b"mine") == [b"mine"]


def test_arguments_that_differ_are_an_error_on_every_rank(world, monkeypatch):
    if world.size == 1:
        pytest.skip("needs two ranks")
    monkeypatch.setattr(world_module, "_open_world", None)
    odd = world.size - 1
    with pytest.raises(MismatchError, match=f"^rank {odd}: num_slots is 2, but rank 0 has 1"):
        pipemoe.init("cpu", num_slots=2 if world.rank == odd else 1)


def test_memory_of_set_up_does_not_grow_with_the_square_of_the_ranks():
    """Buffers of the first use on 32 ranks: under 100 MB, on a GPU too."""
    for device, most in (("cpu", 5 << 20), ("cuda", 100 << 20)):
        sizes = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "zeros", lambda n, **kind: sizes.append(n))
            patch.setattr(torch.cuda, "synchronize", lambda device: None)
            WarmUp(0, 32, torch.device(device))
        assert 0 < sum(sizes) < most


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


def test_ranks_of_one_host_share_memory_unless_told_otherwise(world, monkeypatch, capfd):
    if world.size == 1:
        pytest.skip("needs two ranks")
    monkeypatch.setattr(world_module, "_open_world", None)
    for name, shares in (("auto", True), ("shared", True), ("mpi", False)):
        monkeypatch.setenv(VARIABLE, name)
        with pipemoe.init("cpu", num_slots=1) as new:
            assert (new.shared is not None) == shares
            assert new.all_gather(bytes([world.rank])) == [bytes([rank]) for rank in range(world.size)]
    assert "no shared memory" not in capfd.readouterr().err
    monkeypatch.setenv(VARIABLE, "wrong")
    with pytest.raises(ConfigError, match=f"{VARIABLE} is 'wrong'; it must be one of auto, shared, mpi"):
        pipemoe.init("cpu", num_slots=1)
    monkeypatch.setenv(VARIABLE, "mpi" if world.rank else "auto")
    with pytest.raises(MismatchError, match=VARIABLE):
        pipemoe.init("cpu", num_slots=1)


@pytest.mark.parametrize("where", ["in the kernel", "in taking it"])
def test_a_rank_that_cannot_share_memory_makes_all_use_mpi(world, monkeypatch, capfd, where):
    if world.size == 1:
        pytest.skip("needs two ranks")
    monkeypatch.setattr(world_module, "_open_world", None)

    def refuse(*arguments):
        raise OSError(12, "Cannot allocate memory")

    if world.rank == world.size - 1:
        if where == "in the kernel":
            monkeypatch.setattr(memory.os, "memfd_create", refuse)
        else:
            monkeypatch.setattr(memory, "refusal", lambda: None)
            monkeypatch.setattr(memory.os, "posix_fallocate", refuse)
    monkeypatch.setenv(VARIABLE, "auto")
    with pipemoe.init("cpu", num_slots=1) as new:
        assert new.shared is None
        runtime = make_runtime(new, make_layers(1, new.device, torch.float32))
        source = RowsSource(3, runtime)
        runtime.submit_step([3], source).result()
        assert torch.isfinite(source.sums[0]).all()
    said = capfd.readouterr().err
    if world.rank == 0:
        assert f"no shared memory between the ranks, so MPI moves their rows: rank {world.size - 1}: " in said
        assert "Cannot allocate memory" in said
    monkeypatch.setenv(VARIABLE, "shared")
    with pytest.raises(ConfigError, match=f"{VARIABLE} is 'shared', but rank {world.size - 1}: .*Cannot allocate"):
        pipemoe.init("cpu", num_slots=1)
