"""PTX of the activations between the two GEMMs, on float32 values in registers: about 1e-7 from the exact functions."""

from __future__ import annotations

import struct

from pipemoe_kernels.ptx.hopper import F32, asm


def _bits(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


# x / (1 + 2^(-x log2 e)): two special-function instructions.
_SILU = f"""{{
.reg .f32 e;
mul.f32 e, $1, {_bits(-1.4426950408889634)};
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
mul.f32 e, e, {_bits(-0.5 * 1.4426950408889634)};
ex2.approx.ftz.f32 e, e;
mul.f32 sum, sum, e;
mul.f32 sum, sum, size;
max.f32 $0, $1, {_bits(0.0)};
sub.f32 $0, $0, sum;
}}"""
_RELU = f"max.NaN.f32 $0, $1, {_bits(0.0)};"
ACTIVATIONS = {"silu": _SILU, "gelu": _GELU, "relu": _RELU}


def activated(builder, activation, gate, up=None):
    """activation(gate), times up if given: lists of values; a name of ACTIVATIONS."""
    constraints = "=&f,f" if activation == "gelu" else "=f,f"
    values = [asm(builder, ACTIVATIONS[activation], F32, [value], constraints, side_effect=False) for value in gate]
    return values if up is None else [builder.fmul(value, u) for value, u in zip(values, up, strict=True)]
