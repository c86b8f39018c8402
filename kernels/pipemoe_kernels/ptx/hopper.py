"""PTX of Hopper (sm_90a) behind Numba intrinsics: barriers, the bulk copy engine, gathering copies, register budgets.

Addresses: `shared` are 32-bit addresses of the shared window, `global` 64-bit generic ones. wgmma.py has the tensor
cores.

    shared_address(array)                     of a shared array; one of size 0 is the dynamic shared memory
    barrier_init(bar, count), barrier_fence() an mbarrier that a phase of `count` arrivals completes
    barrier_wait(bar, parity)                 until the phase of that parity is complete
    barrier_arrive(bar)                       one arrival
    barrier_expect(bar, bytes)                one arrival, and `bytes` of bulk copies still to come in this phase
    commit_copies(), wait_for_copies_but_two(), wait_for_all_copies()   this thread's gathering copies, in groups
    load_box_2d(shared, map, bar, x, y), load_box_3d(shared, map, bar, x, y, z)   bulk copy of one box of a tensor map
    element_address(pointer, index)           the global address of pointer[index]
    load_u32(global), load_shared_u32(shared), store_shared_u32(shared, value), add_shared_u32(shared, value)
    tile_rows(tokens, first, end, stride), copy_rows(rows, base, shared, part, size)   see RowOffsets
    rows_of_thread(count)                     makes a tile_rows for `count` rows of a thread instead of ROWS_EACH
    of_first_lane(value)                      lane 0's value, which the compiler then knows to be the same in all lanes
    lanes_with(flag)                          the lanes of the warp whose flag is not 0, as bits
    lanes_before()                            the lanes below this one, as bits
    from_lane_below(value, n)                 the value of the lane n below; 0 where there is none
    from_lane(value, lane)                    the value of a lane
    keep_registers(N), take_registers(N)      make intrinsics that move registers between the warpgroups of a block
    launch_dependents(), wait_for_earlier()   programmatic dependent launch
"""

from __future__ import annotations

import os

from llvmlite import ir
from numba.cuda.extending import core_models, intrinsic, register_model

from pipemoe_kernels.numba_cuda import types

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
U32, U64 = types.uint32, types.uint64
_LLVM = {types.float32: F32, types.uint32: I32, types.int32: I32, types.uint64: I64}
_CONSTRAINT = {types.float32: "f", types.uint32: "r", types.int32: "r", types.uint64: "l"}


def asm(builder, text, result, arguments, constraints, *, side_effect=True):
    """One inline assembly call; memory counts as changed if it has side effects."""
    if side_effect:
        constraints = ",".join(filter(None, (constraints, "~{memory}")))
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(function, text, constraints, side_effect=side_effect), arguments)


def _of_arity(count, function):
    """`function(*arguments)` with exactly `count` named parameters: Numba folds no variadic ones."""
    return (
        lambda typingctx: function(),
        lambda typingctx, a: function(a),
        lambda typingctx, a, b: function(a, b),
        lambda typingctx, a, b, c: function(a, b, c),
        lambda typingctx, a, b, c, d: function(a, b, c, d),
        lambda typingctx, a, b, c, d, e: function(a, b, c, d, e),
        lambda typingctx, a, b, c, d, e, f: function(a, b, c, d, e, f),
    )[count]


def instruction(text, result, *parameters, side_effect=True):
    """An intrinsic of scalars: $0 is the result if there is one, then come the parameters; arguments are converted."""
    constraints = [] if result is None else ["=" + _CONSTRAINT[result]]
    constraints = ",".join([*constraints, *(_CONSTRAINT[p] for p in parameters)])

    def typed(*arguments):
        def codegen(context, builder, signature, values):
            values = [
                context.cast(builder, v, k, p) for v, k, p in zip(values, signature.args, parameters, strict=True)
            ]
            llvm_result = ir.VoidType() if result is None else _LLVM[result]
            out = asm(builder, text, llvm_result, values, constraints, side_effect=side_effect)
            return context.get_dummy_value() if result is None else out

        return (types.void if result is None else result)(*arguments), codegen

    return intrinsic(_of_arity(len(parameters), typed))


# For finding deadlocks: a wait becomes a launch failure after this many tries (0: never).
MAX_TRIES = int(os.environ.get("PIPEMOE_KERNEL_MAX_TRIES", 0))

_WAIT = """{
.reg .pred done;
AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;
@done bra DONE;
bra AGAIN;
DONE:
}"""
_BOUNDED_WAIT = f"""{{
.reg .pred done;
.reg .u32 tries;
mov.u32 tries, 0;
AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;
@done bra DONE;
add.u32 tries, tries, 1;
setp.gt.u32 done, tries, {MAX_TRIES};
@done trap;
bra AGAIN;
DONE:
}}"""


@intrinsic
def shared_address(typingctx, array):
    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(builder.addrspacecast(data, ir.PointerType(ir.IntType(8), 3)), I32)

    return U32(array), codegen


barrier_init = instruction("mbarrier.init.shared::cta.b64 [$0], $1;", None, U32, U32)
barrier_fence = instruction("fence.mbarrier_init.release.cluster;\nfence.proxy.async;", None)
barrier_wait = instruction(_BOUNDED_WAIT if MAX_TRIES else _WAIT, None, U32, U32)
barrier_arrive = instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", None, U32)
barrier_expect = instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", None, U32, U32)
commit_copies = instruction("cp.async.commit_group;", None)
# The tensor cores read the copies' tile next; they see ordinary writes only after this fence.
wait_for_copies_but_two = instruction("cp.async.wait_group 2;\nfence.proxy.async.shared::cta;", None)
wait_for_all_copies = instruction("cp.async.wait_group 0;\nfence.proxy.async.shared::cta;", None)

_BOX = "cp.async.bulk.tensor.{0}d.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1, {{{1}}}], [$2];"
load_box_2d = instruction(_BOX.format(2, "$3, $4"), None, U32, U64, U32, U32, U32)
load_box_3d = instruction(_BOX.format(3, "$3, $4, $5"), None, U32, U64, U32, U32, U32, U32)

# From L2: a kernel that started early must not see what L1 held before.
load_u32 = instruction("ld.relaxed.gpu.global.b32 $0, [$1];", U32, U64)
load_shared_u32 = instruction("ld.shared.b32 $0, [$1];", U32, U32)
store_shared_u32 = instruction("st.shared.b32 [$0], $1;", None, U32, U32)

add_shared_u32 = instruction("red.shared.add.u32 [$0], $1;", None, U32, U32)
lanes_with = instruction(
    "{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\nvote.sync.ballot.b32 $0, p, 0xffffffff;\n}", U32, U32
)
lanes_before = instruction("mov.u32 $0, %lanemask_lt;", U32, side_effect=False)
from_lane_below = instruction(
    "{\n.reg .pred p;\nshfl.sync.up.b32 $0|p, $1, $2, 0, 0xffffffff;\n@!p mov.b32 $0, 0;\n}", U32, U32, U32
)
from_lane = instruction("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", U32, U32, U32)
of_first_lane = instruction("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", U32, U32)

launch_dependents = instruction("griddepcontrol.launch_dependents;", None)
wait_for_earlier = instruction("griddepcontrol.wait;", None)


def keep_registers(count):
    """This warpgroup gives back all registers a thread above `count`."""
    return instruction(f"setmaxnreg.dec.sync.aligned.u32 {count};", None)


def take_registers(count):
    """This warpgroup waits until it has `count` registers a thread."""
    return instruction(f"setmaxnreg.inc.sync.aligned.u32 {count};", None)


@intrinsic
def element_address(typingctx, pointer, index):
    def codegen(context, builder, signature, args):
        index = context.cast(builder, args[1], signature.args[1], types.int64)
        return builder.ptrtoint(builder.gep(args[0], [index]), I64)

    return U64(pointer, index), codegen


class RowOffsets(types.Type):
    """Where the gathered rows of one thread start, in 16-byte units from the matrix; NO_ROW for rows that do not exist.

    thread t of 128 copies part t % 8 of the rows t // 8 + 16 i of a tile, i in 0 .. count
    a row of a tile is 128 bytes: 8 parts of 16 bytes, in shared memory at part ^ (row % 8)
    """

    def __init__(self, count: int):
        self.count = count
        super().__init__(name=f"RowOffsets[{count}]")

    @property
    def llvm(self) -> ir.LiteralStructType:
        return ir.LiteralStructType([I32] * self.count)


ROWS_EACH = 8
NO_ROW = 0xFFFFFFFF


@register_model(RowOffsets)
class _RowOffsetsModel(core_models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


_ROW_OFFSET = f"""{{
.reg .pred in_tile;
.reg .b32 token;
mov.b32 $0, {NO_ROW};
setp.lt.u32 in_tile, $2, $3;
@in_tile ld.relaxed.gpu.global.b32 token, [$1];
@in_tile mul.lo.u32 $0, token, $4;
}}"""
_COPY_ROW = f"""{{
.reg .pred exists;
setp.ne.b32 exists, $3, {NO_ROW};
@exists cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;
}}"""


def rows_of_thread(count: int):
    """An intrinsic: RowOffsets of `count` rows (first, first + 16, ... below `end`); row r is row tokens[r] of the
    matrix.
    """
    kind = RowOffsets(count)

    @intrinsic
    def tile_rows(typingctx, tokens, first, end, stride):
        def codegen(context, builder, signature, args):
            kinds = (U64, U32, U32, U32)
            tokens, first, end, stride = (
                context.cast(builder, *v) for v in zip(args, signature.args, kinds, strict=True)
            )
            rows = ir.Constant(kind.llvm, ir.Undefined)
            for i in range(count):
                row = builder.add(first, ir.Constant(I32, 16 * i))
                address = builder.add(tokens, builder.shl(builder.zext(row, I64), ir.Constant(I64, 2)))
                offset = asm(builder, _ROW_OFFSET, I32, [address, row, end, stride], "=&r,l,r,r,r")
                rows = builder.insert_value(rows, offset, i)
            return rows

        return kind(tokens, first, end, stride), codegen

    return tile_rows


tile_rows = rows_of_thread(ROWS_EACH)


@intrinsic
def copy_rows(typingctx, rows, base, shared, part, size):
    """Start copying 16 bytes of each row, from `part` x 16 on: `size` of them (0 or 16), and zeros for the rest."""

    def codegen(context, builder, signature, args):
        kinds = (signature.args[0], U64, U32, U32, U32)
        rows, base, shared, part, size = (
            context.cast(builder, *v) for v in zip(args, signature.args, kinds, strict=True)
        )
        for i in range(signature.args[0].count):
            offset = builder.extract_value(rows, i)
            units = builder.zext(builder.add(offset, part), I64)
            address = builder.add(base, builder.shl(units, ir.Constant(I64, 4)))
            target = builder.add(shared, ir.Constant(I32, 2048 * i))
            asm(builder, _COPY_ROW, ir.VoidType(), [target, address, size, offset], "r,l,r,r")
        return context.get_dummy_value()

    return types.void(rows, base, shared, part, size), codegen
