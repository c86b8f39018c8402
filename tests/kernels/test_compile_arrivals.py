"""The arrival-driven GEMMs compile without a GPU: tensor cores and bulk copies as meant, registers in budget, nothing in local memory."""

import importlib.util
import re

import pytest

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from pipemoe_kernels.grouped_arrivals import CONSUMER_REGISTERS, PRODUCER_REGISTERS, SHARED_BYTES, arrivals_kernel
from pipemoe_kernels.grouped_wgmma import THREADS
from tests.kernels.assembler import disassemble
from tests.kernels.test_compile_hopper import MAX_SHARED_BYTES, NUM_REGISTERS, build


def check(code):
    assert not re.search(r"\b(LDL|STL|CALL)\b", code)
    for width in (256, 128, 64):
        assert f"HGMMA.64x{width}x16.F32.BF16" in code
    assert "UTMALDG" in code and "LDGSTS" in code and "STG.E.128" in code


@pytest.mark.parametrize("activation", ["silu", None])
def test_grouped_gemm(activation, tmp_path):
    kernel = arrivals_kernel(gated=activation is not None, activation=activation).kernel
    report, code = build(kernel, tmp_path)
    assert int(re.search(r"Used (\d+) registers", report).group(1)) * THREADS <= NUM_REGISTERS
    if code is not None:
        check(code)
        assert code.count("USETMAXREG") == 2
        assert ("ATOMG" in code) == ("NANOSLEEP" in code) == (activation is not None)


def test_grouped_gemm_as_it_is_linked(tmp_path):
    """By the linker that launches use, which gives all warpgroups the same registers."""
    _, cubin = arrivals_kernel(gated=True, activation="silu").kernel.build((9, 0), "sm_90a")
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    code = disassemble(tmp_path)
    if code is None:
        pytest.skip("no nvdisasm")
    check(code)


def test_budgets():
    assert 128 * PRODUCER_REGISTERS + (THREADS - 128) * CONSUMER_REGISTERS <= NUM_REGISTERS
    assert SHARED_BYTES <= MAX_SHARED_BYTES
