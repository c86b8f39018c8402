"""Attention of one sequence, layer by layer and with nothing between the layers, for measurements."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from pipemoe.models.packing import Piece

if TYPE_CHECKING:
    from pipemoe.models.decoder import Decoder


def attend_alone(decoder: Decoder, num_tokens: int, num_layers: int) -> tuple[list[float], list[float]]:
    """Attend to a sequence of num_tokens tokens in the first num_layers MoE layers, on the current stream.

    Returns ns that each layer took, and ns until it was issued; on a GPU it waits for the device. The first layer's are
    left out if there are others: it also embeds the tokens, and may run dense layers.
    """
    pieces = [Piece(0, 0, num_tokens, num_tokens)]
    ids = torch.zeros(num_tokens, dtype=torch.long, device="cpu")
    state = decoder.start(decoder.lone_step(num_tokens), ids, pieces)
    y, marks = None, []
    for layer in range(min(num_layers, decoder.shape.num_layers)):
        begin = _Mark(decoder.device)
        decoder.attend(state, layer, y)
        marks.append((begin, _Mark(decoder.device)))
        y = torch.zeros((num_tokens, decoder.shape.hidden), dtype=torch.float32, device=decoder.device)
    marks = marks[1:] or marks
    return [begin.ns_until(end) for begin, end in marks], [float(end.ns - begin.ns) for begin, end in marks]


class _Mark:
    """A point in time: `ns` of the host, and of the current stream if there is one."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self.ns = time.perf_counter_ns()

    def ns_until(self, later: _Mark) -> float:
        if self._event is None or later._event is None:
            return float(later.ns - self.ns)
        later._event.synchronize()
        return 1e6 * self._event.elapsed_time(later._event)
