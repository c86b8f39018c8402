"""Kernels of few rows, and small ones that start early, compile without a GPU, with room for their blocks."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from pipemoe_kernels.attention.heads import HeadForm, heads_kernel
from pipemoe_kernels.attention.norm import norm_kernel
from pipemoe_kernels.gemm.few import few_rows_kernel
from pipemoe_kernels.gemm.few_experts import few_down_kernel, few_gate_up_kernel
from pipemoe_kernels.routing import Scoring, routing_kernel
from tests.kernels.assembler import MAX_SHARED_BYTES, NUM_REGISTERS, build, compiled

BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
FEW = {
    "one row": lambda: few_rows_kernel(BF16, BF16, 2048, False, False),
    "16 rows": lambda: few_rows_kernel(HALF, FLOAT, 2048, True, False),
    "16 rows added": lambda: few_rows_kernel(BF16, BF16, 4096, True, True),
    "gate_up": lambda: few_gate_up_kernel(2048, 8, "silu"),
    "down": lambda: few_down_kernel(768, 8, BF16),
}
EARLY = {
    "norm": lambda: norm_kernel(BF16, BF16, 2048, 1e-6, True, True, on_hopper=True),
    "heads": lambda: heads_kernel(BF16, HeadForm(128, 128, eps=1e-6), on_hopper=True),
    "routing": lambda: routing_kernel(BF16, Scoring(False, True), max_experts=128, placed=True, on_hopper=True),
}


@pytest.mark.parametrize("name", FEW)
def test_few(name, tmp_path):
    kernel = FEW[name]()
    registers, code = build(kernel, (9, 0), "sm_90a", tmp_path)
    blocks = kernel.blocks_per_sm
    assert blocks * registers * kernel.threads <= NUM_REGISTERS
    assert blocks * kernel.shared_bytes <= MAX_SHARED_BYTES["sm_90a"]
    text = compiled(kernel, (9, 0))
    copies, wait = text.index("cp.async.cg"), text.index("griddepcontrol.wait")
    assert (copies < wait) == (name != "gate_up"), "weights that are known are fetched before the kernel before ends"
    if name == "gate_up":  # `down` relies on the ids when it starts
        assert wait < text.index("griddepcontrol.launch_dependents")
    if code is not None:
        assert "HMMA.16816.F32" in code and "LDGSTS" in code


@pytest.mark.parametrize("name", EARLY)
def test_early(name, tmp_path):
    kernel = EARLY[name]()
    build(kernel, (9, 0), "sm_90a", tmp_path)
    text = compiled(kernel, (9, 0))
    wait = text.index("griddepcontrol.wait")
    assert kernel.starts_early and wait < min(text.index(word) for word in ("ld.global", "st.global") if word in text)
