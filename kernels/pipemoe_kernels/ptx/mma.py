"""PTX of the tensor cores of sm_80 and newer: a warp's sums in registers, their products, and how they leave.

A warp holds `blocks` blocks of 16 rows and 64 columns. In such a block, lane l has, with q = l % 4:

    row l // 4         columns 8 j + 2 q, 8 j + 2 q + 1     values 4 j,     4 j + 1
    row l // 4 + 8     the same columns                     values 4 j + 2, 4 j + 3

A tile in shared memory has rows of 32 columns, 64 bytes. Part c (16 bytes) of row r lies at part c ^ (r // 2 % 4), so
the eight rows that one instruction reads together use all banks. The sums are wgmma.py's Accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from llvmlite import ir
from numba.cuda.extending import intrinsic

from pipemoe_kernels.gating import Gating
from pipemoe_kernels.numba_cuda import types
from pipemoe_kernels.ptx.activation import activated
from pipemoe_kernels.ptx.hopper import F32, I32, I64, U32, U64, asm, instruction
from pipemoe_kernels.ptx.wgmma import Accumulator, store_values, with_bias

STEP = 32  # columns of both operands in a stage
ROW_BYTES = 2 * STEP
BLOCK_ROWS = 16
COLUMNS = 64  # of w's rows, of a warp
COLUMN_BLOCKS = COLUMNS // 8
VALUES = 4 * COLUMN_BLOCKS  # of one block
NO_ROW = 0xFFFFFFFF

_COPY_PART = f"""{{
.reg .pred exists;
setp.ne.b32 exists, $3, {NO_ROW};
@exists cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;
}}"""
# (shared, global, size, offset): 16 bytes, `size` of them (0 or 16) and zeros for the rest, unless offset is NO_ROW.
copy_part = instruction(_COPY_PART, None, U32, U64, U32, U32)
commit_copies = instruction("cp.async.commit_group;", None)
wait_for_copies_but_two = instruction("cp.async.wait_group 2;", None)

_LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
_PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};"
)
_WORDS, _SUMS = ir.LiteralStructType([I32] * 4), ir.LiteralStructType([F32] * 4)


@intrinsic
def lane_part_x(typingctx, lane):
    """Offset in a tile that a lane names when a warp loads 16 rows and 16 columns of x."""

    def codegen(context, builder, signature, args):
        return _lane_offset(
            builder, args[0], builder.and_(args[0], ir.Constant(I32, 15)), builder.lshr(args[0], ir.Constant(I32, 4))
        )

    return U32(U32), codegen


@intrinsic
def lane_part_w(typingctx, lane):
    """The same for w, whose rows are the result's columns: first halves of 8 rows, their second halves, then 8 more."""

    def codegen(context, builder, signature, args):
        lane = args[0]
        below = builder.shl(builder.lshr(lane, ir.Constant(I32, 4)), ir.Constant(I32, 3))
        row = builder.or_(below, builder.and_(lane, ir.Constant(I32, 7)))
        part = builder.and_(builder.lshr(lane, ir.Constant(I32, 3)), ir.Constant(I32, 1))
        return _lane_offset(builder, lane, row, part)

    return U32(U32), codegen


def _lane_offset(builder, lane, row, part):
    turn = builder.and_(builder.lshr(lane, ir.Constant(I32, 1)), ir.Constant(I32, 3))
    at = builder.shl(builder.xor(part, turn), ir.Constant(I32, 4))
    return builder.add(builder.mul(row, ir.Constant(I32, ROW_BYTES)), at)


@dataclass(frozen=True)
class WarpSums:
    """Intrinsics for one number of blocks.

    zero() -> sums
    multiply(sums, x, x_part, w, w_part, to_second) -> sums: one stage's columns; x, w: shared addresses of the warp's
        first rows, multiples of 64; *_part: this lane's offset; to_second: bytes between the two 32 rows of w
    store(sums, address, row_bytes, lane, rows, columns, bias, up_bias): as wgmma.py's store or store_activated
    """

    zero: object
    multiply: object
    store: object


@cache
def warp_sums(blocks: int, *, has_bias: bool, activation: str | Gating | None, gated: bool) -> WarpSums:
    """For `blocks` x 16 rows. activation None: stores the bare sums. gated: the second 32 columns are those of up."""
    kind = Accumulator(blocks * VALUES)
    struct = ir.LiteralStructType([F32] * kind.count)

    def packed(builder, values):
        sums = ir.Constant(struct, ir.Undefined)
        for i, value in enumerate(values):
            sums = builder.insert_value(sums, value, i)
        return sums

    def load(builder, address):
        loaded = asm(builder, _LOAD, _WORDS, [address], "=r,=r,=r,=r,r")
        return [builder.extract_value(loaded, i) for i in range(4)]

    @intrinsic
    def zero(typingctx):
        return kind(), lambda context, builder, signature, args: packed(builder, [ir.Constant(F32, 0.0)] * kind.count)

    @intrinsic
    def multiply(typingctx, sums, x, x_part, w, w_part, to_second):
        def codegen(context, builder, signature, args):
            sums, x, x_part, w, w_part, to_second = args
            values = [builder.extract_value(sums, i) for i in range(kind.count)]
            fragments = []
            for half in range(STEP // 16):
                # 16 columns further is 2 parts further: one bit, in the permuted order too.
                bit = ir.Constant(I32, 32 * half)
                x_at, w_at = (builder.add(a, builder.xor(p, bit)) for a, p in ((x, x_part), (w, w_part)))
                second = builder.add(w_at, to_second)
                rows = [
                    load(builder, builder.add(x_at, ir.Constant(I32, BLOCK_ROWS * ROW_BYTES * m)))
                    for m in range(blocks)
                ]
                columns = []
                for start in (w_at, second):
                    for j in range(2):
                        words = load(builder, builder.add(start, ir.Constant(I32, 16 * ROW_BYTES * j)))
                        columns += [words[:2], words[2:]]
                fragments.append((rows, columns))
            for rows, columns in fragments:
                for m, row in enumerate(rows):
                    for n, column in enumerate(columns):
                        first = VALUES * m + 4 * n
                        operands = [*values[first : first + 4], *row, *column]
                        product = asm(
                            builder, _PRODUCT, _SUMS, operands, "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r", side_effect=False
                        )
                        values[first : first + 4] = [builder.extract_value(product, i) for i in range(4)]
            return packed(builder, values)

        return kind(kind, U32, U32, U32, U32, U32), codegen

    @intrinsic
    def store(typingctx, sums, address, row_bytes, lane, rows, columns, bias, up_bias):
        def codegen(context, builder, signature, args):
            sums, address, row_bytes, lane, rows, columns, *biases = args
            for m in range(blocks):
                values = [builder.extract_value(sums, VALUES * m + i) for i in range(VALUES)]
                halves = [values[: VALUES // 2], values[VALUES // 2 :]] if gated else [values]
                if has_bias:
                    halves = [
                        with_bias(builder, half, b, lane, columns) for half, b in zip(halves, biases, strict=False)
                    ]
                if activation is not None:
                    values = activated(builder, activation, *halves)
                before = ir.Constant(I32, BLOCK_ROWS * m)
                left = builder.select(
                    builder.icmp_unsigned(">", rows, before), builder.sub(rows, before), ir.Constant(I32, 0)
                )
                target = builder.add(address, builder.zext(builder.mul(row_bytes, before), I64))
                store_values(builder, values, target, row_bytes, lane, left, columns)
            return context.get_dummy_value()

        return types.void(kind, U64, U32, U32, U32, U32, U64, U64), codegen

    return WarpSums(zero, multiply, store)
