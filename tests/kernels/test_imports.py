"""What importing loads: nothing heavy until it is needed, and numba.cuda also beside a NumPy without row_stack."""

import importlib.util
import subprocess
import sys

import pytest


def run_python(code: str) -> None:
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["pipemoe.experts", "pipemoe_kernels"])
def test_importing_a_package_loads_nothing_heavy(package):
    run_python(f"import {package}\nassert not {{'torch', 'cupy', 'mpi4py', 'numba.cuda.cudadrv'}} & set(sys.modules)")


def test_host_experts_do_not_need_numba_cuda():
    run_python("import pipemoe.experts.host\nassert 'numba.cuda.cudadrv' not in sys.modules")


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
def test_numba_cuda_beside_a_numpy_without_row_stack():
    run_python(
        "import numpy\n"
        "if hasattr(numpy, 'row_stack'): del numpy.row_stack\n"
        "from pipemoe_kernels.numba_cuda import cuda\n"
        "assert cuda.jit"
    )
