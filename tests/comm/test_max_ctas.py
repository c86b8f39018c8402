"""The default of NCCL_MAX_CTAS leaves room wherever one thread block per communicator does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.comm.nccl import default_max_ctas
from pipemoe.errors import ConfigError
from pipemoe.plan.room import Room


@pytest.mark.parametrize(
    "num_sms, num_slots, ranks, ctas", [(132, 4, 1, 8), (132, 1, 1, 8), (108, 4, 1, 6), (32, 2, 4, 1), (16, 4, 8, 1)]
)
def test_known_devices(num_sms, num_slots, ranks, ctas):
    assert default_max_ctas(num_sms, num_slots, ranks) == ctas


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 8))
def test_room_where_there_is_any(num_sms, num_slots, ranks):
    try:
        Room(num_sms, ctas=1, ranks_on_device=ranks).check(num_slots)
    except ConfigError:
        return
    Room(num_sms, default_max_ctas(num_sms, num_slots, ranks), ranks_on_device=ranks).check(num_slots)
