"""Kernels in e4m3 compile without a GPU: tensor cores and conversions as meant, registers in budget, nothing in local
memory.
"""

import importlib.util
import re

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from pipemoe_kernels.gemm.fp8 import CONSUMER_REGISTERS, PRODUCER_REGISTERS, THREADS, grouped_fp8_kernel
from pipemoe_kernels.gemm.fp8_roles import SHARED_BYTES
from pipemoe_kernels.quantise import dequantise_kernel, quantise_kernel
from tests.kernels.assembler import MAX_SHARED_BYTES, NUM_REGISTERS, build, compiled, disassemble, linked


@pytest.mark.parametrize("gated", [True, False])
def test_grouped_gemm(gated, tmp_path):
    registers, code = build(grouped_fp8_kernel(gated=gated), (9, 0), "sm_90a", tmp_path)
    assert registers * THREADS <= NUM_REGISTERS
    if code is not None:
        assert code.count("QGMMA.64x128x32.F32.E4M3.E4M3") == 8 and code.count("FFMA") >= 128
        assert "UTMALDG" in code and code.count("USETMAXREG") == 2
        assert ("LDGSTS" in code) == gated and ("F2FP.SATFINITE.E4M3" in code) == gated
        assert "STG.E.128" in code


@pytest.mark.parametrize("gated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_grouped_gemm_as_it_is_linked(gated, tmp_path):
    """By the linker that launches use: it must keep what the assembler alone would give."""
    entry, cubin = linked(grouped_fp8_kernel(gated=gated))
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    code = disassemble(tmp_path)
    if code is not None:
        assert f".text.{entry}" in code
        assert not re.search(r"\b(LDL|STL|CALL)\b", code)
        assert code.count("QGMMA.64x128x32.F32.E4M3.E4M3") == 8 and code.count("USETMAXREG") == 2


def test_budgets():
    assert 128 * PRODUCER_REGISTERS + (THREADS - 128) * CONSUMER_REGISTERS <= NUM_REGISTERS
    assert SHARED_BYTES <= MAX_SHARED_BYTES["sm_90a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [quantise_kernel, dequantise_kernel])
@pytest.mark.parametrize("cc", [(8, 9), (9, 0)])
def test_quantisation(make, dtype, cc, tmp_path):
    build(make(dtype), cc, f"sm_{cc[0]}{cc[1]}", tmp_path, every_call_inlined=False)
    ptx = compiled(make(dtype), cc)
    assert "e4m3x2" in ptx and not re.search(r"\b(add|sub|mul|div|fma|cvt)\.\S*f64", ptx)
