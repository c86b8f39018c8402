"""PTX of Hopper's tensor cores for e4m3: products over 128 columns, their scaled sums, and results that leave as e4m3.

    multiply(products, a, b) -> products      64 x 128 new ones over STEP columns, complete; a, b: descriptors
    promote(sums, products, low, high) -> sums      sums + products * low (rows l // 4) or * high (rows l // 4 + 8)
    store_swiglu_e4m3(gate, up, address, row_bytes, scales, lane, rows)     silu(gate) * up, one scale for a row's 128
                                              columns
    row_offset(tokens, row, end, stride), copy_scale(row, base, shared)     of gathered rows, see hopper.py's RowOffsets
    load_f32(global)                          a number that does not change while the kernel runs
    load_shared_f32(shared)                   a number of a stage

Sums and products are wgmma.py's Accumulators. The tensor cores add e4m3 products with some 14 bits. So they add no more
than 128 at a time, and float32 sums take the rest (DeepSeek-V3's report, section 3.3.2).
"""

from __future__ import annotations

from llvmlite import ir
from numba.cuda.extending import intrinsic

from pipemoe_kernels.numba_cuda import types
from pipemoe_kernels.ptx.activation import activated
from pipemoe_kernels.ptx.hopper import F32, I32, I64, NO_ROW, U32, U64, asm, instruction
from pipemoe_kernels.ptx.wgmma import VOID, Accumulator, _transposed

STEP = 128  # columns of both operands that one product takes: a 128-byte row of the swizzled tile in shared memory
WIDTH = 128  # columns of a product
COUNT = WIDTH // 2
LARGEST = 448.0  # of e4m3
SMALLEST_PEAK = 1e-10  # the largest magnitude of 128 values counts as at least this
_KIND = Accumulator(COUNT)
_STRUCT = ir.LiteralStructType([F32] * COUNT)

load_f32 = instruction("ld.global.nc.f32 $0, [$1];", types.float32, U64)
load_shared_f32 = instruction("ld.shared.f32 $0, [$1];", types.float32, U32)
row_offset = instruction(
    f"""{{
.reg .pred in_tile;
.reg .b32 token;
setp.lt.u32 in_tile, $2, $3;
@in_tile ld.relaxed.gpu.global.b32 token, [$1];
@in_tile mul.lo.u32 token, token, $4;
@!in_tile mov.b32 token, {NO_ROW};
mov.b32 $0, token;
}}""",
    U32,
    U64,
    U32,
    U32,
    U32,
)
copy_scale = instruction(
    f"""{{
.reg .pred exists;
.reg .b64 address;
setp.ne.b32 exists, $0, {NO_ROW};
mul.wide.u32 address, $0, 16;
add.s64 address, address, $1;
@exists cp.async.ca.shared.global [$2], [address], 4;
}}""",
    None,
    U32,
    U64,
    U32,
)


def _values(builder, sums):
    return [builder.extract_value(sums, i) for i in range(COUNT)]


def _products_text():
    registers = "{" + ",".join(f"${i}" for i in range(COUNT)) + "}"
    lines = [
        "{",
        ".reg .b64 a, b;",
        f"mov.b64 a, ${2 * COUNT};",
        f"mov.b64 b, ${2 * COUNT + 1};",
        "wgmma.fence.sync.aligned;",
    ]
    for part in range(STEP // 32):
        keep = 0 if part == 0 else 1
        lines.append(f"wgmma.mma_async.sync.aligned.m64n{WIDTH}k32.f32.e4m3.e4m3 {registers}, a, b, {keep}, 1, 1;")
        lines += ["add.s64 a, a, 2;", "add.s64 b, b, 2;"]  # 32 bytes, in a descriptor's units
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"])


_PRODUCTS = _products_text()


@intrinsic
def multiply(typingctx, products, a, b):
    def codegen(context, builder, signature, args):
        operands = [*_values(builder, args[0]), *args[1:]]
        return asm(
            builder,
            _PRODUCTS,
            _STRUCT,
            operands,
            ",".join(["=f"] * COUNT + [str(i) for i in range(COUNT)] + ["l", "l"]),
        )

    return _KIND(_KIND, U64, U64), codegen


@intrinsic
def promote(typingctx, sums, products, low, high):
    def codegen(context, builder, signature, args):
        added = ir.Constant(_STRUCT, ir.Undefined)
        for i, (total, product) in enumerate(zip(_values(builder, args[0]), _values(builder, args[1]), strict=True)):
            added = builder.insert_value(added, builder.fma(product, args[3] if i & 2 else args[2], total), i)
        return added

    return _KIND(_KIND, _KIND, types.float32, types.float32), codegen


_PEAK = "{\n.reg .f32 m;\nabs.f32 m, $2;\nmax.f32 $0, $1, m;\n}"
_PEAK_OF_LANES = "{\n.reg .f32 m;\nshfl.sync.bfly.b32 m, $1, %d, 31, 0xffffffff;\nmax.f32 $0, $1, m;\n}"
_INVERSE = "{\n.reg .f32 r;\nrcp.approx.ftz.f32 r, $1;\nmul.f32 $0, r, 0f43E00000;\n}"  # 448 / peak
_TWO_PAIRS = """{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}"""
_STORE_PART = "{\n.reg .pred p;\nsetp.ne.b32 p, $5, 0;\n@p st.global.v4.b32 [$0], {$1, $2, $3, $4};\n}"
_STORE_SCALE = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\n@p st.global.f32 [$0], $1;\n}"
_LOW_HALVES, _HIGH_HALVES = "prmt.b32 $0, $1, $2, 0x5410;", "prmt.b32 $0, $1, $2, 0x7632;"


@intrinsic
def store_swiglu_e4m3(typingctx, gate, up, address, row_bytes, scales, lane, rows):
    """address: of this thread's first row; scales: of its scale, those of neighbouring rows 4 bytes apart."""

    def codegen(context, builder, signature, args):
        address, row_bytes, scales, lane, rows = args[2:]
        results = activated(builder, "silu", _values(builder, args[0]), _values(builder, args[1]))
        lane_of_row = builder.and_(lane, ir.Constant(I32, 3))
        lane_bits = [
            builder.icmp_unsigned("!=", builder.and_(lane, ir.Constant(I32, bit)), ir.Constant(I32, 0))
            for bit in (1, 2)
        ]
        is_first = builder.icmp_unsigned("==", lane_of_row, ir.Constant(I32, 0))
        base = builder.add(address, builder.zext(builder.shl(lane_of_row, ir.Constant(I32, 4)), I64))
        for half in range(2):
            exists = builder.icmp_unsigned(">", rows, ir.Constant(I32, 8 * half))
            row = builder.add(base, builder.zext(builder.mul(row_bytes, ir.Constant(I32, 8 * half)), I64))
            values = [results[4 * j + 2 * half + c] for j in range(COUNT // 4) for c in range(2)]
            scale, values = _scaled(builder, values)
            target = builder.add(scales, ir.Constant(I64, 32 * half))
            asm(
                builder, _STORE_SCALE, VOID, [target, scale, builder.zext(builder.and_(exists, is_first), I32)], "l,f,r"
            )
            for block in range(0, len(values) // 4, 4):
                words = [
                    asm(builder, _TWO_PAIRS, I32, values[4 * m : 4 * m + 4], "=r,f,f,f,f", side_effect=False)
                    for m in range(block, block + 4)
                ]
                words = _in_order(builder, _transposed(builder, words, lane_bits))
                target = builder.add(row, ir.Constant(I64, 16 * block))
                asm(builder, _STORE_PART, VOID, [target, *words, builder.zext(exists, I32)], "l,r,r,r,r,r")
        return context.get_dummy_value()

    return types.void(_KIND, _KIND, U64, U32, U64, U32, U32), codegen


def _scaled(builder, values):
    """The scale of a row, whose 128 values four lanes hold, and this lane's values divided by it."""
    peak = ir.Constant(F32, SMALLEST_PEAK)
    for value in values:
        peak = asm(builder, _PEAK, F32, [peak, value], "=f,f,f", side_effect=False)
    for distance in (1, 2):
        peak = asm(builder, _PEAK_OF_LANES % distance, F32, [peak], "=&f,f")
    inverse = asm(builder, _INVERSE, F32, [peak], "=f,f", side_effect=False)
    return builder.fmul(peak, ir.Constant(F32, 1 / LARGEST)), [builder.fmul(value, inverse) for value in values]


def _in_order(builder, words):
    """Words of lanes 0 to 3, each two columns of one group of 8 and two of the next, to 16 neighbouring columns."""
    return [
        asm(builder, halves, I32, words[i : i + 2], "=r,r,r", side_effect=False)
        for halves in (_LOW_HALVES, _HIGH_HALVES)
        for i in (0, 2)
    ]
