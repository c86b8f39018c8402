"""The arrival-driven kernel as Python threads: the function itself, with tiles of few rows and stand-ins for what only
a GPU has.

Every block is 32 producers and two consumer warps of the 8 lanes whose rows differ. Copies and products are left out: a
stand-in for them notes which rows a tile reads, and which it writes. Barriers, batches, rasters and what producers tell
consumers are the real ones.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from pipemoe_kernels.gemm import raster, ring
from pipemoe_kernels.gemm.arrivals import gemm as grouped_arrivals
from pipemoe_kernels.gemm.arrivals import raster as arrival_raster

ROWS, GROUP, LANES = 32, 16, range(0, 32, 4)  # rows of a tile, of a consumer warp; lanes of the latter
PATIENCE_S = 20  # until a test that stands still fails
_here = threading.local()  # block, thread


class PhaseBarrier:
    """An mbarrier."""

    def __init__(self, count, changed):
        self.count = self.pending = count
        self.phase = 0
        self.changed = changed

    def arrive(self):
        with self.changed:
            self.pending -= 1
            if self.pending == 0:
                self.pending, self.phase = self.count, self.phase ^ 1
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase != int(parity), PATIENCE_S):
                raise TimeoutError("a barrier's phase never completes")


class Block:
    def __init__(self, index):
        self.index = index
        self.shared = {}
        self.barriers = {}
        self.changed = threading.Condition()
        self.all_threads = threading.Barrier(ROWS + 2 * len(LANES), timeout=PATIENCE_S)
        self.warps = {group: threading.Barrier(len(LANES), timeout=PATIENCE_S) for group in (1, 2)}
        self.producers = threading.Barrier(ROWS, timeout=PATIENCE_S)


@dataclass
class Wave:
    """What one launch sees, and what it did. flags, batches: words that tests and blocks change."""

    num_blocks: int
    flags: list[int]
    batches: list[int]
    tokens: list[int]
    ends: list[int]  # [S * E_loc]
    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: set[int] = field(default_factory=set)  # blocks that have found nothing to do since a flag was written
    failures: list[BaseException] = field(default_factory=list)
    released_early: bool = False
    tiles: list[tuple] = field(default_factory=list)  # block, expert, rows of x, first row of w
    stores: dict = field(default_factory=lambda: defaultdict(int))  # (place, first column, columns) -> how often

    def write_flags(self, parts, epoch):
        with self.changed:
            for part in parts:
                self.flags[part] = epoch
            self.waiting.clear()
            self.changed.notify_all()

    def until_all_wait(self):
        with self.changed:
            found = self.changed.wait_for(lambda: len(self.waiting) == self.num_blocks or self.failures, PATIENCE_S)
            assert found and not self.failures, self.failures or "blocks are busy for ever"


FLAGS, BATCHES, TOKENS, ENDS = (i << 40 for i in range(1, 5))  # where these are in the global memory


def stand_ins(wave, monkeypatch):
    """Put stand-ins into the kernel's modules, and return its function."""

    def load_flag(address):
        with wave.changed:
            return np.uint32(wave.flags[(int(address) - FLAGS) // 4])

    def load_batch(address):
        with wave.changed:
            return np.uint64(wave.batches[(int(address) - BATCHES) // 8])

    def replace_batch(address, old, new):
        with wave.changed:
            index = (int(address) - BATCHES) // 8
            found = wave.batches[index]
            if found == int(old):
                wave.batches[index] = int(new)
                wave.waiting.clear()
                wave.changed.notify_all()
            return np.uint64(found)

    def pause():
        with wave.changed:
            block = _here.block.index
            wave.waiting.add(block)
            wave.changed.notify_all()
            assert wave.changed.wait_for(lambda: block not in wave.waiting, PATIENCE_S), "no part ever comes"

    def load_u32(address):
        address = int(address)
        words, first = (wave.ends, ENDS) if address >= ENDS else (wave.tokens, TOKENS)
        return np.uint32(words[(address - first) // 4])

    def store_shared(address, value):
        _here.block.shared[int(address)] = np.uint32(value)

    def load_shared(address):
        return _here.block.shared.get(int(address), np.uint32(0xABABABAB))

    def add_shared(address, value):
        block = _here.block
        with block.changed:
            block.shared[int(address)] = np.uint32(block.shared[int(address)] + value)

    def barrier_init(address, count):
        # Warps that are not there do not arrive.
        _here.block.barriers[int(address)] = PhaseBarrier({5: 2, 8: 2}[count], _here.block.changed)

    def launch_dependents():
        with wave.changed:
            wave.released_early |= len({flag for flag in wave.flags}) != 1

    def barrier_arrive(address):
        _here.block.barriers[int(address)].arrive()

    def barrier_wait(address, parity):
        _here.block.barriers[int(address)].wait(parity)

    def nothing(*_):
        return None

    def sync_producers():
        _here.block.producers.wait()

    def sync_lanes():
        _here.block.warps[_here.thread >> 7].wait()

    shared = {
        "load_shared_u32": load_shared,
        "store_shared_u32": store_shared,
        "add_shared_u32": add_shared,
        "load_u32": load_u32,
    }
    gpu = SimpleNamespace(
        **shared,
        **{"shared_address": lambda array: np.uint32(5000), "of_first_lane": lambda value: value},
        **{
            "barrier_init": barrier_init,
            "barrier_arrive": barrier_arrive,
            "barrier_wait": barrier_wait,
            "barrier_fence": nothing,
        },
        **{"wait_for_earlier": nothing, "launch_dependents": launch_dependents, "MAX_TRIES": 0},
        **{"keep_registers": lambda count: nothing, "take_registers": lambda count: nothing},
    )
    words = SimpleNamespace(load_flag=load_flag, load_batch=load_batch, replace_batch=replace_batch, pause=pause)

    class Cuda:
        gridDim = SimpleNamespace(x=wave.num_blocks)
        shared = SimpleNamespace(array=nothing)
        syncwarp = staticmethod(sync_lanes)
        threadIdx = property(lambda self: SimpleNamespace(x=_here.thread))
        blockIdx = property(lambda self: SimpleNamespace(x=_here.block.index))

        def syncthreads(self):
            _here.block.all_threads.wait()

    def gathering_producer(gated, listed):
        def produce(
            thread,
            issued,
            barriers,
            ring_at,
            stage,
            parity,
            steps,
            x,
            x_stride,
            rows_at,
            w_map,
            expert,
            row,
            end,
            w_row,
            *rest,
        ):
            if thread == 0:
                sources = [int(load_shared(rows_at + 4 * i)) for i in range(int(end))]
                with wave.changed:
                    wave.tiles.append((_here.block.index, int(expert), sources, int(w_row)))
            cuts, together = rest[-2:]
            for _ in range(-(-int(steps) // 2 ** int(together))):
                full = barriers + 8 * stage
                barrier_wait(full + ring.EMPTY_AT, parity)
                sync_producers()  # a stage is full when all have copied their part
                if thread == 0:
                    barrier_arrive(full)
                    barrier_arrive(full)
                stage, parity = ring.next_stage(stage, parity)
            return stage, parity, np.uint32(1)

        return produce

    def consumer(width, gated, has_bias, activation):
        columns_of_slice = width // 2 if gated else width

        def consume(
            barriers, ring_at, stage, parity, steps, together, group, lane, target, eighth, rows, columns, bias, up_bias
        ):
            for _ in range(-(-int(steps) // 2 ** int(together))):
                full = barriers + 8 * stage
                barrier_wait(full, parity)
                sync_lanes()
                if lane == 0:
                    barrier_arrive(full + ring.EMPTY_AT)
                stage, parity = ring.next_stage(stage, parity)
            with wave.changed:
                for half in range(2):
                    if rows > 8 * half and columns > 0:
                        byte = int(target) + 8 * half * int(eighth)
                        wave.stores[byte, min(columns_of_slice, int(columns)), int(bias)] += 1
            return stage, parity

        return consume

    def typed(function, parameters, *rest, **options):
        return lambda *arguments: function(*[kind(value) for kind, value in zip(parameters, arguments, strict=True)])

    for module in (grouped_arrivals, arrival_raster, raster, ring):
        for name, value in list(vars(module).items()):
            if hasattr(value, "py_func"):
                monkeypatch.setattr(module, name, value.py_func)
    for module in (grouped_arrivals, raster, ring):
        monkeypatch.setattr(module, "ptx", gpu)
    monkeypatch.setattr(arrival_raster, "ptx", words)
    for name, function in shared.items():
        monkeypatch.setattr(arrival_raster, name, function)
    for module in (grouped_arrivals, arrival_raster):
        monkeypatch.setattr(module, "sync_producers", sync_producers)
    monkeypatch.setattr(grouped_arrivals, "TILE_ROWS", ROWS)
    monkeypatch.setattr(grouped_arrivals, "GROUP_ROWS", GROUP)
    for module in (raster, arrival_raster):
        monkeypatch.setattr(module, "TILE_ROWS", np.uint32(ROWS))
    monkeypatch.setattr(arrival_raster, "PRODUCERS", ROWS)
    for module in (grouped_arrivals, ring):
        monkeypatch.setattr(module, "cuda", Cuda())
    monkeypatch.setattr(grouped_arrivals, "announce_rest", nothing)
    monkeypatch.setattr(grouped_arrivals, "gathering_producer", gathering_producer)
    monkeypatch.setattr(grouped_arrivals, "consumer", consumer)
    monkeypatch.setattr(grouped_arrivals, "Kernel", typed)
    return grouped_arrivals.arrivals_kernel.__wrapped__


def launch(wave, function, arguments):
    """Start all threads of all blocks; a function that waits for their end, and raises what one of them raised."""

    def run(block, thread):
        _here.block, _here.thread = block, thread
        try:
            function(*arguments)
        except BaseException as error:  # noqa: BLE001  (raised again by the test's thread)
            with wave.changed:
                wave.failures.append(error)
                wave.changed.notify_all()

    blocks = [Block(index) for index in range(wave.num_blocks)]
    ids = [*range(ROWS), *(128 * group + lane for group in (1, 2) for lane in LANES)]
    threads = [threading.Thread(target=run, args=(block, thread), daemon=True) for block in blocks for thread in ids]
    for thread in threads:
        thread.start()

    def join():
        deadline = time.monotonic() + PATIENCE_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not wave.failures, wave.failures
        assert not any(thread.is_alive() for thread in threads)

    return join
