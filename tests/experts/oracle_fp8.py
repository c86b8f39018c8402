"""Oracle of experts in e4m3, and its cases: expert by expert in float64, with activations quantised between the
GEMMs.
"""

from __future__ import annotations

import torch

from pipemoe.e4m3 import dequantise_rows, dequantise_weight, quantise_rows
from pipemoe.experts import ExpertWeights
from pipemoe.wire import WireFormat, WireRows

F64 = torch.float64
# Norm ratios. Against the definition on unquantised data the format itself costs 2.4 % for each of x, gate_up, a and
# down, and the product of gate and up doubles the square of what went into it: about 6 % together, for normal data.
TOLERANCE, FORMAT_TOLERANCE = 1e-2, 8e-2


def make_e4m3_rows(rows: WireRows, device: str = "cpu") -> WireRows:
    """The same rows in e4m3, in a buffer of rubbish as a reused one would be."""
    wire = WireFormat(rows.hidden.shape[1], rows.ids.shape[1], torch.float8_e4m3fn)
    narrow = wire.rows(torch.full((len(rows), wire.row_bytes), 0xAB, dtype=torch.uint8))
    narrow.write(rows.hidden.cpu(), rows.ids.cpu(), rows.weights.cpu())
    return wire.rows(narrow.buffer.to(device))


def expected_e4m3(rows: WireRows, weights: ExpertWeights, *, quantise_activations: bool = True) -> torch.Tensor:
    """rows and weights quantised -> [n, H] float64."""
    hidden = dequantise_rows(rows.hidden.cpu(), rows.scales.cpu(), F64)
    ids, router = rows.ids.cpu(), rows.weights.cpu().double()
    out = torch.zeros(hidden.shape, dtype=F64)
    for expert in range(weights.num_local_experts):
        tokens, ks = torch.nonzero(ids == weights.first_expert + expert, as_tuple=True)
        gate_up = dequantise_weight(weights.gate_up[expert].cpu(), weights.gate_up_scales[expert].cpu(), F64)
        down = dequantise_weight(weights.down[expert].cpu(), weights.down_scales[expert].cpu(), F64)
        gate, up = (hidden[tokens] @ gate_up.T).chunk(2, dim=1)
        a = torch.nn.functional.silu(gate) * up
        if quantise_activations and len(a):
            a = dequantise_rows(*quantise_rows(a), F64)
        out.index_add_(0, tokens, (a @ down.T) * router[tokens, ks][:, None])
    return out
