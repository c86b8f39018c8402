"""The kernels of sm_80 and newer compile without a GPU: tensor cores, asynchronous copies, nothing in local memory."""

import importlib.util
import re

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from pipemoe_kernels.combine_lanes import combine_lanes_kernel
from pipemoe_kernels.grouped_mma import SHARED_BYTES, THREADS, grouped_mma_kernel
from pipemoe_kernels.index_hopper import index_kernels
from tests.kernels.assembler import assemble, disassemble

NUM_REGISTERS = 65536
LEAST_SHARED_BYTES = 99 * 1024  # of a block, on all devices from sm_80 on
FORMS = [(True, False, "silu"), (True, True, "gelu"), (False, True, "relu"), (False, False, None)]


def build(kernel, cc, folder):
    """ptxas's report and the machine code (None without a disassembler)."""
    arch = f"sm_{cc[0]}{cc[1]}"
    ptx = kernel.compile_ptx(cc)
    assert f".target {arch}" in ptx and ".local" not in ptx
    report = assemble(ptx, arch, folder)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    code = disassemble(folder)
    if code is not None:
        assert not re.search(r"\b(LDL|STL)\b", code)
    return report, code


@pytest.mark.parametrize("name", ["alone", "count", "place"])
def test_index(name, tmp_path):
    _, code = build(getattr(index_kernels(8, False), name), (8, 0), tmp_path)
    if code is not None:
        assert "ATOMS" in code and ("VOTE" in code) == (name != "count")


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_combine(out_dtype, has_bias, tmp_path):
    _, code = build(combine_lanes_kernel(out_dtype, has_bias, 8, 2048, 7168, False), (8, 0), tmp_path)
    if code is not None:
        assert "LDG.E.128" in code and "STG.E.128" in code


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
@pytest.mark.parametrize("gated, has_bias, activation", FORMS)
def test_grouped_gemm(gated, has_bias, activation, cc, tmp_path):
    kernel = grouped_mma_kernel(gated=gated, has_bias=has_bias, activation=activation)
    report, code = build(kernel, cc, tmp_path)
    assert int(re.search(r"Used (\d+) registers", report).group(1)) * THREADS <= NUM_REGISTERS
    if code is not None:
        # Two steps of 16 columns, 4, 2 or 1 blocks of 16 x 64: 8 products each.
        assert code.count("HMMA.16816.F32.BF16") == 2 * 8 * (4 + 2 + 1)
        assert "LDSM.16.M88.4" in code and "LDGSTS" in code and "STG.E.128" in code


def test_shared_memory_fits_every_device():
    assert SHARED_BYTES <= LEAST_SHARED_BYTES
