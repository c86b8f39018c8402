"""What one rank issues for a plan whose waves are computed as they arrive, in which order and behind what; with lanes that run work at
once, as streams enqueue it, and only write it down."""

from types import SimpleNamespace

import pytest
import torch

from pipemoe import Config
from pipemoe.experts import make_experts
from pipemoe.plan.arrivals import groups_of
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import MAX_GROUPS, Facts, ModelShape
from pipemoe.runtime.lanes import SlotLanes
from pipemoe.runtime.run import Run
from pipemoe.runtime.workspace import Workspace
from pipemoe.wire import WireFormat
from tests.moe_cases import HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, make_layers

FACTS = Facts(((10,), (20,), (5,), (30,), (40,)))


class Lane:
    """Notes begin and end of each piece of work, and which earlier ones it waits for."""

    def __init__(self, name, log, hold):
        self._name, self._log, self._hold = name, log, hold

    def submit(self, work, waits=(), timed=False):
        names = sorted(w.name for w in waits if w is not None)
        begin = len(self._log)
        self._log.append(None)
        work()
        inside = self._log[begin + 1 :]
        del self._log[begin:]
        event = SimpleNamespace(name=f"{self._name} {len(self._log)}", done=lambda: self._name not in self._hold)
        self._log.append((event.name, inside, names))
        return event

    def poll(self):
        pass


class Arriving:
    def __init__(self, log):
        self._log = log

    def new_arrivals(self, max_rows):
        return SimpleNamespace(num_bytes=0)

    def expect(self, arrivals, layer, rows, part_rows):
        self._log.append(("expect", list(part_rows)))

    def arrived(self, arrivals, part):
        self._log.append(f"arrived {part}")

    def __call__(self, arrivals, out, scratch, events):
        self._log.append("experts")


class Source:
    has_side_work = False

    def __init__(self, log):
        self._log = log

    def begin(self, plan, rank):
        pass

    def ready(self, cohort, layer):
        return True

    def attend(self, cohort, layer):
        self._log.append("attend")

    def rows(self, cohort, start, stop):
        self._log.append(f"pack {stop - start}")
        n = stop - start
        return torch.zeros(n, HIDDEN), torch.zeros(n, TOP_K, dtype=torch.int32), torch.zeros(n, TOP_K)

    def results(self, cohort, start, stop):
        return torch.zeros(stop - start, HIDDEN)

    def combined(self, cohort, layer, event):
        pass

    def finish(self, cohort):
        self._log.append("finish")

    def finished(self, cohort, seconds):
        pass


def make_run(rank, hold=frozenset(), num_layers=1, **options):
    """The run, and its log: of each piece of work lane and number, what it did, and what it waits for; and what the host did between."""
    log = []
    config = Config(**{"mode": "chunked", "moe_max_num_tokens": 200, "max_tokens_per_rank": 100, "num_slots": 1, "arrivals": True, **options})
    p = plan(FACTS, ModelShape(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, num_layers), config)
    wire, device = WireFormat(HIDDEN, TOP_K, torch.float32), torch.device("cpu")
    experts = make_experts(make_layers(num_layers, device, torch.float32).local(5, rank), top_k=TOP_K, hidden=HIDDEN, device="cpu", dtype=torch.float32)
    arriving = Arriving(log)
    transport = SimpleNamespace(
        dispatch=lambda slot, buffer, group, exchange, rows: log.append(f"send {[s.rank for s in group.segments]}"),
        combine=lambda *arguments: log.append("combine"),
    )
    lanes = SimpleNamespace(
        slots=[SlotLanes(*(Lane(name, log, hold) for name in ("compute", "dispatch", "combine")))],
        clock=SimpleNamespace(start=lambda timed: None),
        poll=lambda: None,
    )
    workspace = Workspace(config, wire, torch.float32, 5, experts, device, arriving)
    call = lambda *arguments: log.append("experts")  # noqa: E731
    return Run(p, rank, lanes, transport, workspace, wire, call, Source(log), arriving=arriving if p.arrivals else None), p, log


def test_own_rows_first_and_the_word_behind_each_group():
    run, _, log = make_run(1)
    run.advance()
    assert log == [
        ("compute 0", ["attend"], []),
        ("expect", [15, 20, 30, 40]),
        ("compute 2", ["pack 20", "arrived 1"], []),
        ("dispatch 3", ["send [2, 0, 1, 3]", "arrived 0", "arrived 2", "send [4]", "arrived 3"], ["compute 2"]),
        ("compute 4", ["experts"], []),  # not behind the dispatch
        ("combine 5", ["combine"], ["compute 4"]),
        ("compute 6", ["finish"], ["combine 5"]),
    ]


def test_a_buffer_is_filled_again_when_it_has_been_read_and_sent():
    """Waves of 35 rows in two buffers: the third one's rows are packed behind the first one's experts, and behind its dispatch, which
    experts with all rows of their own do not wait for."""
    run, p, log = make_run(4, hold={"compute"}, moe_max_num_tokens=35)
    run.advance()
    assert len(p.cohorts[0].waves) == 3
    work = [entry for entry in log if entry[0] != "expect"]
    sends = [entry for entry in work if entry[0].startswith("dispatch")]
    experts = [entry for entry in work if entry[1] == ["experts"]]
    pack = next(entry for entry in work if entry[0] == sends[2][2][0])
    assert pack[2] == sorted([experts[0][0], sends[0][0]]) and pack[1][0].startswith("pack")
    assert all(sends[0][0] not in waits for _, _, waits in experts)


def test_without_arrivals_experts_wait_for_the_dispatch():
    run, p, log = make_run(1, hold={"compute"}, arrivals=None)
    run.advance()
    assert not p.arrivals and log[1:4] == [
        ("compute 1", ["pack 20"], []),
        ("dispatch 2", ["send [2, 0, 1, 3, 4]"], ["compute 1"]),
        ("compute 3", ["experts"], ["dispatch 2"]),
    ]


@pytest.mark.parametrize("rows", [200, 60, 30])
def test_so_many_groups_are_under_way_at_once(rows):
    hold = {"compute", "dispatch", "combine"}
    run, p, log = make_run(1, hold=hold, num_layers=4, moe_max_num_tokens=rows)
    run.advance()
    sent = [word for entry in log if entry[0].startswith("dispatch") for word in entry[1] if word.startswith("send")]
    most = max(len(groups_of(p, 0, w)) for w in range(len(p.cohorts[0].waves)))
    assert len(sent) <= MAX_GROUPS and sum(entry[0].startswith("dispatch") for entry in log) == MAX_GROUPS // most
    assert [entry for entry in log if entry[1] == ["experts"]]  # what has been sent is computed
