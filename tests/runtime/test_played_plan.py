"""Records of all ranks, played by hand in any order that their waits allow: whoever reads rows or sums finds those of
its wave, whatever steps came before, and nobody waits for ever.
"""

import ctypes
import random

import numpy as np
import pytest
import torch

from pipemoe import Config
from pipemoe.comm.shared import player as of
from pipemoe.comm.shared.bells import Bells
from pipemoe.comm.shared.waves import SharedWaves
from pipemoe.experts import make_experts
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape, Op, OpKind
from pipemoe.runtime.played_plan import PlayedPlan, queue_of
from pipemoe.runtime.played_run import PlayedRun
from pipemoe.runtime.workspace import Workspace, shared_layout
from pipemoe.wire import WireFormat
from tests.comm.shared.shared_ranks import memories
from tests.moe_cases import HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, make_layers

LAYERS = 3
# Also a rank with rows in three waves of a layer, which have two buffers.
STEPS = (((10,), (20,), (5,)), ((), (20,), (40,)), ((10,), (20,), (5,)), ((70,), (), (3,)), ((1,), (), ()))


def word(address):
    return ctypes.c_int32.from_address(int(address))


class Ranks:
    """All ranks of a world, and what lies in their memory."""

    def __init__(self, **options):
        num_ranks, device = len(STEPS[0]), torch.device("cpu")
        self.config = Config(moe_max_num_tokens=20, max_tokens_per_rank=80, **options).in_world(3)
        self.shape = ModelShape(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, LAYERS)
        self.wire = WireFormat(HIDDEN, TOP_K, torch.float32)
        layout = shared_layout(self.config, self.wire, torch.float32, num_ranks)
        self._of_ranks = memories(num_ranks, layout.num_bytes), memories(num_ranks, Bells.num_bytes(3))
        by_rank, bells = dict(enumerate(self._of_ranks[0])), [m.ctypes.data for m in self._of_ranks[1]]
        self.ranks = []
        for rank in range(num_ranks):
            weights = make_layers(LAYERS, device, torch.float32).local(num_ranks, rank)
            experts = make_experts(weights, top_k=TOP_K, hidden=HIDDEN, device="cpu", dtype=torch.float32)
            waves = SharedWaves(rank, num_ranks, layout, by_rank, Bells(rank, bells, 3, 0.0))
            workspace = Workspace(self.config, self.wire, torch.float32, num_ranks, experts, device, waves)
            self.ranks.append((waves, workspace, experts))
        self.rows, self.sums = {}, {}  # by rank, slot and buffer: the step, cohort, layer and wave that lies there

    def run(self, draw):
        """All steps; a rank begins with the next when it has done its part."""
        at, queues = [-1] * len(self.ranks), [[] for _ in self.ranks]
        plans = [plan(Facts(lengths), self.shape, self.config) for lengths in STEPS]
        while True:
            for rank, of_rank in enumerate(queues):
                if at[rank] < len(STEPS) and all(int(slot.done[q]) == len(r) for slot, q, r, _ in of_rank):
                    at[rank] += 1
                    queues[rank] = self._queues(rank, plans[at[rank]]) if at[rank] < len(STEPS) else []
            found = [(rank, entry) for rank, of_rank in enumerate(queues) for entry in of_rank if self._is_free(*entry)]
            if not found:
                assert all(step == len(STEPS) for step in at), "they wait for ever"
                return
            rank, entry = draw.choice(found)
            self._do(at[rank], plans[at[rank]], rank, *entry)
            while draw.random() < 0.8 and self._is_free(*entry):  # one may be far ahead of the others
                self._do(at[rank], plans[at[rank]], rank, *entry)

    def _queues(self, rank, p):
        waves, workspace, experts = self.ranks[rank]
        found = []
        for slot in PlayedPlan(p, rank, waves, workspace, self.wire, experts).slots.values():
            slot.done[:] = 0
            records, waits = slot.for_step()
            found += [(slot, queue, records[queue], waits) for queue in (of.SUMS, of.COMPUTATIONS)]
        return found

    def _is_free(self, slot, queue, records, waits):
        at = int(slot.done[queue])
        if at == len(records):
            return False
        mine = waits[records[at, of.WAIT] : records[at, of.LAST_WAIT]]
        return all(not address or word(address).value >= come_to for address, come_to, _ in mine)

    def _do(self, number, p, rank, slot, queue, records, waits):
        at = int(slot.done[queue])
        op, record = slot.ops[queue][at], records[at]
        assert queue_of(op) == queue and p.ops[record[of.OP]] == op
        place = slot.number, p.buffer(*op[1:]) if op.kind not in (OpKind.ATTEND, OpKind.FINISH) else -1
        this = number, op.cohort, op.layer, op.wave
        owners = p.cohorts[op.cohort].waves[op.wave].ranks() if place[1] >= 0 else ()
        if op.kind is OpKind.DISPATCH and rank in owners:
            self.rows[rank, *place] = this
        elif op.kind is OpKind.EXPERTS:
            assert all(self.rows[owner, *place] == this for owner in owners), f"{op} on rank {rank} reads other rows"
            self.sums[rank, *place] = this
        elif op.kind is OpKind.COMBINE and rank in owners:
            everyone = range(len(self.ranks))
            assert all(self.sums[q, *place] == this for q in everyone), f"{op} on rank {rank} reads other sums"
        if record[of.FLAG]:
            word(record[of.FLAG]).value = int(record[of.NUMBER])
        slot.done[queue] = np.int32(at + 1)


@pytest.mark.parametrize("mode", ["padded", "chunked", "two_batch", "per_rank"])
@pytest.mark.parametrize("seed", range(5))
def test_everybody_reads_what_it_should(mode, seed):
    Ranks(mode=mode).run(random.Random(seed))


class Moving(np.ndarray):
    """A record whose wait comes between two looks at it."""

    def __getitem__(self, column):
        value = int(super().__getitem__(column))
        if column == of.WAIT:
            self[of.WAIT] = value + 1
        return value


@pytest.mark.parametrize("kind", [of.A_FLAG, of.OF_REUSE])
def test_an_operation_is_named_while_its_last_wait_comes(kind):
    record = np.zeros(of.OP + 1, np.int64)
    record[of.LAST_WAIT] = 1
    op, waits = Op(OpKind.EXPERTS, 0, 0, 0), np.array([[0, 1, kind]])
    expected = op._replace(kind=OpKind.DISPATCH) if kind == of.A_FLAG else op
    assert PlayedRun._of_head(op, record.view(Moving), waits) == expected
