"""The lanes of a host whose ranks share memory. A slot's work is one queue for its computations and one for its sums,
both served by the same thread, which takes whatever may go on: a cohort's work needs no change of threads.

If a step has one cohort, that thread is the conductor's own: it works in `poll`. If it has several, each slot has a
thread, so that none holds up another. A thread without work sleeps on its rank's bell, until the ranks that it waits
for have rung (pipemoe.comm.shared.bells).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from pipemoe.comm.shared.bells import LONGEST_SLEEP, Bells, Sleeper
from pipemoe.comm.shared.flags import FlagEvent
from pipemoe.runtime.lanes import HostClock, HostEvent, HostMark, PolledLane, SlotLanes
from pipemoe.runtime.thread_class import SHORTEST_SLICE_NS, ask_for_slice, nicer_by
from pipemoe.torch_state import no_grad_on_this_thread

_Work = tuple[Callable[[], Any], list[Any], HostEvent]
# With so few pieces of work left in a slot's queues, the conductor is told that it may issue more.
_FEW_LEFT = 6
_NICENESS, _MOST_NICE = 5, 15  # of each slot more than of the one before; of the last at most
_NUM_CORES = len(os.sched_getaffinity(0))


def _niceness(slot: int) -> int:
    """Of a slot's thread: shorter cohorts, in earlier slots, go before longer ones."""
    return min(_NICENESS * slot, _MOST_NICE)


class QueueLane:
    """One of a slot's queues."""

    def __init__(self, slot: HostSlot) -> None:
        self._slot = slot
        self.work: deque[_Work] = deque()

    def submit(self, work: Callable[[], Any], waits: Iterable[Any] = (), timed: bool = False) -> HostEvent:
        event = HostEvent()
        self.work.append((work, [w for w in waits if w is not None], event))
        self._slot.has_work()
        return event

    def poll(self) -> None:
        pass

    def close(self) -> None:
        self._slot.close()


class HostSlot:
    """A slot's queues and its thread."""

    def __init__(self, number: int, bells: Bells, on_done: Callable[[HostSlot], None]) -> None:
        self.number, self._bells, self._on_done = number, bells, on_done
        self.compute, self.combine = QueueLane(self), QueueLane(self)
        self._queues = self.combine.work, self.compute.work  # a sum completes a layer, so sums go first
        self.is_inline = True  # no thread of its own serves it
        self.waits_here = False  # for an event of another slot of this rank
        self._played: deque[Callable[[], bool]] = deque()  # see play
        self._filled = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def num_left(self) -> int:
        return len(self.compute.work) + len(self.combine.work)

    def serve(self, is_inline: bool) -> None:
        """From now on the conductor's thread serves this slot, or a thread of its own. Only while there is no work."""
        self.is_inline = is_inline
        if not is_inline and self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"pipemoe slot {self.number}", daemon=True)
            self._thread.start()

    def play(self, for_a_while: Callable[[], bool]) -> None:
        """Let the thread call this again and again, until it is True."""
        self._played.append(for_a_while)
        self.has_work()

    def has_work(self) -> None:
        if not self.is_inline:
            self._filled.set()
            self._bells.ring_here(self.number)

    def run_one(self, looks_at_flags: bool = True) -> bool:
        """Do the first piece of work that may go on; False if there is none. looks_at_flags: else only what waits for
        no other rank.
        """
        for queue in self._queues:
            if not queue:
                continue
            work, waits, event = queue[0]
            if not looks_at_flags and waits and isinstance(waits[-1], FlagEvent):
                continue
            try:
                while waits and waits[-1].done():
                    waits.pop()
                if waits:
                    continue
                event.begin()
                work()
                event.set()
            except BaseException as error:  # noqa: BLE001  (handed to whoever polls the event)
                event.set(error)
            queue.popleft()
            del work, waits, event  # do not keep a step's tensors alive while idle
            self._on_done(self)
            return True
        return False

    def say_what_lacks(self, sleeper: Sleeper) -> None:
        """Tell a sleeper for which rings the work at the queues' heads waits."""
        self.waits_here = every = False
        for queue in self._queues:
            if queue and queue[0][1]:
                event = queue[0][1][-1]
                if isinstance(event, FlagEvent):
                    missing = event.missing()
                    every |= event.of_reuse
                    if missing:
                        sleeper.want(self.number, 1 if every else missing)
                    else:
                        sleeper.stay_awake()
                else:
                    self.waits_here = True
                    if event.is_over():
                        sleeper.stay_awake()
        sleeper.want_every(self.number, every)

    def _run(self) -> None:
        # A thread keeps its class for life, so each slot has a thread of its own.
        nicer_by(_niceness(self.number))
        if self.number == 0:  # the shortest cohort wakes up often, for a short while
            ask_for_slice(SHORTEST_SLICE_NS)
        no_grad_on_this_thread()
        sleeper = self._bells.sleeper([self.number])
        while not self._closed:
            self._filled.wait()
            if self._played:
                if self._played[0]():
                    self._played.popleft()  # the conductor may have appended the next step's
                continue
            sleeper.look()
            if self.is_inline or not self.num_left:
                self._bells.say_at_work(self.number, False)
                self._filled.clear()
                if (self.num_left and not self.is_inline) or self._played or self._closed:
                    self._filled.set()
                continue
            self._bells.give_way(self.number, _NUM_CORES)
            self._bells.say_at_work(self.number, True)
            if not self.run_one():
                self._bells.say_at_work(self.number, False)
                self.say_what_lacks(sleeper)
                sleeper.rest(LONGEST_SLEEP)

    def close(self) -> None:
        self._closed = True
        self._filled.set()


class LinkLane(PolledLane):
    """A queue of MPI operations, beside a slot's queues. The slot's thread may sleep until one of them is complete."""

    def __init__(self, on_done: Callable[[], None]) -> None:
        super().__init__()
        self._on_done = on_done

    def poll(self) -> None:
        before = self.num_left
        super().poll()
        if self.num_left < before:
            self._on_done()


class HostLanes:
    """All lanes of a rank. `poll` does the work of a slot that has no thread."""

    def __init__(self, num_slots: int, bells: Bells) -> None:
        self._bells = bells
        self.wake = Wake(bells)
        self._host_slots = [HostSlot(number, bells, self._work_done) for number in range(num_slots)]
        # Nothing is handed to the dispatch lane: rows are sent by whoever has written them.
        self.slots = [SlotLanes(slot.compute, slot.compute, slot.combine) for slot in self._host_slots]
        self.clock = HostClock()
        self._holds_slots = False

    @property
    def num_cores(self) -> int:
        return _NUM_CORES

    def play(self, slot: int, for_a_while: Callable[[], bool]) -> None:
        """Let a slot's thread call this again and again, until it is True."""
        self._host_slots[slot].play(for_a_while)

    def hold_slots(self, slots: set[int], polls: bool = False) -> None:
        """Runs of these slots may come and go side by side, until `let_go_of_slots`. Only while there is no work."""
        self.begin(slots, polls)
        self._holds_slots = True

    def let_go_of_slots(self) -> None:
        self._holds_slots = False

    def new_mark(self) -> HostMark:
        return HostMark(self.wake.set)

    def begin(self, slots: set[int], polls: bool = False) -> None:
        """A step uses these slots. Of several, each gets a thread; also a single one if the conductor's thread `polls`
        what else the step needs.
        """
        if self._holds_slots:
            return
        self.wake.polls_in_step = polls
        has_threads = len(slots) > 1 or polls
        for slot in self._host_slots:
            slot.serve(is_inline=not has_threads or slot.number not in slots)
        self.wake.listens_to(None if has_threads or not slots else self._host_slots[next(iter(slots))])

    def ring_waiting(self, but: HostSlot | None = None) -> None:
        """Wake up the slots whose work waits for something of this rank, as that has come."""
        for slot in self._host_slots:
            if slot.waits_here and slot is not but:
                self._bells.ring_here(slot.number)

    def _work_done(self, slot: HostSlot) -> None:
        self.ring_waiting(but=slot)
        if not slot.is_inline and slot.num_left <= _FEW_LEFT:
            self.wake.set()

    def poll(self, between_issues: bool = False) -> None:
        """Do what may be done. between_issues: only what waits for no other rank; the conductor will call again."""
        for slot in self._host_slots:
            if slot.is_inline:
                while slot.num_left and slot.run_one(looks_at_flags=not between_issues):
                    self.wake.stay_awake()

    def close(self) -> None:
        for slot in self._host_slots:
            slot.close()


class LinkedLanes:
    """HostLanes, and for each slot a lane for rows and one for sums that MPI moves. The conductor's thread polls these,
    so every slot of a step has a thread.
    """

    def __init__(self, lanes: HostLanes, for_all_rows: bool = False) -> None:
        """for_all_rows: MPI moves all of them, those of the same host too."""
        self._lanes, self.slots = lanes, lanes.slots
        self.links = [(LinkLane(lanes.ring_waiting), LinkLane(lanes.ring_waiting)) for _ in lanes.slots]
        if for_all_rows:
            self.slots = [SlotLanes(slot.compute, *links) for slot, links in zip(lanes.slots, self.links)]
        self.clock, self.new_mark = lanes.clock, lanes.new_mark
        self.let_go_of_slots = lanes.let_go_of_slots

    def begin(self, slots: set[int]) -> None:
        self._lanes.begin(slots, polls=True)

    def hold_slots(self, slots: set[int]) -> None:
        self._lanes.hold_slots(slots, polls=True)

    def poll(self, between_issues: bool = False) -> None:
        for links in self.links:
            for link in links:
                link.poll()
        self._lanes.poll(between_issues)


class Wake:
    """What wakes up the conductor's thread: other threads by `set`, and its peers' news."""

    def __init__(self, bells: Bells) -> None:
        self._bells = bells
        # Something moves on only when the conductor polls it, as MPI does: in this step, or always.
        self.polls_in_step = self.polls_always = False
        self._slot: HostSlot | None = None  # that the conductor's thread serves
        self._sleepers: dict[int | None, Sleeper] = {}
        self._sleeper = self._for(None)

    def _for(self, slot: HostSlot | None) -> Sleeper:
        number = None if slot is None else slot.number
        if number not in self._sleepers:
            channels = [self._bells.conductor_channel] + ([] if number is None else [number])
            self._sleepers[number] = self._bells.sleeper(channels)
        return self._sleepers[number]

    @property
    def longest_rest(self) -> float:
        """In seconds; 0 if the thread must poll."""
        return 0.0 if self.polls_in_step or self.polls_always else LONGEST_SLEEP

    def listens_to(self, slot: HostSlot | None) -> None:
        """The conductor's thread does the work of this slot."""
        self._slot = slot
        self._sleeper = self._for(slot)
        self._sleeper.look()

    def set(self) -> None:
        self._bells.ring_here(self._bells.conductor_channel)

    def look(self) -> None:
        self._sleeper.look()

    def stay_awake(self) -> None:
        self._sleeper.stay_awake()

    def wants(self, num_rings: int) -> None:
        """The conductor waits for so many ranks."""
        self._sleeper.want(self._bells.conductor_channel, num_rings)

    def rest(self, seconds: float) -> None:
        if self._slot is not None:
            self._slot.say_what_lacks(self._sleeper)
        self._sleeper.rest(seconds)
