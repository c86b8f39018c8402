"""Every kernel compiles without a GPU, keeps its values in registers, and does no accidental float64 arithmetic."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from tests.kernels.variants import enumerate_kernels

KERNELS = dict(enumerate_kernels())
# The newest architecture for all variants; for sm_80 one of each family.
CASES = [(name, (9, 0)) for name in KERNELS]
CASES += [(name, (8, 0)) for name in KERNELS if "torch" not in name or "bfloat16-torch.float32-True" in name]
CASES += [("grouped_gemm-torch.bfloat16", (8, 0)), ("swiglu_rows-torch.bfloat16-True", (8, 0))]
MAX_REGISTERS = 80


def find_ptxas() -> str | None:
    """That of the pip toolkit, which matches libnvvm's PTX version, else the one on PATH."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = [] if nvidia is None else nvidia.submodule_search_locations
    from_pip = [str(path) for folder in folders for path in Path(folder).glob("*/bin/ptxas")]
    return next(iter(from_pip), shutil.which("ptxas"))


@pytest.mark.parametrize("name, cc", CASES)
def test_compiles_into_registers(name, cc, tmp_path):
    ptx = KERNELS[name].compile_ptx(cc)
    assert f".target sm_{cc[0]}{cc[1]}" in ptx
    assert ".local" not in ptx
    assert ("float64" in name) or not re.search(r"\b(add|sub|mul|div|fma|cvt)\.\S*f64", ptx)
    ptxas = find_ptxas()
    if ptxas is None:
        pytest.skip("no ptxas: registers and spills not checked")
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    command = [ptxas, "-v", f"-arch=sm_{cc[0]}{cc[1]}", str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert int(re.search(r"Used (\d+) registers", report).group(1)) <= MAX_REGISTERS


def test_gather_moves_16_bytes_at_a_time():
    ptx = KERNELS["gather_rows"].compile_ptx((9, 0))
    assert "ld.global.v2.u64" in ptx and "st.global.v2.u64" in ptx
