"""What several packages' tests share."""

from __future__ import annotations

import gc
import os

import pytest

from tests.hosts import pretend_hosts_if_told

# Read when CUDA starts, which looking for a GPU does.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


_stderr = 2


def pytest_configure() -> None:
    """What pytest captures of a test is lost when a rank ends the process inside it; its last words go here."""
    global _stderr
    _stderr = os.dup(2)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none."""
    import torch

    gc.collect()  # what has been imported stays; from now on it is not gone through for garbage
    gc.freeze()
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def world():
    """This process's world: one rank under plain pytest, one of several under launch/mpirun.sh; on a GPU where there is
    one.
    """
    import torch

    import pipemoe

    torch.set_num_threads(1)
    pretend_hosts_if_told()
    world = pipemoe.init(watchdog_seconds=30, grace_seconds=2)

    def say_why() -> None:
        test, error = os.environ.get("PYTEST_CURRENT_TEST"), world.conductor.failure
        os.write(_stderr, f"\n{test}: {type(error).__name__}: {error}\n".encode())

    world.conductor.on_failure.append(say_why)
    return world
