"""Plays requests on a simulated engine: the real queues and admission, with the cost model's times for rounds.

Time passes from event to event: a request arrives, a round ends, a pause is over. Rounds of several slots share what
computes, evenly, so together they cannot keep any rank busier than all the time; and they slow one another (crowding,
CoresCost). On a GPU the streams of shorter slots go first, but by the clock that gains them little. Memory for keys
and values is taken to suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.model import CostModel
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, Microbatch, ModelShape
from pipemoe.rolling.admission import Admission, RollingSettings
from pipemoe.rolling.offer import Chunk, Offer
from pipemoe.rolling.round_time import Pace, RoundTime
from pipemoe.rolling.rounds import pause_seconds
from pipemoe.rolling.waiting import Queue, Waiting
from pipemoe.traffic.arrival_times import Arrival
from pipemoe.traffic.campaign import Limits
from pipemoe.traffic.policy import Policy, rank_for
from pipemoe.traffic.served import Served

_TYPICAL, _MANY = 1024, 3  # tokens of a rank in a typical round; rounds that compute all the time


class Machine(NamedTuple):
    """What requests are simulated on."""

    shape: ModelShape
    cost: CostModel
    num_ranks: int
    num_slots: int
    moe_max_num_tokens: int
    delay_seconds: float = 0.0  # see pipemoe.Engine


@lru_cache
def crowding(machine: Machine) -> float:
    """How much longer computations take on GPUs in rounds side by side, of all that exchange meanwhile: by the clock,
    which runs several typical rounds at once. At least 1.
    """
    ends = [n * _TYPICAL for n in range(_MANY + 1)]
    cohorts = [[Microbatch(rank, *of) for rank in range(machine.num_ranks)] for of in zip(ends, ends[1:])]
    facts = Facts(((_TYPICAL,) * _MANY,) * machine.num_ranks)
    config = PlanConfig(moe_max_num_tokens=machine.moe_max_num_tokens, max_tokens_per_rank=ends[-1], num_slots=_MANY)
    rounds = plan(facts, machine.shape, config, machine.cost, cohorts, slots_in_use=_MANY)
    times = RoundTime(machine.shape, machine.cost, machine.num_ranks, machine.moe_max_num_tokens)
    busy = max(times.busy([[Chunk(0, 0, _TYPICAL, _TYPICAL)]] * machine.num_ranks))
    return max(1.0, (simulate(rounds, machine.cost).makespan - machine.cost.start_ns) / max(1, _MANY * busy))


class SimulatedPlayer:
    """A campaign's Player without ranks."""

    def __init__(self, machine: Machine, settings_of: Callable[[Policy], RollingSettings]) -> None:
        self._machine, self._settings_of = machine, settings_of

    def alone(self, policy: Policy, lengths: Sequence[int]) -> list[Served]:
        """One request after another, in turn on all ranks, each on an idle system."""
        found = []
        for number, tokens in enumerate(lengths):
            (served,) = self.play(policy, [Arrival(0, 0.0, tokens)])
            found.append(served._replace(number=number, rank=number % self._machine.num_ranks))
        return found

    def play(self, policy: Policy, arrivals: Sequence[Arrival], stop_at: Limits | None = None) -> list[Served]:
        """All requests, in order of arrival, to the end."""
        return _Play(self._machine, self._settings_of(policy), policy.routing).run(arrivals)


@dataclass(slots=True)
class _Round:
    chunks: tuple[tuple[Chunk, ...], ...]  # per rank
    seconds: float  # that it takes alone
    busy: list[float]  # the share of those in which it computes, by rank
    begun: float
    left: float  # of `seconds`


@dataclass(slots=True)
class _Slot:
    admission: Admission
    waiting: list[Waiting]  # per rank
    patient_until: list[float]  # per rank: its offers may wait for other ranks' (policy lockstep_delayed)
    round: _Round | None = None
    retry_at: float = math.inf  # when what was not taken is offered again
    is_asleep: bool = field(default=True)
    usual: float = 0.0  # seconds that the last round took alone
    pace: Pace = field(default_factory=Pace)


class _Play:
    def __init__(self, machine: Machine, settings: RollingSettings, routing: str) -> None:
        self._machine, self._settings, self._routing = machine, settings, routing
        self._times = RoundTime(machine.shape, machine.cost, machine.num_ranks, machine.moe_max_num_tokens)
        self._now = 0.0
        self._tokens = [0] * machine.num_ranks  # of each rank's requests that have no first token yet
        self._admitted: dict[int, float] = {}
        self._first_token: dict[int, float] = {}
        count, num_ranks = settings.num_slots(machine.num_slots), machine.num_ranks
        self._queues = [Queue(settings) for _ in range(num_ranks)]
        self._slots = [
            _Slot(
                Admission(number, count, num_ranks, settings),
                [Waiting(number, count, settings, queue) for queue in self._queues],
                [0.0] * num_ranks,
            )
            for number in range(count)
        ]

    def run(self, arrivals: Sequence[Arrival]) -> list[Served]:
        todo, ranks = list(reversed(arrivals)), {}
        while todo or any(slot.round or slot.retry_at < math.inf for slot in self._slots):
            self._pass_time(todo[-1].seconds if todo else math.inf)
            while todo and todo[-1].seconds <= self._now:
                arrival = todo.pop()
                ranks[arrival.number] = self._arrive(arrival)
            for slot in self._slots:
                if slot.round and slot.round.left <= 0:
                    self._end(slot)
                if not slot.round and (not slot.retry_at > self._now or slot.retry_at == math.inf):
                    self._begin(slot)
        return [
            Served(
                a.number,
                ranks[a.number],
                a.num_tokens,
                a.seconds,
                self._admitted[a.number],
                self._first_token[a.number],
            )
            for a in arrivals
        ]

    def _pass_time(self, latest: float) -> None:
        """Until something happens, but no longer than until `latest`."""
        speeds = self._speeds()
        ends = [
            self._now + slot.round.left / v if slot.round else slot.retry_at for slot, v in zip(self._slots, speeds)
        ]
        then = max(self._now, min([*ends, latest]))
        for slot, speed, end in zip(self._slots, speeds, ends):
            if slot.round:
                slot.round.left = 0.0 if end <= then else slot.round.left - (then - self._now) * speed
        self._now = then

    def _speeds(self) -> list[float]:
        """Of the slots' rounds, as shares of their speed alone."""
        rounds, cores = [slot.round for slot in self._slots], self._machine.cost.cores
        busy = [round_.busy for round_ in rounds if round_]
        if len(busy) < 2:
            return [1.0] * len(rounds)
        total = max(map(sum, zip(*busy)))
        if not cores.permille:
            return [1 / max(1.0, crowding(self._machine) * total)] * len(rounds)
        share, slowdown = 1 / max(1.0, total), cores.slowdown_permille / 1000
        return [share / (1 + slowdown * (total - round_.busy[0])) if round_ else 1.0 for round_ in rounds]

    def _arrive(self, arrival: Arrival) -> int:
        """Returns the rank that gets it."""
        rank, tokens = rank_for(self._routing, arrival.number, self._tokens), arrival.num_tokens
        self._tokens[rank] += tokens
        for slot in self._slots:
            if not slot.waiting[rank].has_work:
                slot.patient_until[rank] = self._now + self._machine.delay_seconds
            slot.retry_at = math.inf  # it is looked at now
        self._queues[rank].add(arrival.number, tokens)
        return rank

    def _begin(self, slot: _Slot) -> None:
        """The next round, if anybody has anything to offer."""
        if not any(waiting.has_work for waiting in slot.waiting):
            slot.is_asleep = True
            return
        lags = tuple(s.pace.lag(self._now - s.round.begun, s.round.seconds) if s.round else 0 for s in self._slots)
        offers = []
        for waiting, until in zip(slot.waiting, slot.patient_until):
            chunks = waiting.offer()
            behind = waiting.waiting_tokens - sum(chunk.tokens for chunk in chunks)
            offers.append(Offer(chunks, lags, behind, False, self._now < until))
        admitted = slot.admission.admit(offers)
        for rank, (waiting, chunks) in enumerate(zip(slot.waiting, admitted)):
            waiting.settle(chunks)
            if chunks:
                slot.patient_until[rank] = self._now + self._machine.delay_seconds
            for chunk in chunks:
                self._admitted.setdefault(chunk.sequence, self._now)
        was_asleep, slot.is_asleep = slot.is_asleep, False
        slot.retry_at = (
            math.inf if any(admitted) else self._now + pause_seconds(slot.usual, self._machine.delay_seconds)
        )
        if any(admitted):
            self._start(slot, admitted, self._machine.cost.start_ns if was_asleep else 0)

    def _start(self, slot: _Slot, admitted: tuple[tuple[Chunk, ...], ...], start_ns: int) -> None:
        slot.usual = seconds = (self._times.of(admitted) + start_ns) * 1e-9
        busy = [ns * 1e-9 / seconds for ns in self._times.busy(admitted)]
        slot.round = _Round(admitted, seconds, busy, self._now, seconds)
        for waiting in slot.waiting:
            waiting.begin(admitted)

    def _end(self, slot: _Slot) -> None:
        assert slot.round is not None
        slot.pace.note(self._now - slot.round.begun, slot.round.seconds)
        for waiting in slot.waiting:
            waiting.end()
        for rank, chunks in enumerate(slot.round.chunks):
            for chunk in chunks:
                if chunk.is_last:
                    self._first_token[chunk.sequence] = self._now
                    self._tokens[rank] -= chunk.length
        slot.round = None
