"""PTX of memory accesses in several number formats, behind Numba intrinsics.

    load_vector(p, i), store_vector(p, i, v)   the i-th 16 bytes of p, a pointer to uint64 on a 16-byte boundary, as two
                                               uint64
    load_plain(p, i), store_plain(p, i, x)     p[i], converted to the pointer's type when written
    load_bf16(p, i), store_bf16(p, i, x)       p[i] of bfloat16 bits as float32; rounded to nearest even when written
    load_half(p, i), store_half(p, i, x)       the same for float16
    load_e4m3(p, i), to_e4m3(x)                p[i] of e4m3 bits as float32; the e4m3 bits of x, to nearest even and at
                                               most 448

These are intrinsics, not device functions, because those can only be compiled where there is a GPU.
"""

from llvmlite import ir
from numba.cuda.extending import intrinsic

from pipemoe_kernels.numba_cuda import types

_I8, _I16, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(64), ir.FloatType()
_VECTOR = types.UniTuple(types.uint64, 2)
_WORD_POINTER = types.CPointer(types.uint64)
_BITS_POINTER = types.CPointer(types.uint16)


def _vector_address(context, builder, pointer, index, index_type):
    offset = builder.shl(context.cast(builder, index, index_type, types.int64), ir.Constant(_I64, 4))
    return builder.add(builder.ptrtoint(pointer, _I64), offset)


def _element_address(context, builder, pointer, index, index_type):
    return builder.gep(pointer, [context.cast(builder, index, index_type, types.int64)])


@intrinsic
def load_vector(typingctx, pointer, index):
    def codegen(context, builder, signature, args):
        address = _vector_address(context, builder, *args, signature.args[1])
        function = ir.FunctionType(ir.LiteralStructType([_I64, _I64]), [_I64])
        asm = ir.InlineAsm(function, "ld.global.v2.u64 {$0, $1}, [$2];", "=l,=l,l,~{memory}", side_effect=True)
        loaded = builder.call(asm, [address])
        return context.make_tuple(builder, _VECTOR, [builder.extract_value(loaded, i) for i in range(2)])

    return _VECTOR(_WORD_POINTER, index), codegen


@intrinsic
def store_vector(typingctx, pointer, index, vector):
    def codegen(context, builder, signature, args):
        address = _vector_address(context, builder, *args[:2], signature.args[1])
        function = ir.FunctionType(ir.VoidType(), [_I64, _I64, _I64])
        asm = ir.InlineAsm(function, "st.global.v2.u64 [$0], {$1, $2};", "l,l,l,~{memory}", side_effect=True)
        builder.call(asm, [address, *(builder.extract_value(args[2], i) for i in range(2))])
        return context.get_dummy_value()

    return types.void(_WORD_POINTER, index, _VECTOR), codegen


@intrinsic
def load_plain(typingctx, pointer, index):
    def codegen(context, builder, signature, args):
        return builder.load(_element_address(context, builder, *args, signature.args[1]))

    return pointer.dtype(pointer, index), codegen


@intrinsic
def store_plain(typingctx, pointer, index, value):
    def codegen(context, builder, signature, args):
        builder.store(args[2], _element_address(context, builder, *args[:2], signature.args[1]))
        return context.get_dummy_value()

    return types.void(pointer, index, pointer.dtype), codegen


def _load_converted(asm):
    """A load of 16 bits followed by one conversion to float32."""

    @intrinsic
    def load(typingctx, pointer, index):
        def codegen(context, builder, signature, args):
            bits = builder.load(_element_address(context, builder, *args, signature.args[1]))
            return builder.call(ir.InlineAsm(ir.FunctionType(_F32, [_I16]), asm, "=f,h"), [bits])

        return types.float32(_BITS_POINTER, index), codegen

    return load


def _store_converted(asm):
    """One conversion from float32 followed by a store of 16 bits."""

    @intrinsic
    def store(typingctx, pointer, index, value):
        def codegen(context, builder, signature, args):
            bits = builder.call(ir.InlineAsm(ir.FunctionType(_I16, [_F32]), asm, "=h,f"), [args[2]])
            builder.store(bits, _element_address(context, builder, *args[:2], signature.args[1]))
            return context.get_dummy_value()

        return types.void(_BITS_POINTER, index, types.float32), codegen

    return store


load_bf16 = _load_converted("{ .reg .b16 low; mov.b16 low, 0; mov.b32 $0, {low, $1}; }")
load_half = _load_converted("cvt.f32.f16 $0, $1;")
store_bf16 = _store_converted("cvt.rn.bf16.f32 $0, $1;")
store_half = _store_converted("cvt.rn.f16.f32 $0, $1;")

_FROM_E4M3 = (
    "{ .reg .b16 low, high; .reg .b32 both; cvt.rn.f16x2.e4m3x2 both, $1; "
    "mov.b32 {low, high}, both; cvt.f32.f16 $0, low; }"
)
_TO_E4M3 = "{ .reg .f32 zero; mov.f32 zero, 0f00000000; cvt.rn.satfinite.e4m3x2.f32 $0, zero, $1; }"


@intrinsic
def load_e4m3(typingctx, pointer, index):
    def codegen(context, builder, signature, args):
        bits = builder.zext(builder.load(_element_address(context, builder, *args, signature.args[1])), _I16)
        return builder.call(ir.InlineAsm(ir.FunctionType(_F32, [_I16]), _FROM_E4M3, "=f,h"), [bits])

    return types.float32(types.CPointer(types.uint8), index), codegen


@intrinsic
def to_e4m3(typingctx, value):
    def codegen(context, builder, signature, args):
        value = context.cast(builder, args[0], signature.args[0], types.float32)
        bits = builder.call(ir.InlineAsm(ir.FunctionType(_I16, [_F32]), _TO_E4M3, "=h,f"), [value])
        return builder.trunc(bits, _I8)

    return types.uint8(value), codegen
