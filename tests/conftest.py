"""Fixtures that several packages' tests share."""

import pytest


@pytest.fixture(scope="session")
def world():
    """This process's world: one rank under plain pytest, one of several under launch/mpirun.sh; on a GPU where there is one."""
    import os

    import torch

    import pipemoe

    torch.set_num_threads(1)
    return pipemoe.init(num_slots=int(os.environ.get("PIPEMOE_NUM_SLOTS", 4)), watchdog_seconds=30, grace_seconds=2)
