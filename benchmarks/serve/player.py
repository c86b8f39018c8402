"""Plays requests on the ranks of a world: each comes when it is due, whether or not earlier ones are done (open loop).

Each rank runs one of these. A request's time to first token counts from when it was due, so it includes what the
submitting thread was late.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from benchmarks.serve.board import Board
from pipemoe.traffic.arrival_times import Arrival
from pipemoe.traffic.campaign import Limits
from pipemoe.traffic.policy import Policy, rank_for
from pipemoe.traffic.served import WITHIN_LIMIT, Served

_LEAD_S = 0.02  # from when all ranks are ready to the first request
_POLL_S = 2e-4  # how often a rank looks whether a request is its own
_REST_S = 5e-3  # the same while a request is served: ranks that share cores would take them from it
_LOOK_S = 0.05  # and whether a hopeless play may end
IDLE_S = 0.05  # of silence before a request that comes alone
_WARM_UP = 2  # requests per rank, the first time that a policy is opened

OpenEngine = Callable[[Policy, int], AbstractContextManager[Any]]  # of a policy, and a queue for so many requests


class RankPlayer:
    """A campaign's Player, on this rank; every rank makes the same calls."""

    def __init__(
        self,
        board: Board,
        open_engine: OpenEngine,
        token_ids: np.ndarray,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """token_ids: int64, of which prompts are parts; at least as many as the longest has. clock: in seconds, what
        FirstToken's times are of.
        """
        self._board, self._open, self._ids = board, open_engine, token_ids
        self._clock, self._sleep = clock, sleep
        self._warm: set[Policy] = set()
        self.statistics: dict[Policy, dict[str, Any]] = {}  # this rank's, of the last play

    def alone(self, policy: Policy, lengths: Sequence[int]) -> list[Served]:
        """One request after another, in turn on all ranks, each on an idle system."""
        board = self._board
        arrivals = [Arrival(number, 0.0, tokens) for number, tokens in enumerate(lengths)]
        with self._opened(policy, len(lengths)) as engine:
            board.clear(self._clock())
            for arrival in arrivals:
                while board.done.sum() < arrival.number:
                    self._sleep(_REST_S)
                if arrival.number % board.num_ranks == board.rank:
                    self._sleep(IDLE_S)
                    future = self._submit(engine, arrival, self._clock())
                    wait([future])
            board.meet(self._sleep)
            if board.rank == 0:
                board.rank_of[: len(arrivals)] = np.arange(len(arrivals)) % board.num_ranks
            board.meet(self._sleep)
        return board.served(arrivals)

    def play(self, policy: Policy, arrivals: Sequence[Arrival], stop_at: Limits | None = None) -> list[Served]:
        """All requests, each when it is due. stop_at: it ends as soon as these limits cannot be met."""
        with self._opened(policy, len(arrivals)) as engine:
            self._play(engine, policy, arrivals, stop_at)
            self.statistics[policy] = engine.statistics()
        return self._board.served(arrivals)

    def _opened(self, policy: Policy, num_requests: int) -> AbstractContextManager[Any]:
        if policy not in self._warm:
            self._warm.add(policy)
            count = _WARM_UP * self._board.num_ranks
            with self._open(policy, count) as engine:
                arrivals = [Arrival(n, 0.0, max(1, len(self._ids) // (1 + n % 4))) for n in range(count)]
                self._play(engine, policy, arrivals, None)
        return self._open(policy, num_requests)

    def _play(self, engine: Any, policy: Policy, arrivals: Sequence[Arrival], stop_at: Limits | None) -> None:
        board, futures = self._board, []
        board.clear(self._clock() + _LEAD_S)
        begin = float(board.begin[0])
        hopeless = Hopeless(board, arrivals, stop_at) if stop_at else None
        if policy.routing == "round_robin":
            mine = [a for a in arrivals if a.number % board.num_ranks == board.rank]
            if board.rank == 0:
                board.rank_of[: len(arrivals)] = np.arange(len(arrivals)) % board.num_ranks
        else:
            mine = list(arrivals)
        assigned = np.zeros(board.num_ranks, np.int64)  # tokens; on rank 0
        for arrival in mine:
            while (early := begin + arrival.seconds - self._clock()) > 0:
                if hopeless and hopeless.now(self._clock() - begin):
                    break
                self._sleep(min(early, _LOOK_S) if hopeless else early)
            if hopeless and hopeless.now(self._clock() - begin):
                break
            if policy.routing != "round_robin" and self._rank_of(policy, arrival, assigned, hopeless) != board.rank:
                continue
            futures.append(self._submit(engine, arrival, begin))
        while wait(futures, _LOOK_S if hopeless else None).not_done:
            if hopeless and hopeless.now(self._clock() - begin):
                futures = [future for future in futures if not future.cancel()]
                hopeless = None
        board.meet(self._sleep)

    def _rank_of(self, policy: Policy, arrival: Arrival, assigned: np.ndarray, hopeless: Hopeless | None) -> int | None:
        """The rank that an arrived request goes to: rank 0 decides. None if the play is to end."""
        board, begin = self._board, float(self._board.begin[0])
        if board.rank == 0:
            rank = rank_for(policy.routing, arrival.number, (assigned - board.done_tokens).tolist())
            assigned[rank] += arrival.num_tokens
            board.rank_of[arrival.number] = rank
            return rank
        while (found := board.assigned(arrival.number)) is None:
            if hopeless and hopeless.now(self._clock() - begin):
                return None
            self._sleep(_POLL_S)
        return found

    def _submit(self, engine: Any, arrival: Arrival, begin: float) -> Future:
        first = arrival.number % max(1, len(self._ids) - arrival.num_tokens + 1)
        future = engine.submit(self._ids[first : first + arrival.num_tokens])
        future.add_done_callback(partial(self._note, arrival, begin))
        return future

    def _note(self, arrival: Arrival, begin: float, future: Future) -> None:
        """Called on the engine's thread. A request that failed or was cancelled counts as done, without times."""
        board = self._board
        if not future.cancelled() and future.exception() is None:
            found = future.result()
            board.admitted[arrival.number] = found.admitted - begin
            board.first_token[arrival.number] = found.first_token - begin
        board.done_tokens[board.rank] += arrival.num_tokens
        board.done[board.rank] += 1


class Hopeless:
    """Whether so many requests are past their limits that the limits cannot be met."""

    def __init__(self, board: Board, arrivals: Sequence[Arrival], limits: Limits) -> None:
        self._board = board
        self._due = np.array([a.seconds for a in arrivals])
        classes = [limits.classes.of(a.num_tokens) for a in arrivals]
        self._limit = np.array([limits.seconds[name] for name in classes])
        self._members = [np.array([c == name for c in classes]) for name in sorted(set(classes))]
        self._found = False

    def now(self, seconds: float) -> bool:
        """seconds: since the play began."""
        if not self._found:
            first_token = self._board.first_token[: len(self._due)]
            so_far = np.where(np.isnan(first_token), seconds, first_token) - self._due
            late = so_far > self._limit
            self._found = any(late[m].sum() > (1 - WITHIN_LIMIT) * m.sum() + 1e-9 for m in self._members)
        return self._found
