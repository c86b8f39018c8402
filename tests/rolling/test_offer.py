"""Offers as they travel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.comm.gathering import BLOCK, pack_message
from pipemoe.errors import InputError, MismatchError
from pipemoe.rolling.offer import (
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    MAX_CHUNKS,
    MOST_ROUNDS,
    Chunk,
    Offer,
    decode_offers,
    encode_offer,
)

WORD = st.integers(0, 2**32 - 1)
FINGERPRINT = bytes(range(16))


@st.composite
def all_offers(draw) -> Offer:
    first = draw(st.integers(0, 2**63))
    chunk = st.builds(
        Chunk,
        WORD.map(lambda n: first + n),
        WORD,
        WORD,
        WORD,
        st.integers(0, MOST_ROUNDS),
        st.integers(LOWEST_PRIORITY, HIGHEST_PRIORITY),
    )
    chunks = draw(st.lists(chunk, max_size=MAX_CHUNKS))
    first = min((c.sequence for c in chunks), default=0)
    chunks = [c for c in chunks if c.sequence - first < 2**32]
    lags = draw(st.lists(st.integers(0, 2**16 - 1), max_size=8))
    return Offer(tuple(chunks), tuple(lags), draw(WORD), draw(st.booleans()), draw(st.booleans()))


@given(st.lists(all_offers(), min_size=1, max_size=8))
def test_offers_arrive_as_they_were_sent(offers):
    assert decode_offers([encode_offer(FINGERPRINT, offer) for offer in offers]) == offers


def test_the_longest_offer_of_eight_slots_travels_in_one_collective():
    chunks = tuple(Chunk(2**40 + n, 2**20, 2**21, 2**22, MOST_ROUNDS, -5) for n in range(MAX_CHUNKS))
    payload = encode_offer(FINGERPRINT, Offer(chunks, (2000,) * 8, 10**6))
    assert len(pack_message(payload, "round 1000000000 of slot 7 of the rolling steps")) <= BLOCK - 8


def test_what_is_too_large_for_its_place_is_as_large_as_can_be():
    sent = Offer((Chunk(5, 0, 1, 1, MOST_ROUNDS + 7),), (10**9, 3), 2**40)
    (offer,) = decode_offers([encode_offer(FINGERPRINT, sent)])
    assert offer == Offer((Chunk(5, 0, 1, 1, MOST_ROUNDS),), (2**16 - 1, 3), 2**32 - 1)


def test_one_rank_s_error_is_every_rank_s():
    payloads = [
        encode_offer(FINGERPRINT, Offer((Chunk(0, 0, 3, 3),), (1, 2)), e) for e in (None, InputError("too hot"))
    ]
    with pytest.raises(InputError, match="rank 1: too hot") as caught:
        decode_offers(payloads)
    assert caught.value.is_shared


def test_other_fingerprints_are_an_error():
    with pytest.raises(MismatchError, match="rank 0 has 00010203, rank 1 has 78787878"):
        decode_offers([encode_offer(FINGERPRINT, Offer()), encode_offer(b"x" * 16, Offer())])
