"""Kernels to machine code on a machine without a GPU, for what the assembler and the disassembler say about it."""

import importlib.util
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pipemoe_kernels.launch import cubin_cache
from pipemoe_kernels.launch.kernel import Kernel

NUM_REGISTERS = 65536  # of a multiprocessor, on all devices
# of a block; sm_80: the least of all devices from there on
MAX_SHARED_BYTES = {"sm_80": 99 * 1024, "sm_90a": 227 * 1024}


@cache
def compiled(kernel: Kernel, cc: tuple[int, int]) -> str:
    """PTX. The large kernels take seconds, so it is kept on disk as launches keep cubins: under a name that holds all
    sources, the compilers' versions and the kernel's constants.
    """
    return _kept("ptx", kernel, cc, lambda: ("ptx", kernel.compile_ptx(cc).encode()))[1].decode()


@cache
def linked(kernel: Kernel) -> tuple[str, bytes]:
    """Entry name and cubin for sm_90a, by the linker that launches use. Warnings are errors. Kept on disk as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return _kept("linked", kernel, (9, 0), lambda: kernel.build((9, 0), "sm_90a"))


def _kept(what: str, kernel: Kernel, cc: tuple[int, int], make: Callable[[], tuple[str, bytes]]) -> tuple[str, bytes]:
    if kernel.key is None:  # it does not say what its code depends on
        return make()
    key = ("tests", what, kernel.name, *kernel.key, kernel.parameters, kernel.threads, kernel.blocks_per_sm, cc)
    found = cubin_cache.load(key)
    if found is None:
        found = make()
        cubin_cache.store(key, *found)
    return found


def build(
    kernel: Kernel, cc: tuple[int, int], arch: str, folder: Path, *, every_call_inlined: bool = True
) -> tuple[int, str | None]:
    """Compile for `cc` and assemble for `arch`, which may be newer: registers of a thread, and the machine code (None
    without a disassembler), after the checks that hold for every kernel."""
    ptx, own_arch = compiled(kernel, cc), f"sm_{cc[0]}{cc[1]}"
    assert re.search(rf"\.target {arch if arch.startswith(own_arch) else own_arch}\b", ptx) and ".local" not in ptx
    report = assemble(ptx, arch, folder)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert "warning" not in report.lower(), report  # such as: setmaxnreg ignored, wgmma serialized
    code = disassemble(folder)
    if code is not None:
        assert not re.search(r"\b(LDL|STL|CALL)\b" if every_call_inlined else r"\b(LDL|STL)\b", code)
    return int(re.search(r"Used (\d+) registers", report).group(1)), code


def _find(tool: str) -> str | None:
    """That of the pip toolkit, which matches libnvvm's PTX version, else the one on PATH."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = [] if nvidia is None else nvidia.submodule_search_locations
    from_pip = [str(path) for folder in folders for path in Path(folder).glob(f"*/bin/{tool}")]
    return next(iter(from_pip), shutil.which(tool))


def assemble(ptx: str, arch: str, folder: Path) -> str:
    """ptxas's report on `ptx`; the cubin stays in `folder`. Skips the test where there is no ptxas."""
    ptxas = _find("ptxas")
    if ptxas is None:
        pytest.skip("no ptxas: registers and spills not checked")
    (folder / "kernel.ptx").write_text(ptx)
    command = [ptxas, "-v", f"-arch={arch}", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def disassemble(folder: Path) -> str | None:
    """The machine code of the cubin in `folder`, or None where there is no nvdisasm."""
    nvdisasm = _find("nvdisasm")
    if nvdisasm is None:
        return None
    return subprocess.run(
        [nvdisasm, "-c", str(folder / "kernel.cubin")], capture_output=True, text=True, check=True
    ).stdout
