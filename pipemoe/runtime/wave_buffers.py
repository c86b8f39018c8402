"""The views of the workspace that one wave uses in one of its slot's double buffers.

They are the same in every layer, so they are made once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipemoe.plan.schedule import Plan
    from pipemoe.runtime.workspace import Workspace
    from pipemoe.wire import WireFormat


class WaveBuffers:
    """Views for `rank`, of wave number `wave` of cohort number `cohort`."""

    def __init__(
        self, plan: Plan, rank: int, cohort: int, wave: int, buffer: int, workspace: Workspace, wire: WireFormat
    ) -> None:
        self.slot, self.buffer = plan.cohorts[cohort].slot, buffer
        self.wave = plan.cohorts[cohort].waves[wave]
        self.exchange = plan.exchange(self.wave)
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
        self.partial = slot.partial[buffer][:num_rows]  # sums, [n, H]
        self.staging = slot.staging[buffer]  # the peers' sums, for combine="gather"

    @property
    def is_sent_from_here(self) -> bool:
        """Does the dispatch send rows of this rank?"""
        return self.exchange == "padded" or bool(self.own)
