"""Every kernel that experts can launch, for tests that go over all of them."""

from itertools import product

import torch

from pipemoe_kernels.activation import activation_kernel
from pipemoe_kernels.attention.heads import HeadForm, heads_kernel
from pipemoe_kernels.attention.latents import (
    LatentShape,
    join_keys_kernel,
    norm_latents_kernel,
    rotate_queries_kernel,
)
from pipemoe_kernels.attention.norm import norm_kernel
from pipemoe_kernels.combine import combine_kernel
from pipemoe_kernels.gather import gather_kernel
from pipemoe_kernels.gating import ACTIVATIONS, Gating
from pipemoe_kernels.gemm.simt import grouped_simt_kernel
from pipemoe_kernels.index.portable import index_kernels
from pipemoe_kernels.pack import pack_kernel
from pipemoe_kernels.routing import Scoring, routing_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCORINGS = {
    "softmax": Scoring(sigmoid=False, renormalise=True, rounded=True),
    "sigmoid": Scoring(sigmoid=True, renormalise=True, scale=2.5),
}


def enumerate_kernels():
    """Name and Kernel of each variant."""
    index = index_kernels()
    yield from ((kernel.name, kernel) for kernel in (index.count, index.scan, index.place))
    yield "gather_rows", gather_kernel()
    yield "pack_rows", pack_kernel()
    for dtype in DTYPES:
        yield f"grouped_gemm-{dtype}", grouped_simt_kernel(dtype)
    for dtype, bias in product(DTYPES, (False, True)):
        yield f"activate_rows-{dtype}-{bias}", activation_kernel(dtype, bias)
    for name, gated in product(ACTIVATIONS, (False, True)):
        yield f"activate_rows-{name}-{gated}", activation_kernel(torch.bfloat16, True, gating=name, gated=gated)
    yield "activate_rows-clamped", activation_kernel(torch.bfloat16, True, gating=Gating("silu", 7.0, 1.702, 1.0))
    for dtype, bias in product(DTYPES, (False, True)):
        for out_dtype in (*DTYPES, torch.float64):
            yield f"combine_rows-{dtype}-{out_dtype}-{bias}", combine_kernel(dtype, out_dtype, bias)
    for dtype, (name, scoring) in product(DTYPES, SCORINGS.items()):
        yield (
            f"route_tokens-{name}-{str(dtype).removeprefix('torch.')}",
            routing_kernel(dtype, scoring, scoring.sigmoid),
        )
        yield (
            f"route_tokens-{name}-{str(dtype).removeprefix('torch.')}-placed",
            routing_kernel(dtype, scoring, scoring.sigmoid, placed=True),
        )
    yield from enumerate_attention_kernels()


def enumerate_attention_kernels():
    """Those of a decoder layer; each side of every choice."""
    for dtype, sums_dtype in product((torch.bfloat16, torch.float16), (None, *DTYPES)):
        yield f"norm_rows-2048-{dtype}-{sums_dtype}", norm_kernel(dtype, sums_dtype, 2048, 1e-6)
    for placed, copied in ((True, True), (True, False)):
        yield (
            f"norm_rows-7168-{placed}-{copied}",
            norm_kernel(torch.bfloat16, torch.float32, 7168, 1e-6, placed, copied),
        )
    yield "norm_rows-16384", norm_kernel(torch.float16, torch.float32, 16384, 1e-6, placed=True)
    for dtype, form in product(
        (torch.bfloat16, torch.float16),
        (
            HeadForm(128, 128, eps=1e-6),
            HeadForm(128, 64),
            HeadForm(80, 80, eps=1e-6),
            HeadForm(192, 64, interleaved=True, eps=1e-6),
            HeadForm(512, 512),
        ),
    ):
        yield f"place_heads-{form.head_dim}-{form.rotary}-{form.eps}-{dtype}", heads_kernel(dtype, form)
    for dtype, shape in product(
        (torch.bfloat16, torch.float16),
        (
            LatentShape(1536, True, 512, 128, 64, 128, interleaved=True),
            LatentShape(3072, False, 512, 128, 64, 128, interleaved=False),
        ),
    ):
        name = f"{shape.query}-{dtype}"
        yield f"norm_latents-{name}", norm_latents_kernel(dtype, shape, 1e-6)
        yield f"rotate_queries-{name}", rotate_queries_kernel(dtype, shape)
    yield "join_keys", join_keys_kernel(shape)
