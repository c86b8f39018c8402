"""PTX of attention on Hopper's tensor cores: scores, softmax and outputs of a warpgroup's 64 rows, in registers.

    scores   64 rows x 128 keys   = queries (shared memory) x keys (shared memory)
    out      64 rows x Dv        += probabilities (registers) x values (shared memory)

Sums lie in a thread as wgmma.py shows: two rows, row l // 4 and 8 below. As the first operand of a product, 16 columns
of the probabilities lie in the same lanes as those columns of the scores, so they only have to be rounded.

A product runs on after its instruction. Until `wait` nothing may touch its registers, the first operand's neither: so
`wait_out` takes the probabilities as well, which keeps them where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from llvmlite import ir
from numba.cuda.extending import core_models, intrinsic, register_model

from pipemoe_kernels.numba_cuda import types
from pipemoe_kernels.ptx.hopper import F32, I32, I64, U32, U64, asm, instruction
from pipemoe_kernels.ptx.wgmma import Accumulator, _packed, _transposed, _values

KEYS = 128  # of a tile
BOX_COLUMNS = 64  # of a box in shared memory: 128 bytes, swizzled
BOX_UNITS = 128 * 128 // 16  # from a box of 128 rows to the next, in a descriptor's units
# Values are read across their rows: 1024 bytes from 8 keys to the next 8, a box from 64 columns to the next 64.
VALUES_DESCRIPTOR = (1 << 62) | (64 << 32) | (BOX_UNITS << 16)
_PAIR = types.UniTuple(types.float32, 2)
_VOID = ir.VoidType()
_NEGATIVE_INFINITY = ir.Constant(F32, float("-inf"))

exp2 = instruction("ex2.approx.ftz.f32 $0, $1;", types.float32, types.float32, side_effect=False)
maximum = instruction("max.f32 $0, $1, $2;", types.float32, types.float32, types.float32, side_effect=False)
reciprocal = instruction("rcp.approx.ftz.f32 $0, $1;", types.float32, types.float32, side_effect=False)
sum_of_row = instruction(
    "{\n.reg .f32 other;\nshfl.sync.bfly.b32 other, $1, 1, 31, 0xffffffff;\nadd.f32 $0, $1, other;\n"
    "shfl.sync.bfly.b32 other, $0, 2, 31, 0xffffffff;\nadd.f32 $0, $0, other;\n}",
    types.float32,
    types.float32,
)
count_bits = instruction("popc.b32 $0, $1;", U32, U32, side_effect=False)
fetch_and_add = instruction("atom.global.relaxed.gpu.add.u32 $0, [$1], $2;", U32, U64, U32)
store_u32 = instruction("st.relaxed.gpu.global.u32 [$0], $1;", None, U64, U32)
group_sync = instruction("barrier.sync.aligned $0, 128;", None, U32)
turn_sync = instruction("barrier.sync.aligned $0, 256;", None, U32)
turn_arrive = instruction("barrier.arrive.aligned $0, 256;", None, U32)
clear_shared = instruction("{\n.reg .b32 z;\nmov.b32 z, 0;\nst.shared.v4.b32 [$0], {z, z, z, z};\n}", None, U32)
multiprocessor = instruction("mov.u32 $0, %smid;", U32)
copy_word = instruction("{\n.reg .b32 w;\nld.global.nc.b32 w, [$1];\nst.shared.b32 [$0], w;\n}", None, U32, U64)
_REPLACE = "tensormap.replace.tile.{0}.shared::cta.b1024.{1} [$0], {2}$1;"
replace_address = instruction(_REPLACE.format("global_address", "b64", ""), None, U32, U64)
replace_rows = instruction(_REPLACE.format("global_dim", "b32", "2, "), None, U32, U32)
replace_head_stride = instruction(_REPLACE.format("global_stride", "b64", "0, "), None, U32, U64)
replace_row_stride = instruction(_REPLACE.format("global_stride", "b64", "1, "), None, U32, U64)
publish_map = instruction(
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [$0], [$1], 128;",
    None,
    U64,
    U32,
)
see_map = instruction("fence.proxy.tensormap::generic.acquire.gpu [$0], 128;", None, U64)
fence_for_products = instruction("fence.proxy.async.shared::cta;", None)


class Probabilities(types.Type):
    """A thread's 64 probabilities in 16 bits, two to a word."""

    words = KEYS // 4
    struct = ir.LiteralStructType([I32] * (KEYS // 4))

    def __init__(self):
        super().__init__(name="Probabilities")


@register_model(Probabilities)
class _ProbabilitiesModel(core_models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.struct)


@dataclass(frozen=True)
class AttentionProducts:
    """Intrinsics for one pair of head sizes and number format; queries, keys, values: descriptors.

    scores(queries, keys) -> scores; on their way
    scores_and_accumulate(queries, keys, out, probabilities, values) -> scores, out; both on their way. In one, since
        the assembler lets products overlap only if nothing between them defines what they read
    wait_scores(scores), wait_scores_but_one(scores) -> scores; until all products, or all but the last, are done
    zero() -> out
    accumulate(out, probabilities, values) -> out; on its way
    wait_out(out, probabilities, scores) -> out, scores; until all products are done. The scores only pass, so that
        NVVM leaves their exponentials before the wait
    mask(scores, end, end_below) -> scores; columns from `end` on become -inf. Ends are of the thread's two rows,
        signed, less the thread's first column
    mask_both(scores, begin, end, begin_below, end_below) -> scores; also those before `begin`
    row_maxima(scores) -> the two rows' maxima, over all four lanes
    exponentials(scores, scale, shift, shift_below) -> 2 ** (score * scale - shift), and this thread's sums of the rows
    rounded(scores) -> Probabilities; wait before, as the last ones' registers may be in use until then
    rescale(out, factor, factor_below) -> out
    store(out, address, address_below, lane, exists, exists_below): two rows of out, in the number format
    """

    scores: object
    scores_and_accumulate: object
    wait_scores: object
    wait_scores_but_one: object
    zero: object
    accumulate: object
    wait_out: object
    mask: object
    mask_both: object
    row_maxima: object
    exponentials: object
    rounded: object
    rescale: object
    store: object


def _values_of_struct(builder, struct):
    return [builder.extract_value(struct, i) for i in range(len(struct.type.elements))]


def _tied(count):
    return ",".join(["=f"] * count + [str(i) for i in range(count)])


def _row_of(index):
    """Which of the thread's two rows a value belongs to."""
    return index >> 1 & 1


@cache
def attention_products(head_dim: int, value_dim: int, *, half: bool) -> AttentionProducts:
    """half: float16, else bfloat16. Head sizes: multiples of 64."""
    assert head_dim % BOX_COLUMNS == 0 and value_dim % BOX_COLUMNS == 0
    number = "f16" if half else "bf16"
    num_scores, num_out = KEYS // 2, value_dim // 2
    scores_kind, out_kind, probabilities_kind = Accumulator(num_scores), Accumulator(num_out), Probabilities()
    scores_struct, out_struct = (ir.LiteralStructType([F32] * n) for n in (num_scores, num_out))

    def scores_steps(first_sum, queries, keys):
        """The products that give scores; the operands' numbers in the text."""
        text, sums = "", ",".join(f"${first_sum + i}" for i in range(num_scores))
        for k in range(head_dim // 16):
            offset = k // 4 * BOX_UNITS + k % 4 * 2
            text += f"add.s64 a, ${queries}, {offset};\nadd.s64 b, ${keys}, {offset};\n"
            text += f"wgmma.mma_async.sync.aligned.m64n{KEYS}k16.f32.{number}.{number} {{{sums}}}, a, b, "
            text += f"{min(k, 1)}, 1, 1, 0, 0;\n"
        return text + "wgmma.commit_group.sync.aligned;\n"

    def out_steps(first_sum, first_word, values):
        text, sums = "", ",".join(f"${first_sum + i}" for i in range(num_out))
        for k in range(KEYS // 16):
            words = ",".join(f"${first_word + 4 * k + i}" for i in range(4))
            text += f"add.s64 b, ${values}, {128 * k};\n"
            text += (
                f"wgmma.mma_async.sync.aligned.m64n{value_dim}k16.f32.{number}.{number} {{{sums}}}, {{{words}}}, b, "
            )
            text += "1, 1, 1, 1;\n"
        return text + "wgmma.commit_group.sync.aligned;\n"

    def started(steps):
        return f"{{\n.reg .b64 a, b;\nwgmma.fence.sync.aligned;\n{steps}}}"

    @intrinsic
    def scores(typingctx, queries, keys):
        def codegen(context, builder, signature, args):
            text = started(scores_steps(0, num_scores, num_scores + 1))
            return asm(builder, text, scores_struct, args, ",".join(["=f"] * num_scores) + ",l,l")

        return scores_kind(U64, U64), codegen

    both_kind = types.Tuple((scores_kind, out_kind))
    both_struct = ir.LiteralStructType([F32] * (num_scores + num_out))

    @intrinsic
    def scores_and_accumulate(typingctx, queries, keys, out, probabilities, values):
        def codegen(context, builder, signature, args):
            first_word = num_scores + 2 * num_out
            queries_at = first_word + Probabilities.words
            text = started(
                scores_steps(0, queries_at, queries_at + 1) + out_steps(num_scores, first_word, queries_at + 2)
            )
            operands = [*_values(builder, args[2]), *words_of(builder, args[3]), args[0], args[1], args[4]]
            constraints = ["=f"] * (num_scores + num_out) + [str(num_scores + i) for i in range(num_out)]
            constraints += ["r"] * Probabilities.words + ["l"] * 3
            sums = _values_of_struct(builder, asm(builder, text, both_struct, operands, ",".join(constraints)))
            parts = [_packed(builder, sums[:num_scores]), _packed(builder, sums[num_scores:])]
            return context.make_tuple(builder, both_kind, parts)

        return both_kind(U64, U64, out, probabilities, U64), codegen

    def waiting(pending):
        @intrinsic
        def wait(typingctx, scores):
            def codegen(context, builder, signature, args):
                text = f"wgmma.wait_group.sync.aligned {pending};"
                return asm(builder, text, scores_struct, _values(builder, args[0]), _tied(num_scores))

            return scores_kind(scores), codegen

        return wait

    @intrinsic
    def zero(typingctx):
        return out_kind(), lambda context, builder, signature, args: _packed(builder, [ir.Constant(F32, 0.0)] * num_out)

    def words_of(builder, probabilities):
        return [builder.extract_value(probabilities, i) for i in range(Probabilities.words)]

    @intrinsic
    def accumulate(typingctx, out, probabilities, values):
        def codegen(context, builder, signature, args):
            text = started(out_steps(0, 2 * num_out, 2 * num_out + Probabilities.words))
            operands = [*_values(builder, args[0]), *words_of(builder, args[1]), args[2]]
            return asm(builder, text, out_struct, operands, _tied(num_out) + ",r" * Probabilities.words + ",l")

        return out_kind(out, probabilities, U64), codegen

    waited_kind = types.Tuple((out_kind, scores_kind))
    waited_struct = ir.LiteralStructType([F32] * (num_out + num_scores))

    @intrinsic
    def wait_out(typingctx, out, probabilities, scores):
        def codegen(context, builder, signature, args):
            sums = [*_values(builder, args[0]), *_values(builder, args[2])]
            constraints = _tied(len(sums)) + ",r" * Probabilities.words
            text = "wgmma.wait_group.sync.aligned 0;"
            operands = [*sums, *words_of(builder, args[1])]
            done = _values_of_struct(builder, asm(builder, text, waited_struct, operands, constraints))
            parts = [_packed(builder, done[:num_out]), _packed(builder, done[num_out:])]
            return context.make_tuple(builder, waited_kind, parts)

        return waited_kind(out, probabilities, scores), codegen

    def column_of(index):
        return index // 4 * 8 + (index & 1)

    @intrinsic
    def mask(typingctx, scores, end, end_below):
        def codegen(context, builder, signature, args):
            ends = [context.cast(builder, args[i], signature.args[i], types.int32) for i in (1, 2)]
            kept = []
            for i, value in enumerate(_values(builder, args[0])):
                seen = builder.icmp_signed(">", ends[_row_of(i)], ir.Constant(I32, column_of(i)))
                kept.append(builder.select(seen, value, _NEGATIVE_INFINITY))
            return _packed(builder, kept)

        return scores_kind(scores, end, end_below), codegen

    @intrinsic
    def mask_both(typingctx, scores, begin, end, begin_below, end_below):
        def codegen(context, builder, signature, args):
            limits = [context.cast(builder, args[i], signature.args[i], types.int32) for i in range(1, 5)]
            kept = []
            for i, value in enumerate(_values(builder, args[0])):
                begin, end = limits[2 * _row_of(i) : 2 * _row_of(i) + 2]
                column = ir.Constant(I32, column_of(i))
                seen = builder.and_(builder.icmp_signed(">", end, column), builder.icmp_signed("<=", begin, column))
                kept.append(builder.select(seen, value, _NEGATIVE_INFINITY))
            return _packed(builder, kept)

        return scores_kind(scores, begin, end, begin_below, end_below), codegen

    def pairwise(builder, values, text):
        """Over a tree, so that no chain is long; always in the same order."""
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [asm(builder, text, F32, pair, "=f,f,f", side_effect=False) for pair in pairs]
        return values[0]

    @intrinsic
    def row_maxima(typingctx, scores):
        def codegen(context, builder, signature, args):
            values = _values(builder, args[0])
            maxima = []
            for row in range(2):
                of_row = [v for i, v in enumerate(values) if _row_of(i) == row]
                # Four chains: as many as hide the instruction's time, without 32 values at once.
                chains = of_row[:4]
                for i, value in enumerate(of_row[4:]):
                    chains[i % 4] = asm(
                        builder, "max.f32 $0, $1, $2;", F32, [chains[i % 4], value], "=f,f,f", side_effect=False
                    )
                value = pairwise(builder, chains, "max.f32 $0, $1, $2;")
                for distance in (1, 2):
                    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
                    other = asm(builder, text, F32, [value], "=f,f")
                    value = asm(builder, "max.f32 $0, $1, $2;", F32, [value, other], "=f,f,f", side_effect=False)
                maxima.append(value)
            return context.make_tuple(builder, _PAIR, maxima)

        return _PAIR(scores), codegen

    exponentials_kind = types.Tuple((scores_kind, types.float32, types.float32))

    @intrinsic
    def exponentials(typingctx, scores, scale, shift, shift_below):
        def codegen(context, builder, signature, args):
            scale, *shifts = args[1:]
            negated = [builder.fsub(ir.Constant(F32, -0.0), shift) for shift in shifts]
            values, sums = [], [[], []]
            for i, value in enumerate(_values(builder, args[0])):
                operands = [value, scale, negated[_row_of(i)]]
                shifted = asm(builder, "fma.rn.ftz.f32 $0, $1, $2, $3;", F32, operands, "=f,f,f,f", side_effect=False)
                values.append(asm(builder, "ex2.approx.ftz.f32 $0, $1;", F32, [shifted], "=f,f", side_effect=False))
                chains = sums[_row_of(i)]
                position = i // 4 * 2 + (i & 1)  # in its row
                if position < 2:
                    chains.append(values[i])
                else:
                    chains[position % 2] = builder.fadd(chains[position % 2], values[i])
            parts = [_packed(builder, values), *(builder.fadd(*chains) for chains in sums)]
            return context.make_tuple(builder, exponentials_kind, parts)

        return exponentials_kind(scores, types.float32, types.float32, types.float32), codegen

    rounding = "".join(
        f"cvt.rn.{number}x2.f32 ${i}, ${Probabilities.words + 2 * i + 1}, ${Probabilities.words + 2 * i};\n"
        for i in range(Probabilities.words)
    )

    @intrinsic
    def rounded(typingctx, scores):
        def codegen(context, builder, signature, args):
            constraints = ["=r"] * Probabilities.words + ["f"] * num_scores
            return asm(builder, rounding, Probabilities.struct, _values(builder, args[0]), ",".join(constraints))

        return probabilities_kind(scores), codegen

    @intrinsic
    def rescale(typingctx, out, factor, factor_below):
        def codegen(context, builder, signature, args):
            values = _values(builder, args[0])
            return _packed(builder, [builder.fmul(v, args[1 + _row_of(i)]) for i, v in enumerate(values)])

        return out_kind(out, types.float32, types.float32), codegen

    @intrinsic
    def store(typingctx, out, address, address_below, lane, exists, exists_below):
        def codegen(context, builder, signature, args):
            values = _values(builder, args[0])
            lane_of_row = builder.and_(args[3], ir.Constant(I32, 3))
            odd, upper = (
                builder.icmp_unsigned("!=", builder.and_(args[3], ir.Constant(I32, bit)), ir.Constant(I32, 0))
                for bit in (1, 2)
            )
            part = builder.zext(builder.shl(lane_of_row, ir.Constant(I32, 4)), I64)
            for row in range(2):
                base = builder.add(args[1 + row], part)
                for block in range(0, value_dim // 8, 4):
                    words = []
                    for j in range(block, block + 4):
                        pair = values[4 * j + 2 * row : 4 * j + 2 * row + 2]
                        text = f"cvt.rn.{number}x2.f32 $0, $2, $1;"
                        words.append(asm(builder, text, I32, pair, "=r,f,f", side_effect=False))
                    words = _transposed(builder, words, (odd, upper))
                    target = builder.add(base, ir.Constant(I64, 16 * block))
                    text = "{\n.reg .pred p;\nsetp.ne.b32 p, $5, 0;\n@p st.global.v4.b32 [$0], {$1, $2, $3, $4};\n}"
                    asm(builder, text, _VOID, [target, *words, args[4 + row]], "l,r,r,r,r,r")
            return context.get_dummy_value()

        return types.void(out, U64, U64, U32, U32, U32), codegen

    return AttentionProducts(
        scores,
        scores_and_accumulate,
        waiting(0),
        waiting(1),
        zero,
        accumulate,
        wait_out,
        mask,
        mask_both,
        row_maxima,
        exponentials,
        rounded,
        rescale,
        store,
    )
