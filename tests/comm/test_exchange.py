"""Messages of a step: what every rank makes of all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.comm.exchange import (
    check_equal,
    decode_step,
    encode_error,
    encode_step,
    pack_shared,
    raise_first,
    unpack_shared,
)
from pipemoe.errors import FatalError, InputError, MismatchError, ModelError

SAME = b"f" * 16


@given(st.lists(st.lists(st.integers(1, 2**40), max_size=200), min_size=1, max_size=8))
def test_lengths_come_through(lengths_of):
    payloads = [encode_step(SAME, tuple(lengths), None) for lengths in lengths_of]
    assert decode_step(payloads).lengths == tuple(tuple(lengths) for lengths in lengths_of)


def test_the_lowest_ranks_error_is_raised():
    payloads = [
        encode_step(SAME, (5,), None),
        encode_step(SAME, (), InputError("rank 1: bad x")),
        encode_step(SAME, (), ModelError("rank 2: y")),
    ]
    with pytest.raises(InputError, match="^rank 1: bad x$"):
        decode_step(payloads)


def test_errors_that_every_rank_knows_are_raised_on_none():
    known, unknown = (
        [encode_step(SAME, (r + 1,), InputError(f"rank {r}: x"), is_known=is_known or r == 0) for r in range(2)]
        for is_known in (True, False)
    )
    assert decode_step(known).lengths == ((1,), (2,))
    with pytest.raises(InputError, match="^rank 0: x$"):
        decode_step(unknown)


def test_an_error_without_a_rank_gets_one_and_a_foreign_class_becomes_a_model_error():
    with pytest.raises(ModelError, match="^rank 1: boom$"):
        raise_first([b"", encode_error(FatalError("boom"))])


def test_different_fingerprints_are_told_apart():
    with pytest.raises(
        MismatchError, match="differ in configuration, model or checkpoint: rank 0 has 66.*, rank 1 has 67"
    ):
        decode_step([encode_step(SAME, (), None), encode_step(b"g" * 16, (), None)])


def test_the_differing_setting_is_named():
    with pytest.raises(MismatchError, match="rank 2: mode is per_rank, but rank 0 has padded"):
        check_equal([{"mode": "padded"}, {"mode": "padded"}, {"mode": "per_rank"}])
    with pytest.raises(MismatchError, match="rank 1: mode is missing"):
        check_equal([{"mode": "padded"}, {}])


def test_what_a_step_leaves_out_must_be_the_same():
    with pytest.raises(
        MismatchError, match=r"rank 1: what a step leaves out \(only\) is communication, but rank 0 has nothing"
    ):
        decode_step([encode_step(SAME, (1,), None), encode_step(SAME, (1,), None, left_out=2)])


def test_what_is_shared_comes_through_or_the_error():
    assert unpack_shared([pack_shared(payload, None) for payload in (b"", b"\1x")]) == [b"", b"\1x"]
    with pytest.raises(InputError, match="^rank 1: odd$"):
        unpack_shared([pack_shared(b"x", None), pack_shared(b"", InputError("odd"))])
