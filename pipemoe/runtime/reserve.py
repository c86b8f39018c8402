"""Memory reserved ahead of the steps, so that no step makes CUDA allocate.

An allocation of device or pinned memory is a barrier: CUDA does not run later work beside earlier work (CUDA C++
Programming Guide, "Implicit Synchronization"). Suppose an earlier collective waits for a peer, and the peer waits for
this rank's later kernels. Then everything stands still. So torch's caching allocator is filled at set-up: it hands out
memory that it holds for a stream without asking CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipemoe.errors import ConfigError, PipemoeError

if TYPE_CHECKING:
    import torch

_SMALL_TENSORS, _SMALL_BYTES = 64, 512 << 10  # torch keeps allocations up to 1 MiB apart from larger ones
# Of errors that are plain RuntimeErrors: torch's for the host's memory, CUDA's where torch did not allocate.
_WORDS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Storage size calculation overflowed",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA_ERROR_OUT_OF_MEMORY",
)
_LARGEST_PINNED = 23  # 8 MiB, as a power of two: torch keeps pinned memory by powers of two


class Reserved:
    """The most that any runtime of a world has reserved. Runtimes share the lanes, so the largest need counts."""

    def __init__(self) -> None:
        self.of_lane: dict[tuple[str, int], int] = {}  # bytes, by kind of lane and slot
        self.of_stream: dict[torch.cuda.Stream, int] = {}  # bytes, by a caller's stream

    def raise_lane(self, kind: str, slot: int, num_bytes: int) -> None:
        self.of_lane[kind, slot] = max(self.of_lane.get((kind, slot), 0), num_bytes)

    def raise_stream(self, stream: torch.cuda.Stream, num_bytes: int) -> None:
        self.of_stream[stream] = max(self.of_stream.get(stream, 0), num_bytes)


def reserve(device: torch.device, num_bytes: int) -> None:
    """Let torch hold `num_bytes` in one piece, and some small pieces, for the current stream."""
    import torch

    held = [torch.empty(num_bytes, dtype=torch.uint8, device=device)]
    held += [torch.empty(_SMALL_BYTES, dtype=torch.uint8, device=device) for _ in range(_SMALL_TENSORS)]
    del held


def reserve_pinned(num_tensors: int, num_bytes: int = 0) -> None:
    """Let torch hold `num_tensors` pieces of pinned memory of every size up to 8 MiB, and up to num_bytes."""
    import torch

    held = [
        torch.empty(1 << power, dtype=torch.uint8, device="cpu", pin_memory=True)
        for power in range(max(_LARGEST_PINNED, (num_bytes - 1).bit_length()) + 1)
        for _ in range(num_tensors)
    ]
    del held


def is_out_of_memory(error: BaseException) -> bool:
    """Does an error mean that memory ran out, the host's or a GPU's?"""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def lack_of_memory_told(rank: int) -> Iterator[None]:
    """Set-up. If memory runs out meanwhile, raises ConfigError, which names the rank and what may be lowered."""
    try:
        yield
    except PipemoeError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"rank {rank}: out of memory at set-up ({error}); lower moe_max_num_tokens, max_tokens_per_rank, num_slots "
            "or an engine's max_kept_tokens"
        ) from error
