"""What a rank offers to one round of one slot, and how that travels.

An offer is a promise: what it names has its keys, values and buffers reserved, and travels if it is admitted, whatever
happens to its request meanwhile.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from pipemoe.comm.exchange import encode_error, raise_first, shared
from pipemoe.errors import MismatchError, PipemoeError

MAX_CHUNKS = 20  # of one offer, so that it fits gathering.BLOCK beside the words that a gathering carries
MOST_ROUNDS = 2**16 - 1  # that an age can count
MOST_TOKENS = 2**32 - 1  # of a sequence
LOWEST_PRIORITY, HIGHEST_PRIORITY = -128, 127
_MOST_LAG = 2**16 - 1

# fingerprint, bytes of the error's text, leaving, patient, waiting tokens, first sequence, chunks, slots
_HEADER = struct.Struct("<16sI??IQBB")
_CHUNK = struct.Struct("<IIIIHb")  # sequence (behind the first), start, stop, length, age, priority


class Chunk(NamedTuple):
    """Tokens [start, stop) of one of a rank's sequences."""

    sequence: int  # this rank's number of it, growing in the order of submission
    start: int
    stop: int
    length: int  # of the whole sequence
    age: int = 0  # rounds of this slot in which the sequence was offered and not admitted, since its last chunk
    priority: int = 0  # higher goes first

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def is_last(self) -> bool:
        return self.stop == self.length


class Offer(NamedTuple):
    """One rank's part in agreeing on a round.

    chunks: in the order in which the rank would have them, at most MAX_CHUNKS, each of another sequence. lags: per
    slot, how long the round under way has taken, in thousandths of its predicted time; 0 if none is under way.
    waiting_tokens: on this rank, behind these chunks: on offer in this slot, and in the queue of all slots. leaving:
    the rank has nothing more for this slot and never will have. patient: its chunks may wait for other ranks to have
    some too (policy lockstep_delayed).
    """

    chunks: tuple[Chunk, ...] = ()
    lags: tuple[int, ...] = ()
    waiting_tokens: int = 0
    leaving: bool = False
    patient: bool = False


def encode_offer(fingerprint: bytes, offer: Offer, error: PipemoeError | None = None) -> bytes:
    """One rank's message. fingerprint: 16 bytes, of all that admission and plan depend on. error: what keeps this rank
    from taking part in any round; every rank raises it. The error of one request is never given here.
    """
    text = encode_error(error)
    first = min((c.sequence for c in offer.chunks), default=0)
    waiting = min(offer.waiting_tokens, 2**32 - 1)
    counts = (waiting, first, len(offer.chunks), len(offer.lags))
    return b"".join(
        (
            _HEADER.pack(fingerprint, len(text), offer.leaving, offer.patient, *counts),
            struct.pack(f"<{len(offer.lags)}H", *(min(lag, _MOST_LAG) for lag in offer.lags)),
            *(
                _CHUNK.pack(c.sequence - first, c.start, c.stop, c.length, min(c.age, MOST_ROUNDS), c.priority)
                for c in offer.chunks
            ),
            text,
        )
    )


def decode_offers(payloads: Sequence[bytes]) -> list[Offer]:
    """All ranks' offers. Raises the same on every rank: the first rank's error, or MismatchError if fingerprints
    differ.
    """
    headers = [_HEADER.unpack_from(payload) for payload in payloads]
    raise_first([payload[len(payload) - n :] if n else b"" for payload, (_, n, *_) in zip(payloads, headers)])
    if len({fingerprint for fingerprint, *_ in headers}) > 1:
        found = ", ".join(f"rank {rank} has {header[0].hex()[:8]}" for rank, header in enumerate(headers))
        raise shared(MismatchError(f"the ranks differ in configuration, model or checkpoint: {found}"))
    offers = []
    for payload, (_, _, leaving, patient, waiting, first, num_chunks, num_slots) in zip(payloads, headers):
        lags = struct.unpack_from(f"<{num_slots}H", payload, _HEADER.size)
        at = _HEADER.size + 2 * num_slots
        numbers = _CHUNK.iter_unpack(payload[at : at + num_chunks * _CHUNK.size])
        chunks = tuple(Chunk(first + sequence, *others) for sequence, *others in numbers)
        offers.append(Offer(chunks, lags, waiting, leaving, patient))
    return offers
