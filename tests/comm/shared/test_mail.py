"""All-gathers over shared memory, of messages of any size, several under way at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.comm.shared.mail import BLOCK, Mail
from pipemoe.errors import MismatchError
from tests.comm.shared.shared_ranks import memories, on_ranks

SIZES = st.sampled_from([0, 1, 100, BLOCK - 50, BLOCK, 2 * BLOCK + 1, 3 * BLOCK])


def mails(num_ranks):
    of_ranks = memories(num_ranks, Mail.num_bytes())
    return [Mail(rank, of_ranks, lambda: None) for rank in range(num_ranks)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(SIZES, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_every_rank_gets_all_messages(sizes):
    """sizes: [gathering][rank]. All gatherings are started before the first is looked at."""
    num_ranks = len(sizes[0])
    made = mails(num_ranks)
    wanted = [[bytes([rank + 1]) * size for rank, size in enumerate(of_ranks)] for of_ranks in sizes]

    def run(rank):
        gatherings = [made[rank].start(message[rank], f"number {n}") for n, message in enumerate(wanted)]
        while not all([gathering.done() for gathering in gatherings]):
            pass
        return [gathering.payloads for gathering in gatherings]

    assert on_ranks(num_ranks, run) == [wanted] * num_ranks


def test_nothing_is_done_before_all_have_posted():
    first, second = mails(2)
    wants = []
    first._wants = wants.append
    gathering = first.start(b"a", "meeting")
    assert not gathering.done() and wants == [1]
    other = second.start(b"b", "meeting")
    assert gathering.done() and other.done()
    assert gathering.payloads == other.payloads == [b"a", b"b"]


def test_ranks_that_gather_for_different_things_all_raise():
    first, second = mails(2)
    gatherings = [first.start(b"", "this"), second.start(b"", "that")]
    for gathering in gatherings:
        with pytest.raises(MismatchError, match="'this' on rank 0; 'that' on rank 1"):
            gathering.done()
