"""Set-up of a runtime: compile, load and allocate what every step uses, so that no step does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pipemoe.config import Config
from pipemoe.plan.schedule import ModelShape
from pipemoe.runtime.lanes import Lane, SlotLanes
from pipemoe.runtime.reserve import lack_of_memory_told, reserve, reserve_pinned
from pipemoe.runtime.source import SourceTraits
from pipemoe.runtime.workspace import SlotBuffers, Workspace
from pipemoe.wire import WireFormat

if TYPE_CHECKING:
    import torch

    from pipemoe.comm.shared.waves import SharedWaves
    from pipemoe.runtime.tapes import Tapes
    from pipemoe.world.world import World

_log = logging.getLogger("pipemoe")
_RESERVE_FACTOR = 1.5  # of a trial's activations: steps split memory differently, and allocate before they free


@dataclass(slots=True)
class SetUp:
    """The work of one set-up, in the lanes that will run the experts and the model, and what it makes."""

    world: World
    shape: ModelShape
    config: Config
    dtype: torch.dtype  # of the hidden values that sources give
    wire: WireFormat
    combine_dtype: torch.dtype
    experts: Any  # this rank's (see pipemoe.experts)
    traits: SourceTraits
    sms_left: Sequence[int]  # all numbers of SMs that plans may leave to collectives
    callers_stream: Any  # on which results are handed out, or None
    shared: SharedWaves | None  # where rows and sums lie, if ranks share memory
    num_others: int  # ranks of other hosts, which do not

    # What `run` makes:
    workspace: Workspace = field(init=False)
    experts_with_free_sms: dict[int, Any] = field(init=False)  # by the number of SMs left
    tapes: Tapes | None = field(init=False, default=None)  # what steps are played from, on a GPU

    def run(self) -> None:
        """Runs on the conductor's thread. Raises ConfigError if memory does not suffice."""
        with lack_of_memory_told(self.world.rank):
            self._run()

    def _run(self) -> None:
        import torch

        world, experts = self.world, self.experts
        # for every plan
        self.experts_with_free_sms = {
            num_sms: experts.with_free_sms(num_sms) if num_sms else experts for num_sms in self.sms_left
        }
        self.workspace = Workspace(
            self.config,
            self.wire,
            self.combine_dtype,
            world.size,
            self.experts,
            world.device,
            self.shared,
            self.num_others,
        )
        lanes = world.lanes.slots[: len(self.workspace.slots)]
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)  # the buffers were filled on another stream than the lanes'
            self._reserve(lanes)
            prepare = self.traits.prepare
            if prepare is not None:
                preparing = [
                    (lane.compute, partial(prepare, slot, self.workspace.results_dtype))
                    for slot, lane in enumerate(lanes)
                ]
                self._in_lanes(preparing, "preparing the model")
        warm_ups = [partial(self._warm_up, slot) for slot in self.workspace.slots]
        self._in_lanes([(lane.compute, warm_up) for lane, warm_up in zip(lanes, warm_ups)], "warming up the experts")
        if world.device.type == "cuda" and world.size == 1:
            self._prepare_tapes(lanes)
            self._prepare_whole(lanes)

    def _warm_up(self, slot: SlotBuffers) -> None:
        self.wire.warm_up(self.world.device, self.dtype)
        self.experts.warm_up(slot.scratch)

    def _prepare_tapes(self, lanes: list[SlotLanes]) -> None:
        """Write what steps will play, as far as it is known."""
        from pipemoe.runtime.tapes import Tapes
        from pipemoe_kernels.launch.tape import NotRecordable

        try:
            self.tapes = tapes = Tapes(self.world.lanes, self.world.transport, self.experts)
        except NotRecordable as reason:
            _log.info("steps are issued by Python alone: %s", reason)
            return
        for number, (slot, lane) in enumerate(zip(self.workspace.slots, lanes)):
            rows, out = self.wire.rows(slot.receive[0]), slot.partial[0]
            for experts in self.experts_with_free_sms.values():
                self._in_lanes(
                    [(lane.compute, partial(tapes.prepare, experts, number, rows, out, slot.scratch))],
                    "writing the experts' tapes",
                )

    def _prepare_whole(self, lanes: list[SlotLanes]) -> None:
        """Where nothing lies between attention and experts, let the source have both in one piece."""
        prepare, experts = self.traits.prepare_whole, self.experts_with_free_sms.get(0)
        if prepare is None or experts is None or not experts.only_launches:
            return
        dtype = self.workspace.results_dtype
        if dtype != self.combine_dtype:  # sums that are copied
            return
        slots = enumerate(zip(self.workspace.slots, lanes))
        work = [
            (lane.compute, partial(prepare, number, dtype, experts, slot.scratch)) for number, (slot, lane) in slots
        ]
        self._in_lanes(work, "preparing the model's small steps")

    def _reserve(self, lanes: list[SlotLanes]) -> None:
        import torch

        device, reserved, activations = self.world.device, self.world.reserved, 0
        trial = self.traits.trial
        if trial is not None:
            for lane in lanes:  # in each: libraries keep a workspace per stream
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                self._in_lanes([(lane.compute, trial)], "trial of the model's attention")
                activations = max(activations, torch.cuda.max_memory_allocated(device) - before)
        # Drops what earlier runtimes have reserved, so all lanes reserve anew, each in one piece.
        torch.cuda.empty_cache()
        for slot, buffers in enumerate(self.workspace.slots):
            needed = int(_RESERVE_FACTOR * activations) + self.traits.kept_bytes + buffers.scratch.transient_bytes
            reserved.raise_lane("compute", slot, needed)
            reserved.raise_lane("combine", slot, self.workspace.sum_bytes)
        work = [
            (getattr(self.world.lanes.slots[slot], kind), partial(reserve, device, num_bytes))
            for (kind, slot), num_bytes in reserved.of_lane.items()
            if num_bytes
        ]
        self._in_lanes(work, "reserving memory")
        if self.callers_stream is not None:
            reserved.raise_stream(
                self.callers_stream, results_bytes(self.config, self.shape, self.dtype, self.workspace.results_dtype)
            )
        for stream, num_bytes in reserved.of_stream.items():
            with torch.cuda.stream(stream):
                reserve(device, num_bytes)
        reserve_pinned(len(lanes) + 1)

    def _in_lanes(self, work: Sequence[tuple[Lane, Callable[[], object]]], doing: str) -> None:
        """Run set-up work in lanes and wait for it. Only on the conductor's thread."""
        events = [lane.submit(task) for lane, task in work]

        def done() -> bool:
            self.world.lanes.poll()
            return all(event.done() for event in events)

        self.world.conductor.wait(done, doing, seconds=self.world.setup_seconds)


def results_bytes(config: Config, shape: ModelShape, dtype: torch.dtype, results_dtype: torch.dtype) -> int:
    """Bytes that layer calls allocate on the caller's stream. Two layers' worth: the caller holds one layer's results
    while the next are computed.
    """
    of_row = shape.hidden * results_dtype.itemsize + 8 * shape.top_k  # ids and weights as rows have them
    if results_dtype != dtype:
        of_row += shape.hidden * dtype.itemsize
    return 2 * config.max_tokens_per_rank * of_row
