"""The float32 GEMM of the library that torch brings, by its address, for compiled code: a call costs a microsecond,
where torch.mm from Python costs ten.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_NUM_ARGUMENTS = 13  # of BLAS's sgemm, all of them pointers


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
def call_sgemm(typing_context, address, arguments):
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
