"""The clock again, written from the rules of pipemoe.runtime.run, for costs without contention: everything at full
speed.
"""

from pipemoe.plan.clock.layer import FINISH, FIRST_ATTEND
from pipemoe.plan.clock.prediction import costs_of
from pipemoe.plan.cost.model import rates_of
from pipemoe.plan.schedule import MAX_GROUPS, OpKind

COMPUTE = (OpKind.ATTEND, OpKind.EXPERTS, OpKind.FINISH)


class NaiveSimulator:
    def __init__(self, plan, cost):
        self.plan, self.rates, self.costs = plan, rates_of(cost), costs_of(plan, cost)
        self.ranks, self.num_cohorts = range(plan.facts.num_ranks), len(plan.cohorts)
        self.ops_of = [[op for op in plan.ops if op.cohort == c] for c in range(self.num_cohorts)]
        self.position = {op: i for i, op in enumerate(plan.ops)}
        self.done = [set() for _ in self.ranks]
        self.issued = [set() for _ in self.ranks]  # issuing has begun
        self.posted = [set() for _ in self.ranks]  # collectives: issuing has ended
        self.host = [None for _ in self.ranks]  # (end, op)
        self.running = [{} for _ in self.ranks]  # computation -> end
        self.transfers = {}  # collective -> end
        self.begun = {}  # (rank, operation) under way: when it began
        self.spans = [[] for _ in self.ranks]  # (operation, (begin, end))

    def run(self):
        """Finish [C][R] in ns; then `spans` are those of a Prediction."""
        now, finish = 0, {}
        while True:
            self.start(now)
            ends = (
                [h[0] for h in self.host if h]
                + [e for r in self.running for e in r.values()]
                + list(self.transfers.values())
            )
            if not ends:
                self.spans = tuple(tuple(sorted(spans, key=lambda span: (span[1], span[0]))) for spans in self.spans)
                return [[finish[c, r] for r in self.ranks] for c in range(self.num_cohorts)]
            now = min(ends)
            for r in self.ranks:
                if self.host[r] and self.host[r][0] == now:
                    self.posted[r].add(self.host[r][1])
                    self.host[r] = None
                for op in [op for op, end in self.running[r].items() if end == now]:
                    del self.running[r][op]
                    self.end(r, op, now)
                    if op.kind is OpKind.FINISH:
                        finish[op.cohort, r] = now
            for op in [op for op, end in self.transfers.items() if end == now]:
                del self.transfers[op]
                for r in self.ranks:
                    self.end(r, op, now)

    def end(self, r, op, now):
        self.done[r].add(op)
        self.spans[r].append((op, (self.begun.pop((r, op)), now)))

    def start(self, now):
        for r in self.ranks:
            if self.host[r] is None:
                heads = [next((op for op in ops if op not in self.issued[r]), None) for ops in self.ops_of]
                may = [op for op in heads if op and self.may_issue(r, op)]
                if may:
                    op = min(may, key=self.position.__getitem__)
                    self.issued[r].add(op)
                    self.host[r] = (now + self.host_ns(r, op), op)
            for c in range(self.num_cohorts):
                op = next((op for op in self.ops_of[c] if op.kind in COMPUTE and op not in self.done[r]), None)
                if (
                    op
                    and op in self.issued[r]
                    and op not in self.running[r]
                    and self.slot_is_free(r, op)
                    and self.needs(r, op) <= self.done[r]
                ):
                    issue_end = self.host[r][0] if self.host[r] and self.host[r][1] == op else now
                    self.running[r][op] = max(now + self.compute_ns(r, op), issue_end)
                    self.begun[r, op] = now
        for c in range(self.num_cohorts):
            for kind in (OpKind.DISPATCH, OpKind.COMBINE):
                op = next((op for op in self.ops_of[c] if op.kind is kind and op not in self.done[0]), None)
                if op is None or op in self.transfers:
                    continue
                if all(
                    op in self.posted[r] and self.slot_is_free(r, op) and self.needs(r, op) <= self.done[r]
                    for r in self.ranks
                ):
                    self.begun.update({(r, op): now for r in self.ranks})
                    self.transfers[op] = now + int(self.costs.exchange[c, int(kind is OpKind.COMBINE), op.wave, 0])

    def may_issue(self, r, op):
        if op.kind is OpKind.DISPATCH:
            under_way = [
                o
                for o in self.posted[r]
                if o.kind is OpKind.DISPATCH and o.cohort == op.cohort and o not in self.done[r]
            ]
            return len(under_way) < MAX_GROUPS
        if op.kind is not OpKind.ATTEND:
            return True
        if op.layer == 0 and any(o not in self.issued[r] for e in self.before(op) for o in self.ops_of[e]):
            return False
        return all(attend in self.issued[r] for attend in self.attends_before(op))

    def attends_before(self, op):
        """Of earlier chunks in the same layer; of the chunks that continue this one's, and take slots in the same turn,
        in the last.
        """
        before = {type(op)(OpKind.ATTEND, e, op.layer, 0) for e in self.plan.causal_predecessors[op.cohort]}
        for e, predecessors in enumerate(self.plan.causal_predecessors):
            same_turn = e // self.plan.config.num_slots == op.cohort // self.plan.config.num_slots
            if op.cohort in predecessors and same_turn and op.layer:
                before.add(type(op)(OpKind.ATTEND, e, op.layer - 1, 0))
        return before

    def before(self, op):
        slot = self.plan.cohorts[op.cohort].slot
        return [e for e in range(op.cohort) if self.plan.cohorts[e].slot == slot]

    def slot_is_free(self, r, op):
        """The lane is in order over the cohorts of a slot."""
        same = (lambda o: o.kind in COMPUTE) if op.kind in COMPUTE else (lambda o: o.kind is op.kind)
        return all(o in self.done[r] for e in self.before(op) for o in self.ops_of[e] if same(o))

    def needs(self, r, op):
        """What must be done on rank r before `op` runs."""
        kind, c, layer, wave = op
        make, waves = type(op), len(self.plan.cohorts[c].waves)
        own = [w for w in range(waves) if self.costs.own[c, r, w]]
        if kind is OpKind.ATTEND or kind is OpKind.FINISH:
            of_layer = layer - 1 if kind is OpKind.ATTEND else layer
            found = {make(OpKind.COMBINE, c, of_layer, w) for w in own} if of_layer >= 0 else set()
            return found | (self.attends_before(op) if kind is OpKind.ATTEND else set())
        if kind is OpKind.COMBINE:
            return {make(OpKind.EXPERTS, c, layer, wave)}
        earlier = layer * waves + wave - self.plan.config.num_buffers  # the wave that had the buffer

        def of_earlier(kind):
            return {make(kind, c, earlier // waves, earlier % waves)} if earlier >= 0 else set()

        if kind is OpKind.DISPATCH:
            return ({make(OpKind.ATTEND, c, layer, 0)} if wave in own else set()) | of_earlier(OpKind.EXPERTS)
        return {make(OpKind.DISPATCH, c, layer, wave)} | of_earlier(OpKind.COMBINE)

    def compute_ns(self, r, op):
        attend = 0 if op.layer else FIRST_ATTEND
        place = {OpKind.ATTEND: attend, OpKind.EXPERTS: 1 + op.wave, OpKind.FINISH: FINISH}[op.kind]
        return int(self.costs.compute[op.cohort, r, place, 0])

    def host_ns(self, r, op):
        rates, owner = self.rates, bool(self.costs.own[op.cohort, r].any())
        if op.kind is OpKind.DISPATCH:
            return rates.host_dispatch_ns + (rates.host_pack_ns if self.costs.own[op.cohort, r, op.wave] else 0)
        if op.kind is OpKind.ATTEND:
            return int(self.costs.issue[op.cohort, r])
        if op.kind is OpKind.FINISH:
            return rates.host_finish_ns if owner else rates.host_idle_ns
        return rates.host_experts_ns if op.kind is OpKind.EXPERTS else rates.host_combine_ns
