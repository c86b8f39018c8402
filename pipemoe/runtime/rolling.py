"""Rolling steps on one rank: each slot goes from round to round by itself, and one loop looks after all of them.

    slot 0   exchange | round 1 ........ | round 2 ... | (asleep)                 | exchange | round 3 ..
    slot 1   exchange | round 1 ........................................ | round 2 ..................

The loop has the conductor's thread for as long as the engine is open. Nothing in it waits: an exchange, a run and a
sleep are states of a slot. What a round takes and when it is agreed on say pipemoe.rolling's parts.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pipemoe.errors import FatalError, PipemoeError
from pipemoe.plan.schedule import Op, OpKind, Plan
from pipemoe.rolling.admission import Admission, RollingSettings
from pipemoe.rolling.offer import Chunk, Offer, decode_offers, encode_offer
from pipemoe.rolling.round_time import Pace, RoundTime
from pipemoe.rolling.rounds import SlotRounds, When, pause_seconds
from pipemoe.rolling.waiting import Queue, Waiting

if TYPE_CHECKING:
    from pipemoe.comm.gathering import Gathering
    from pipemoe.runtime.run import Run
    from pipemoe.runtime.runtime import Runtime
    from pipemoe.runtime.source import Source

# How long the thread may rest while a slot waits for this. Transfers and exchanges of MPI move only when polled.
_EXCHANGE_SECONDS, _RUN_SECONDS, _ASLEEP_SECONDS = 50e-6, 200e-6, 0.05


class Sequences(Protocol):
    """Whose sequences go through the rounds. Called on the conductor's thread."""

    def reserve(self, slot: int, sequence: int) -> bool:
        """Is there memory for this sequence? See Waiting.offer."""

    def room(self, slot: int) -> int:
        """How much memory is free; `reserve` may succeed after it has refused once this has changed."""

    def admitted(self, slot: int, chunks: Sequence[Chunk], ended: Sequence[int]) -> None:
        """A round that is agreed on has these chunks of this rank. ended: the sequences of which no more will come."""

    def withdrawn(self, slot: int, sequences: Sequence[int]) -> None:
        """These were cancelled, and no round will have anything more of them."""

    def source(self, slot: int, chunks: Sequence[Chunk]) -> Source:
        """The source of a round that begins now."""

    def passed(self, slot: int, chunks: Sequence[Chunk], failure: BaseException | None) -> None:
        """A round with these chunks is over. failure: what this rank's model code raised in it."""


@dataclass(slots=True)
class _Round:
    number: int
    plan: Plan
    admitted: tuple[tuple[Chunk, ...], ...]  # by rank
    chunks: tuple[Chunk, ...]  # this rank's
    predicted: float = 0.0  # seconds; 0 until it has begun
    run: Run | None = None
    begun: float = 0.0
    is_near_end: bool = False


@dataclass(slots=True)
class SlotCounts:
    """What a slot has done so far, for monitors."""

    rounds: int = 0
    rounds_with_work: int = 0
    tokens: int = 0  # of this rank
    rows: int = 0  # of all ranks
    seconds: float = 0.0  # of rounds with work


@dataclass(slots=True)
class _Patience:
    """How long a rank's offers may wait for other ranks to have some (policy lockstep_delayed)."""

    seconds: float
    until: float = field(default=0.0)

    def begin(self) -> None:
        self.until = time.monotonic() + self.seconds

    @property
    def lasts(self) -> bool:
        return time.monotonic() < self.until


class RollingSlot:
    """One slot, as a state machine."""

    def __init__(
        self,
        number: int,
        num_slots: int,
        runtime: Runtime,
        settings: RollingSettings,
        sequences: Sequences,
        queue: Queue,
        fingerprint: bytes,
        delay_seconds: float,
        lags: Callable[[], tuple[int, ...]],
        tell: Callable[[bool], None],
    ) -> None:
        """queue: of this rank's slots. fingerprint: 16 bytes of all that must agree. lags: of all slots, see Offer.
        tell: the peers, to which rounds this rank has posted; True: at once.
        """
        self.number, self._num_slots, self._runtime, self._world = number, num_slots, runtime, runtime.world
        self.rounds, self.waiting = SlotRounds(), Waiting(number, num_slots, settings, queue)
        self._admission = Admission(number, num_slots, self._world.size, settings)
        self._times = RoundTime(runtime.shape, runtime.cost, self._world.size, runtime.config.moe_max_num_tokens)
        # Where ranks share cores, an exchange beside a round takes cores from it: nothing can hide there.
        self._hides_exchanges = not runtime.cost.cores.permille
        self._pace = Pace()
        self._sequences, self._fingerprint, self._lags, self._tell = sequences, fingerprint, lags, tell
        self._patience = _Patience(delay_seconds)
        self._gathering: Gathering | None = None
        self._queue: deque[_Round] = deque()  # agreed on, not over; the first one runs
        self._all_slept = True  # nobody offered anything to the last round, so peers may be asleep
        self._num_moved = 0  # operations issued, and done
        self._refused_at = -1  # the room of which an offer could get nothing; -1: it got some
        self.progress_at = time.monotonic()
        self.pause_until = 0.0
        self.is_leaving = False
        self.counts = SlotCounts()
        self.waiting_by_rank = [0] * self._world.size  # tokens, as told with the last offers

    def __str__(self) -> str:
        if self._queue:
            round_, run = self._queue[0], self._queue[0].run
            doing = run and (run.failed_op or run.oldest() or run.not_begun())
            return f"round {round_.number} of slot {self.number}, {doing or 'at its beginning or end'}"
        if self._gathering is not None:
            return f"exchange of round {self.rounds.posted} of slot {self.number}"
        return f"slot {self.number}, asleep"

    @property
    def is_over(self) -> bool:
        """There are no more rounds, and none is under way."""
        return self.rounds.has_ended and not self._queue

    @property
    def lag(self) -> int:
        """See Offer.lags."""
        if not self._queue or self._queue[0].run is None:
            return 0
        return self._pace.lag(time.perf_counter() - self._queue[0].begun, self._queue[0].predicted)

    def expect_work(self) -> None:
        """A sequence comes that this slot may take."""
        if not self.waiting.has_work:
            self._patience.begin()

    def advance(self) -> bool:
        """Do what can be done now. True if that was anything."""
        try:
            moved = self._gathering is not None and self._gathering.done()
            if moved:
                self._agree()
            moved |= bool(self._queue) and self._run_first()
            if self._may_post():
                self._post()
                moved = True
        except BaseException as error:
            self._world.conductor.now_doing(str(self))
            if isinstance(error, PipemoeError) and not isinstance(error, FatalError):
                raise FatalError(f"rank {self._world.rank}: {error} (in {self})") from error
            raise
        if moved:
            self.progress_at = time.monotonic()
        return moved

    def rest_seconds(self) -> float:
        """How long nothing will happen here that does not wake the thread up."""
        if self.pause_until:
            return max(50e-6, self.pause_until - time.monotonic())
        if self._world.shared_by_all and not self._runtime.polls:
            return _ASLEEP_SECONDS
        return _EXCHANGE_SECONDS if self._gathering else _RUN_SECONDS if self._queue else _ASLEEP_SECONDS

    @property
    def is_in_a_round(self) -> bool:
        """Is a round under way, and too far from its end to post to the next?"""
        return bool(self._queue) and not self._queue[0].is_near_end

    @property
    def _leaves(self) -> bool:
        """Has this rank nothing more for this slot, for good?"""
        return self.is_leaving and not self.waiting.may_have_work

    def _may_post(self) -> bool:
        if self.is_in_a_round:
            return False
        has_work = self.waiting.has_work and self._refused_at != self._sequences.room(self.number)
        when = self.rounds.when(has_work, self._leaves)
        if when is not When.AFTER_PAUSE:
            self.pause_until = 0.0
            return when in (When.NOW, When.LATE)
        if not self.pause_until:
            usual = self.counts.seconds / max(1, self.counts.rounds_with_work)
            self.pause_until = time.monotonic() + pause_seconds(usual, self._patience.seconds)
        return time.monotonic() >= self.pause_until

    def _post(self) -> None:
        self.pause_until = 0.0
        chunks = self.waiting.offer(lambda sequence: self._sequences.reserve(self.number, sequence))
        self._refused_at = -1 if chunks or not self.waiting.has_work else self._sequences.room(self.number)
        behind = self.waiting.waiting_tokens - sum(chunk.tokens for chunk in chunks)
        offer = Offer(chunks, self._lags(), behind, self._leaves, self._patience.lasts)
        doing = f"round {self.rounds.post(offer)} of slot {self.number}"
        self._gathering = self._world.start_gathering(encode_offer(self._fingerprint, offer), doing, self.number)
        self._tell(self._all_slept)

    def _agree(self) -> None:
        assert self._gathering is not None
        offers = decode_offers(self._gathering.payloads)
        self._gathering = None
        admitted = self._admission.admit(offers)
        runs = self.rounds.agree(offers, admitted)
        self._all_slept = not any(offer.chunks for offer in offers)
        self.waiting_by_rank = [o.waiting_tokens + sum(c.tokens for c in o.chunks) for o in offers]
        settled = self.waiting.settle(admitted[self._world.rank])
        if settled.chunks:
            self._patience.begin()
        self.counts.rounds += 1
        self._sequences.admitted(self.number, settled.chunks, settled.ended)
        self._sequences.withdrawn(self.number, settled.withdrawn)
        if runs:
            plan = self._runtime.plans.of_round(
                self.number, self._num_slots, tuple(tuple(c.tokens for c in of) for of in admitted)
            )
            self._queue.append(_Round(self.rounds.agreed, plan, admitted, settled.chunks))
            self.counts.rounds_with_work += 1
            self.counts.tokens += sum(chunk.tokens for chunk in settled.chunks)
            self.counts.rows += sum(plan.facts.tokens)

    def _run_first(self) -> bool:
        """Go on with the round that runs. True if anything happened."""
        round_, before = self._queue[0], self._num_moved
        if round_.run is None:
            round_.begun = time.perf_counter()
            self.waiting.begin(round_.admitted)
            source = self._sequences.source(self.number, round_.chunks)
            self._world.conductor.begin_step()
            round_.run = self._runtime.new_round(
                round_.plan,
                source,
                on_progress=self._count_move,
                on_progress_made=self._world.conductor.count_op,
                on_done=lambda op: self._note_done(round_, op),
            )
        is_over = round_.run.advance()
        if not round_.predicted:
            self._note_begun(round_)
        if not is_over:
            return self._num_moved != before
        self._queue.popleft()
        self.waiting.end()
        self.rounds.finish()
        seconds = time.perf_counter() - round_.begun
        self._pace.note(seconds, round_.predicted)
        self.counts.seconds += seconds
        failure, round_.run = round_.run.failure, None  # its callbacks know the round: end the circle
        self._sequences.passed(self.number, round_.chunks, failure)
        return True

    def _note_begun(self, round_: _Round) -> None:
        """What no operation had to wait for. A rank with another plan has another fingerprint in its next offer."""
        round_.predicted = self._times.of(round_.admitted) * 1e-9
        self._fingerprint = hashlib.blake2b(self._fingerprint + round_.plan.digest, digest_size=16).digest()

    def _count_move(self, _op: object) -> None:
        self._num_moved += 1

    def _note_done(self, round_: _Round, op: Op) -> None:
        self._num_moved += 1
        # The next exchange has the last layer to hide in.
        if self._hides_exchanges:
            last = round_.plan.shape.num_layers - 1
            round_.is_near_end |= op.kind is OpKind.FINISH or op.layer == last or (op.layer == last - 1 and op.kind > 2)


class RollingLoop:
    """All slots of one engine on this rank."""

    def __init__(
        self,
        runtime: Runtime,
        settings: RollingSettings,
        sequences: Sequences,
        take_news: Callable[[RollingLoop], None],
        *,
        engine: int,
        fingerprint: bytes,
        delay_seconds: float,
    ) -> None:
        """take_news: called again and again on the conductor's thread; it adds and cancels sequences, and may say that
        this rank leaves. engine: its number, the same on all ranks, and of no earlier engine of this world.
        """
        self._world, self._lanes, self._take_news, self._engine = runtime.world, runtime.lanes, take_news, engine
        self._abandoned: PipemoeError | None = None
        num_slots = settings.num_slots(runtime.config.max_slots)
        self.queue = Queue(settings)
        more = fingerprint, delay_seconds, self._lags, self._tell
        self.slots = [
            RollingSlot(number, num_slots, runtime, settings, sequences, self.queue, *more)
            for number in range(num_slots)
        ]

    def __str__(self) -> str:
        return "; ".join(map(str, self.slots))

    def _lags(self) -> tuple[int, ...]:
        return tuple(slot.lag for slot in self.slots)

    def _tell(self, at_once: bool) -> None:
        """Tell the peers the rounds to which this rank has posted. at_once: they may be asleep."""
        levels = [self._engine, *(slot.rounds.posted for slot in self.slots)]
        # Peers that share memory have seen it there.
        self._world.conductor.tell_rounds(levels, at_once and not self._world.shared_by_all)

    def abandon(self, error: PipemoeError) -> None:
        """End at the next look around, whatever the peers do; `run` raises `error`. On any thread."""
        self._abandoned = error
        self._world.conductor.wake.set()

    def add(self, sequence: int, length: int, priority: int) -> None:
        """See Queue.add."""
        for slot in self.slots:
            slot.expect_work()
        self.queue.add(sequence, length, priority)

    def leave(self) -> None:
        """This rank will add no more sequences."""
        for slot in self.slots:
            slot.is_leaving = True

    def run(self) -> None:
        """The conductor's task: until all ranks have left."""
        conductor, lanes = self._world.conductor, self._lanes
        lanes.hold_slots({slot.number for slot in self.slots})
        try:
            conductor.now_doing(self)
            conductor.roll(self._advance, self._late)
        finally:
            conductor.tell_rounds([])
        lanes.let_go_of_slots()

    def _advance(self) -> float | None:
        if self._abandoned is not None:
            raise self._abandoned
        self._take_news(self)
        moved = False
        for slot in self.slots:
            if not slot.is_in_a_round:
                slot.rounds.hear(self._highest_round(slot))
            moved |= slot.advance()
        if moved:
            return 0.0
        if all(slot.is_over for slot in self.slots):
            return None
        if self._world.shared_by_all and any(slot.rounds.is_asleep for slot in self.slots):
            self._world.lanes.wake.wants(1)  # the first peer that posts
        return min(slot.rest_seconds() for slot in self.slots)

    def _highest_round(self, slot: RollingSlot) -> int:
        """To which a peer has posted, as memory that all share says, or heartbeats."""
        everyone = self._world.shared_by_all
        if everyone is None:
            return self._world.conductor.highest_round(self._engine, slot.number)
        return slot.rounds.posted + everyone.num_ahead(slot.number)

    def _late(self) -> tuple[str, float] | None:
        """See Conductor.roll."""
        busy = [slot for slot in self.slots if not slot.rounds.is_asleep and not slot.is_over]
        if not busy:
            return None
        slot = min(busy, key=lambda s: s.progress_at)
        return str(slot), time.monotonic() - slot.progress_at
