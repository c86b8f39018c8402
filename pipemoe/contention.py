"""Measures how operations slow one another when they run side by side, for the table of contention and for
benchmarks/overlap.py.

Every pair of attention, experts, dispatch and combine that can overlap in a step, in the lanes that they would have
there: two computations on the streams of two slots, the first with the higher priority; transfers on communicators of
their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from pipemoe.comm.transport import WaveSums
from pipemoe.models.graph_capture import collection_held
from pipemoe.plan.schedule import Segment, Wave
from pipemoe.wire import WireFormat

if TYPE_CHECKING:
    import torch

    from pipemoe.models.decoder import Decoder
    from pipemoe.runtime.lanes import Lane
    from pipemoe.world.world import World

PAIRS = (
    ("attend", "attend"),
    ("attend", "experts"),
    ("experts", "attend"),
    ("experts", "experts"),
    ("attend", "dispatch"),
    ("attend", "combine"),
    ("experts", "dispatch"),
    ("experts", "combine"),
    ("dispatch", "dispatch"),
    ("dispatch", "combine"),
    ("combine", "combine"),
)
COMMUNICATION = ("dispatch", "combine")
BESIDE_TRANSFERS = tuple(pair for pair in PAIRS if pair[0] == "experts" and pair[1] in COMMUNICATION)
MAX_REPEATS = 200


@dataclass(frozen=True, slots=True)
class Side:
    """One operation, and the lane that it runs in beside others."""

    lane: Lane
    work: Callable[[], Any]

    def submit(self) -> Any:
        """The event of one more run."""
        return self.lane.submit(self.work)


class SharedTransfers:
    """Transfers of one wave over shared memory, and nothing else of a step: a dispatch that nobody computes on, a
    combine of sums that nobody has computed.
    """

    def __init__(self, world: World, wave: Wave, row_bytes: int, hidden: int, sums_dtype: torch.dtype) -> None:
        from pipemoe.comm.shared.waves import WaveMemory

        self._wave, num_tokens = wave, wave.segments[0].num_rows
        layout = WaveMemory(world.num_slots, 1, num_tokens, row_bytes, wave.num_rows, hidden, sums_dtype)
        self._dispatched, self._combined = world.new_waves(layout), world.new_waves(layout)

    def dispatch(self, slot: int, lane: Lane) -> Any:
        waves = self._dispatched
        use = waves.use(slot, 0, self._wave)
        lane.submit(lambda: waves.tell_sent(slot, 0, use), [waves.rows_free(slot, 0, use)])
        return lane.submit(lambda: waves.tell_summed(slot, 0, use), [waves.sent(slot, 0, use)])

    def combine(self, slot: int, lane: Lane, results: list[torch.Tensor]) -> Any:
        from pipemoe.comm.shared.waves import add_in_order

        waves = self._combined
        use = waves.use(slot, 0, self._wave)

        own = [s for s in self._wave.segments if s.rank == waves.rank]
        parts = [[p[s.row : s.row + s.num_rows] for p in waves.sums[slot, 0].values()] for s in own]

        def add_up() -> None:
            for of_ranks, result in zip(parts, results, strict=True):
                add_in_order(of_ranks, result)
            waves.tell_combined(slot, 0, use)

        lane.submit(lambda: waves.tell_summed(slot, 0, use), [waves.sums_free(slot, 0, use)])
        return lane.submit(add_up, [waves.summed(slot, 0, use)])


class SharedSide:
    """A transfer of SharedTransfers."""

    def __init__(self, submit: Callable[[], Any]) -> None:
        self.submit = submit


class Operations:
    """The operations of the first MoE layer on this rank, `num_tokens` tokens from every rank, in the lanes of two
    slots.
    """

    def __init__(self, world: World, decoder: Decoder, experts: Any, num_tokens: int) -> None:
        import torch

        shape, rows, dtype = decoder.shape, num_tokens * world.size, decoder.dtype
        self._decoder, self._experts, self._num_tokens = decoder, experts, num_tokens
        wire = WireFormat(shape.hidden, shape.top_k, experts.wire_dtype)
        generator = torch.Generator("cpu").manual_seed(0)
        on_host: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        hidden = torch.randn(rows, shape.hidden, **on_host)
        ids = torch.rand(rows, shape.num_experts, **on_host).topk(shape.top_k).indices
        weights = torch.full((rows, shape.top_k), 1 / shape.top_k, dtype=torch.float32, device=world.device)
        sums_dtype = torch.float64 if experts.deterministic else dtype if world.device.type == "cuda" else torch.float32
        begins = [0, *accumulate([num_tokens] * world.size)]
        wave = Wave(tuple(Segment(rank, 0, num_tokens, begins[rank]) for rank in range(world.size)), rows)
        self._sides: dict[tuple[str, int], Side | SharedSide] = {}
        shared = None
        if world.shared is not None:
            shared = SharedTransfers(world, wave, wire.row_bytes, shape.hidden, sums_dtype)
        self._read_by_graphs: list[Any] = []  # a graph does not keep the tensors that it reads
        for slot, lanes in enumerate(world.lanes.slots[:2]):
            scratch = experts.new_scratch(rows)
            buffer = torch.zeros((rows, wire.row_bytes), dtype=torch.uint8, device=world.device)
            wire.rows(buffer).write(hidden.to(world.device, dtype), ids.int().to(world.device), weights)
            out = torch.zeros((rows, shape.hidden), dtype=sums_dtype, device=world.device)
            sums = WaveSums(out, [torch.zeros((num_tokens, shape.hidden), dtype=sums_dtype, device=world.device)], None)
            warm_up = Side(lanes.compute, partial(experts.warm_up, scratch))
            world.conductor.call(partial(run_all, world, [(warm_up, 1)]))
            self._sides["attend", slot] = Side(lanes.compute, self._attend(world, lanes.compute))
            self._sides["experts", slot] = Side(lanes.compute, partial(experts, 0, wire.rows(buffer), out, scratch))
            if shared is not None:
                self._sides["dispatch", slot] = SharedSide(partial(shared.dispatch, slot, lanes.dispatch))
                results = list(sums.results)
                self._sides["combine", slot] = SharedSide(partial(shared.combine, slot, lanes.combine, results))
                continue
            dispatch = partial(world.transport.dispatch, slot, 0, wave, "broadcast", buffer)
            self._sides["dispatch", slot] = Side(lanes.dispatch, dispatch)
            combine = partial(world.transport.combine, slot, 0, wave, "broadcast", "reduce", sums)
            self._sides["combine", slot] = Side(lanes.combine, combine)

        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)  # all this was filled on another stream than the lanes'

    def _attend(self, world: World, lane: Lane) -> Callable[[], Any]:
        """Attention of the first MoE layer and all before it, repeated on the same tokens; from a graph where steps
        use one."""
        import torch

        from pipemoe.models.packing import Piece

        pieces = [Piece(0, 0, self._num_tokens, self._num_tokens)]
        state = self._decoder.start(
            self._decoder.lone_step(self._num_tokens),
            torch.zeros(self._num_tokens, dtype=torch.long, device="cpu"),
            pieces,
        )
        hidden = state.hidden
        self._read_by_graphs.append((state, hidden))

        def work() -> None:
            state.hidden, state.layer = hidden, -1  # as before the first layer
            self._decoder.attend(state, 0, None)

        if not self._decoder.can_be_captured:
            return work
        graph = torch.cuda.CUDAGraph()

        def capture() -> None:
            work()  # libraries set themselves up outside a capture
            with collection_held():
                graph.capture_begin(capture_error_mode="thread_local")
                work()
                graph.capture_end()

        torch.cuda.synchronize(world.device)  # the lane's stream does not wait for what `start` enqueued on another
        world.conductor.call(lambda: run_all(world, [(Side(lane, capture), 1)]))
        return graph.replay

    def pair(self, a: str, b: str) -> tuple[Side | SharedSide, Side | SharedSide]:
        """Two sides, each in its own lane; in two slots if both compute or both do the same."""
        computes = a not in COMMUNICATION and b not in COMMUNICATION
        return self._sides[a, 0], self._sides[b, 1 if computes or a == b else 0]


def run_all(world: World, sides: Sequence[tuple[Side | SharedSide, int]]) -> list[tuple[float, float]]:
    """Run each side so many times, all at once; begin and end of each in seconds. Conductor's thread."""
    world.lanes.clock.start(True)
    events: list[list[Any]] = [[] for _ in sides]
    for repeat in range(max(count for _, count in sides)):
        for of_side, (side, count) in zip(events, sides):
            if repeat < count:
                of_side.append(side.submit())

    def done() -> bool:
        world.lanes.poll()
        return all(of_side[-1].done() for of_side in events)

    world.conductor.wait(done, "operations side by side")
    return [(of_side[0].span()[0], of_side[-1].span()[1]) for of_side in events]


class Timer:
    """Times of sides, the same on every rank: the mean over ranks of each rank's span."""

    def __init__(self, world: World) -> None:
        self._world = world

    def seconds(self, sides: Sequence[tuple[Side | SharedSide, int]]) -> list[float]:
        """Each side's seconds, then the seconds of all together."""
        self._world.all_gather(b"", "start of a measurement")
        spans = self._world.conductor.call(lambda: run_all(self._world, sides))
        own = [end - begin for begin, end in spans] + [max(e for _, e in spans) - min(b for b, _ in spans)]
        return np.mean(
            [json.loads(p) for p in self._world.all_gather(json.dumps(own).encode(), "times")], axis=0
        ).tolist()


@dataclass(frozen=True, slots=True)
class PairTimes:
    """Seconds of both sides, `repeats` times each, alone and together; the same on every rank."""

    repeats: tuple[int, int]
    alone: tuple[float, float]
    together: tuple[float, float]
    both: float

    @property
    def gain(self) -> float:
        """One after the other, over both together."""
        return sum(self.alone) / self.both

    def speeds(self) -> tuple[float, float]:
        """Each side's speed while the other is under way, as a share of its speed alone. The side that ends later runs
        its rest alone."""
        (a, b), (a_end, b_end) = self.alone, self.together
        if a_end <= b_end:
            return a / a_end, max(0.0, (a_end + b - b_end) / a_end)
        return max(0.0, (b_end + a - a_end) / b_end), b / b_end


def measure_pair(
    timer: Timer, sides: tuple[Side | SharedSide, Side | SharedSide], target_s: float, rounds: int
) -> PairTimes:
    """Every rank calls and gets the same. target_s: how long each side is to take alone."""
    once = [timer.seconds([(side, 3)])[0] / 3 for side in sides for _ in range(2)][1::2]  # the second of two
    counts = [int(min(MAX_REPEATS, max(3, target_s / max(seconds, 1e-6)))) for seconds in once]
    alone: list[list[float]] = [[], []]
    together = []
    for _ in range(rounds):
        for of_side, side, count in zip(alone, sides, counts):
            of_side.append(timer.seconds([(side, count)])[0])
        together.append(timer.seconds(list(zip(sides, counts))))
    a, b, both = np.median(together, axis=0).tolist()
    first, second = (float(np.median(of_side)) for of_side in alone)
    return PairTimes((counts[0], counts[1]), (first, second), (a, b), both)
