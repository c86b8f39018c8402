"""PTX to a cubin on a machine without a GPU, for what the assembler and the disassembler say about it."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest


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
    return subprocess.run([nvdisasm, "-c", str(folder / "kernel.cubin")], capture_output=True, text=True, check=True).stdout
