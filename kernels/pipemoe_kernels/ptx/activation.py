"""PTX of what stands between the two GEMMs, on float32 values in registers: about 1e-7 from the exact functions."""

from __future__ import annotations

import math
import struct

from llvmlite import ir

from pipemoe_kernels.gating import Gating
from pipemoe_kernels.ptx.hopper import F32, asm


def _bits(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


_LOG2_E = 1.4426950408889634


# x / (1 + 2^(-x log2 e)): two special-function instructions.
def _silu(alpha: float) -> str:
    return f"""{{
.reg .f32 e;
mul.f32 e, $1, {_bits(-alpha * _LOG2_E)};
ex2.approx.ftz.f32 e, e;
add.f32 e, e, {_bits(1.0)};
rcp.approx.ftz.f32 e, e;
mul.f32 $0, $1, e;
}}"""


# As tanh z = 2 sigmoid(2 z) - 1, it is x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3).
_TANH_LINEAR = -2 * (2 / math.pi) ** 0.5 * _LOG2_E
_GELU_TANH = f"""{{
.reg .f32 e;
mul.f32 e, $1, $1;
fma.rn.f32 e, e, {_bits(0.044715 * _TANH_LINEAR)}, {_bits(_TANH_LINEAR)};
mul.f32 e, e, $1;
ex2.approx.ftz.f32 e, e;
add.f32 e, e, {_bits(1.0)};
rcp.approx.ftz.f32 e, e;
mul.f32 $0, $1, e;
}}"""
# x Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, erfc by formula 7.1.26 of Abramowitz and Stegun.
_ERFC_TERMS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_POLYNOMIAL = "".join(f"fma.rn.f32 sum, sum, t, {_bits(0.5 * term)};\n" for term in _ERFC_TERMS[1:])
_GELU = f"""{{
.reg .f32 size, t, sum, e;
abs.f32 size, $1;
fma.rn.f32 t, size, {_bits(0.3275911 * 0.5**0.5)}, {_bits(1.0)};
rcp.approx.ftz.f32 t, t;
mov.f32 sum, {_bits(0.5 * _ERFC_TERMS[0])};
{_POLYNOMIAL}mul.f32 sum, sum, t;
mul.f32 e, $1, $1;
mul.f32 e, e, {_bits(-0.5 * _LOG2_E)};
ex2.approx.ftz.f32 e, e;
mul.f32 sum, sum, e;
mul.f32 sum, sum, size;
max.f32 $0, $1, {_bits(0.0)};
sub.f32 $0, $0, sum;
}}"""
_RELU = f"max.NaN.f32 $0, $1, {_bits(0.0)};"
_RELU2 = f"{{\n.reg .f32 r;\nmax.NaN.f32 r, $1, {_bits(0.0)};\nmul.f32 $0, r, r;\n}}"
_FUNCTIONS = {"gelu": _GELU, "relu": _RELU, "gelu_tanh": _GELU_TANH, "relu2": _RELU2}


def activated(builder, activation, gate, up=None):
    """activation(gate), times up if given: lists of values. activation: a Gating, or the mere name of one."""
    gating = Gating.of(activation)
    text = _silu(gating.alpha) if gating.activation == "silu" else _FUNCTIONS[gating.activation]
    if gating.limit is not None:
        at_most = f"min.NaN.f32 $0, $1, {_bits(gating.limit)};"
        gate = [asm(builder, at_most, F32, [value], "=f,f", side_effect=False) for value in gate]
    constraints = "=&f,f" if gating.activation == "gelu" else "=f,f"
    values = [asm(builder, text, F32, [value], constraints, side_effect=False) for value in gate]
    if up is None:
        return values
    if gating.limit is not None:
        within = f"min.NaN.f32 $0, $1, {_bits(gating.limit)};\nmax.NaN.f32 $0, $0, {_bits(-gating.limit)};"
        up = [asm(builder, within, F32, [value], "=f,f", side_effect=False) for value in up]
    if gating.up_offset:
        offset = ir.Constant(F32, gating.up_offset)
        up = [builder.fadd(value, offset) for value in up]
    return [builder.fmul(value, u) for value, u in zip(values, up, strict=True)]
