"""PTX of Hopper's tensor cores: a warpgroup's 64 x N sums in registers, their products, and how they leave.

A warpgroup's sums, as wgmma has them; warp w of 4, lane l, q = l % 4:

    row 16 w + l // 4         columns 8 j + 2 q, 8 j + 2 q + 1     values 4 j,     4 j + 1
    row 16 w + l // 4 + 8     the same columns                     values 4 j + 2, 4 j + 3

They live in an Accumulator, a Numba type over an LLVM struct. It stays in registers as long as every index is known
when the code is generated, so loops over values are unrolled here and not in the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from llvmlite import ir
from numba.cuda.extending import core_models, intrinsic, register_model

from pipemoe_kernels.gating import Gating
from pipemoe_kernels.numba_cuda import types
from pipemoe_kernels.ptx.activation import activated
from pipemoe_kernels.ptx.hopper import F32, I32, I64, U32, U64, asm

STEP = 64  # columns of both operands that one product takes: a 128-byte row of the swizzled tile in shared memory
MAX_WIDTH = 256  # of one product
# A tile in shared memory: rows of 128 bytes, 128-byte swizzle, 1024 bytes from one group of 8 rows to the next.
TILE_DESCRIPTOR = (1 << 62) | (64 << 32) | (1 << 16)
VOID = ir.VoidType()


class Accumulator(types.Type):
    """`count` float32 sums of a thread."""

    def __init__(self, count: int):
        self.count = count
        super().__init__(name=f"Accumulator[{count}]")


@register_model(Accumulator)
class _AccumulatorModel(core_models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.LiteralStructType([F32] * kind.count))


def _values(builder, accumulator):
    return [builder.extract_value(accumulator, i) for i in range(len(accumulator.type.elements))]


def _packed(builder, values):
    accumulator = ir.Constant(ir.LiteralStructType([F32] * len(values)), ir.Undefined)
    for i, value in enumerate(values):
        accumulator = builder.insert_value(accumulator, value, i)
    return accumulator


@dataclass(frozen=True)
class Accumulators:
    """Intrinsics for one width.

    zero() -> sums
    multiply(sums, a, b, keep) -> sums; a, b: descriptors; keep 0: forgets the earlier sums
    wait_all(sums), wait_but_one(sums) -> sums; until all products, or all but the last, are done
    store(sums, address, row_bytes, lane, rows, columns): the sums as bfloat16
    store_activated(sums, address, row_bytes, lane, rows, columns, bias, up_bias): activation(left half) * right half if
        gated, else activation(sums)
    address: of this thread's first row. rows, columns: how many exist from there on. Biases: addresses, or absent.
    """

    zero: object
    multiply: object
    wait_all: object
    wait_but_one: object
    store: object
    store_activated: object


@cache
def accumulators(
    width: int, *, has_bias: bool, activation: str | Gating = "silu", gated: bool = True, max_width: int = MAX_WIDTH
) -> Accumulators:
    """For 64 x `width` sums, in products of at most max_width columns of them at a time."""
    count = width // 2
    width_of_product = min(width, max_width)
    kind = Accumulator(count)
    tied = ",".join(["=f"] * count + [str(i) for i in range(count)])
    struct = ir.LiteralStructType([F32] * count)

    def products_of_16(keep):
        """For 16 columns of both operands; rows of w are 128 bytes apart, which is 8 in a descriptor's units."""
        text = ""
        for first in range(0, width, width_of_product):
            sums = "{" + ",".join(f"${i}" for i in range(first // 2, (first + width_of_product) // 2)) + "}"
            w = "b" if first == 0 else "w"
            text += "" if first == 0 else f"add.s64 w, b, {8 * first};\n"
            text += (
                f"wgmma.mma_async.sync.aligned.m64n{width_of_product}k16.f32.bf16.bf16 "
                f"{sums}, a, {w}, {keep}, 1, 1, 0, 0;\n"
            )
        return text

    # 16 columns of bfloat16 are 32 bytes, 2 in a descriptor's units.
    next_products = "add.s64 a, a, 2;\nadd.s64 b, b, 2;\n" + products_of_16(1)
    products = (
        "{\n.reg .pred keep;\n.reg .b64 a, b, w;\n"
        f"mov.b64 a, ${2 * count};\nmov.b64 b, ${2 * count + 1};\nsetp.ne.b32 keep, ${2 * count + 2}, 0;\n"
        "wgmma.fence.sync.aligned;\n"
        + products_of_16("keep")
        + next_products * (STEP // 16 - 1)
        + "wgmma.commit_group.sync.aligned;\n}"
    )

    @intrinsic
    def zero(typingctx):
        return kind(), lambda context, builder, signature, args: _packed(builder, [ir.Constant(F32, 0.0)] * count)

    @intrinsic
    def multiply(typingctx, accumulator, a, b, keep):
        def codegen(context, builder, signature, args):
            operands = [*_values(builder, args[0]), *args[1:]]
            return asm(builder, products, struct, operands, tied + ",l,l,r")

        return kind(kind, U64, U64, U32), codegen

    def waiting(pending):
        @intrinsic
        def wait(typingctx, accumulator):
            def codegen(context, builder, signature, args):
                text = f"wgmma.wait_group.sync.aligned {pending};"
                return asm(builder, text, struct, _values(builder, args[0]), tied)

            return kind(kind), codegen

        return wait

    @intrinsic
    def store(typingctx, accumulator, address, row_bytes, lane, rows, columns):
        def codegen(context, builder, signature, args):
            store_values(builder, _values(builder, args[0]), *args[1:])
            return context.get_dummy_value()

        return types.void(kind, U64, U32, U32, U32, U32), codegen

    @intrinsic
    def store_activated(typingctx, accumulator, address, row_bytes, lane, rows, columns, bias, up_bias):
        def codegen(context, builder, signature, args):
            values = _values(builder, args[0])
            halves = [values[: count // 2], values[count // 2 :]] if gated else [values]
            if has_bias:
                halves = [
                    with_bias(builder, half, a, args[3], args[5]) for half, a in zip(halves, args[6:], strict=False)
                ]
            store_values(builder, activated(builder, activation, *halves), *args[1:6])
            return context.get_dummy_value()

        return types.void(kind, U64, U32, U32, U32, U32, U64, U64), codegen

    return Accumulators(zero, multiply, waiting(0), waiting(1), store, store_activated)


_LOAD_PAIR = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\nmov.b32 $0, 0;\n@p ld.global.nc.b32 $0, [$1];\n}"
_STORE_PART = "{\n.reg .pred p;\nsetp.ne.b32 p, $5, 0;\n@p st.global.v4.b32 [$0], {$1, $2, $3, $4};\n}"


def with_bias(builder, values, address, lane, columns):
    """values + bias of their columns; address: of the tile's first column, in bfloat16."""
    pair = builder.shl(builder.and_(lane, ir.Constant(I32, 3)), ir.Constant(I32, 1))
    results = list(values)
    for j in range(len(values) // 4):
        column = builder.add(pair, ir.Constant(I32, 8 * j))
        exists = builder.zext(builder.icmp_unsigned("<", column, columns), I32)
        source = builder.add(address, builder.shl(builder.zext(column, I64), ir.Constant(I64, 1)))
        bits = asm(builder, _LOAD_PAIR, I32, [source, exists], "=&r,l,r", side_effect=False)
        low = builder.bitcast(builder.shl(bits, ir.Constant(I32, 16)), F32)
        high = builder.bitcast(builder.and_(bits, ir.Constant(I32, 0xFFFF0000)), F32)
        for i in range(4):
            results[4 * j + i] = builder.fadd(values[4 * j + i], high if i % 2 else low)
    return results


def store_values(builder, values, address, row_bytes, lane, rows, columns):
    """Values in wgmma's order to bfloat16 rows, 16 bytes a store: the 4 lanes of a row exchange parts first.

    A lane holds 2 columns of each of four groups of 8; a 4 x 4 transposition gives lane q all 8 columns of group q.
    """
    lane_of_row = builder.and_(lane, ir.Constant(I32, 3))
    odd = builder.icmp_unsigned("!=", builder.and_(lane, ir.Constant(I32, 1)), ir.Constant(I32, 0))
    upper = builder.icmp_unsigned("!=", builder.and_(lane, ir.Constant(I32, 2)), ir.Constant(I32, 0))
    base = builder.add(address, builder.zext(builder.shl(lane_of_row, ir.Constant(I32, 4)), I64))
    for half in range(2):
        row_exists = builder.icmp_unsigned(">", rows, ir.Constant(I32, 8 * half))
        row_base = builder.add(base, builder.zext(builder.mul(row_bytes, ir.Constant(I32, 8 * half)), I64))
        for block in range(0, len(values) // 4, 4):
            words = []
            for j in range(block, block + 4):
                pair = values[4 * j + 2 * half : 4 * j + 2 * half + 2]
                words.append(asm(builder, "cvt.rn.bf16x2.f32 $0, $2, $1;", I32, pair, "=r,f,f", side_effect=False))
            words = _transposed(builder, words, (odd, upper))
            column = builder.shl(builder.add(lane_of_row, ir.Constant(I32, block)), ir.Constant(I32, 3))
            exists = builder.and_(row_exists, builder.icmp_unsigned("<", column, columns))
            target = builder.add(row_base, ir.Constant(I64, 16 * block))
            asm(builder, _STORE_PART, VOID, [target, *words, builder.zext(exists, I32)], "l,r,r,r,r,r")


def _transposed(builder, words, lane_bits):
    """words[i] of lane q of 4 -> words[q] of lane i; lane_bits: the two bits of q."""
    for distance, bit in zip((1, 2), lane_bits, strict=True):
        exchanged = list(words)
        for i in range(4):
            if i & distance:
                continue
            low, high = words[i], words[i | distance]
            shuffle = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
            received = asm(builder, shuffle, I32, [builder.select(bit, low, high)], "=r,r")
            exchanged[i] = builder.select(bit, received, low)
            exchanged[i | distance] = builder.select(bit, high, received)
        words = exchanged
    return words
