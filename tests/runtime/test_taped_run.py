"""A run from tapes enqueues what Python does: the same work in the same order on each stream, after the same
work of others.

On a stand-in for the driver; the kernels' arguments are real.
"""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe import Config
from pipemoe.comm.transport import LocalTransport
from pipemoe.experts.hopper import HopperExperts
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape, OpKind
from pipemoe.runtime import tape_loop as loop
from pipemoe.runtime.run import Run
from pipemoe.runtime.taped_run import TapedRun
from pipemoe.runtime.tapes import Tapes
from pipemoe.runtime.workspace import Workspace
from pipemoe.wire import WireFormat
from tests.experts.oracle import random_weights
from tests.runtime import driver_stand_in

BF16, CPU = torch.bfloat16, torch.device("cpu")
HIDDEN, TOP_K, NUM_EXPERTS, NUM_LAYERS, MAX_TOKENS = 128, 2, 8, 3, 200


class Source:
    """Attention from graphs, or called; with shared experts. Tensors are the same in every layer, as a model's."""

    keeps_tensors = True

    def __init__(self, device, plan, *, has_graphs, has_side_work, writes_rows):
        self._device, self._plan, self._has_graphs, self.has_side_work = device, plan, has_graphs, has_side_work
        self.fails_at, self.finished_cohorts, self.writes_rows, self._in_place = None, [], writes_rows, {}
        n = plan.facts.tokens[0]
        self._rows = [
            (torch.zeros(n, HIDDEN, dtype=BF16), torch.zeros(n, TOP_K, dtype=torch.int32), torch.zeros(n, TOP_K))
            for _ in range(1 if has_graphs else NUM_LAYERS)
        ]
        self.sums = torch.zeros(n, HIDDEN, dtype=BF16)
        self._layer = {}

    def begin(self, plan, rank):
        pass

    def ready(self, cohort, layer):
        return True

    def _handle(self, cohort, layer, shared=False):
        return 10_000 + 1000 * shared + 100 * self._plan.cohorts[cohort].slot + layer

    def graphs(self, cohort, rows_of):
        assert bool(rows_of) == self._in_place[cohort]
        if not self._has_graphs:
            return None
        shared = self.has_side_work
        return tuple((self._handle(cohort, k), self._handle(cohort, k, True) * shared) for k in range(NUM_LAYERS))

    def attend(self, cohort, layer, rows=None):
        if (cohort, layer) == self.fails_at:
            raise ValueError("planted")
        self._layer[cohort], self._in_place[cohort] = layer, rows is not None
        if layer == 0:
            self._device.enqueue(self._device.current, "start")
        assert self._device.enqueue(self._device.current, "graph", self._handle(cohort, layer)) == 0

    def rows(self, cohort, start, stop):
        assert not self._in_place[cohort]
        return tuple(t[start:stop] for t in self._rows[0 if self._has_graphs else self._layer[cohort]])

    def side_work(self, cohort):
        self._device.enqueue(self._device.current, "graph", self._handle(cohort, self._layer[cohort], True))

    def results(self, cohort, start, stop):
        return self.sums[start:stop]

    def combined(self, cohort, layer, event):
        pass

    def finish(self, cohort):
        self._device.enqueue(self._device.current, "finish")

    def finished(self, cohort, seconds):
        self.finished_cohorts.append(cohort)


class Rank:
    """A step of sequences of these lengths, on the stand-in."""

    def __init__(self, monkeypatch, lengths, *, has_graphs=True, has_side_work=False, writes_rows=False, **options):
        self.device = driver_stand_in.install(monkeypatch)
        monkeypatch.setattr(loop, "SPIN_NS", 0)  # nothing goes on meanwhile
        options = {"mode": "pipelined", "moe_max_num_tokens": 256, "num_slots": 2, **options}
        config = Config(max_tokens_per_rank=MAX_TOKENS, **options)
        shape = ModelShape(HIDDEN, 128, NUM_EXPERTS, TOP_K, NUM_LAYERS)
        self.plan = plan(Facts((tuple(lengths),)), shape, config)
        weights = [random_weights(NUM_EXPERTS, HIDDEN, 128, dtype=BF16) for _ in range(NUM_LAYERS)]
        self.experts = HopperExperts(
            weights, top_k=TOP_K, hidden=HIDDEN, device=CPU, dtype=BF16, num_experts=NUM_EXPERTS
        )
        self.lanes, self.transport = driver_stand_in.lanes_of(config.num_slots), LocalTransport()
        self.wire = WireFormat(HIDDEN, TOP_K, BF16)
        self.workspace = Workspace(config, self.wire, BF16, 1, self.experts, CPU)
        self.tapes = Tapes(self.lanes, self.transport, self.experts)
        self.source = Source(
            self.device,
            self.plan,
            has_graphs=has_graphs,
            has_side_work=has_side_work,
            writes_rows=writes_rows,
        )
        self.done, self.progress = [], []

    def run(self, of: type[Run], **options: Any) -> Run:
        return of(
            self.plan, 0, self.lanes, self.transport, self.workspace, self.wire, self.experts, self.source,
            on_done=self.done.append, on_progress=lambda op: self.progress.append(str(op)), **options,
        )  # fmt: skip

    def to_the_end(self, run, seed=0):
        """Advance, and let the device go on by chance; what was enqueued."""
        chance = random.Random(seed)
        self.device.streams.clear()
        idle = calls = 0
        while not run.advance():
            goes_on = self.device.go_on(chance) or len(self.device.calls) > calls
            idle, calls = 0 if goes_on else idle + 1, len(self.device.calls)
            while chance.random() < 0.8 and self.device.go_on(chance):
                pass
            assert idle < 3, f"it stands still at {run.oldest()}"
        while self.device.go_on(chance):
            pass
        return {s: stream.work for s, stream in self.device.streams.items() if stream.work}

    def both(self, seed=0):
        wanted = self.to_the_end(self.run(Run), seed)
        order = list(self.done)
        self.done.clear()
        found = self.to_the_end(self.run(TapedRun, tapes=self.tapes), seed + 1)
        assert sorted(self.done) == sorted(order) == sorted(self.plan.ops)
        return wanted, found

    def seen(self, work):
        """A piece of work, whatever memory holds the sums: a tape has them written to their place."""
        sums = [self.source.sums, *(p for slot in self.workspace.slots for p in slot.partial)]
        if work.name != "kernel":
            return work.name, work.arguments
        kernel, grid, values, early = work.arguments
        ranges = [range(t.data_ptr(), t.data_ptr() + max(1, t.nbytes)) for t in sums]
        values = tuple("sums" if any(v in r for r in ranges) else v for v in values)
        return work.name, (kernel, grid, values, early)


def same(rank, wanted, found):
    """Is the same enqueued on each stream, and after the same work on the others, unless that was already done?"""
    assert sorted(wanted) == sorted(found)
    for stream in wanted:
        assert [rank.seen(w) for w in wanted[stream]] == [rank.seen(w) for w in found[stream]], f"stream {stream}"
        for a, b in zip(wanted[stream], found[stream], strict=True):
            for other in {*a.after, *b.after}:
                late, seen = a.after.get(other, 0), b.after.get(other, 0)
                assert max(seen, b.done.get(other, 0)) >= late, f"{b.name} on {stream} is too early for {other}"
                assert seen <= late, f"{b.name} on stream {stream} waits for too much of {other}"


LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=4).filter(lambda lengths: sum(lengths) <= MAX_TOKENS)


@settings(max_examples=80, deadline=None)
@given(
    lengths=LENGTHS,
    mode=st.sampled_from(["broadcast", "chunked", "two_batch", "per_rank", "pipelined", "padded"]),
    cap=st.sampled_from([16, 64, 256]),
    seed=st.integers(0, 99),
    has_graphs=st.sampled_from([True, True, False]),
    has_side_work=st.booleans(),
    writes_rows=st.booleans(),
    breath_ns=st.sampled_from([0, loop.BREATH_NS]),
)
def test_the_same_is_enqueued(lengths, mode, cap, seed, has_graphs, has_side_work, writes_rows, breath_ns):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loop, "BREATH_NS", breath_ns)
        of = Rank(
            monkeypatch, lengths, mode=mode, moe_max_num_tokens=cap,
            has_graphs=has_graphs, has_side_work=has_side_work, writes_rows=writes_rows,
        )  # fmt: skip
        same(of, *of.both(seed))
        assert sorted(of.source.finished_cohorts) == sorted(2 * list(range(len(of.plan.cohorts))))


@pytest.mark.parametrize("lengths", [[5], [200], [30, 9, 64]], ids=str)
@pytest.mark.parametrize("has_side_work", [False, True])
@pytest.mark.parametrize("writes_rows", [False, True])
def test_only_the_first_attention_and_the_end_are_left_to_python(monkeypatch, lengths, has_side_work, writes_rows):
    of = Rank(monkeypatch, lengths, has_side_work=has_side_work, writes_rows=writes_rows)
    by_python = []
    issue = TapedRun._issue
    monkeypatch.setattr(TapedRun, "_issue", lambda run, op: by_python.append(op) or issue(run, op))
    of.to_the_end(of.run(TapedRun, tapes=of.tapes))
    assert by_python == [op for op in of.plan.ops if op.kind is OpKind.FINISH or op[0::2] == (OpKind.ATTEND, 0)]


def test_no_sums_are_copied(monkeypatch):
    of = Rank(monkeypatch, [5, 20])
    wanted, found = of.both()
    for streams, memory in ((wanted, of.workspace.slots[0].partial), (found, [of.source.sums])):
        ranges = [range(t.data_ptr(), t.data_ptr() + t.nbytes) for t in memory]
        kernels = [w.arguments for work in streams.values() for w in work if w.name == "kernel"]
        combines = [
            k
            for k in kernels
            if "out_stride" in k[0].function.__code__.co_varnames and "positions" in k[0].function.__code__.co_varnames
        ]
        assert len(combines) == NUM_LAYERS * len(of.plan.cohorts)
        assert all(any(values[kernel.index_of("out")] in r for r in ranges) for kernel, _, values, _ in combines)


def test_sums_of_another_dtype_are_left_to_python(monkeypatch):
    """The copy converts; everything else is played."""
    of = Rank(monkeypatch, [5])
    of.source.sums = of.source.sums.float()
    by_python = []
    issue = TapedRun._issue
    monkeypatch.setattr(TapedRun, "_issue", lambda run, op: by_python.append(op) or issue(run, op))
    same(of, *of.both())
    assert [op.layer for op in by_python if op.kind is OpKind.COMBINE] == [0, 1, 2]
    assert not any(op.kind in (OpKind.EXPERTS, OpKind.DISPATCH) for op in by_python)


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_failed_attention_goes_on_without_its_rows(monkeypatch, layer):
    of = Rank(monkeypatch, [30], mode="per_rank", has_graphs=False)
    of.source.fails_at, nobodys = (0, layer), torch.zeros(30, HIDDEN, dtype=BF16)
    monkeypatch.setattr(of.workspace, "new_results", lambda num_rows: nobodys[:num_rows])
    same(of, *of.both())
    run = of.run(TapedRun, tapes=of.tapes)
    of.to_the_end(run)
    assert str(run.failure) == "planted"


@pytest.mark.parametrize("lengths", [[5], [30, 9]], ids=str)
def test_a_call_that_fails_is_named(monkeypatch, lengths):
    """Whichever it is: the error, with the operation, its rank, and the driver's result."""
    of = Rank(monkeypatch, lengths)
    run = of.run(TapedRun, tapes=of.tapes)
    of.device.calls.clear()
    of.to_the_end(run)
    seen = set()
    for number in range(len(of.device.calls)):
        run = of.run(TapedRun, tapes=of.tapes)
        of.device.calls.clear()
        of.device.fails_at = number
        try:
            of.to_the_end(run)
            assert run.failure is not None  # model code that Python calls
        except RuntimeError as error:
            assert str(driver_stand_in.BROKEN) in str(error)
            assert run.failed_op in of.plan.ops
            if "of rank 0" in str(error):
                assert str(run.failed_op) in str(error)
                seen.add(str(error).split(" in ")[0])
        of.device.fails_at = None
    assert {"cuGraphLaunch", "cuLaunchKernelEx"} <= seen
