"""PTX of products of few rows of x with rows of weights that each thread fetches for itself, behind Numba intrinsics.

A warp multiplies 16 rows of weights by up to 8 rows of x, over SLICE neighbouring columns. With g = lane // 4 and
t = lane % 4, lane l fetches, and later reads, what tensor cores want of it: 16 bytes, which are columns

    32 s + 8 t .. 32 s + 8 t + 7,  s in 0 .. STEPS      of the weights' rows g and g + 8, and of x's row g

in shared memory at (2 s + (0 or 1)) * threads * 16 bytes from its place. Sums over columns may go in any order, so
these eight stand for columns 2t, 2t + 1, 2t + 8 and 2t + 9 of two products of 16 columns. The sums: a tuple of four
float32, of weights' row g and x's rows 2t and 2t + 1, and of weights' row g + 8 and the same.

    copy_16(shared, global)              starts to fetch 16 bytes
    wait_for_copies()                    of this thread, all
    few_products(threads, num_x, half)   an intrinsic (shared, x, exists, x_after) -> num_x sums, one for each eight
                                         rows of x: x the global address of this lane's part of row g, exists not 0 if
                                         there is one; the next eight rows begin x_after bytes later, their row g exists
                                         if bit 1 of `exists` is set
    gated(gating)                        an intrinsic (gate, up) -> activation(gate) * up, of float32
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba.cuda.extending import intrinsic

from pipemoe_kernels.gating import Gating
from pipemoe_kernels.numba_cuda import types
from pipemoe_kernels.ptx.activation import activated
from pipemoe_kernels.ptx.hopper import F32, I32, I64, U32, U64, asm, instruction

SLICE = 256
STEPS = SLICE // 32
ROWS = 16
STAGED_BYTES = 32 * STEPS  # of a thread

copy_16 = instruction("cp.async.cg.shared.global.L2::128B [$0], [$1], 16;", None, U32, U64)
wait_for_copies = instruction("cp.async.wait_all;", None)

_WORDS, _SUMS = ir.LiteralStructType([I32] * 4), ir.LiteralStructType([F32] * 4)
_LOAD_X = """{
.reg .pred p;
.reg .b32 bit;
and.b32 bit, $5, $6;
setp.ne.b32 p, bit, 0;
mov.b32 $0, 0;
mov.b32 $1, 0;
mov.b32 $2, 0;
mov.b32 $3, 0;
@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
}"""
_LOAD_W = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
_PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.%(x)s.%(x)s.f32 {$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};"
)


@cache
def few_products(threads: int, num_x: int, half: bool = False):
    """See the module. half: float16, else bfloat16."""
    text = _PRODUCT % {"x": "f16" if half else "bf16"}
    kind = types.UniTuple(types.float32, 4 * num_x)

    def words(builder, text, arguments, constraints):
        loaded = asm(builder, text, _WORDS, arguments, constraints)
        return [builder.extract_value(loaded, i) for i in range(4)]

    @intrinsic
    def products(typingctx, shared, x, exists, x_after):
        def codegen(context, builder, signature, args):
            shared, x, exists, x_after = (
                context.cast(builder, value, given, wanted)
                for value, given, wanted in zip(args, signature.args, (U32, U64, U32, U64), strict=True)
            )
            bases = [x]
            for _ in range(num_x - 1):
                bases.append(builder.add(bases[-1], x_after))
            sums = [[ir.Constant(F32, 0.0)] * 4 for _ in range(num_x)]
            at_once = STEPS // num_x  # loads of x under way before the first is used
            for begin in range(0, STEPS, at_once):
                rows = {}
                for s in range(begin, begin + at_once):
                    for n, base in enumerate(bases):
                        address = builder.add(base, ir.Constant(I64, 64 * s))
                        operands = [address, exists, ir.Constant(I32, 1 << n)]
                        rows[s, n] = words(builder, _LOAD_X, operands, "=&r,=&r,=&r,=&r,l,r,r")
                for s in range(begin, begin + at_once):
                    low, high = (
                        words(
                            builder,
                            _LOAD_W,
                            [builder.add(shared, ir.Constant(I32, 16 * threads * (2 * s + i)))],
                            "=r,=r,=r,=r,r",
                        )
                        for i in range(2)
                    )
                    for n in range(num_x):
                        for i in (0, 2):
                            weights = [low[i], high[i], low[i + 1], high[i + 1]]
                            operands = [*sums[n], *weights, *rows[s, n][i : i + 2]]
                            constraints = "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r"
                            found = asm(builder, text, _SUMS, operands, constraints, side_effect=False)
                            sums[n] = [builder.extract_value(found, j) for j in range(4)]
            return context.make_tuple(builder, kind, [value for of_eight in sums for value in of_eight])

        return kind(shared, x, exists, x_after), codegen

    return products


@cache
def gated(gating: str | Gating):
    """See the module."""

    @intrinsic
    def times_up(typingctx, gate, up):
        def codegen(context, builder, signature, args):
            (found,) = activated(builder, gating, *([value] for value in args))
            return found

        return types.float32(types.float32, types.float32), codegen

    return times_up
