"""Weighted sums of rows, several parts of eight neighbouring columns of bfloat16 a thread, as values in registers.

    row_sum(...) makes three intrinsics, for P parts, one every `stride` bytes of a row:
        find(positions, weights, ids)               addresses of one token's K of each -> its TokenRows
        add_up(rows, y, row_bytes, bias, first, column, limit)   the sum over k ascending with positions[k] >= 0 of
                                                    weights[k] * (y[positions[k]] + bias[ids[k] - first])
        store(address, sums, column, limit)         to a row of out, on a boundary of 16 bytes

row_bytes: of y and bias. column: of this thread's first part, in bytes of y. Parts from `limit` on do not exist. Sums
are float32; for a float64 out they are float64 sums of float32 products rounded to multiples of 2^-32 (see combine.py).
A whole block takes the same branch on positions[k]. The loads of all parts of a row are under way before the first is
used.
"""

from __future__ import annotations

from functools import cache

import torch
from llvmlite import ir
from numba.cuda.extending import core_models, intrinsic, register_model

from pipemoe_kernels.numba_cuda import types
from pipemoe_kernels.ptx.hopper import F32, I32, I64, U64, asm

WIDTH = 8
PART_BYTES = 2 * WIDTH
F64 = ir.DoubleType()
GRID_ROUNDING = 1.5 * 2.0**20  # see combine.py


class _Struct(types.Type):
    """A value of several registers."""

    def __init__(self, name, elements):
        self.struct = ir.LiteralStructType(elements)
        super().__init__(name=f"{name}[{len(elements)}, {elements[-1]}]")


@register_model(_Struct)
class _StructModel(core_models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.struct)


def _packed(builder, kind, values):
    packed = ir.Constant(kind.struct, ir.Undefined)
    for i, value in enumerate(values):
        packed = builder.insert_value(packed, value, i)
    return packed


_LOAD_PART_IF = """{
.reg .pred p;
setp.ne.b32 p, $5, 0;
mov.b32 $0, 0;
mov.b32 $1, 0;
mov.b32 $2, 0;
mov.b32 $3, 0;
@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
}"""
_LOAD_WEIGHT_IF = "{\n.reg .pred p;\nsetp.ge.s32 p, $2, 0;\nmov.b32 $0, 0;\n@p ld.global.f32 $0, [$1];\n}"


def _load_parts(builder, row, stride, exists):
    """A row's parts as words; those that do not exist as zeros."""
    parts = []
    for i, flag in enumerate(exists):
        address = builder.add(row, ir.Constant(I64, i * stride))
        words = ir.LiteralStructType([I32] * 4)
        loaded = asm(builder, _LOAD_PART_IF, words, [address, flag], "=&r,=&r,=&r,=&r,l,r")
        parts.append([builder.extract_value(loaded, j) for j in range(4)])
    return parts


def _as_floats(builder, parts):
    values = []
    for word in (word for part in parts for word in part):
        values.append(builder.bitcast(builder.shl(word, ir.Constant(I32, 16)), F32))
        values.append(builder.bitcast(builder.and_(word, ir.Constant(I32, 0xFFFF0000)), F32))
    return values


def _exist(builder, column, limit, stride, count):
    """For each part, 1 if it exists."""
    columns = (builder.add(column, ir.Constant(I64, i * stride)) for i in range(count))
    return [builder.zext(builder.icmp_unsigned("<", c, limit), I32) for c in columns]


@cache
def row_sum(top_k: int, has_bias: bool, out_dtype: torch.dtype, num_parts: int, stride: int):
    """The intrinsics find, add_up and store: see the module."""
    on_grid = out_dtype == torch.float64
    element = F64 if on_grid else F32
    rows_kind = _Struct("TokenRows", [I32] * top_k + [F32] * top_k + ([I32] * top_k if has_bias else []))
    sums_kind = _Struct("Sums", [element] * (WIDTH * num_parts))

    @intrinsic
    def find(typingctx, positions, weights, ids):
        def codegen(context, builder, signature, args):
            found = [[], [], []]
            for k in range(top_k):
                positions, weights, ids = (builder.add(address, ir.Constant(I64, 4 * k)) for address in args)
                found[0].append(asm(builder, "ld.global.b32 $0, [$1];", I32, [positions], "=r,l"))
                found[1].append(asm(builder, _LOAD_WEIGHT_IF, F32, [weights, found[0][-1]], "=&f,l,r"))
                if has_bias:
                    found[2].append(asm(builder, "ld.global.b32 $0, [$1];", I32, [ids], "=r,l"))
            return _packed(builder, rows_kind, sum(found, []))

        return rows_kind(U64, U64, U64), codegen

    def weighted(builder, args, k, exists):
        """weights[k] * (y[positions[k]] + bias), in the sums' format."""
        rows, y, row_bytes, bias, first_expert, column, _ = args

        def load(base, row):
            offset = builder.mul(builder.sext(row, I64), row_bytes)
            return _load_parts(builder, builder.add(builder.add(base, offset), column), stride, exists)

        parts = load(y, builder.extract_value(rows, k))
        if has_bias:
            bias_parts = load(bias, builder.sub(builder.extract_value(rows, 2 * top_k + k), first_expert))
            pairs = zip(_as_floats(builder, parts), _as_floats(builder, bias_parts), strict=True)
            values = [builder.fadd(value, b) for value, b in pairs]
        else:
            values = _as_floats(builder, parts)
        products = [builder.fmul(value, builder.extract_value(rows, top_k + k)) for value in values]
        if on_grid:
            rounding = ir.Constant(F64, GRID_ROUNDING)
            wide = (builder.fpext(product, F64) for product in products)
            products = [builder.fsub(builder.fadd(product, rounding), rounding) for product in wide]
        return products

    @intrinsic
    def add_up(typingctx, rows, y, row_bytes, bias, first_expert, column, limit):
        def codegen(context, builder, signature, args):
            exists = _exist(builder, args[5], args[6], stride, num_parts)
            sums = [ir.Constant(element, 0.0)] * (WIDTH * num_parts)
            for k in range(top_k):
                is_local = builder.icmp_signed(">=", builder.extract_value(args[0], k), ir.Constant(I32, 0))
                before = builder.block
                with builder.if_then(is_local):
                    added = [builder.fadd(s, p) for s, p in zip(sums, weighted(builder, args, k, exists), strict=True)]
                    inside = builder.block
                joined = []
                for old, new in zip(sums, added, strict=True):
                    phi = builder.phi(element)
                    phi.add_incoming(old, before)
                    phi.add_incoming(new, inside)
                    joined.append(phi)
                sums = joined
            return _packed(builder, sums_kind, sums)

        return sums_kind(rows_kind, U64, U64, U64, types.int32, U64, U64), codegen

    @intrinsic
    def store(typingctx, address, sums, column, limit):
        def codegen(context, builder, signature, args):
            address, sums, column, limit = args
            values = [builder.extract_value(sums, i) for i in range(WIDTH * num_parts)]
            for i, exists in enumerate(_exist(builder, column, limit, stride, num_parts)):
                start = ir.Constant(I64, i * stride * out_dtype.itemsize // 2)
                _store_part(
                    builder, builder.add(address, start), values[WIDTH * i : WIDTH * (i + 1)], out_dtype, exists
                )
            return context.get_dummy_value()

        return types.void(U64, sums_kind, U64, U64), codegen

    return find, add_up, store


# By out's format: how much a 16-byte store holds, its PTX type, constraint, and how two values become a word.
_FORMATS = {
    torch.bfloat16: (4, "b32", "r", "cvt.rn.bf16x2.f32 $0, $2, $1;"),
    torch.float16: (4, "b32", "r", "cvt.rn.f16x2.f32 $0, $2, $1;"),
    torch.float32: (4, "f32", "f", None),
    torch.float64: (2, "f64", "d", None),
}


def _store_part(builder, address, values, dtype, exists):
    """8 values in stores of 16 bytes, if they exist."""
    per_store, type_name, constraint, pack = _FORMATS[dtype]
    if pack:
        pairs = (values[i : i + 2] for i in range(0, WIDTH, 2))
        values = [asm(builder, pack, I32, pair, "=r,f,f", side_effect=False) for pair in pairs]
    operands = ", ".join(f"${i + 2}" for i in range(per_store))
    text = f"{{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n@p st.global.v{per_store}.{type_name} [$0], {{{operands}}};\n}}"
    for first in range(0, len(values), per_store):
        target = builder.add(address, ir.Constant(I64, 16 * (first // per_store)))
        constraints = ",".join(["l", "r", *[constraint] * per_store])
        asm(builder, text, ir.VoidType(), [target, exists, *values[first : first + per_store]], constraints)
