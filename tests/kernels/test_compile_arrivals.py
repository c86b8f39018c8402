"""The arrival-driven GEMMs compile without a GPU: tensor cores and bulk copies as meant, registers in budget, nothing
in local memory.
"""

import importlib.util
import re

import pytest

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from pipemoe_kernels.gemm.arrivals.gemm import CONSUMER_REGISTERS, PRODUCER_REGISTERS, SHARED_BYTES, arrivals_kernel
from pipemoe_kernels.gemm.tile_shape import ROWS_128
from tests.kernels.assembler import assemble, compiled, disassemble, linked

MAX_SHARED_BYTES = 227 * 1024
NUM_REGISTERS = 65536


def check(code):
    assert not re.search(r"\b(LDL|STL|CALL)\b", code)
    for width in (256, 128, 64):
        assert f"HGMMA.64x{width}x16.F32.BF16" in code
    for instruction in ("UTMALDG", "LDGSTS", "STG.E.128", "ATOMG", "NANOSLEEP"):
        assert instruction in code


def test_grouped_gemm(tmp_path):
    """By the assembler, and by the linker that launches use, which gives all warpgroups the same registers."""
    kernel = arrivals_kernel(gated=True, activation="silu").kernel
    ptx = compiled(kernel, (9, 0))
    assert ".target sm_90a" in ptx and ".local" not in ptx
    report = assemble(ptx, "sm_90a", tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert "warning" not in report.lower(), report
    code = disassemble(tmp_path)
    assert int(re.search(r"Used (\d+) registers", report).group(1)) * ROWS_128.threads <= NUM_REGISTERS
    if code is not None:
        check(code)
        assert code.count("USETMAXREG") == 2
        (tmp_path / "kernel.cubin").write_bytes(linked(kernel)[1])
        check(disassemble(tmp_path))


def test_budgets():
    assert 128 * PRODUCER_REGISTERS + (ROWS_128.threads - 128) * CONSUMER_REGISTERS <= NUM_REGISTERS
    assert SHARED_BYTES <= MAX_SHARED_BYTES
