"""When a rank posts its offer to a slot's next round, sleeps, wakes up and ends. Pure: no clock, no threads.

A slot's rounds are numbered from 1. All ranks post to the same rounds, since each decides by what all know:
- After a round to which somebody offered something, everybody posts to the next.
- After one to which nobody did, a rank posts once it has work, or sees that another has posted, or wants to say that it
  leaves; until then it sleeps.
- After one in which all ranks say that they leave, there is none.
What a rank sees of the others is a level, the highest round that each has posted to. It may come late, twice or out of
order. Once a level has come through, nobody is left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from pipemoe.errors import PlanError
from pipemoe.rolling.offer import Chunk, Offer


class When(Enum):
    """When to post to the next round."""

    NOT_YET = "not yet"  # something must happen before: ask again after each event
    NOW = "now"
    LATE = "late"  # any time before the round under way ends, best when the exchange just fits in
    AFTER_PAUSE = "after a pause"  # a short one: the last round took nothing of what was offered


_SHORTEST_PAUSE, _PAUSES = 1e-3, 8  # seconds; of a usual round


def pause_seconds(usual: float, patience: float) -> float:
    """How long a pause is. Ages count in rounds, also in those that take nothing, so these must not pass in no time.

    usual: seconds of a round of this slot that took something, as far as is known. patience: seconds for which offers
    are patient.
    """
    return max(_SHORTEST_PAUSE, usual / _PAUSES, patience / _PAUSES)


class SlotRounds:
    """The rounds of one slot as one rank sees them."""

    def __init__(self) -> None:
        self.posted = 0  # rounds posted to: the level that the peers are told
        self.agreed = 0  # rounds whose offers are here from all ranks
        self.has_ended = False  # all ranks have left: there are no more rounds
        self._heard = 0  # the highest level of the peers
        self._num_running = 0  # rounds that run, or wait for the one before to end
        self._is_awake = False  # does everybody post to the next round, as all know?
        self._was_held = False  # did the last round take nothing of what was offered?
        self._has_said_leaving = False

    @property
    def is_exchanging(self) -> bool:
        """Is the exchange of a round under way?"""
        return self.posted > self.agreed

    @property
    def is_running(self) -> bool:
        """Does a round run?"""
        return self._num_running > 0

    @property
    def is_asleep(self) -> bool:
        """Is nothing under way, nor expected of anybody? Then there is nothing that could be late."""
        return not (self.is_exchanging or self.is_running or self._is_awake)

    def hear(self, level: int) -> None:
        """A peer has posted to round `level`."""
        self._heard = max(self._heard, level)

    def when(self, has_work: bool, is_leaving: bool) -> When:
        """When to post to the next round. has_work: there is something to offer. is_leaving: there is nothing, and
        never will be. Ask again after every event; an answer holds until the next one.
        """
        if self.has_ended or self.is_exchanging or self._num_running > 1:
            return When.NOT_YET
        woken = self._heard > self.posted
        if not (self._is_awake or woken or has_work or (is_leaving and not self._has_said_leaving)):
            return When.NOT_YET
        if self.is_running:
            return When.LATE
        return When.AFTER_PAUSE if self._was_held and not woken else When.NOW

    def post(self, offer: Offer) -> int:
        """This rank posts `offer`. Returns the round's number: the level to tell the peers at once, and with every
        heartbeat.
        """
        if self.has_ended or self.is_exchanging:
            raise PlanError(f"round {self.posted} is {'the last' if self.has_ended else 'not agreed yet'}")
        self.posted += 1
        self._has_said_leaving |= offer.leaving
        return self.posted

    def agree(self, offers: Sequence[Offer], admitted: Sequence[Sequence[Chunk]]) -> bool:
        """All offers to the round are here, and it admits this. True: it must run, after the rounds before it, and
        `finish` must follow. False: there is nothing to run.
        """
        self.agreed += 1
        runs = any(admitted)
        self._num_running += runs
        self._is_awake = any(offer.chunks for offer in offers)
        self._was_held = self._is_awake and not runs
        self.has_ended = all(offer.leaving for offer in offers)
        return runs

    def finish(self) -> None:
        """The oldest round that runs has ended on this rank."""
        self._num_running -= 1
