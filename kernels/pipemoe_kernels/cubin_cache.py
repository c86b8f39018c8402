"""Compiled kernels on disk, so that only the first process compiles them; the large ones take seconds.

One file per kernel: the entry's name, a line end, the cubin. Its name is a hash of all that the code depends on: this package's
sources, the kernel's key (the constants in it), its signature and launch bounds, the architecture, and the compilers' versions.
Folder: $PIPEMOE_CACHE, else pipemoe in $XDG_CACHE_HOME or ~/.cache. Where it cannot be written, nothing is kept.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "nvidia-cuda-nvcc-cu12", "nvidia-nvvm")
COMPILERS += ("nvidia-nvjitlink-cu12", "nvidia-nvjitlink")


def load(key: tuple[object, ...]) -> tuple[str, bytes] | None:
    """Entry name and cubin, or None."""
    try:
        entry, _, cubin = _path(key).read_bytes().partition(b"\n")
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return (entry.decode(), cubin) if cubin.startswith(b"\x7fELF") else None


def store(key: tuple[object, ...], entry: str, cubin: bytes) -> None:
    """Keep a cubin; readers see all of it or nothing."""
    try:
        path = _path(key)
    except RuntimeError:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(entry.encode() + b"\n" + cubin)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _path(key: tuple[object, ...]) -> Path:
    name = hashlib.sha256(f"{_environment()} {key!r}".encode()).hexdigest()[:32]
    return _folder() / f"{name}.cubin"


def _folder() -> Path:
    named = os.environ.get("PIPEMOE_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipemoe"


@cache
def _environment() -> str:
    """The sources and compilers of this process."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    versions = []
    for name in COMPILERS:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{digest.hexdigest()} {' '.join(versions)}"
