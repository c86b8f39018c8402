"""Every kernel compiles without a GPU, keeps its values in registers, and does no accidental float64 arithmetic."""

import importlib.util
import re

import pytest

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from tests.kernels.assembler import assemble
from tests.kernels.variants import enumerate_kernels

KERNELS = dict(enumerate_kernels())
# The newest architecture for all variants; for sm_80 one of each family.
CASES = [(name, (9, 0)) for name in KERNELS]
CASES += [(name, (8, 0)) for name in KERNELS if "torch" not in name or "bfloat16-torch.float32-True" in name]
CASES += [("grouped_gemm-torch.bfloat16", (8, 0)), ("activate_rows-torch.bfloat16-True", (8, 0))]
MAX_REGISTERS = 80


@pytest.mark.parametrize("name, cc", CASES)
def test_compiles_into_registers(name, cc, tmp_path):
    ptx = KERNELS[name].compile_ptx(cc)
    assert f".target sm_{cc[0]}{cc[1]}" in ptx
    assert ".local" not in ptx
    assert ("float64" in name) or not re.search(r"\b(add|sub|mul|div|fma|cvt)\.\S*f64", ptx)
    report = assemble(ptx, f"sm_{cc[0]}{cc[1]}", tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert int(re.search(r"Used (\d+) registers", report).group(1)) <= MAX_REGISTERS


def test_gather_moves_16_bytes_at_a_time():
    ptx = KERNELS["gather_rows"].compile_ptx((9, 0))
    assert "ld.global.v2.u64" in ptx and "st.global.v2.u64" in ptx
