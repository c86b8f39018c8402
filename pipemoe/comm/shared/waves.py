"""The transport over shared memory: every rank's rows and partial sums lie once, in its own memory, and its peers read
them there.

A dispatch is the owner writing its rows and raising a flag. A combine is every rank raising a flag over its partial
sums, and the owner adding them up where they lie, in rank order.

    memory of one rank, for each buffer of each slot:
    | flags: sent, summed, combined | rows of this rank [own rows, row_bytes] | its partial sums [rows, H] |

When a buffer may be used again, and why that is safe, says pipemoe.plan.reuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types

from pipemoe.addresses import floats_at
from pipemoe.comm.shared import words
from pipemoe.comm.shared.bells import Bells
from pipemoe.comm.shared.flags import FlagEvent
from pipemoe.comm.shared.memory import offsets
from pipemoe.comm.shared.words import compiled
from pipemoe.comm.transport import CallLog, gather_calls
from pipemoe.plan.reuse import BufferUses, Use
from pipemoe.plan.schedule import Wave

if TYPE_CHECKING:
    import torch

_FLAG = 64  # bytes: a line for each, as different threads of a peer wait for them
SENT, SUMMED, COMBINED = range(3)


class WaveMemory:
    """Where everything lies in a rank's memory; the same on all ranks."""

    def __init__(
        self, num_slots: int, num_buffers: int, own_rows: int, row_bytes: int, rows: int, hidden: int, sums_dtype: Any
    ) -> None:
        self.num_slots, self.num_buffers = num_slots, num_buffers
        self._rows, self._sums, self._sums_dtype = (own_rows, row_bytes), (rows, hidden), sums_dtype
        pieces = [3 * _FLAG, own_rows * row_bytes, rows * hidden * sums_dtype.itemsize]
        self._starts = offsets(pieces * num_slots * num_buffers)
        self.num_bytes = self._starts[-1]

    def _start(self, slot: int, buffer: int, piece: int) -> int:
        return self._starts[3 * (slot * self.num_buffers + buffer) + piece]

    def flag(self, memory: np.ndarray, slot: int, buffer: int, flag: int) -> int:
        """The address of a flag."""
        return memory.ctypes.data + self._start(slot, buffer, 0) + _FLAG * flag

    def rows(self, memory: np.ndarray, slot: int, buffer: int) -> torch.Tensor:
        """[own rows, row_bytes] uint8"""
        import torch

        return self._matrix(memory, slot, buffer, 1, self._rows, torch.uint8)

    def sums(self, memory: np.ndarray, slot: int, buffer: int) -> torch.Tensor:
        """[rows, H]"""
        return self._matrix(memory, slot, buffer, 2, self._sums, self._sums_dtype)

    def _matrix(
        self, memory: np.ndarray, slot: int, buffer: int, piece: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        import torch

        start = self._start(slot, buffer, piece)
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)


class SharedWaves(CallLog):
    """The waves of one runtime."""

    def __init__(self, rank: int, size: int, layout: WaveMemory, memories: dict[int, np.ndarray], bells: Bells) -> None:
        """size: number of ranks, of all hosts. memories: by rank, of the ranks of this host, which ring `bells`."""
        super().__init__()
        self.rank, self.size = rank, size
        self._places = {here: place for place, here in enumerate(memories)}  # among the ranks of this host
        self._own = self._places[rank]
        self.bells, self.num_bytes = bells, layout.num_bytes
        add_rows.compile()  # now, not inside a step
        self._uses = BufferUses(layout.num_slots, layout.num_buffers)
        places = [(slot, buffer) for slot in range(layout.num_slots) for buffer in range(layout.num_buffers)]
        self._flags = {  # addresses [R] of each flag of a buffer
            (*place, flag): np.array([layout.flag(memory, *place, flag) for memory in memories.values()], np.int64)
            for place in places
            for flag in (SENT, SUMMED, COMBINED)
        }
        # By slot and buffer, and by rank.
        self.rows = {place: {r: layout.rows(memory, *place) for r, memory in memories.items()} for place in places}
        self.sums = {place: {r: layout.sums(memory, *place) for r, memory in memories.items()} for place in places}

    def use(self, slot: int, buffer: int, wave: Wave) -> Use:
        """The next wave's use of a buffer, by the ranks of this host. Every rank calls, in the plan's order."""
        return self._uses.next(slot, buffer, self.places(wave))

    def check(self) -> None:
        """Nothing here notices a lost peer: the side channel does."""

    # When a step may go on.

    def rows_free(self, slot: int, buffer: int, use: Use) -> FlagEvent:
        """No rank reads this rank's rows of the buffer's last wave any more."""
        return FlagEvent(self._flags[slot, buffer, SUMMED], use.before, of_reuse=True)

    def sent(self, slot: int, buffer: int, use: Use) -> FlagEvent:
        """All rows of the wave that ranks of this host own are there."""
        return FlagEvent(self._flags[slot, buffer, SENT][list(use.owners)], use.number)

    def sums_free(self, slot: int, buffer: int, use: Use) -> FlagEvent:
        """No rank reads this rank's partial sums of the buffer's last wave any more."""
        return FlagEvent(self._flags[slot, buffer, COMBINED][list(use.owners_before)], use.before, of_reuse=True)

    def summed(self, slot: int, buffer: int, use: Use) -> FlagEvent:
        """The partial sums of the wave are there, of every rank of this host."""
        return FlagEvent(self._flags[slot, buffer, SUMMED], use.number)

    # What a rank tells the others.

    def tell_sent(self, slot: int, buffer: int, use: Use) -> None:
        """This rank's rows of the wave are there."""
        words.store(self._flags[slot, buffer, SENT][self._own], use.number)
        self.bells.ring(slot, range(len(self._places)))

    def tell_summed(self, slot: int, buffer: int, use: Use) -> None:
        """This rank's partial sums of the wave are there, and it has read all of the wave's rows."""
        words.store(self._flags[slot, buffer, SUMMED][self._own], use.number)
        self.bells.ring(slot, use.owners)

    def tell_combined(self, slot: int, buffer: int, use: Use) -> None:
        """This rank has added up the sums of its rows."""
        words.store(self._flags[slot, buffer, COMBINED][self._own], use.number)
        self.bells.ring(slot, ())

    # The same for records (pipemoe.comm.shared.player).

    def flags(self, slot: int, buffer: int, flag: int, ranks: Iterable[int] | None = None) -> list[int]:
        """Addresses of a flag: SENT, SUMMED or COMBINED. ranks: places among the ranks of this host; None: all."""
        found = self._flags[slot, buffer, flag]
        return found.tolist() if ranks is None else found[list(ranks)].tolist()

    @property
    def everyone(self) -> tuple[int, ...]:
        """The places of all ranks of this host."""
        return tuple(range(len(self._places)))

    def own_flag(self, slot: int, buffer: int, flag: int) -> int:
        return int(self._flags[slot, buffer, flag][self._own])

    def places(self, wave: Wave) -> tuple[int, ...]:
        """Of the ranks of this host that have rows in the wave."""
        return tuple(self._places[rank] for rank in sorted(wave.ranks() & self._places.keys()))

    # The log: what rows and sums go from rank to rank, as the collectives that it stands for.

    def note_dispatch(self, slot: int, buffer: int, wave: Wave, exchange: str, row_bytes: int) -> None:
        """A wave's rows are exchanged. Called when that is issued."""
        if self.log is None:
            return
        if exchange == "padded":
            self._note("dispatch", slot, buffer, "all_gather", -1, wave.num_rows * row_bytes)
        else:
            for s in wave.segments:
                self._note("dispatch", slot, buffer, "broadcast", s.rank, s.num_rows * row_bytes)

    def note_combine(
        self, slot: int, buffer: int, wave: Wave, exchange: str, combine: str, partial: torch.Tensor
    ) -> None:
        """A wave's sums are combined. Called when that is issued."""
        if self.log is None:
            return
        row_bytes = partial.shape[1] * partial.dtype.itemsize
        if combine == "gather":
            for primitive, peer, s in gather_calls(wave, self.rank, self.size):
                self._note("combine", slot, buffer, primitive, peer, s.num_rows * row_bytes)
        elif exchange == "padded":
            self._note("combine", slot, buffer, "reduce_scatter", -1, wave.num_rows * row_bytes)
        else:
            for s in wave.segments:
                self._note("combine", slot, buffer, "reduce", s.rank, s.num_rows * row_bytes)


@compiled(lambda: types.void(types.int64[::1], types.int64[::1], types.int64, types.int64))
def add_rows(addresses, strides, num_rows, width):
    """The matrix at addresses[0] is the sum of the others, in their order; float32, strides in values."""
    for row in range(num_rows):
        out = floats_at(addresses[0] + 4 * row * strides[0])
        for p in range(1, len(addresses)):
            part = floats_at(addresses[p] + 4 * row * strides[p])
            for h in range(width):
                out[h] = part[h] if p == 1 else out[h] + part[h]


def add_in_order(parts: Sequence[torch.Tensor], result: torch.Tensor) -> None:
    """result = the sum of `parts` in their order, in float32, or float64 if they are, rounded once."""
    import torch

    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    if len(parts) == 1:
        result.copy_(parts[0])
        return
    if result.dtype == parts[0].dtype == torch.float32 and all(t.stride(1) == 1 for t in (result, *parts)):
        addresses = np.array([part.data_ptr() for part in (result, *parts)], np.int64)
        strides = np.array([part.stride(0) for part in (result, *parts)], np.int64)
        add_rows(addresses, strides, *result.shape)
        return
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total.add_(part)
    result.copy_(total)
