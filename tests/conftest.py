"""What several packages' tests share."""

import os

import pytest

# Read when CUDA starts, which looking for a GPU does.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def world():
    """This process's world: one rank under plain pytest, one of several under launch/mpirun.sh; on a GPU where there is one."""
    import torch

    import pipemoe

    torch.set_num_threads(1)
    return pipemoe.init(watchdog_seconds=30, grace_seconds=2)
