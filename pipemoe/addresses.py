"""Memory at an address, for compiled code: rows that lie in several places are found by their addresses."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic


def _at(element: Any) -> Any:
    @intrinsic
    def at(typing_context, address):
        """A pointer to the elements from `address` (int64) on."""
        pointer = types.CPointer(element)

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return at


floats_at, ints_at, shorts_at = _at(types.float32), _at(types.int32), _at(types.int16)
