"""The largest of a token's choices, in the registers of one warp: routing.py picks experts and their groups with it.

    lane      0     1    ...  31        a lane has the places lane, lane + 32, ...: `each` of them
    place     0     1         31
              32    33        63
    key of a choice           uint32, ordered as the choices: 0 not to be taken, 1 NaN, then the numbers from -inf on

Of equal keys the lowest place is taken. All 32 lanes call everything together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from pipemoe_kernels.launch.kernel import UINT32
from pipemoe_kernels.numba_cuda import SIMULATOR, cuda, types

if SIMULATOR:
    from pipemoe_kernels import simulated_warp as warp_operations
else:
    from pipemoe_kernels.ptx import warp as warp_operations

max_over_lanes, min_over_lanes = warp_operations.max_over_lanes, warp_operations.min_over_lanes
sync_lanes, bits_of, from_bits = warp_operations.sync_lanes, warp_operations.bits_of, warp_operations.from_bits

NOT_TAKEN, NAN_KEY, NO_PLACE, SIGN = UINT32(0), UINT32(1), UINT32(0xFFFFFFFF), UINT32(0x80000000)
ZERO = np.float32(0.0)


@dataclass(frozen=True)
class LargestKeys:
    """For `each` keys of a lane, in a local array.

    take(keys, count, lane) -> in lane k < count the place of the k-th largest key; the keys taken become NOT_TAKEN
    keep_groups(keys, shared, first, num_experts, num_groups, top_groups, lane)
        Of groups of neighbouring places, keeps the top_groups whose two largest choices have the largest sums; all
        other keys become NOT_TAKEN. shared: words_of_groups(each) words, from `first` on
    """

    take: Callable
    keep_groups: Callable


def words_of_groups(each: int) -> int:
    """With a pad after every 32 keys: lanes that scan neighbouring groups of 32 then use different banks."""
    return 33 * each


@cuda.jit(device=True, inline="always")
def key_of(choice):
    bits = bits_of(choice + ZERO)  # -0 becomes 0
    key = UINT32(bits ^ SIGN)
    if bits >= SIGN:
        key = UINT32(~bits)
    if choice != choice:
        key = NAN_KEY
    return key


@cuda.jit(device=True, inline="always")
def choice_of(key):
    """The inverse of key_of."""
    bits = UINT32(~key)
    if key >= SIGN:
        bits = UINT32(key ^ SIGN)
    return from_bits(bits)


def _taking(each: int) -> Callable:
    @cuda.jit(device=True, inline="always")
    def best_of_lane(keys, lane):
        """A lane's largest key, and the lowest place that has it."""
        best, place = NOT_TAKEN, NO_PLACE
        for i in range(each):
            if keys[i] > best:
                best, place = UINT32(keys[i]), UINT32(32 * i + lane)
        return best, place

    @cuda.jit(device=True, inline="always")
    def take(keys, count, lane):
        mine = UINT32(0)
        best, place = best_of_lane(keys, lane)
        for k in range(count):
            largest = max_over_lanes(best)
            taken = min_over_lanes(place if best == largest else NO_PLACE)
            if lane == k:
                mine = taken
            if place == taken:
                for i in range(each):
                    if UINT32(32 * i + lane) == taken:
                        keys[i] = NOT_TAKEN
                best, place = best_of_lane(keys, lane)
        return mine

    return take


@cache
def largest_keys(each: int) -> LargestKeys:
    groups_each = max(1, each // 2)  # a group has at least two places
    take, take_groups = _taking(each), _taking(groups_each)

    @cuda.jit(device=True, inline="always")
    def keep_groups(keys, shared, first, num_experts, num_groups, top_groups, lane):
        size = UINT32(UINT32(num_experts) // UINT32(num_groups))
        for i in range(each):
            shared[first + 33 * i + lane] = keys[i]
        sync_lanes()
        groups = cuda.local.array(groups_each, types.uint32)
        for i in range(groups_each):
            group = UINT32(32 * i + lane)
            groups[i] = NOT_TAKEN
            if group < num_groups:
                largest, second = NOT_TAKEN, NOT_TAKEN
                place = UINT32(group * size)
                end = UINT32(place + size)
                while place < end:
                    key = UINT32(shared[UINT32(UINT32(first + place) + (place >> UINT32(5)))])
                    smaller = UINT32(largest if key > largest else key)
                    largest = UINT32(key if key > largest else largest)
                    second = UINT32(smaller if smaller > second else second)
                    place = UINT32(place + UINT32(1))
                groups[i] = key_of(choice_of(largest) + choice_of(second))
        sync_lanes()
        take_groups(groups, top_groups, lane)
        for i in range(groups_each):
            shared[first + 32 * i + lane] = groups[i]
        sync_lanes()
        # The group of each place, with one division.
        group = UINT32(UINT32(lane) // size)
        rest = UINT32(lane - group * size)
        groups_apart = UINT32(UINT32(32) // size)
        rest_apart = UINT32(UINT32(32) - groups_apart * size)
        for i in range(each):
            if group < num_groups and shared[first + group] != NOT_TAKEN:
                keys[i] = NOT_TAKEN
            group = UINT32(group + groups_apart)
            rest = UINT32(rest + rest_apart)
            if rest >= size:
                rest = UINT32(rest - size)
                group = UINT32(group + UINT32(1))
        sync_lanes()

    return LargestKeys(take, keep_groups)
