"""The requests of one rank: from `submit` to the first token. What callers' threads and the conductor's share.

A request is queued, then admitted chunk by chunk, then answered. Its future may be cancelled until it is answered.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipemoe.errors import InputError, ModelError, QueueFull, describe
from pipemoe.models.rounds import DecoderRounds, Part
from pipemoe.rolling.offer import Chunk
from pipemoe.runtime.conductor import settle

if TYPE_CHECKING:
    import torch

    from pipemoe.models.round_source import First, RoundSource
    from pipemoe.rolling.admission import RollingSettings
    from pipemoe.runtime.conductor import Conductor
    from pipemoe.runtime.rolling import RollingLoop

_WATCH_SECONDS = 0.25  # how often a waiting caller looks after the conductor


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A request's first token (greedy), and when things happened, in seconds of `time.perf_counter`."""

    token: int
    logits: torch.Tensor | None  # [V] float32 on the host, if the engine keeps them
    queued: float  # submitted
    admitted: float  # its first chunk was admitted to a round
    first_token: float  # the token was there
    finite: bool = True  # False: the logits hold NaN or infinity, so that the token means nothing


@dataclass(slots=True, eq=False)
class _Request:
    number: int
    tokens: torch.Tensor  # [T] int64 on the host
    priority: int
    future: Future
    queued: float
    slot: int = -1  # until one has it on offer
    admitted: float = 0.0
    is_queued: bool = True  # counts as one that waits
    num_rounds: int = 0  # agreed on and not over, that have chunks of it
    is_held: bool = False  # has memory for keys and values
    is_broken: bool = False  # keys and values are not all there; nobody waits for the result
    is_ended: bool = False  # no later round has anything of it


@dataclass(slots=True)
class Totals:
    """Sums over requests so far."""

    submitted: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens_answered: int = 0
    queue_seconds: float = 0.0  # from submitted to admitted
    first_token_seconds: float = 0.0  # from submitted to first token


class Requests:
    """See the module. The loop's Sequences."""

    def __init__(
        self,
        rank: int,
        conductor: Conductor,
        rounds: DecoderRounds,
        settings: RollingSettings,
        *,
        max_queue: int,
        waits_when_full: bool,
    ) -> None:
        self.rank, self._conductor, self._rounds = rank, conductor, rounds
        self._settings = settings
        self._max_queue, self._waits_when_full = max_queue, waits_when_full
        self.totals = Totals()
        self.num_queued = 0  # submitted, and not admitted, answered or cancelled
        self._num_open = 0  # futures that have no result yet
        self._is_closed = False
        self._changed = threading.Condition()  # of all that stands above
        self._news: deque[tuple[str, _Request]] = deque()  # for the conductor's thread
        self._known: dict[int, _Request] = {}  # by number; the conductor's, as is all below
        self._answers: queue.SimpleQueue[tuple[Future, Any, BaseException | None] | None] = queue.SimpleQueue()
        # Callbacks of futures may take their time, so none of them runs on the conductor's thread.
        self._thread = threading.Thread(target=self._answer, name="pipemoe answers", daemon=True)
        self._thread.start()

    # Callers' threads.

    def submit(self, tokens: torch.Tensor, priority: int) -> Future:
        """Queue a sequence. Raises QueueFull, InputError once this is closed, and what has ended the ranks' work."""
        future: Future = Future()
        with self._changed:
            while self.num_queued >= self._max_queue and not self._is_closed and self._conductor.failure is None:
                if not self._waits_when_full:
                    raise QueueFull(
                        f"rank {self.rank}: {self.num_queued} requests wait, as many as max_queue allows; "
                        "submit fewer, or open the engine with when_full='wait'"
                    )
                self._changed.wait(_WATCH_SECONDS)
                self._conductor.watch()
            self._check_open()
            self._conductor.answer_for(future)
            request = _Request(self.totals.submitted, tokens, priority, future, time.perf_counter())
            self.totals.submitted += 1
            self.num_queued += 1
            self._num_open += 1
            self._news.append(("new", request))
        future.add_done_callback(lambda _: self._note_answered(request))
        self._conductor.wake.set()
        return future

    def refused(self, error: BaseException) -> Future:
        """The future of a request that is wrong in itself. Raises InputError once this is closed."""
        future: Future = Future()
        with self._changed:
            self._check_open()
            self.totals.submitted += 1
            self.totals.failed += 1
        future.set_exception(error)
        return future

    def _check_open(self) -> None:
        if self._is_closed:
            raise InputError(f"rank {self.rank}: the engine is closed; it takes no more requests")

    def close(self) -> None:
        """Take no more requests."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._conductor.wake.set()

    def wait_until_answered(self, seconds: float | None) -> bool:
        """Until all futures have results, at most `seconds`. Raises what has ended the ranks' work."""
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while self._num_open:
                left = _WATCH_SECONDS if deadline is None else min(_WATCH_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    return False
                self._changed.wait(left)
                self._conductor.watch()
        if self._conductor.failure is not None:
            raise self._conductor.failure
        return True

    def end(self, error: BaseException | None = None) -> None:
        """There are no more rounds. error: for futures that have no result."""
        with self._changed:
            unread = [request for _, request in self._news]
        for request in unread + list(self._known.values()):
            self._settle(request, error=error or InputError(f"rank {self.rank}: the engine is closed"))
        self._answers.put(None)

    def _note_answered(self, request: _Request) -> None:
        """A future has its result, or has been cancelled. On any thread."""
        future, totals = request.future, self.totals
        self._conductor.is_answered(future)
        with self._changed:
            self._num_open -= 1
            self._leave_queue(request)
            if future.cancelled():
                totals.cancelled += 1
                self._news.append(("cancel", request))
            elif future.exception() is not None:
                totals.failed += 1
            else:
                first = future.result()
                totals.answered += 1
                totals.tokens_answered += len(request.tokens)
                totals.queue_seconds += first.admitted - first.queued
                totals.first_token_seconds += first.first_token - first.queued
            self._changed.notify_all()
        if future.cancelled():
            future.set_running_or_notify_cancel()  # or concurrent.futures.wait would wait for it for ever
            self._conductor.wake.set()

    def _leave_queue(self, request: _Request) -> None:
        self.num_queued -= request.is_queued
        request.is_queued = False

    # The conductor's thread.

    def take_news(self, loop: RollingLoop) -> None:
        """Hand the loop what has come since."""
        while self._news:
            kind, request = self._news.popleft()
            if kind == "new" and not request.future.cancelled():
                self._known[request.number] = request
                loop.add(request.number, len(request.tokens), request.priority)
            elif kind == "cancel" and request.number in self._known and not request.is_ended:
                self._cancel(loop, request)
        if self._is_closed and not self._news:
            loop.leave()

    def _cancel(self, loop: RollingLoop, request: _Request) -> None:
        queue = loop.queue if request.slot < 0 else loop.slots[request.slot].waiting
        if queue.cancel(request.number):
            self._end(request)

    def reserve(self, slot: int, sequence: int) -> bool:
        request = self._known[sequence]
        request.is_held = self._rounds.reserve(slot, sequence, len(request.tokens))
        if request.is_held:
            request.slot = slot
        return request.is_held

    def room(self, slot: int) -> int:
        return self._rounds.places[slot].num_free

    def admitted(self, slot: int, chunks: Sequence[Chunk], ended: Sequence[int]) -> None:
        now = time.perf_counter()
        with self._changed:
            for chunk in chunks:
                request = self._known[chunk.sequence]
                request.num_rounds += 1
                request.admitted = request.admitted or now
                self._leave_queue(request)
            self._changed.notify_all()
        for sequence in ended:
            self._end(self._known[sequence])

    def withdrawn(self, slot: int, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            self._end(self._known[sequence])

    def source(self, slot: int, chunks: Sequence[Chunk]) -> RoundSource:
        requests = [self._known[chunk.sequence] for chunk in chunks]
        parts = [Part(c.sequence, c.start, c.stop, r.tokens, r.is_broken) for c, r in zip(chunks, requests)]
        return self._rounds.source(slot, parts, self._found)

    def _found(self, first: First) -> None:
        request = self._known[first.sequence]
        self._answers.put(
            (
                request.future,
                FirstToken(first.token, first.logits, request.queued, request.admitted, first.seconds, first.is_finite),
                None,
            )
        )

    def passed(self, slot: int, chunks: Sequence[Chunk], failure: BaseException | None) -> None:
        for chunk in chunks:
            request = self._known[chunk.sequence]
            request.num_rounds -= 1
            if failure is not None:
                request.is_broken = True
                error = ModelError(f"rank {self.rank}: model code raised {describe(failure)}")
                error.__cause__ = failure
                self._settle(request, error=error)
                if not request.is_ended:
                    self._news.append(("cancel", request))
            self._let_go(request)

    def _end(self, request: _Request) -> None:
        request.is_ended = True
        self._let_go(request)

    def _let_go(self, request: _Request) -> None:
        """Free its memory, if nothing will use it any more."""
        if request.is_ended and not request.num_rounds:
            del self._known[request.number]
            if request.is_held:
                self._rounds.release(request.number)

    def _settle(self, request: _Request, result: Any = None, error: BaseException | None = None) -> None:
        self._answers.put((request.future, result, error))

    # A thread of its own.

    def _answer(self) -> None:
        while (item := self._answers.get()) is not None:
            future, result, error = item
            settle(future, result, error)
            del item, future, result, error
