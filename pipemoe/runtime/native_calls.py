"""Calls of C functions by their addresses, and writes to memory, for compiled code. Imports numba."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipemoe_kernels.launch.tape import ROW

_I64, _I32 = ir.IntType(64), ir.IntType(32)


def _call(builder: Any, address: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(_I32, [_I64] * len(arguments)).as_pointer()
    return builder.call(builder.inttoptr(address, kind), arguments)


def _of_row(num_arguments: int) -> Any:
    """call(address, rows, at): with so many arguments of row `at` of a tape; its int."""

    @intrinsic
    def call(typing: Any, address: Any, rows: Any, at: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            address, array, at = values
            data = context.make_array(signature.args[1])(context, builder, array).data
            first = builder.add(builder.mul(at, _I64(ROW)), _I64(2))
            places = [builder.add(first, _I64(i)) for i in range(num_arguments)]
            return _call(builder, address, [builder.load(builder.gep(data, [place])) for place in places])

        return types.int32(types.int64, types.Array(types.int64, 2, "C"), types.int64), code

    return call


call_row_2, call_row_4 = map(_of_row, (2, 4))


@intrinsic
def call_1(typing: Any, address: Any, a: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _call(builder, values[0], list(values[1:]))

    return types.int32(types.int64, types.int64), code


@intrinsic
def call_2(typing: Any, address: Any, a: Any, b: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _call(builder, values[0], list(values[1:]))

    return types.int32(types.int64, types.int64, types.int64), code


@intrinsic
def call_3(typing: Any, address: Any, a: Any, b: Any, c: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _call(builder, values[0], list(values[1:]))

    return types.int32(types.int64, types.int64, types.int64, types.int64), code


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """Write a 64-bit word."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[1], builder.inttoptr(values[0], _I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def address_of(typing: Any, array: Any) -> Any:
    """Of an array's first element."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.ptrtoint(data, _I64)

    return types.int64(types.Array(types.int64, 1, "C")), code
