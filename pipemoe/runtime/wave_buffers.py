"""The views of the workspace that one wave uses in one of its slot's double buffers.

They are the same in every layer, so they are made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipemoe.comm.transport import column_blocks
from pipemoe.plan.arrivals import own_rows_first

if TYPE_CHECKING:
    import torch

    from pipemoe.plan.schedule import Plan
    from pipemoe.runtime.workspace import Workspace
    from pipemoe.wire import WireFormat


class WaveBuffers:
    """Views for `rank`, of wave number `wave` of cohort number `cohort`."""

    def __init__(
        self, plan: Plan, rank: int, cohort: int, wave: int, buffer: int, workspace: Workspace, wire: WireFormat
    ) -> None:
        self.slot, self.buffer = plan.cohorts[cohort].slot, buffer
        planned = plan.cohorts[cohort].waves[wave]
        self.exchange = plan.exchange(planned)
        # Where its rows lie here; the first `early_rows` are computed before the others come.
        self.wave, early_rows = own_rows_first(plan, planned, rank)
        slot, num_rows = workspace.slots[self.slot], self.wave.num_rows
        self.scratch = slot.scratch
        self.received = slot.receive[buffer][:num_rows]  # [n, row_bytes] uint8
        self.rows = wire.rows(self.received)
        own = [s for s in self.wave.segments if s.rank == rank]
        # this rank's segments, with their wire rows
        self.own = [(s, self.rows[s.row : s.row + s.num_rows]) for s in own]
        block = num_rows // plan.facts.num_ranks
        self.has_padding = self.exchange == "padded" and block > sum(s.num_rows for s in own)
        self.own_block_ids = self.rows.ids[rank * block : (rank + 1) * block]  # of a padded exchange, padding included
        # Blocks of columns of the partial sums, [n, columns] each, and of the peers' for combine="gather".
        self.columns = [slice(c.start, c.stop) for c in plan.columns]
        self.partial = column_blocks(slot.partial[buffer], (num_rows,), plan.columns)
        # Rows, and where each block of their sums goes, of each call of the experts.
        bounds = [0, early_rows, num_rows] if early_rows else [0, num_rows]
        calls = [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]
        self.calls = [(self.rows[rows], [block[rows] for block in self.partial]) for rows in calls]
        self.staging: Sequence[torch.Tensor | None] = [None] * len(self.columns)
        if (memory := slot.staging[buffer]) is not None:
            self.staging = column_blocks(memory, (len(memory), sum(s.num_rows for s in own)), plan.columns)

    @property
    def is_sent_from_here(self) -> bool:
        """Does the dispatch send rows of this rank?"""
        return self.exchange == "padded" or bool(self.own)
