"""Every kernel compiles without a GPU, keeps its values in registers, and does no accidental float64 arithmetic."""

import importlib.util
import re

import pytest

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from tests.kernels.assembler import build, compiled
from tests.kernels.variants import enumerate_kernels

KERNELS = dict(enumerate_kernels())
# Each compilation takes seconds. Sums without a bias are those with one less an addition. Where a kernel has several
# choices, every two sides of different choices meet in some variant, but not every three.
LEFT_OUT = {
    *(name for name in KERNELS if name.startswith("combine_rows") and name.endswith("False")),
    *("route_tokens-softmax-float32-placed", "route_tokens-sigmoid-float32"),
    *("route_tokens-softmax-bfloat16", "route_tokens-sigmoid-bfloat16-placed"),
    *("route_tokens-softmax-float16-placed", "route_tokens-sigmoid-float16"),
    *("place_heads-128-128-1e-06-torch.float16", "place_heads-128-64-None-torch.bfloat16"),
    *("place_heads-80-80-1e-06-torch.float16", "place_heads-192-64-1e-06-torch.bfloat16"),
    *("place_heads-512-512-None-torch.float16", "norm_latents-1536-torch.float16"),
    *("norm_latents-3072-torch.bfloat16", "rotate_queries-1536-torch.float16", "rotate_queries-3072-torch.bfloat16"),
}
assert not LEFT_OUT - KERNELS.keys()
# The newest architecture for all that remain; for sm_80 one of each family.
CASES = [(name, (9, 0)) for name in KERNELS if name not in LEFT_OUT]
CASES += [("combine_rows-torch.bfloat16-torch.bfloat16-False", (9, 0))]
CASES += [
    (name, (8, 0))
    for name in ("count_pairs", "scan_counts", "place_pairs", "gather_rows", "grouped_gemm-torch.bfloat16")
]
CASES += [("activate_rows-torch.bfloat16-True", (8, 0)), ("combine_rows-torch.bfloat16-torch.float32-True", (8, 0))]
CASES += [("route_tokens-sigmoid-float32", (8, 0))]
MAX_REGISTERS = 80


@pytest.mark.parametrize("name, cc", CASES)
def test_compiles_into_registers(name, cc, tmp_path):
    registers, _ = build(KERNELS[name], cc, f"sm_{cc[0]}{cc[1]}", tmp_path, every_call_inlined=False)
    ptx = compiled(KERNELS[name], cc)
    assert ("float64" in name) or not re.search(r"\b(add|sub|mul|div|fma|cvt)\.\S*f64", ptx)
    assert registers <= MAX_REGISTERS


def test_gather_moves_16_bytes_at_a_time():
    ptx = compiled(KERNELS["gather_rows"], (9, 0))
    assert "ld.global.v2.u64" in ptx and "st.global.v2.u64" in ptx
