"""The workspace: every buffer that the exchange and the experts need.

It is allocated once. Its size depends on the configuration alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipemoe.config import Config
from pipemoe.wire import WireFormat

if TYPE_CHECKING:
    import torch

    from pipemoe.comm.shared.waves import SharedWaves, WaveMemory


@dataclass(frozen=True, slots=True)
class SlotBuffers:
    """One cohort slot's buffers; the lists have one entry per double buffer."""

    # If ranks share memory, rows and partial sums lie in Workspace.shared, and here only those of ranks of other hosts.
    receive: list[torch.Tensor]  # [rows, row_bytes] uint8
    partial: list[torch.Tensor]  # [rows, H] combine dtype
    # [peers, own rows, H] combine dtype; peers: all for combine="gather", those of other hosts if ranks share memory
    staging: list[Any]  # or None
    scratch: Any  # of the experts


class Workspace:
    """Buffers for `config.max_slots` cohorts under way at once."""

    def __init__(
        self,
        config: Config,
        wire: WireFormat,
        combine_dtype: torch.dtype,
        num_ranks: int,
        experts: Any,
        device: torch.device,
        shared: SharedWaves | None = None,
        num_others: int = 0,
    ) -> None:
        """shared: where rows and sums lie, if ranks share memory, and num_others ranks of other hosts do not."""
        import torch

        self.shared = shared

        # A gather sums in float32; a reduce writes what the partial sums travel as.
        self.results_dtype = torch.float32 if config.combine == "gather" else combine_dtype
        self._hidden, self._device = wire.hidden, device
        rows = config.max_wave_rows(num_ranks)
        gathers = config.combine == "gather" and num_ranks > 1
        own_rows = min(rows, config.max_tokens_per_rank)
        # A gather adds peers' sums in a wider copy of the own rows, beside the one it casts to.
        self.sum_bytes = 2 * own_rows * wire.hidden * max(4, combine_dtype.itemsize) if gathers else 0

        def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            # zeroed, so that no page is first touched inside a step
            return torch.empty(shape, dtype=dtype, device=device).zero_()

        def slot() -> SlotBuffers:
            buffers = range(0 if shared and not num_others else config.num_buffers)
            num_staged = num_others if shared else (num_ranks - 1) * gathers
            return SlotBuffers(
                receive=[filled((rows, wire.row_bytes), torch.uint8) for _ in buffers],
                partial=[filled((rows, wire.hidden), combine_dtype) for _ in (() if shared else buffers)],
                staging=[
                    filled((num_staged, own_rows, wire.hidden), combine_dtype) if num_staged else None for _ in buffers
                ],
                scratch=experts.new_scratch(rows),
            )

        self.slots = [slot() for _ in range(config.max_slots)]

    def new_results(self, num_rows: int) -> torch.Tensor:
        """Memory for the sums of `num_rows` rows: [num_rows, H]."""
        import torch

        return torch.empty((num_rows, self._hidden), dtype=self.results_dtype, device=self._device)

    @property
    def num_bytes(self) -> int:
        tensors = [t for s in self.slots for t in (*s.receive, *s.partial, *s.staging) if t is not None]
        return (
            (self.shared.num_bytes if self.shared else 0)
            + sum(t.numel() * t.element_size() for t in tensors)
            + sum(s.scratch.num_bytes for s in self.slots)
        )


def shared_layout(config: Config, wire: WireFormat, combine_dtype: torch.dtype, num_ranks: int) -> WaveMemory:
    """What a rank shares with the others if ranks share memory."""
    from pipemoe.comm.shared.waves import WaveMemory

    rows = config.max_wave_rows(num_ranks)
    own_rows = min(rows, config.max_tokens_per_rank)
    return WaveMemory(config.max_slots, config.num_buffers, own_rows, wire.row_bytes, rows, wire.hidden, combine_dtype)
