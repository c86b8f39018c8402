"""The plans of a runtime's steps and rounds."""

from __future__ import annotations

import socket
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipemoe.arguments import look
from pipemoe.config import Config
from pipemoe.errors import ConfigError
from pipemoe.plan.cost.model import CostModel
from pipemoe.plan.planner import compile_planner, planner_is_kept
from pipemoe.plan.planner import plan as make_plan
from pipemoe.plan.room import Room
from pipemoe.plan.schedule import Facts, Microbatch, ModelShape, Plan
from pipemoe.plan.verify import verify

if TYPE_CHECKING:
    from pipemoe.world.world import World

CACHED_PLANS = 64


@dataclass
class Plans:
    """Makes plans, the same on every rank. With debug, each is proved before anything runs by it."""

    shape: ModelShape
    config: Config
    cost: CostModel
    row_bytes: int  # of a row on the wire
    room: Room | None  # for the thread blocks of collectives, on a GPU
    hosts: tuple[int, ...]  # the number of every rank's host
    _of_steps: OrderedDict[Facts, Plan] = field(default_factory=OrderedDict)

    def of_step(self, facts: Facts) -> Plan:
        """The plan for `facts`; the latest plans are remembered."""
        found = self._of_steps.get(facts)
        if found is None:
            found = make_plan(facts, self.shape, self.config, self.cost)
            self._of_steps[facts] = found
            if len(self._of_steps) > CACHED_PLANS:
                self._of_steps.popitem(last=False)
        else:
            self._of_steps.move_to_end(facts)
        self._prove(found)
        return found

    def of_round(self, slot: int, num_slots: int, lengths: tuple[tuple[int, ...], ...]) -> Plan:
        """The plan of a round: one cohort, in this slot of `num_slots` that roll. lengths: of every rank's chunks, in
        tokens.
        """
        facts = Facts(lengths)
        cohort = [Microbatch(rank, 0, tokens) for rank, tokens in enumerate(facts.tokens) if tokens]
        found = make_plan(facts, self.shape, self.config, self.cost, [cohort], first_slot=slot, slots_in_use=num_slots)
        self._prove(found)
        return found

    def _prove(self, found: Plan) -> None:
        if self.config.debug:
            verify(found, row_bytes=self.row_bytes, room=self.room, hosts=self.hosts)


def compile_on_hosts(world: World, shape: ModelShape, config: Config, cost: CostModel) -> None:
    """Compile what planning needs. Every rank calls. The first rank of each host does it, once per machine; the others
    read it.

    Where nothing can be kept on disk, all ranks compile at once.
    """
    config = replace(config, num_sms=None)
    hosts = world.all_gather(socket.gethostname().encode(), "compiling the planner")
    waits = hosts.index(hosts[world.rank]) != world.rank and planner_is_kept()
    for turn in (not waits, waits):
        error = None
        if turn:
            _, error = look(
                world.rank, "planning", lambda: compile_planner(world.size, shape, config, cost), ConfigError
            )
        world.agree(error, {}, "compiling the planner")
