"""Memory at an address, for compiled code: rows that lie in several places are found by their addresses, and so are the
arguments of calls that are prepared once and made often.
"""

from __future__ import annotations

import struct
from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from pipemoe.compiled import Compiled


def _at(element: Any) -> Any:
    @intrinsic
    def at(typing_context, address):
        """A pointer to the elements from `address` (int64) on."""
        pointer = types.CPointer(element)

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return at


floats_at, doubles_at = _at(types.float32), _at(types.float64)
ints_at, shorts_at, longs_at = _at(types.int32), _at(types.int16), _at(types.int64)


@intrinsic
def call_at(typing_context, function, argument):
    """Call the compiled function at an address, which takes an address. It must not raise."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)]).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


class Call(NamedTuple):
    """A function's address, and that of its arguments, for call_at. kept: what must live until it has been made."""

    function: int
    arguments: int
    kept: Any


def places(**dimensions: int) -> Any:
    """A named tuple of where each argument of a call begins, as a number of its int64 word: for Arguments, and for
    compiled code that reads them. dimensions: of each; 0 for a number.
    """
    words: list[int] = []
    last = 0
    for number in dimensions.values():
        words.append(last)
        last += 1 + number
    return namedtuple("Places", dimensions)(*words)  # type: ignore[arg-type]


class Arguments:
    """Values one behind the other in int64 words, as compiled code reads them by the functions below: an array as its
    address and its shape, a number as itself, a float as the bits of a float64.
    """

    def __init__(self, at: Any, **values: Any) -> None:
        """at: their `places`, in the order of the values."""
        self.kept = values
        words: list[int] = []
        assert tuple(values) == at._fields
        for begin, value in zip(at, values.values()):
            assert len(words) == begin, "an argument has other dimensions than its place"
            if isinstance(value, float):
                words.append(struct.unpack("<q", struct.pack("<d", value))[0])
            elif isinstance(value, int):
                words.append(int(value))
            else:  # an array, or a tensor on the host
                is_array = isinstance(value, np.ndarray)
                words += [value.ctypes.data if is_array else value.data_ptr(), *value.shape]
        self.words = np.array(words, np.int64)
        self.address: int = self.words.ctypes.data

    def of(self, function: Compiled) -> Call:
        """A call with these arguments."""
        return Call(function.address, self.address, self)


def _part(function):
    return Compiled(function, inside=True, nogil=True, error_model="numpy", forceinline=True)


@_part
def real(words, i):
    """The float at word i."""
    return doubles_at(words + 8 * i)[0]


@_part
def vector(words, i):
    """[n] float32 at words i and i + 1."""
    a = longs_at(words + 8 * i)
    return carray(floats_at(a[0]), (a[1],))


@_part
def matrix(words, i):
    """[n, m] float32 at words i to i + 2."""
    a = longs_at(words + 8 * i)
    return carray(floats_at(a[0]), (a[1], a[2]))


@_part
def int_matrix(words, i):
    """[n, m] int32."""
    a = longs_at(words + 8 * i)
    return carray(ints_at(a[0]), (a[1], a[2]))


@_part
def double_matrix(words, i):
    """[n, m] float64."""
    a = longs_at(words + 8 * i)
    return carray(doubles_at(a[0]), (a[1], a[2]))


@_part
def long_vector(words, i):
    """[n] int64."""
    a = longs_at(words + 8 * i)
    return carray(longs_at(a[0]), (a[1],))


@_part
def long_matrix(words, i):
    """[n, m] int64."""
    a = longs_at(words + 8 * i)
    return carray(longs_at(a[0]), (a[1], a[2]))
