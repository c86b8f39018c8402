"""Messages of a gathering: what every rank makes of all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.comm.gathering import pack_message, unpack_messages
from pipemoe.errors import MismatchError


@given(
    st.lists(st.binary(max_size=20), min_size=1, max_size=5),
    st.one_of(
        st.text(st.characters(), max_size=20),
        st.text(st.characters(), min_size=1, max_size=3).map(lambda unit: 100_000 * unit),
    ),
)
def test_payloads_come_through(payloads, doing):
    assert unpack_messages([pack_message(payload, doing) for payload in payloads]) == payloads


def test_ranks_that_meet_over_different_things_are_named():
    messages = [
        pack_message(b"a", "step 1"),
        pack_message(b"a", "all_gather"),
        pack_message(b"", "step 1"),
        pack_message(b"a", "step 2"),
    ]
    with pytest.raises(MismatchError, match="meet: 'step 1' on rank 0, 2; 'all_gather' on rank 1; 'step 2' on rank 3$"):
        unpack_messages(messages)
