"""What the tapes of a runtime's steps are made of: rows that are written once, and the events and addresses that every
step uses.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipemoe.runtime.tape_loop import BREATH_NS, CLOCK, QUERY, RECORD, RING, WAIT, new_state, play
from pipemoe_kernels.launch import driver
from pipemoe_kernels.launch.packed_launch import Recorded, recorded
from pipemoe_kernels.launch.tape import NotRecordable, Tape, grid, moved

if TYPE_CHECKING:
    import torch

    from pipemoe.runtime.lanes import Lanes
    from pipemoe.wire import WireRows

# Numbers of an experts' call, and then the grids of its launches.
IDS, HIDDEN, WEIGHTS, OUT, PAIRS, GRIDS = range(6)
MAX_LAUNCHES = 16
NUM_NUMBERS = GRIDS + MAX_LAUNCHES
_MAX_COUNTS = 4096  # calls whose grids are remembered
_LEAST_ADDRESS = 1 << 32  # a smaller number may be a count

_rings: dict[int, np.ndarray] = {}  # a lane's events, by its stream; streams last as long as the process


class Tapes:
    """Of one runtime on a GPU, on a rank without peers. Made at set-up: makes events, and compiles the loop."""

    def __init__(self, lanes: Lanes, transport: Any, experts: Any) -> None:
        self.tape = Tape()
        self.transport = transport.onto(self.tape)
        assert all(slot.compute is slot.dispatch is slot.combine for slot in lanes.slots)
        self.lanes: list[Any] = [slot.compute for slot in lanes.slots]  # StreamLanes
        for lane in self.lanes:
            if lane.handle not in _rings:
                _rings[lane.handle] = np.array([driver.new_event() for _ in range(RING)], np.int64)
        self.rings = np.stack([_rings[lane.handle] for lane in self.lanes])
        self.functions = np.zeros(4, np.int64)
        names = {QUERY: "cuEventQuery", RECORD: "cuEventRecord", WAIT: "cuStreamWaitEvent"}
        for place, name in names.items():
            _, self.functions[place] = driver.function(name)
        self.functions[CLOCK] = ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0
        # Layers of a kind run the same kernels, in the same grids.
        kinds: dict[tuple[object, ...], int] = {}
        layers = experts.weights if experts.only_launches else ()
        self.kind_of_layer = [
            kinds.setdefault((*w.kind, w.intermediate, w.num_local_experts), len(kinds)) for w in layers
        ]
        self.layer_of_kind = [self.kind_of_layer.index(kind) for kind in range(len(kinds))]
        self._may_record = bool(layers) and all(w.num_local_experts for w in layers)
        self._of_count: dict[tuple[object, ...], tuple[np.ndarray, np.ndarray] | None] = {}
        self._pieces: dict[tuple[object, ...], np.ndarray] = {}
        self._graph_pieces: dict[tuple[object, ...], np.ndarray] = {}
        self._compile()

    def _compile(self) -> None:
        sizes = {"layers": 1, "waves": 1, "buffers": 1, "lanes": 1, "kinds": 1}
        state = new_state(np.zeros((0, 4), np.int32), np.zeros((0, 0), np.int64), numbers=NUM_NUMBERS, **sizes)
        state.functions[:] = self.functions
        play(state, self.tape.rows, BREATH_NS, 0)

    def of_graphs(self, slot: int, stream: int, handles: Sequence[tuple[int, int]]) -> np.ndarray:
        """[2, L, 2] pieces that launch a slot's graphs: of attention and of shared experts."""
        key = slot, *handles
        found = self._graph_pieces.get(key)
        if found is None:
            launch = driver.function("cuGraphLaunch")
            found = self._graph_pieces[key] = np.zeros((2, len(handles), 2), np.int64)
            for layer, of_layer in enumerate(handles):
                for i, handle in enumerate(of_layer):
                    found[i, layer] = self.tape.here()
                    if handle:
                        self.tape.call(launch, handle, stream)
                        found[i, layer, 1] += 1
        return found

    def of_experts(
        self, experts: Any, slot: int, rows: WireRows, out: torch.Tensor, scratch: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """The experts' call of every layer, on so many rows, with torch's current stream: pieces [L, 2], and their
        numbers [kinds, NUM_NUMBERS] for these tensors. Raises NotRecordable.
        """
        if not self._may_record:
            raise NotRecordable("these experts do more than launch kernels")
        key = id(experts), slot, len(rows), out.dtype, out.stride(), out.data_ptr() & 15
        if key not in self._of_count:
            if len(self._of_count) >= _MAX_COUNTS:
                self._of_count.clear()
            try:
                self._of_count[key] = self._on_so_many(experts, rows, out, scratch)
            except NotRecordable:
                self._of_count[key] = None
        found = self._of_count[key]
        if found is None:
            raise NotRecordable("these experts cannot be recorded on such tensors")
        pieces, grids = found
        numbers = np.zeros((len(self.layer_of_kind), NUM_NUMBERS), np.int64)
        for number, value in _names(rows, out).items():
            numbers[:, number] = value
        numbers[:, GRIDS:] = grids
        return pieces, numbers

    def prepare(self, experts: Any, slot: int, rows: WireRows, out: torch.Tensor, scratch: Any) -> None:
        """Write the call for some numbers of rows, up to all of `rows`, so that few steps write any."""
        for count in (1, *(4**power for power in range(2, 9)), len(rows)):
            if count <= len(rows):
                with contextlib.suppress(NotRecordable):
                    self.of_experts(experts, slot, rows[:count], out[:count], scratch)

    def _on_so_many(
        self, experts: Any, rows: WireRows, out: torch.Tensor, scratch: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pieces, and the launches' grids, which depend on the number of rows."""
        grids = np.zeros((len(self.layer_of_kind), MAX_LAUNCHES), np.int64)
        which: list[object] = [id(experts)]
        for kind, layer in enumerate(self.layer_of_kind):
            with recorded() as launches:
                experts(layer, rows, out, scratch)
            if len(launches) > MAX_LAUNCHES:
                raise NotRecordable(f"an experts' call of {len(launches)} launches")
            grids[kind, : len(launches)] = [grid(made) for made in launches]
            which += [id(made.launch) for made in launches]
        key = tuple(which)  # a scratch keeps its launches, and so does the tape
        if key not in self._pieces:
            self._pieces[key] = self._write(experts, rows, out, scratch)
        return self._pieces[key], grids

    def _write(self, experts: Any, rows: WireRows, out: torch.Tensor, scratch: Any) -> np.ndarray:
        names = {value: number for number, value in _names(rows, out).items()}
        of_kind = []
        for layer in self.layer_of_kind:
            of_launches = []
            for made, written in moved(partial(experts, layer, rows, out, scratch)):
                unknown = [v for v in written.values() if v not in names and v < _LEAST_ADDRESS]
                if unknown:
                    raise NotRecordable(f"{made.launch.function} takes {unknown}")
                of_launches.append({index: names[value] for index, value in written.items() if value in names})
            of_kind.append(of_launches)
        pieces = np.zeros((len(self.kind_of_layer), 2), np.int64)
        for layer, kind in enumerate(self.kind_of_layer):
            with recorded() as launches:
                experts(layer, rows, out, scratch)
            pieces[layer, 0] = self.tape.here()
            for i, (made, moving) in enumerate(zip(launches, of_kind[kind], strict=True)):
                self.tape.launch(made, moving, GRIDS + i)
            pieces[layer, 1] = self.tape.here()
        return pieces


def _names(rows: WireRows, out: torch.Tensor) -> dict[int, int]:
    """The numbers of a call."""
    return {
        IDS: rows.ids.data_ptr(),
        HIDDEN: rows.hidden.data_ptr(),
        WEIGHTS: rows.weights.data_ptr(),
        OUT: out.data_ptr(),
        PAIRS: len(rows) * rows.ids.shape[1],
    }


def write_launches(tape: Tape, launches: Sequence[Recorded]) -> None:
    """As they were recorded."""
    for made in launches:
        tape.launch(made, {})
