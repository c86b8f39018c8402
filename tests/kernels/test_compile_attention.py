"""The attention kernel compiles without a GPU: products that overlap, exponentials beside them, no local memory."""

import importlib.util
import itertools
import re

import pytest

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

from pipemoe_kernels.attention.forward import attention_kernel
from pipemoe_kernels.attention.layout import CONSUMER_REGISTERS, PRODUCER_REGISTERS, THREADS
from pipemoe_kernels.attention.packed import HEAD_SIZES
from pipemoe_kernels.ptx.attention import KEYS
from tests.kernels.assembler import MAX_SHARED_BYTES, NUM_REGISTERS, build, compiled, disassemble

# Compiling one takes over ten seconds. Of keys of 192 the quick test is that of the linked kernel.
FORMS = [
    (128, 128, 8, False, False),
    (128, 128, 1, True, True),
    pytest.param(192, 128, 1, False, False, marks=pytest.mark.slow),
    pytest.param(64, 64, 8, False, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("head_dim, value_dim, group, half, windowed", FORMS)
def test_attention(head_dim, value_dim, group, half, windowed, tmp_path):
    """The assembler warns, which `build` does not allow, if it lets each product wait for the one before."""
    kernel = attention_kernel(head_dim, value_dim, group, half=half, windowed=windowed)
    registers, code = build(kernel, (9, 0), "sm_90a", tmp_path)
    assert registers * THREADS <= NUM_REGISTERS
    if code is not None:
        assert f"HGMMA.64x{KEYS}x16.F32" in code and "tnspB" in code and "UTMALDG" in code
        assert code.count("USETMAXREG") == 2 and "STG.E.128" in code


def test_exponentials_come_before_the_wait():
    """In the text that the assembler gets: a step's exponentials stand between its two waits, beside the products."""
    text = compiled(attention_kernel(128, 128, 8), (9, 0))
    found = re.findall(r"wgmma\.wait_group\.sync\.aligned \d|ex2\.approx", text)
    runs = [(name, len(list(run))) for name, run in itertools.groupby(found)]
    steps = [i for i, (name, _) in enumerate(runs) if name.endswith("aligned 1")]
    assert len(steps) == 2 and all(runs[i + 1][0] == "ex2.approx" and runs[i + 1][1] >= KEYS // 2 for i in steps), runs
    assert all(runs[i + 2][0].endswith("aligned 0") for i in steps), runs


def test_attention_as_it_is_linked(tmp_path):
    """By the linker that launches use: it must keep the warpgroups' shares of the registers."""
    entry, cubin = attention_kernel(192, 128, 1).build((9, 0), "sm_90a")
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    code = disassemble(tmp_path)
    if code is not None:
        assert f".text.{entry}" in code and code.count("USETMAXREG") == 2
        assert not re.search(r"\b(LDL|STL|CALL)\b", code)


def test_budgets():
    assert 128 * PRODUCER_REGISTERS + (THREADS - 128) * CONSUMER_REGISTERS <= NUM_REGISTERS
    for head_dim, value_dim in HEAD_SIZES:
        assert attention_kernel(head_dim, value_dim, 1).shared_bytes <= MAX_SHARED_BYTES["sm_90a"]
