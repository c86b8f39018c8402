"""The program of test_lives: every rank starts a world, and its end, or that of its process, goes another way than
usual.

Arguments: the case, or several with commas, and a folder for what each rank writes on standard error (a launcher may
drop it).
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import types

import numpy as np

import pipemoe
from pipemoe import compiled
from pipemoe.errors import ConfigError, InputError, PipemoeError
from pipemoe.world.departure import departure
from tests.faults.detach import detach

WATCHDOG_SECONDS = 4.0  # a busy machine may hold a rank up for two seconds
CULPRIT = 1


def launched_rank() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))


def write_to(folder: str) -> None:
    log = os.open(f"{folder}/rank{launched_rank()}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, sys.stderr.fileno())


def start(**settings) -> pipemoe.World:
    return pipemoe.init(
        "cpu", **{"num_slots": 1, "watchdog_seconds": WATCHDOG_SECONDS, "grace_seconds": 0.5, **settings}
    )


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


# Ranks that do not come.


def absent_with_mpi() -> None:
    if launched_rank() == CULPRIT:
        from mpi4py import MPI  # noqa: F401

        signal.pause()
    start(setup_seconds=6.0)


def absent_without_mpi() -> None:
    if launched_rank() == CULPRIT:
        signal.pause()
    start(setup_seconds=6.0)


# From the good-bye to the end of the process.


def stopped_in_good_bye() -> None:
    world = start()
    if world.rank == CULPRIT:
        world.conductor.side_channel.say_good_bye = lambda *reason: stop()
    world.close()


def stopped_after_close() -> None:
    world = start()
    world.close()
    if world.rank == CULPRIT:
        stop()


def stopped_in_finalisation() -> None:
    world = start()
    if world.rank == CULPRIT:
        departure._watch_finalisation = lambda done: stop()
    world.close()


def killed_after_close() -> None:
    detach()
    world = start()
    world.close()
    if world.rank == CULPRIT:
        os.kill(os.getpid(), signal.SIGKILL)


def busy_after_close() -> None:
    world = start()
    world.close()
    if world.rank == CULPRIT:  # no other thread of this process runs meanwhile, nor says that it is alive
        ctypes.PyDLL(None).usleep(int(2 * WATCHDOG_SECONDS * 1e6))
    print(f"rank {world.rank} survived busy_after_close", flush=True)


# Errors that nobody catches.


def own_error_inside() -> None:
    with start() as world:
        if world.rank == CULPRIT:
            raise ValueError("planted inside")
        world.all_gather(b"", "something")


def own_error_at_the_top() -> None:
    world = start()
    if world.rank == CULPRIT:
        raise ValueError("planted at the top")
    world.all_gather(b"", "something")


def own_error_in_finally() -> None:
    world = start()
    try:
        if world.rank == CULPRIT:
            raise ValueError("planted before a finally")
        world.all_gather(b"", "something")
    finally:
        world.close()
        time.sleep(3.5 if world.rank == CULPRIT else 0.0)  # the traceback comes late


def shared_error() -> None:
    with start() as world:
        world.agree(InputError("planted for all") if world.rank == CULPRIT else None, {}, "a test")


def shared_error_of_init() -> None:
    start(num_slots="many" if launched_rank() == CULPRIT else 1)


def shared_error_caught_by_the_first() -> None:
    world = start()
    with contextlib.suppress(InputError if world.rank == 0 else ConfigError):
        world.agree(InputError("planted for all") if world.rank == CULPRIT else None, {}, "a test")


# What can be wrong with arguments, of one rank or all; and worlds after that.


def bad_arguments() -> None:
    cases = [
        *(
            {"watchdog_seconds": value}
            for value in (float("nan"), float("inf"), 0, -1, "60", True, None, np.array([1.0, 2.0]))
        ),
        *({"grace_seconds": value} for value in ("5", -0.1, float("nan"))),
        *({"setup_seconds": value} for value in (0, [600], 1e30)),
        *({"num_slots": value} for value in ("4", 0, 2000, True, 2.0, np.array([1, 1]))),
    ]
    for culprits in ({0, 1}, {CULPRIT}):
        for case in cases:
            name = next(iter(case))
            try:
                start(**case if launched_rank() in culprits else {})
            except ConfigError as error:
                assert f"{name} is " in str(error), error
            else:
                raise AssertionError(f"{case} accepted")
    for device in ("gpu", 0, None, np.array(["cpu", "cuda"])):
        try:
            pipemoe.init(device)
        except ConfigError as error:
            assert "device is " in str(error), error
        else:
            raise AssertionError(f"{device!r} accepted")
    with start() as world:
        assert len(world.all_gather(b"")) == 2
        print(f"rank {world.rank} survived bad_arguments", flush=True)


# Forks.


def answer(number: int) -> int:
    return number + 1


def status_of(child) -> int:
    """Of a child that runs `child` and ends as any program does."""
    pid = os.fork()
    if pid == 0:
        child()
        sys.exit(7)
    for _ in range(1000):  # a child that hangs is an error, not a hang
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


def forks() -> None:
    world = start(watchdog_seconds=10.0)

    def uses() -> None:
        for call in (lambda: world.all_gather(b""), lambda: world.agree(None, {}, "x"), lambda: pipemoe.init("cpu")):
            try:
                call()
            except PipemoeError as error:
                assert f"forked from process {os.getppid()}" in str(error), error
            else:
                raise AssertionError("a child used its parent's world")
        with world:
            pass
        world.close()

    assert status_of(lambda: None) == 7
    assert status_of(uses) == 7
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(answer, range(4)) == [1, 2, 3, 4]
    assert world.all_gather(bytes([world.rank])) == [b"\x00", b"\x01"]
    world.close()
    print(f"rank {world.rank} survived forks", flush=True)


def without_torch() -> None:
    """Of torch, a world on the host needs two names. Importing it would take each rank three seconds."""
    torch = types.ModuleType("torch")
    torch.device = lambda name: types.SimpleNamespace(type=name)
    torch.set_grad_enabled = lambda is_on: None
    sys.modules["torch"] = torch


def main(cases: str, folder: str) -> None:
    write_to(folder)
    if not cases.startswith("own_error"):  # there rank 1 would end all before rank 0 can say what it has heard
        without_torch()
    compiled.PATIENCE_SECONDS = 600.0  # a busy machine may load kept code for so long that it would say so
    for case in cases.split(","):
        globals()[case]()


if __name__ == "__main__":
    main(*sys.argv[1:])
