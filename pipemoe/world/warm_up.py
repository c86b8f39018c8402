"""The first use of a world's communicators, at set-up: nothing is connected or loaded inside a step.

It runs every kind of collective on every communicator, from each root and from all, small and large, since libraries
choose algorithms by size. The content does not matter, so all calls share the same few buffers. These hold one block
for each rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from pipemoe.comm.transport import Transport, WaveSums
from pipemoe.plan.schedule import Segment, Wave

if TYPE_CHECKING:
    import torch

    from pipemoe.runtime.lanes import Event, Lanes

_WIDTH = 256
# Bytes of a rank's block. NCCL changes protocols up to a megabyte; MPI changes above some tens of kilobytes.
_DEVICE_BYTES, _HOST_BYTES = 1 << 20, 1 << 16


class WarmUp:
    """Makes the buffers; `start` hands in the work. Raises torch's error, or MemoryError, if memory does not
    suffice.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        import torch

        self._rank, self._size = rank, size
        self._block = _DEVICE_BYTES if device.type == "cuda" else _HOST_BYTES
        self._dtypes = [torch.float32, torch.float64] + (
            [torch.bfloat16, torch.float16] if device.type == "cuda" else []
        )
        self._wave, self._staging, self._result = (
            torch.zeros(num_blocks * self._block, dtype=torch.uint8, device=device)
            for num_blocks in (size, size - 1, 1)
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the buffers are filled on another stream than the lanes'

    def start(self, transport: Transport, lanes: Lanes) -> Callable[[], bool]:
        """Hand everything in; returns a function that polls, True once all is done. Keep this object until then."""
        import torch

        events: list[Event] = []
        for num_bytes in (_WIDTH, self._block):
            for exchange, wave_of in self._cases():
                wave, rows = self._rows(wave_of, num_bytes, torch.uint8)
                combines = []
                for dtype in self._dtypes:
                    of_sums, sent = self._rows(wave_of, max(num_bytes, _WIDTH * dtype.itemsize), dtype)
                    combines += [(combine, of_sums, self._sums(of_sums, sent)) for combine in ("reduce", "gather")]
                for slot, lane in enumerate(lanes.slots):
                    events.append(lane.dispatch.submit(partial(transport.dispatch, slot, 0, wave, exchange, rows)))
                    events += [
                        lane.combine.submit(partial(transport.combine, slot, 0, of_sums, exchange, combine, sums))
                        for combine, of_sums, sums in combines
                    ]

        def done() -> bool:
            lanes.poll()
            return all(event.done() for event in events)

        return done

    def _cases(self) -> list[tuple[str, list[int]]]:
        """Exchanges, and whose segments are in the wave."""
        everyone = list(range(self._size))
        return [("padded", everyone), ("broadcast", everyone), *(("broadcast", [root]) for root in everyone)]

    def _rows(self, ranks: list[int], num_bytes: int, dtype: torch.dtype) -> tuple[Wave, torch.Tensor]:
        """A wave of `num_bytes` of each of `ranks`, and its rows [n, _WIDTH]."""
        num_rows = num_bytes // (_WIDTH * dtype.itemsize)
        wave = Wave(tuple(Segment(r, 0, num_rows, i * num_rows) for i, r in enumerate(ranks)), len(ranks) * num_rows)
        return wave, self._matrix(self._wave, wave.num_rows, dtype)

    def _sums(self, wave: Wave, partial: torch.Tensor) -> WaveSums:
        num_rows = wave.num_rows // len(wave.segments)
        results = [self._matrix(self._result, num_rows, partial.dtype) for s in wave.segments if s.rank == self._rank]
        staging = self._matrix(self._staging, (self._size - 1) * num_rows, partial.dtype)
        return WaveSums(partial, results, staging.view(self._size - 1, num_rows, _WIDTH))

    @staticmethod
    def _matrix(memory: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        return memory[: num_rows * _WIDTH * dtype.itemsize].view(dtype).view(num_rows, _WIDTH)
