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
    sums = torch.zeros((num_tokens, decoder.shape.hidden), dtype=torch.float32, device=decoder.device)
    marks, issued = [_Mark(decoder.device)], []
    for layer in range(min(num_layers, decoder.shape.num_layers)):
        begin = time.perf_counter_ns()
        decoder.attend(state, layer, sums if layer else None)
        issued.append(float(time.perf_counter_ns() - begin))
        marks.append(_Mark(decoder.device))
    took = [before.ns_until(after) for before, after in zip(marks, marks[1:])]
    return took[1:] or took, issued[1:] or issued


class _Mark:
    """A point in time: of the current stream, or of the host."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._ns = time.perf_counter_ns()

    def ns_until(self, later: _Mark) -> float:
        if self._event is None or later._event is None:
            return float(later._ns - self._ns)
        later._event.synchronize()
        return 1e6 * self._event.elapsed_time(later._event)
