"""The operation that an error names is the one that failed, or the one that is waited for; not the one that was issued
last.
"""

import time
from types import SimpleNamespace

import pytest
import torch

from pipemoe import Config
from pipemoe.experts import make_experts
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape, OpKind
from pipemoe.runtime.lanes import host_lanes
from pipemoe.runtime.run import Run
from pipemoe.runtime.workspace import Workspace
from pipemoe.wire import WireFormat
from tests.moe_cases import HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, make_layers

WAIT_SECONDS = 60
NUM_LAYERS = 2


class Planted(Exception):
    pass


def raise_planted(*arguments, **options):
    raise Planted


class Source:
    has_side_work = keeps_tensors = writes_rows = False

    def __init__(self):
        self.layers_given = NUM_LAYERS

    def begin(self, plan, rank):
        pass

    def ready(self, cohort, layer):
        return layer < self.layers_given

    def attend(self, cohort, layer):
        pass

    def rows(self, cohort, start, stop):
        n = stop - start
        return torch.zeros(n, HIDDEN), torch.zeros(n, TOP_K, dtype=torch.int32), torch.zeros(n, TOP_K)

    def results(self, cohort, start, stop):
        return torch.zeros(stop - start, HIDDEN)

    def combined(self, cohort, layer, event):
        pass

    def finish(self, cohort):
        pass

    def finished(self, cohort, seconds):
        pass


class Stage:
    """Rank 0 of two; a cohort each, under way at once. Collectives are done at once, unless a test makes them something
    else.
    """

    def __init__(self, *, on_progress=lambda op: None, experts=lambda *arguments: None):
        config = Config(mode="per_rank", moe_max_num_tokens=200, max_tokens_per_rank=100, num_slots=2)
        self.plan = plan(
            Facts(((10,), (20,))), ModelShape(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, NUM_LAYERS), config
        )
        wire, device = WireFormat(HIDDEN, TOP_K, torch.float32), torch.device("cpu")
        real = make_experts(
            make_layers(NUM_LAYERS, device, torch.float32).local(2, 0),
            top_k=TOP_K,
            hidden=HIDDEN,
            device="cpu",
            dtype=torch.float32,
        )
        workspace = Workspace(config, wire, torch.float32, 2, real, device, None)
        self.transport = SimpleNamespace(dispatch=lambda *arguments: None, combine=lambda *arguments: None)
        self.lanes, self.source, self.issued = host_lanes(2, lambda: None), Source(), []
        self.run = Run(
            self.plan,
            0,
            self.lanes,
            self.transport,
            workspace,
            wire,
            experts,
            self.source,
            on_progress=lambda op: (self.issued.append(op), on_progress(op)),
        )

    def slot_of(self, cohort):
        return self.plan.cohorts[cohort].slot

    def advance_until(self, condition):
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            if self.run.advance():
                return
            time.sleep(0.001)

    def fail(self):
        """Advance until the planted exception; the operation that the run names."""
        with pytest.raises(Planted):
            self.advance_until(lambda: False)
        return self.run.failed_op


@pytest.fixture
def stage():
    made = []

    def make(**options):
        made.append(Stage(**options))
        return made[-1]

    yield make
    for one in made:
        one.lanes.close()


@pytest.mark.parametrize("cohort", [0, 1])
@pytest.mark.parametrize("kind", [OpKind.DISPATCH, OpKind.COMBINE])
def test_a_collective_that_fails_while_others_are_under_way(stage, kind, cohort):
    one = stage()
    slot, fails = one.slot_of(cohort), []

    def post(its_slot, *arguments):
        return lambda: raise_planted() if its_slot == slot and fails else False

    setattr(one.transport, kind.name.lower(), post)
    one.advance_until(lambda: {(op.kind, op.cohort) for op, _ in _under_way(one.run)} >= {(kind, 0), (kind, 1)})
    fails.append(True)
    failed = one.fail()
    assert (failed.kind, failed.cohort, failed.layer) == (kind, cohort, 0)
    assert one.issued[-1] != failed


def _under_way(run):
    return [item for queue in run._under_way.values() for item in queue]


@pytest.mark.parametrize("kind", [OpKind.DISPATCH, OpKind.COMBINE])
def test_a_collective_that_cannot_be_posted(stage, kind):
    """Posted late, when operations behind it have been issued; or at once."""
    one = stage()
    setattr(one.transport, kind.name.lower(), raise_planted)
    failed = one.fail()
    assert (failed.kind, failed.layer) == (kind, 0)


def test_experts_that_fail(stage):
    one = stage(experts=lambda layer, *arguments: raise_planted() if layer == 1 else None)
    failed = one.fail()
    assert (failed.kind, failed.layer) == (OpKind.EXPERTS, 1)


def test_a_callback_that_fails(stage):
    one = stage(
        on_progress=lambda op: raise_planted() if (op.kind, op.layer, op.cohort) == (OpKind.COMBINE, 1, 0) else None
    )
    failed = one.fail()
    assert (failed.kind, failed.layer, failed.cohort) == (OpKind.COMBINE, 1, 0)


def test_a_run_that_waits_for_its_caller_says_so(stage):
    one = stage()
    one.source.layers_given = 1
    one.run.advance()
    one.advance_until(lambda: not _under_way(one.run))
    assert one.run.oldest() is None
    assert one.run.not_begun() == "attend(cohort 0, layer 1, wave 0), for which the caller has given no rows yet"
    one.source.layers_given = NUM_LAYERS
    one.advance_until(lambda: False)
    assert one.run.oldest() is None and one.run.not_begun() is None
