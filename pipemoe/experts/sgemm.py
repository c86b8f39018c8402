"""The float32 GEMM of the library that torch brings, by its address, for compiled code: a call costs a microsecond,
where torch.mm from Python costs ten.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipemoe.addresses import floats_at
from pipemoe.compiled import Compiled

_NUM_ARGUMENTS = 13  # of BLAS's sgemm, all of them pointers
_TRANSPOSED, _AS_IT_IS = 84, 78  # "T" and "N"
# A product of fewer rows waits for its weights more than it computes. Larger matrices would push one another out of the
# second cache. EPYC 9004, 8 experts of 128 x 128, 8 rows each, weights not in any cache: 240 us, without it 373.
_FEW_ROWS, _CACHED_VALUES, _LINE_VALUES = 64, 1 << 17, 16


@cache
def sgemm_address() -> int:
    """Where sgemm is, or 0 if torch's library shows none."""
    import torch

    for path in sorted(Path(torch.__file__).with_name("lib").glob("libtorch_cpu.*")):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).sgemm_, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


@intrinsic
def _call_sgemm(typing_context, address, arguments):
    """Call sgemm with the 13 pointers that lie at `arguments` (int64)."""

    def generate(context, builder, signature, values):
        word = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [word] * _NUM_ARGUMENTS)
        first = builder.ptrtoint(builder.inttoptr(values[1], word.as_pointer()), word)
        pointers = []
        for i in range(_NUM_ARGUMENTS):
            place = builder.inttoptr(builder.add(first, ir.Constant(word, 8 * i)), word.as_pointer())
            pointers.append(builder.load(place, typ=word))
        builder.call(builder.inttoptr(values[0], function.as_pointer()), pointers)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _part(function: Callable) -> Compiled:
    return Compiled(function, inside=True, nogil=True, error_model="numpy")


@_part
def new_call():
    """Room for the arguments of a call, which `multiply` fills in: pointers, what whole numbers they point to, factors
    and letters.
    """
    pointers, numbers = np.empty(_NUM_ARGUMENTS, np.int64), np.empty(6, np.int32)
    factors, letters = np.empty(3, np.float32), np.empty(2, np.uint8)
    letters[1] = _AS_IT_IS
    at = numbers.ctypes.data
    pointers[0], pointers[1] = letters.ctypes.data, letters.ctypes.data + 1
    pointers[2], pointers[3], pointers[4] = at, at + 4, at + 8
    pointers[5], pointers[10] = factors.ctypes.data, factors.ctypes.data + 4
    pointers[7], pointers[9], pointers[12] = at + 12, at + 16, at + 20
    return pointers, numbers, factors, letters


@_part
def multiply(sgemm, call, x, num_rows, depth, other, transposes, width, out, factor, keeps):
    """out [num_rows, width] = factor x @ other, plus what it held if `keeps`. If `transposes`, x @ other.T.

    call: of new_call. x [num_rows, depth], other [depth, width] (or [width, depth]) and out are addresses, each with
    the values from row to row. To BLAS, which counts by columns, this is out.T = other.T @ x.T.
    """
    pointers, numbers, factors, letters = call
    letters[0] = _TRANSPOSED if transposes else _AS_IT_IS
    numbers[0], numbers[1], numbers[2] = width, num_rows, depth
    numbers[3], numbers[4], numbers[5] = other[1], x[1], out[1]
    factors[0], factors[1] = factor, 1 if keeps else 0
    pointers[6], pointers[8], pointers[11] = other[0], x[0], out[0]
    _call_sgemm(sgemm, pointers.ctypes.data)


@_part
def _read_ahead(address, num_values):
    """Read a value of each cache line: in a row, memory hands them over faster than BLAS asks for them. Their sum."""
    values, some, others = floats_at(address), np.float32(0), np.float32(0)
    for i in range(0, num_values - _LINE_VALUES, 2 * _LINE_VALUES):
        some += values[i]
        others += values[i + _LINE_VALUES]
    return some + others


@_part
def multiply_by_weights(sgemm, call, x, num_rows, depth, weights, width, out, keeps):
    """out [num_rows, width] = x [num_rows, depth] @ weights.T, plus what it held if `keeps`. weights [width, depth]: an
    address; x and out: as of multiply.
    """
    if num_rows < _FEW_ROWS and width * depth <= _CACHED_VALUES:
        call[2][2] = _read_ahead(weights, width * depth)  # nobody needs the sum, but the compiler must not leave it out
    multiply(sgemm, call, x, num_rows, depth, (weights, depth), True, width, out, 1, keeps)
