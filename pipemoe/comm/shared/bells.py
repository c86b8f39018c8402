"""Bells: how a thread sleeps until others, of any rank of this host, have news for it.

A rank's bell has a word that changes with every ring, on which its threads sleep, and a channel for each of them:

    word | channel 0: rings, target, sleeps, ... | channel 1: ... |  a channel for each slot, the last for the conductor

Of a peer's rings a thread usually needs several: one from each rank that it waits for. So before it sleeps it says at
which number of rings it wants to be woken; a ring that is not the last one costs no system call, and no change of
threads. A thread that waits for something that its peers raise for nobody in particular (a buffer's next use) asks for
every ring. The thread looks at its flags again after a ring and after 50 ms at the latest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numba import types

from pipemoe.comm.shared import words
from pipemoe.comm.shared.words import _add, _load, _store, compiled, compiled_part

LONGEST_SLEEP = 0.05  # seconds
_LINE = 64  # bytes; each channel has one, as threads write it
_RINGS, _TARGET, _SLEEPS, _EVERY, _WORKS = 0, 4, 8, 12, 16  # bytes
_WAY_US, _LONGEST_WAY_NS = 300, 10_000_000
_MASKS = 31  # bits that tell channels apart; more channels share them, and wake up for one another


@compiled(lambda: types.void(types.int64[::1], types.int64, types.int64))
def _ring(bells, channel, expected):
    """Ring `channel` of each of `bells` (addresses); if they do not expect it, only of those who want every ring."""
    for bell in bells:
        at = bell + _LINE * (1 + channel)
        if not expected and _load(at + _EVERY) == 0:
            continue
        rings = _add(at + _RINGS, np.int32(1)) + 1
        if _load(at + _SLEEPS) != 0 and np.int32(rings - _load(at + _TARGET)) >= 0:
            _add(bell, np.int32(1))
            words.wake(bell, 1 << (channel % _MASKS))


@compiled(lambda: types.void(types.int64, types.int64))
def _ring_at_once(bell, channel):
    """Wake the thread of this channel up, whatever it wanted, or keep it from falling asleep."""
    _add(bell, np.int32(1))
    if _load(bell + _LINE * (1 + channel) + _SLEEPS) != 0:
        words.wake(bell, 1 << (channel % _MASKS))


@compiled(lambda: types.void(types.int64, types.int64[::1], types.int64[::1]))
def _look(bell, channels, seen):
    """seen[0] = the bell's word, then each channel's rings."""
    seen[0] = _load(bell)
    for i in range(len(channels)):
        seen[1 + i] = _load(bell + _LINE * (1 + channels[i]) + _RINGS)


@compiled(
    lambda: types.void(types.int64, types.int64[::1], types.int64[::1], types.int64[::1], types.int64, types.int64)
)
def _rest(bell, channels, seen, wanted, spin_ns, rest_ns):
    """Sleep for `rest_ns`, unless the bell has changed since it was `seen`, or some channel i has had wanted[i] more
    rings. wanted: 0 for every ring."""
    begin = words.now_ns()
    while words.now_ns() < begin + spin_ns:
        if _load(bell) != seen[0] or _has_rung(bell, channels, seen, wanted):
            return
    mask = 0
    for i in range(len(channels)):
        at = bell + _LINE * (1 + channels[i])
        _store(at + _TARGET, np.int32(seen[1 + i] + max(1, wanted[i])))
        _store(at + _SLEEPS, np.int32(1))
        mask |= 1 << (channels[i] % _MASKS)
    # A ring just before this did not see that the thread sleeps.
    if not _has_rung(bell, channels, seen, wanted):
        words.sleep(bell, seen[0], begin + rest_ns, mask)
    for i in range(len(channels)):
        _store(bell + _LINE * (1 + channels[i]) + _SLEEPS, np.int32(0))


@compiled_part
def _num_at_work(bells, channel):
    """Threads of lower channels that are at work, on all ranks."""
    found = 0
    for bell in bells:
        for other in range(channel):
            found += _load(bell + _LINE * (1 + other) + _WORKS)
    return found


@compiled(lambda: types.void(types.int64[::1], types.int64, types.int64))
def _give_way(bells, channel, num_cores):
    """Wait for a while if threads of lower channels keep all cores busy, on whatever ranks."""
    end = words.now_ns() + _LONGEST_WAY_NS
    while _num_at_work(bells, channel) >= num_cores and words.now_ns() < end:
        words.pause(_WAY_US)


@compiled_part
def _has_rung(bell, channels, seen, wanted):
    for i in range(len(channels)):
        rings = _load(bell + _LINE * (1 + channels[i]) + _RINGS)
        if np.int32(rings - seen[1 + i] - max(1, wanted[i])) >= 0:
            return True
    return False


class Bells:
    """The bells of all ranks, as this one rings and hears them."""

    def __init__(self, rank: int, bells: Sequence[int], num_slots: int, spin_seconds: float) -> None:
        """bells: their addresses. spin_seconds: how long a thread looks before it sleeps."""
        self.conductor_channel, self.own, self._rank = num_slots, bells[rank], rank
        self.all, self.spin_ns = np.array(bells, np.int64), int(spin_seconds * 1e9)
        self._others = np.array([other for other in range(len(bells)) if other != rank], np.int64)
        self._groups: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    @staticmethod
    def num_bytes(num_slots: int) -> int:
        """Of a rank's bell."""
        return _LINE * (2 + num_slots)

    def ring(self, channel: int, ranks: Iterable[int]) -> None:
        """Ring this channel of `ranks`, which expect it, and of others that want every ring."""
        expecting, not_expecting = self.groups(tuple(ranks))
        if len(expecting):
            _ring(expecting, channel, 1)
        if len(not_expecting):
            _ring(not_expecting, channel, 0)

    def groups(self, ranks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of the bells of these ranks, this one left out, and of all other ranks."""
        if ranks not in self._groups:
            is_expecting = np.isin(self._others, ranks)
            self._groups[ranks] = self.all[self._others[is_expecting]], self.all[self._others[~is_expecting]]
        return self._groups[ranks]

    def say_at_work(self, channel: int, works: bool) -> None:
        """Tell all ranks whether this rank's thread of the channel is at work, or waits."""
        words.store(self.own + _LINE * (1 + channel) + _WORKS, int(works))

    def give_way(self, channel: int, num_cores: int) -> None:
        """Before a piece of work, wait for a while if threads of lower channels keep all cores busy, on whatever ranks.

        Niceness alone does not do that: Linux shares cores among sessions first (autogroup), and a launcher may start
        each rank in a session of its own.
        """
        _give_way(self.all, channel, num_cores)

    def ring_here(self, channel: int) -> None:
        """Wake up this rank's thread of the channel."""
        _ring_at_once(self.own, channel)

    def sleeper(self, channels: Sequence[int]) -> Sleeper:
        return Sleeper(self.own, channels, self.spin_ns)


class Sleeper:
    """How a thread sleeps on its bell: it calls `look`, looks for work, says what it lacks by `want`, and rests."""

    def __init__(self, bell: int, channels: Sequence[int], spin_ns: int) -> None:
        self._bell, self._spin_ns = bell, spin_ns
        self._channels = np.array(channels, np.int64)
        self._place = {channel: i for i, channel in enumerate(channels)}
        self._seen, self._wanted = np.zeros(1 + len(channels), np.int64), np.zeros(len(channels), np.int64)
        self._awake = False

    def look(self) -> None:
        """Remember how the bell is now; what rings later keeps `rest` from sleeping."""
        _look(self._bell, self._channels, self._seen)
        self._wanted.fill(0)
        self._awake = False

    def want(self, channel: int, num_rings: int) -> None:
        """Sleep through fewer rings than these. The smallest number counts; without any, the first ring wakes."""
        i = self._place[channel]
        self._wanted[i] = num_rings if self._wanted[i] == 0 else min(num_rings, self._wanted[i])

    def want_every(self, channel: int, wants: bool = True) -> None:
        """Hear rings, or no longer, that the peers do not expect to be heard. Then what came just before was missed:
        stay awake once.
        """
        word = self._bell + _LINE * (1 + channel) + _EVERY
        if bool(words.load(word)) != wants:
            words.store(word, int(wants))
            self._awake |= wants

    def stay_awake(self) -> None:
        """The next `rest` returns at once."""
        self._awake = True

    def rest(self, seconds: float) -> None:
        if not self._awake:
            _rest(self._bell, self._channels, self._seen, self._wanted, self._spin_ns, int(seconds * 1e9))
