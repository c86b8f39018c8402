"""Eight neighbouring values of a row as float32 in registers, behind Numba intrinsics; from sm_80 on.

    an Eight    a tuple of 8 float32
    a vector    its 16 bytes in bfloat16 or float16, as load_vector of ptx/access.py gives it: two uint64

    eight_of_bf16(vector), eight_of_half(vector)     a vector's values
    bf16_of(eight), half_of(eight)                   the vector of the nearest such values
    eight_of_float32(p, i)                           the i-th 32 bytes of p, a pointer to uint64
    add(a, b), multiply(a, b), scale(a, s)           value by value; s a float32
    swap_pairs(a)                                    (a1, a0, a3, a2, ...)
    sum_of_squares(a)                                always in the same order
    store_vector_at(address, vector)                 to a 64-bit address on a boundary of 16 bytes
    store_word_at(address, word)                     32 bits
    element_address(p, i)                            the 64-bit address of p[i]
    sum_over(n)                                      an intrinsic of float32: the sum over each group of n neighbouring
                                                     lanes, in all of them; n a power of two; all 32 lanes call it

simulated_eights.py does the same for the CUDA simulator.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba.cuda.extending import intrinsic

from pipemoe_kernels.numba_cuda import types
from pipemoe_kernels.ptx import hopper
from pipemoe_kernels.ptx.hopper import F32, I32, I64, U32, U64, asm, instruction

element_address = hopper.element_address
WIDTH = 8
EIGHT = types.UniTuple(types.float32, WIDTH)
_VECTOR = types.UniTuple(types.uint64, 2)
_EIGHT_VALUE, _VECTOR_VALUE = ir.ArrayType(F32, WIDTH), ir.ArrayType(I64, 2)


def _collected(builder, kind, values):
    collected = ir.Constant(kind, ir.Undefined)
    for i, value in enumerate(values):
        collected = builder.insert_value(collected, value, i)
    return collected


def _values(builder, collected, count=WIDTH):
    return [builder.extract_value(collected, i) for i in range(count)]


def _unpacked(floats_of):
    """An intrinsic vector -> Eight; floats_of(builder, word): the two values of 32 bits."""

    @intrinsic
    def unpack(typingctx, vector):
        def codegen(context, builder, signature, args):
            floats = []
            for word in _values(builder, args[0], 2):
                for half in (word, builder.lshr(word, ir.Constant(I64, 32))):
                    floats += floats_of(builder, builder.trunc(half, I32))
            return _collected(builder, _EIGHT_VALUE, floats)

        return EIGHT(_VECTOR), codegen

    return unpack


def _packed(text):
    """An intrinsic Eight -> vector; text: the conversion of two values."""

    @intrinsic
    def pack(typingctx, eight):
        def codegen(context, builder, signature, args):
            values = _values(builder, args[0])
            words = []
            for first in range(0, WIDTH, 4):
                low, high = (
                    builder.zext(asm(builder, text, I32, values[i : i + 2], "=r,f,f", side_effect=False), I64)
                    for i in (first, first + 2)
                )
                words.append(builder.or_(low, builder.shl(high, ir.Constant(I64, 32))))
            return _collected(builder, _VECTOR_VALUE, words)

        return _VECTOR(EIGHT), codegen

    return pack


def _of_bf16(builder, word):
    low = builder.bitcast(builder.shl(word, ir.Constant(I32, 16)), F32)
    return [low, builder.bitcast(builder.and_(word, ir.Constant(I32, 0xFFFF0000)), F32)]


def _of_half(builder, word):
    both = ir.LiteralStructType([F32, F32])
    text = "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
    found = asm(builder, text, both, [word], "=f,=f,r", side_effect=False)
    return [builder.extract_value(found, i) for i in range(2)]


eight_of_bf16, eight_of_half = _unpacked(_of_bf16), _unpacked(_of_half)
bf16_of, half_of = _packed("cvt.rn.bf16x2.f32 $0, $2, $1;"), _packed("cvt.rn.f16x2.f32 $0, $2, $1;")


@intrinsic
def eight_of_float32(typingctx, pointer, index):
    def codegen(context, builder, signature, args):
        index = context.cast(builder, args[1], signature.args[1], types.int64)
        address = builder.add(builder.ptrtoint(args[0], I64), builder.shl(index, ir.Constant(I64, 5)))
        values = []
        for part in range(2):
            start = builder.add(address, ir.Constant(I64, 16 * part))
            loaded = asm(
                builder,
                "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];",
                ir.LiteralStructType([F32] * 4),
                [start],
                "=f,=f,=f,=f,l",
            )
            values += _values(builder, loaded, 4)
        return _collected(builder, _EIGHT_VALUE, values)

    return EIGHT(types.CPointer(types.uint64), index), codegen


def _by_value(operation):
    @intrinsic
    def combined(typingctx, a, b):
        def codegen(context, builder, signature, args):
            pairs = zip(_values(builder, args[0]), _values(builder, args[1]), strict=True)
            return _collected(builder, _EIGHT_VALUE, [getattr(builder, operation)(x, y) for x, y in pairs])

        return EIGHT(EIGHT, EIGHT), codegen

    return combined


add, multiply = _by_value("fadd"), _by_value("fmul")


@intrinsic
def scale(typingctx, a, factor):
    def codegen(context, builder, signature, args):
        return _collected(builder, _EIGHT_VALUE, [builder.fmul(x, args[1]) for x in _values(builder, args[0])])

    return EIGHT(EIGHT, types.float32), codegen


@intrinsic
def swap_pairs(typingctx, a):
    def codegen(context, builder, signature, args):
        values = _values(builder, args[0])
        return _collected(builder, _EIGHT_VALUE, [values[i ^ 1] for i in range(WIDTH)])

    return EIGHT(EIGHT), codegen


@intrinsic
def sum_of_squares(typingctx, a):
    def codegen(context, builder, signature, args):
        values = _values(builder, args[0])
        total = builder.fmul(values[0], values[0])
        for value in values[1:]:
            total = builder.fadd(total, builder.fmul(value, value))
        return total

    return types.float32(EIGHT), codegen


@intrinsic
def store_vector_at(typingctx, address, vector):
    def codegen(context, builder, signature, args):
        words = _values(builder, args[1], 2)
        asm(builder, "st.global.v2.u64 [$0], {$1, $2};", ir.VoidType(), [args[0], *words], "l,l,l")
        return context.get_dummy_value()

    return types.void(U64, _VECTOR), codegen


store_word_at = instruction("st.global.b32 [$0], $1;", None, U64, U32)


@cache
def sum_over(width: int):
    steps = "".join(
        f"shfl.sync.bfly.b32 other, $0, {1 << n}, 31, 0xffffffff;\nadd.f32 $0, $0, other;\n"
        for n in reversed(range(width.bit_length() - 1))
    )
    return instruction("{\n.reg .f32 other;\nmov.f32 $0, $1;\n" + steps + "}", types.float32, types.float32)
