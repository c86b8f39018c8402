"""Hopper's kernels compile without a GPU: tensor cores, bulk copies and register budgets as meant, nothing in local
memory.
"""

import importlib.util
import re

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from pipemoe_kernels.combine_lanes import combine_lanes_kernel
from pipemoe_kernels.gating import Gating
from pipemoe_kernels.gemm.tile_shape import ROWS_128, ROWS_192, ROWS_256, SHAPES
from pipemoe_kernels.gemm.wgmma import grouped_kernel
from pipemoe_kernels.index.hopper import index_kernels
from tests.kernels.assembler import MAX_SHARED_BYTES, NUM_REGISTERS, build, disassemble, linked

HOPPER = (9, 0), "sm_90a"
# Each side of every choice; gelu with a bias and a gate takes the most registers.
CLAMPED = Gating("silu", 7.0, 1.702, 1.0)  # of GPT-OSS
FORMS = [
    (True, False, "silu"),
    (True, True, "gelu"),
    (True, True, CLAMPED),
    (True, False, "gelu_tanh"),
    (False, True, "relu2"),
    (False, False, None),
]


# Compiling one takes up to eight seconds: quick are what most models launch, the form with most registers in pairs of
# blocks, and the one without activation. The form with most registers and the latter meet both shapes.
QUICK = [(*FORMS[0], ROWS_128), (*FORMS[1], ROWS_256), (*FORMS[5], ROWS_128)]
SLOW = [(*FORMS[1], ROWS_128), (*FORMS[5], ROWS_256), (*FORMS[3], ROWS_128)]
SLOW += [(*form, ROWS_256) for form in (FORMS[2], FORMS[4])]


@pytest.mark.parametrize(
    "gated, has_bias, activation, shape",
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=[f"{case[2]}-{case[3].rows} rows" for case in QUICK + SLOW],
)
def test_grouped_gemm(gated, has_bias, activation, shape, tmp_path):
    grouped = grouped_kernel(gated=gated, has_bias=has_bias, activation=activation, shape=shape)
    registers, code = build(grouped.kernel, *HOPPER, tmp_path)
    assert registers * grouped.kernel.threads <= NUM_REGISTERS
    if code is not None:
        for c in range(grouped.max_cuts + 1):
            assert f"HGMMA.64x{256 >> c}x16.F32.BF16" in code
        assert "UTMALDG" in code and code.count("USETMAXREG") == 2
        assert ("LDGSTS" in code) == (activation is not None)
        assert (".MULTICAST" in code) == ("UCGABAR_WAIT" in code) == (shape is ROWS_256)
        # For the barriers' beginning and for a pair's end, none in a loop, such as of releases to the other block.
        assert code.count("MEMBAR.ALL.GPU") <= (2 if shape is ROWS_256 else 1)
        assert "STG.E.128" in code


def test_budgets():
    assert all(shape.shared_bytes <= MAX_SHARED_BYTES["sm_90a"] for shape in SHAPES.values())


def test_tiles_of_three_consumers_as_they_are_linked(tmp_path):
    """They multiply with nothing in local memory, and no warning of the linker; the producer alone, with its few
    registers, has spills.
    """
    grouped = grouped_kernel(gated=True, shape=ROWS_192)
    entry, cubin = linked(grouped.kernel)
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    code = disassemble(tmp_path)
    if code is not None:
        assert f".text.{entry}" in code and code.count("USETMAXREG") == 2
        products = code[code.index("HGMMA") : code.rindex("HGMMA")]
        assert "HGMMA.64x128x16.F32.BF16" in products and not re.search(r"\b(LDL|STL|CALL)\b", products)
        assert len(re.findall(r"\b(LDL|STL)\b", code)) <= 24


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_combine_lanes(out_dtype, has_bias, tmp_path):
    _, code = build(combine_lanes_kernel(out_dtype, has_bias, 8, 7168), *HOPPER, tmp_path)
    if code is not None:
        assert "LDG.E.128" in code and "STG.E.128" in code
        assert has_bias or code.count("LDG.E.128") == 4 * 8


@pytest.mark.parametrize("name", ["alone", "count", "place"])
@pytest.mark.parametrize("top_k", [1, 6, 8])
def test_index(top_k, name, tmp_path):
    _, code = build(getattr(index_kernels(top_k), name), *HOPPER, tmp_path)
    if code is not None:
        assert "ATOMS" in code and ("VOTE" in code) == (name != "count")
