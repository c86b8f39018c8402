"""Which of the offered chunks a round takes. Every rank computes it from the same offers, so every rank gets the same.

No clock, no load of other slots, nothing of the rank itself: only offers, settings and the number of the round.

- Chunks go in order: those that waited too long, by age; then by priority; then by work per round waited (policy
  "rolling"), or as they came, what has begun before what is new (lockstep); then as each rank wished, the ranks in
  turn. What does not fit is passed over.
- A rolling round takes of each rank a share (`_Size`) of what waits on the rank with the most work: long prompts, which
  go last, come after two or three rounds of what was there, and where much waits, what rounds cost by themselves is a
  small share. But it takes at least some part, or a multiple, of what a round costs by itself, since smaller ones would
  mostly be that. All ranks may take as much as the one with the most work, since they work at the same time.
- A short slot takes less while the round of a longer slot is over twice its predicted time, nothing from three times
  on: the streams of short slots go first on a GPU, and would starve the long one. Chunks that waited too long go all
  the same, so a long round that stands still holds up nobody for ever.
- The chunk that waited longest of those that waited too long always goes. So nobody waits for more than
  `longest_wait` rounds.

By work per round waited the shortest goes first, until longer ones have waited in proportion: highest response ratio
next (Brinch Hansen, 1971).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

from pipemoe.arguments import shown
from pipemoe.errors import ConfigError, PlanError
from pipemoe.rolling.offer import MAX_CHUNKS, MOST_ROUNDS, Chunk, Offer

POLICIES = ("rolling", "lockstep", "lockstep_delayed", "lockstep_balanced")
_LATE, _TOO_LATE = 2000, 3000  # thousandths of its predicted time, for a longer slot's round
_FINE = 1 << 20  # so that a division by rounds waited tells works apart


class _Size(NamedTuple):
    """How much a rolling round takes of a rank, at the least, in thousandths: of what a round costs by itself, and of
    what waits.
    """

    of_fixed: int
    of_waiting: int


# Where rounds side by side gain, most of what one costs by itself costs nothing. Measured where ranks share a GPU.
_BESIDE_OTHERS = _Size(667, 400)
# In the only slot, and where short slots serve beside long rounds only: measured on shared cores, else by simulation.
_ALONE_ON_CORES, _ALONE, _BESIDE_LONG = _Size(8000, 500), _Size(2000, 400), _Size(2000, 300)


class RollingSettings(NamedTuple):
    """How rounds are made up; the same on all ranks.

    max_tokens_per_round: of one rank, in one round of any slot. max_round_rows: of all ranks together. chunk_tokens:
    the longest chunk. most_rounds_waited: a sequence offered so often in vain goes before all others. policy:
    "rolling"; or one slot for everything: "lockstep" and "lockstep_balanced", which differ in who is given a request,
    and "lockstep_delayed", where patient ranks wait for those without work. cuts: may a sequence be cut into chunks?
    Else it goes whole. fixed_rows: a round's fixed cost, in rows of one rank; 0: rounds and chunks take all they may.
    shares_cores: do ranks compute on cores that they share? pairs_per_row: pairs of a query and a key it may see that
    are as much work as one row; 0: none is. most_slots: that roll; 0: all that there are. beside_rows: short slots take
    new sequences only while a longer slot's round is at least so much work for some rank, in rows, or while a longer
    slot has no memory for more; 0: always.
    """

    max_tokens_per_round: int
    max_round_rows: int
    chunk_tokens: int
    most_rounds_waited: int = 32
    policy: str = "rolling"
    cuts: bool = True
    fixed_rows: int = 0
    shares_cores: bool = False
    pairs_per_row: int = 0
    most_slots: int = 0
    beside_rows: int = 0

    def checked(self) -> RollingSettings:
        """These settings. Raises ConfigError for what cannot work."""
        least = {"max_tokens_per_round": 1, "max_round_rows": 1, "chunk_tokens": 1, "most_rounds_waited": 1}
        least |= dict.fromkeys(("fixed_rows", "pairs_per_row", "most_slots", "beside_rows"), 0)
        for name, lowest in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise ConfigError(f"{name} is {shown(value)}; it must be a whole number of at least {lowest}")
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
        return min(available, self.most_slots or available) if self.policy == "rolling" else 1

    def cuts_in(self, slot: int, num_slots: int) -> bool:
        """May this slot take sequences in chunks? Short slots take them whole."""
        return self.cuts and slot == num_slots - 1

    def longest_chunk(self, slot: int, num_slots: int) -> int:
        """Tokens of the longest chunk that may be offered to this slot."""
        return self.chunk_tokens if self.cuts_in(slot, num_slots) else self.max_tokens_per_round

    def work(self, start: int, stop: int) -> int:
        """What tokens [start, stop) of a sequence cost, in rows."""
        pairs = (stop * (stop + 1) - start * (start + 1)) // 2
        return stop - start + (pairs // self.pairs_per_row if self.pairs_per_row else 0)

    def most_tokens(self, start: int, work: int) -> int:
        """How many tokens from `start` on are at most so much work."""
        if not self.pairs_per_row:
            return work
        of_first = 2 * (self.pairs_per_row + start) + 1
        return (isqrt(of_first**2 + 8 * self.pairs_per_row * work) - of_first) // 2

    def best_work(self, waiting: int, num_slots: int) -> int:
        """What a rank's part of a round should be if so much work waits on it, in rows. num_slots: that roll."""
        if not self.fixed_rows:
            return self.max_round_rows + waiting
        if num_slots > 1:
            size = _BESIDE_LONG if self.beside_rows else _BESIDE_OTHERS
        else:
            size = _ALONE_ON_CORES if self.shares_cores else _ALONE
        return -(-max(size.of_fixed * self.fixed_rows, size.of_waiting * waiting) // 1000)

    def most_on_offer(self, waiting: int, num_slots: int) -> int:
        """How many tokens a slot has on offer at most, to which the last sequence may come. waiting: on the rank.

        Beside slots that are always open it is a round's: what else waits is theirs. Else it is more, to choose from.
        """
        if num_slots == 1 or self.beside_rows:
            return 2 * self.max_tokens_per_round
        return min(self.max_tokens_per_round, self.best_work(waiting, num_slots))

    def longest_short(self, waiting: int) -> int:
        """Tokens of a sequence, at most, that may go through a short slot. waiting: tokens in the rank's queue.

        It costs no more than a round by itself; or half of what waits, so that under load all slots serve all.
        """
        if not self.fixed_rows:
            return self.chunk_tokens
        return min(self.max_tokens_per_round, self.most_tokens(0, max(self.fixed_rows, waiting // 2)))

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
        left, rows = [settings.max_tokens_per_round] * self._num_ranks, settings.max_round_rows
        budgets = [self._budget(offers)] * self._num_ranks
        for rank, chunk in self._in_order(offers, turn):
            room = min(left[rank], rows)
            if chunk.age < settings.most_rounds_waited:
                if budgets[rank] <= 0:
                    continue
                is_over = settings.work(chunk.start, chunk.stop) > budgets[rank]
                if is_over and self._cuts:
                    room = min(room, max(1, settings.most_tokens(chunk.start, budgets[rank])))
                elif is_over and taken[rank]:
                    continue
            if chunk.tokens > room:
                if room == 0 or not self._cuts:
                    continue
                chunk = chunk._replace(stop=chunk.start + room)
            taken[rank].append(chunk)
            left[rank] -= chunk.tokens
            rows -= chunk.tokens
            budgets[rank] -= settings.work(chunk.start, chunk.stop)
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

    def _budget(self, offers: Sequence[Offer]) -> int:
        """Work that every rank may put into the round, in rows, beside what has waited too long. A sequence that goes
        whole, and is longer, goes as its rank's first.
        """
        settings = self._settings
        if settings.policy != "rolling":
            return settings.best_work(0, self._num_slots)

        def waiting(offer: Offer) -> int:
            behind = offer.waiting_tokens - sum(chunk.length - chunk.stop for chunk in offer.chunks)
            return max(0, behind) + sum(settings.work(chunk.start, chunk.length) for chunk in offer.chunks)

        most = max(map(waiting, offers))
        # Cutting a lone sequence would delay it, and help nobody.
        is_lone = sum(len(offer.chunks) for offer in offers) == 1 and not any(o.waiting_tokens for o in offers)
        usual = 2 * most if is_lone else min(most, settings.best_work(most, self._num_slots))
        return -(-usual * self._share(offers) // 1000)

    def _share(self, offers: Sequence[Offer]) -> int:
        """Thousandths of its usual rows that this slot may take beside longer slots that may be late."""
        lag = max((lag for offer in offers for lag in offer.lags[self._slot + 1 : self._num_slots]), default=0)
        return max(0, min(1000, 1000 * (_TOO_LATE - lag) // (_TOO_LATE - _LATE)))

    def _in_order(self, offers: Sequence[Offer], turn: int) -> list[tuple[int, Chunk]]:
        settings, num_ranks = self._settings, self._num_ranks

        def key(item: tuple[int, int, Chunk]) -> tuple[int, ...]:
            position, rank, chunk = item
            after = (position, (rank + turn) % num_ranks)
            if chunk.age >= settings.most_rounds_waited:
                return 0, -chunk.age, *after
            if settings.policy == "rolling":
                work = settings.work(chunk.start, chunk.length)
                return 1, -chunk.priority, _FINE * work // (1 + chunk.age), *after
            return 1, -chunk.priority, chunk.start == 0, -chunk.age, *after

        items = [(p, rank, chunk) for rank, offer in enumerate(offers) for p, chunk in enumerate(offer.chunks)]
        return [(rank, chunk) for _, rank, chunk in sorted(items, key=key)]
