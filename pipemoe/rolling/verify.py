"""A proof that rounds took what was offered, as promised. Each property is checked from its definition, not from how
admission works.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from pipemoe.errors import PlanError
from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.offer import MAX_CHUNKS, Chunk, Offer


class Round(NamedTuple):
    """What the ranks offered to a round of a slot, and what it admitted; by rank."""

    slot: int
    offers: tuple[Offer, ...]
    admitted: tuple[tuple[Chunk, ...], ...]


class _Progress(NamedTuple):
    """A sequence that is on offer: tokens admitted, all its tokens, and the age that its next chunk must have."""

    at: int
    length: int
    age: int


class _Known(NamedTuple):
    """What earlier rounds say of a rank's sequences."""

    open: dict[int, dict[int, _Progress]]  # by slot and sequence
    slot_of: dict[int, int]  # of every sequence ever offered
    left: set[int]  # slots


def verify_rolling(
    history: Sequence[Round],
    settings: RollingSettings,
    num_slots: int,
    *,
    is_complete: bool = False,
    cancelled: Collection[tuple[int, int]] = (),
) -> None:
    """Prove the properties of rolling steps for rounds of all slots, each slot's in order; raise PlanError naming the
    first that does not hold.

    is_complete: nothing is still to come: all ranks have left, and every sequence that was offered has ended.
    cancelled: (rank, sequence) that need not end.
    """
    ranks: list[_Known] = []
    ended: set[int] = set()
    gone: dict[int, set[int]] = defaultdict(set)
    for rank, sequence in cancelled:
        gone[rank].add(sequence)
    for index, record in enumerate(history):
        where = f"round {index} of the history (slot {record.slot})"
        ranks += [_Known({slot: {} for slot in range(num_slots)}, {}, set()) for _ in record.offers[len(ranks) :]]
        for rank, (known, offer) in enumerate(zip(ranks, record.offers)):
            _sequences_go_on(known, record.slot, offer, gone[rank], f"{where}: rank {rank}")
            _leaves_for_good(known, record.slot, offer, f"{where}: rank {rank}")
        _admitted_as_offered(record, settings, num_slots, where)
        _within_budgets(record, settings, where)
        _nobody_starves(record, settings, where)
        if record.slot in ended:
            _fail("leaves for good", f"{where} comes after one in which all ranks left")
        if all(offer.leaving for offer in record.offers):
            ended.add(record.slot)
        for known, offer, admitted in zip(ranks, record.offers, record.admitted):
            _follow(known, record.slot, offer, admitted)
    if is_complete and len(ended) < num_slots:
        _fail("leaves for good", f"only slots {sorted(ended)} of {num_slots} have ended")


def _fail(name: str, text: str) -> None:
    raise PlanError(f"{name}: {text}")


def _sequences_go_on(known: _Known, slot: int, offer: Offer, cancelled: Collection[int], where: str) -> None:
    """A sequence is offered once a round, in one slot, from where it was admitted to, at its age; and once offered, it
    is in every offer until it has ended.
    """
    name = "sequences go on"
    offered = {chunk.sequence for chunk in offer.chunks}
    if len(offered) < len(offer.chunks):
        _fail(name, f"{where} offers a sequence twice")
    for chunk in offer.chunks:
        before = known.open[slot].get(chunk.sequence)
        if before is None and chunk.sequence in known.slot_of:
            _fail(name, f"{where} offers {chunk}, which has ended, or is slot {known.slot_of[chunk.sequence]}'s")
        elif _Progress(chunk.start, chunk.length, chunk.age) != (before or _Progress(0, chunk.length, 0)):
            _fail(name, f"{where} offers {chunk}, which was at {before}")
    for sequence, progress in known.open[slot].items():
        if sequence not in offered and sequence not in cancelled:
            _fail(name, f"{where} no longer offers sequence {sequence}, which is at {progress}")


def _leaves_for_good(known: _Known, slot: int, offer: Offer, where: str) -> None:
    """A rank that has said of a slot that it leaves offers it nothing, and goes on saying so."""
    if slot in known.left and not offer.leaving:
        _fail("leaves for good", f"{where} has left, and comes back")
    if offer.leaving:
        known.left.add(slot)
        if offer.chunks:
            _fail("leaves for good", f"{where} leaves, and offers {offer.chunks[0]}")


def _admitted_as_offered(record: Round, settings: RollingSettings, num_slots: int, where: str) -> None:
    """A round admits chunks that are offered to it, each once; shorter ones only where sequences may be cut."""
    name = "admitted as offered"
    if len(record.admitted) != len(record.offers):
        _fail(name, f"{where}: {len(record.admitted)} ranks of {len(record.offers)}")
    for rank, (offer, admitted) in enumerate(zip(record.offers, record.admitted)):
        offered = {chunk.sequence: chunk for chunk in offer.chunks}
        for chunk in admitted:
            whole = offered.pop(chunk.sequence, None)
            if whole is None:
                _fail(name, f"{where}: rank {rank} did not offer {chunk}, or it is admitted twice")
            elif chunk._replace(stop=whole.stop) != whole or not chunk.start < chunk.stop <= whole.stop:
                _fail(name, f"{where}: rank {rank} offered {whole}, and {chunk} is admitted")
            elif chunk != whole and not settings.cuts_in(record.slot, num_slots):
                _fail(name, f"{where}: rank {rank}: {chunk} is a part of {whole}, which goes whole in this slot")


def _within_budgets(record: Round, settings: RollingSettings, where: str) -> None:
    """No more tokens than the settings allow, of a sequence, of a rank and of all ranks; no more chunks in an offer."""
    name = "within budgets"
    total = 0
    for rank, (offer, admitted) in enumerate(zip(record.offers, record.admitted)):
        tokens = sum(chunk.tokens for chunk in admitted)
        total += tokens
        if len(offer.chunks) > MAX_CHUNKS:
            _fail(name, f"{where}: rank {rank} offers {len(offer.chunks)} chunks")
        if tokens > settings.max_tokens_per_round:
            _fail(name, f"{where}: {tokens} tokens of rank {rank}, more than {settings.max_tokens_per_round}")
    if total > settings.max_round_rows:
        _fail(name, f"{where}: {total} rows, more than {settings.max_round_rows}")


def _nobody_starves(record: Round, settings: RollingSettings, where: str) -> None:
    """Of those that waited for too long, one that waited longest goes; and nobody waits longer than promised."""
    name = "nobody starves"
    ages = {(rank, c.sequence): c.age for rank, offer in enumerate(record.offers) for c in offer.chunks}
    oldest, bound = max(ages.values(), default=0), settings.longest_wait(len(record.offers))
    if oldest > bound:
        _fail(name, f"{where}: a sequence waits for {oldest} rounds, more than {bound}")
    goes = {(rank, c.sequence) for rank, admitted in enumerate(record.admitted) for c in admitted}
    if oldest >= settings.most_rounds_waited and not any(ages[who] == oldest for who in goes):
        _fail(name, f"{where}: somebody has waited for {oldest} rounds, and goes behind others")


def _follow(known: _Known, slot: int, offer: Offer, admitted: Sequence[Chunk]) -> None:
    sequences = known.open[slot]
    sequences.clear()
    for chunk in offer.chunks:
        known.slot_of[chunk.sequence] = slot
        sequences[chunk.sequence] = _Progress(chunk.start, chunk.length, chunk.age + 1)
    for chunk in admitted:
        sequences[chunk.sequence] = _Progress(chunk.stop, chunk.length, 0)
        if chunk.is_last:
            del sequences[chunk.sequence]
