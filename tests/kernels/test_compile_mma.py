"""The kernels of sm_80 and newer compile without a GPU: tensor cores, asynchronous copies, nothing in local memory."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from pipemoe_kernels.combine_lanes import combine_lanes_kernel
from pipemoe_kernels.gating import Gating
from pipemoe_kernels.gemm.mma import SHARED_BYTES, THREADS, grouped_mma_kernel
from pipemoe_kernels.index.hopper import index_kernels
from tests.kernels.assembler import MAX_SHARED_BYTES, NUM_REGISTERS, build

AMPERE = (8, 0), "sm_80"
CLAMPED = Gating("silu", 7.0, 1.702, 1.0)  # of GPT-OSS
FORMS = [
    (True, False, "silu"),
    (True, True, "gelu"),
    (True, True, CLAMPED),
    (True, False, "gelu_tanh"),
    (False, True, "relu2"),
    (False, False, None),
]
# Compiling takes seconds, assembling does not: the PTX of sm_80 stands in for that of sm_90 in all forms but one. The
# quick ones are what most models launch, the one with most registers and the one with least of everything.
CASES = [(*FORMS[0], (9, 0), "sm_90")]
for form in FORMS:
    slow = () if form in (FORMS[1], FORMS[5]) else pytest.mark.slow
    CASES += [pytest.param(*form, *AMPERE, marks=slow)]
    CASES += [pytest.param(*form, (8, 0), "sm_90", marks=slow)] if form is not FORMS[0] else []


@pytest.mark.parametrize("name", ["alone", "count", "place"])
def test_index(name, tmp_path):
    _, code = build(getattr(index_kernels(8, False), name), *AMPERE, tmp_path, every_call_inlined=False)
    if code is not None:
        assert "ATOMS" in code and ("VOTE" in code) == (name != "count")


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_combine(out_dtype, has_bias, tmp_path):
    _, code = build(
        combine_lanes_kernel(out_dtype, has_bias, 8, 2048, False), *AMPERE, tmp_path, every_call_inlined=False
    )
    if code is not None:
        assert "LDG.E.128" in code and "STG.E.128" in code


@pytest.mark.parametrize("gated, has_bias, activation, cc, arch", CASES)
def test_grouped_gemm(gated, has_bias, activation, cc, arch, tmp_path):
    kernel = grouped_mma_kernel(gated=gated, has_bias=has_bias, activation=activation)
    registers, code = build(kernel, cc, arch, tmp_path, every_call_inlined=False)
    assert registers * THREADS <= NUM_REGISTERS
    if code is not None:
        # Two steps of 16 columns, 4, 2 or 1 blocks of 16 x 64: 8 products each.
        assert code.count("HMMA.16816.F32.BF16") == 2 * 8 * (4 + 2 + 1)
        assert "LDSM.16.M88.4" in code and "LDGSTS" in code and "STG.E.128" in code


def test_shared_memory_fits_every_device():
    assert SHARED_BYTES <= MAX_SHARED_BYTES["sm_80"]
