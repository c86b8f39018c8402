"""The compiled loop: the order of its two queues, what it waits for, and what wakes it up."""

import threading

import numpy as np
import pytest

from pipemoe.comm.shared import player as of
from pipemoe.comm.shared import words
from pipemoe.comm.shared.bells import Bells
from pipemoe.comm.shared.player import Player
from tests.comm.shared.shared_ranks import PATIENCE, memories

SLOTS = 2


@pytest.fixture
def bells():
    of_ranks = memories(2, Bells.num_bytes(SLOTS))
    made = [Bells(rank, [m.ctypes.data for m in of_ranks], SLOTS, 0.0) for rank in range(2)]
    made[0].memories = of_ranks  # kept alive
    return made


class Slot:
    """Records that only note that it is their turn: each is for Python. A queue is a list of what each waits for."""

    def __init__(self, bells, sums, computations, *, slot=0, others=(), flags=None, is_thread=False):
        self.done, waits, records = np.zeros(3, np.int32), [], []
        for queue in (sums, computations):
            rows = []
            for op, (of_record, flag) in enumerate(queue):
                first = len(waits)
                waits += [self._wait(w) for w in of_record]
                # All bells but the own one, which expect it.
                rings = (0, 1, 1) if flag else (0, 0, 0)
                rows.append([of.FOR_PYTHON, 0, 0, 0, first, len(waits), *(flag or (0, 0)), *rings, op])
            records.append(np.array(rows, np.int64).reshape(-1, of.OP + 1))
        self.player = Player(
            records,
            np.array(waits, np.int64).reshape(-1, 3),
            self.done,
            bells,
            slot,
            bells.groups((0, 1))[0],
            others,
            np.zeros((10, 2), np.int64),
            is_thread=is_thread,
            num_cores=2,
            is_timed=False,
        )

    def _wait(self, wait):
        return (self.done.ctypes.data + 4 * wait[1], wait[2], of.OWN) if wait[0] == "own" else wait

    def to_the_end(self, order, name="", seconds=PATIENCE):
        while self.player.play(seconds) == of.STOPPED:
            queue, at = self.player.stopped_at
            order.append((name, queue, at))
            self.player.tell_done(queue, at)
        return self.player.is_over()


def word():
    value = np.zeros(1, np.int32)
    return value, value.ctypes.data


def test_sums_go_before_computations_as_soon_as_they_may(bells):
    order = []
    # Two computations; a sum that waits for the first of them; a computation that waits for the sum.
    computations = [([], None), ([], None), ([("own", of.SUMS, 1)], None)]
    assert Slot(bells[0], [([("own", of.COMPUTATIONS, 1)], None)], computations).to_the_end(order)
    assert [at for _, *at in order] == [
        [of.COMPUTATIONS, 0],
        [of.SUMS, 0],
        [of.COMPUTATIONS, 1],
        [of.COMPUTATIONS, 2],
    ]


def test_it_gives_back_control_while_a_flag_is_not_there(bells):
    flag, at = word()
    slot, order = Slot(bells[0], [], [([(at, 3, of.A_FLAG)], None)]), []
    assert not slot.to_the_end(order, seconds=0.001) and not order
    words.store(at, 2)
    assert not slot.to_the_end(order, seconds=0.001) and not order
    words.store(at, 3)
    assert slot.to_the_end(order) and len(order) == 1
    assert flag[0] == 3


@pytest.mark.parametrize("come_to", [2**31 - 1, 2**31, 2**31 + 1])
def test_numbers_may_pass_what_a_word_holds(bells, come_to):
    flag, at = word()
    flag[0] = (come_to - 1 + 2**31) % 2**32 - 2**31
    slot, order = Slot(bells[0], [], [([(at, come_to, of.A_FLAG)], None)]), []
    assert not slot.to_the_end(order, seconds=0.001)
    words.add(at, 1)
    assert slot.to_the_end(order)


@pytest.mark.parametrize("kind", [of.A_FLAG, of.OF_REUSE])
def test_ranks_hand_over_to_one_another(bells, kind):
    """Each in its thread waits for the other's flag, many times; a lost ring would cost the longest sleep each."""
    (_, a), (_, b), count = word(), word(), 200
    mine, theirs = [(a, b), (b, a)]
    slots = [
        Slot(bells[rank], [], [([(wait, i + (rank == 1), kind)], (tell, i + 1)) for i in range(count)])
        for rank, (tell, wait) in enumerate((mine, theirs))
    ]
    if kind == of.OF_REUSE:  # then they ring for whoever wants every ring
        for slot in slots:
            slot.player.records[of.COMPUTATIONS][:, of.EXPECTING] = 0
    order = []
    threads = [threading.Thread(target=slot.to_the_end, args=(order, rank)) for rank, slot in enumerate(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [rank for rank, *_ in order] == [0, 1] * count


def test_slots_of_a_rank_wait_for_one_another(bells):
    count, order = 100, []
    first = Slot(bells[0], [], [([], None)] * count, is_thread=True)
    waits = [([(first.done.ctypes.data + 4 * of.COMPUTATIONS, i + 1, of.OTHER_SLOT)], None) for i in range(count)]
    second = Slot(bells[0], [], waits, slot=1, is_thread=True)
    others = [(second.done.ctypes.data + of.WAITS_HERE, 1)]
    first = _with_others(first, others)
    threads = [
        threading.Thread(target=slot.to_the_end, args=(order, name)) for name, slot in (("b", second), ("a", first))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    places = {entry: place for place, entry in enumerate(order)}
    assert len(order) == 2 * count
    assert all(places["a", of.COMPUTATIONS, i] < places["b", of.COMPUTATIONS, i] for i in range(count))


def _with_others(slot, others):
    slot.player._others = np.array(others, np.int64)
    rest = list(slot.player._rest)
    rest[3] = slot.player._others
    slot.player._rest = tuple(rest)
    return slot
