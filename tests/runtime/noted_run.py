"""A run whose lanes do all work at once, as streams enqueue it, and write down what it is and what it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from pipemoe import Config
from pipemoe.experts import make_experts
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape, Plan
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
        event = SimpleNamespace(
            name=f"{self._name} {len(self._log)}", done=lambda: self._name not in self._hold, end=lambda: 0.0
        )
        self._log.append((event.name, inside, names))
        return event

    def poll(self):
        pass


class Source:
    has_side_work = keeps_tensors = writes_rows = False

    def __init__(self, log):
        self._log, self.fails_at = log, set()  # cohorts and layers
        self.given = {}  # by cohort and layer: the rows to write in place

    def begin(self, plan, rank):
        pass

    def ready(self, cohort, layer):
        return True

    def attend(self, cohort, layer, rows=None):
        self._log.append("attend" if rows is None else f"attend {len(rows)} in place")
        self.given[cohort, layer] = rows
        if (cohort, layer) in self.fails_at:
            raise ValueError(f"planted in layer {layer}")

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


@dataclass(frozen=True)
class NotedRun:
    """log: of each piece of work lane and number, what it did, and what it waits for; and what the host did between."""

    run: Run
    plan: Plan
    log: list[Any]
    workspace: Workspace
    wire: WireFormat
    source: Source
    calls: list[int]  # rows of each call of the experts

    def to_the_end(self) -> None:
        """Advance until the whole plan is done."""
        for _ in range(10 * len(self.plan) + 10):
            if self.run.advance():
                return
        raise AssertionError(f"it stands still; the oldest operation under way is {self.run.oldest()}")


def noted_run(
    rank,
    hold=frozenset(),
    num_layers=1,
    facts=FACTS,
    on_progress=lambda log, op: None,
    writes_rows=False,
    **options,
) -> NotedRun:
    """hold: lanes whose work is never done; those of slot n > 0 are called "compute of n" and so on."""
    log = []
    config = Config(
        **{"mode": "chunked", "moe_max_num_tokens": 200, "max_tokens_per_rank": 100, "num_slots": 1, **options}
    )
    p = plan(facts, ModelShape(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, num_layers), config)
    wire, device = WireFormat(HIDDEN, TOP_K, torch.float32), torch.device("cpu")
    weights = make_layers(num_layers, device, torch.float32).local(facts.num_ranks, rank)
    experts = make_experts(weights, top_k=TOP_K, hidden=HIDDEN, device="cpu", dtype=torch.float32)
    transport = SimpleNamespace(
        dispatch=lambda slot, buffer, group, exchange, rows: log.append(f"send {[s.rank for s in group.segments]}"),
        combine=lambda *arguments: log.append("combine"),
    )
    names = [
        [kind if not slot else f"{kind} of {slot}" for kind in ("compute", "dispatch", "combine")]
        for slot in range(config.max_slots)
    ]
    lanes = SimpleNamespace(
        slots=[SlotLanes(*(Lane(name, log, hold) for name in of_slot)) for of_slot in names],
        begin=lambda slots: None,
        clock=SimpleNamespace(start=lambda timed: None),
        poll=lambda between_issues=False: None,
    )
    workspace = Workspace(config, wire, torch.float32, facts.num_ranks, experts, device)
    source = Source(log)
    source.writes_rows = writes_rows

    calls = []

    def call(layer, rows, out, scratch):
        log.append("experts")
        calls.append(len(rows))

    run = Run(
        p, rank, lanes, transport, workspace, wire, call, source,
        on_progress=lambda op: on_progress(log, op),
    )  # fmt: skip
    return NotedRun(run, p, log, workspace, wire, source, calls)
