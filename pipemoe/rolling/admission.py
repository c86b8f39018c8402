"""Which of the offered chunks a round takes. Every rank computes it from the same offers, so every rank gets the same.

No clock, no load of other slots, nothing of the rank itself: only offers, settings and the number of the round.

- Chunks go in order: those that waited too long, by age; then by priority; sequences that have begun before new ones;
  older before younger; then as each rank wished, the ranks in turn. What does not fit is passed over.
- A short slot takes less while the round of a longer slot is over twice its predicted time, nothing from three times
  on: the streams of short slots go first on a GPU, and would starve the long one. Chunks that waited too long go all
  the same, so a long round that stands still holds up nobody for ever.
- The chunk that waited longest of those that waited too long always goes. So nobody waits for more than
  `longest_wait` rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipemoe.arguments import shown
from pipemoe.errors import ConfigError, PlanError
from pipemoe.rolling.offer import MAX_CHUNKS, MOST_ROUNDS, Chunk, Offer

POLICIES = ("rolling", "lockstep", "lockstep_delayed", "lockstep_balanced")
_LATE, _TOO_LATE = 2000, 3000  # thousandths of its predicted time, for a longer slot's round


class RollingSettings(NamedTuple):
    """How rounds are made up; the same on all ranks.

    max_tokens_per_round: of one rank, in one round of any slot. max_round_rows: of all ranks together.
    short_round_rows: the same for all slots but the last, unless a single chunk is longer. chunk_tokens: the longest
    chunk. most_rounds_waited: a sequence offered so often in vain goes before all others. cuts: may a sequence be cut
    into chunks? Else it goes whole. policy: "rolling"; or one slot for everything: "lockstep" and "lockstep_balanced",
    which differ in who is given a request, and "lockstep_delayed", where patient ranks wait for those without work.
    """

    max_tokens_per_round: int
    max_round_rows: int
    chunk_tokens: int
    most_rounds_waited: int = 32
    policy: str = "rolling"
    short_round_rows: int | None = None
    cuts: bool = True

    def checked(self) -> RollingSettings:
        """These settings. Raises ConfigError for what cannot work."""
        least = {"max_tokens_per_round": 1, "max_round_rows": 1, "chunk_tokens": 1, "most_rounds_waited": 1}
        if self.short_round_rows is not None:
            least["short_round_rows"] = 1
        for name in least:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is {shown(value)}; it must be a whole number of at least 1")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy is {shown(self.policy)}; it must be one of {', '.join(POLICIES)}")
        if self.chunk_tokens > self.max_tokens_per_round:
            raise ConfigError(
                f"chunk_tokens is {self.chunk_tokens}, more than max_tokens_per_round={self.max_tokens_per_round}"
            )
        if self.max_tokens_per_round > self.max_round_rows:
            raise ConfigError(
                f"max_tokens_per_round is {self.max_tokens_per_round}, more than max_round_rows={self.max_round_rows}"
            )
        if self.most_rounds_waited > MOST_ROUNDS // 2:
            raise ConfigError(f"most_rounds_waited is {self.most_rounds_waited}; it must be at most {MOST_ROUNDS // 2}")
        return self

    def num_slots(self, available: int) -> int:
        """Slots that the policy uses, of those that there are."""
        return available if self.policy == "rolling" else 1

    def cuts_in(self, slot: int, num_slots: int) -> bool:
        """May this slot take sequences in chunks? Short slots take them whole."""
        return self.cuts and slot == num_slots - 1

    def longest_chunk(self, slot: int, num_slots: int) -> int:
        """Tokens of the longest chunk that may be offered to this slot."""
        return self.chunk_tokens if self.cuts_in(slot, num_slots) else self.max_tokens_per_round

    def longest_wait(self, num_ranks: int) -> int:
        """No sequence is offered more often than this in vain: behind it then stand younger ones only."""
        return self.most_rounds_waited + num_ranks * MAX_CHUNKS - 1


class Admission:
    """Admission to the rounds of one slot."""

    def __init__(self, slot: int, num_slots: int, num_ranks: int, settings: RollingSettings) -> None:
        """Raises ConfigError for settings that cannot work."""
        self._slot, self._num_slots, self._num_ranks = slot, num_slots, num_ranks
        self._settings = settings.checked()
        self._cuts = settings.cuts_in(slot, num_slots)
        self._num_rounds = 0

    def admit(self, offers: Sequence[Offer]) -> tuple[tuple[Chunk, ...], ...]:
        """Per rank, the chunks of the next round, in the order in which its plan has them. A chunk may be shorter than
        it was offered, where sequences may be cut.

        Raises PlanError, the same on every rank, for an offer that no round could take.
        """
        self._check(offers)
        turn, self._num_rounds = self._num_rounds, self._num_rounds + 1
        taken: list[list[Chunk]] = [[] for _ in offers]
        if self._waits_for_others(offers):
            return tuple(map(tuple, taken))
        settings = self._settings
        left = [settings.max_tokens_per_round] * self._num_ranks
        rows = usual = settings.max_round_rows
        if self._slot < self._num_slots - 1:
            usual = min(rows, settings.short_round_rows or rows)
        usual = usual * self._share(offers) // 1000
        for rank, chunk in self._in_order(offers, turn):
            overdue = chunk.age >= settings.most_rounds_waited
            if not overdue and usual <= 0:
                continue
            is_first = rows == settings.max_round_rows
            room = min(left[rank], rows if overdue or is_first else min(rows, usual))
            if chunk.tokens > room:
                if room == 0 or not self._cuts:
                    continue
                chunk = chunk._replace(stop=chunk.start + room)
            taken[rank].append(chunk)
            left[rank] -= chunk.tokens
            rows -= chunk.tokens
            usual -= chunk.tokens
        return tuple(map(tuple, taken))

    def _check(self, offers: Sequence[Offer]) -> None:
        if len(offers) != self._num_ranks:
            raise PlanError(f"offers of {len(offers)} ranks; there are {self._num_ranks}")
        longest = self._settings.longest_chunk(self._slot, self._num_slots)
        for rank, offer in enumerate(offers):
            if len(offer.chunks) > MAX_CHUNKS:
                raise PlanError(f"rank {rank} offers {len(offer.chunks)} chunks, more than {MAX_CHUNKS}")
            if offer.leaving and offer.chunks:
                raise PlanError(f"rank {rank} offers chunks and says that it has none")
            for chunk in offer.chunks:
                if not 0 <= chunk.start < chunk.stop <= chunk.length or chunk.tokens > longest:
                    raise PlanError(f"rank {rank} offers {chunk}; a round takes at most {longest} tokens of a sequence")
                if not self._cuts and chunk.tokens != chunk.length:
                    raise PlanError(
                        f"rank {rank} offers {chunk} to slot {self._slot}, which takes whole sequences only"
                    )

    def _waits_for_others(self, offers: Sequence[Offer]) -> bool:
        """Policy lockstep_delayed: is there a rank without work, and nobody who has waited long enough for it?"""
        with_work = [offer for offer in offers if offer.chunks]
        idle = [offer for offer in offers if not offer.chunks and not offer.leaving]
        most = self._settings.most_rounds_waited
        return (
            self._settings.policy == "lockstep_delayed"
            and bool(idle)
            and all(offer.patient and all(chunk.age < most for chunk in offer.chunks) for offer in with_work)
        )

    def _share(self, offers: Sequence[Offer]) -> int:
        """Thousandths of its usual rows that this slot may take beside longer slots that may be late."""
        lag = max((lag for offer in offers for lag in offer.lags[self._slot + 1 : self._num_slots]), default=0)
        return max(0, min(1000, 1000 * (_TOO_LATE - lag) // (_TOO_LATE - _LATE)))

    def _in_order(self, offers: Sequence[Offer], turn: int) -> list[tuple[int, Chunk]]:
        most, num_ranks = self._settings.most_rounds_waited, self._num_ranks

        def key(item: tuple[int, int, Chunk]) -> tuple[int, ...]:
            position, rank, chunk = item
            after = (position, (rank + turn) % num_ranks)
            if chunk.age >= most:
                return 0, -chunk.age, *after
            return 1, -chunk.priority, chunk.start == 0, -chunk.age, *after

        items = [(p, rank, chunk) for rank, offer in enumerate(offers) for p, chunk in enumerate(offer.chunks)]
        return [(rank, chunk) for _, rank, chunk in sorted(items, key=key)]
