"""Compiled kernels on disk, so that only the first process compiles them; the large ones take seconds.

One file per kernel: the entry's name, a digest of entry and cubin, and the cubin, with line ends between. The file's
name is a hash of all that the code depends on: this package's sources, the kernel's key (the constants in it), its
signature and launch bounds, the architecture, and the compilers' versions. As in DeepGEMM's cache a file is written
aside under a name that no other process has, flushed to the disk and renamed: homes are shared between hosts, and hosts
lose power. A file that fails its digest is compiled anew.

`turn` lets one process build a kernel while the others that need it wait, or build another one (build_ahead.py).

Folder: $PIPEMOE_CACHE, else pipemoe in $XDG_CACHE_HOME or ~/.cache, made for its user alone. What lies there runs on
the GPU, so a folder or file that others own or may write to is not used; that is said once. Nothing is kept then, nor
where the folder cannot be written.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path

COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "nvidia-cuda-nvcc-cu12", "nvidia-nvvm")
COMPILERS += ("nvidia-nvjitlink-cu12", "nvidia-nvjitlink")
_PACKAGE = Path(__file__).resolve().parents[1]
_log = logging.getLogger("pipemoe")


def load(key: tuple[object, ...]) -> tuple[str, bytes] | None:
    """Entry name and cubin, or None."""
    try:
        folder = _folder()
        if _refused(folder):
            return None
        with open(folder / _name(key), "rb") as file:
            if _is_others(os.fstat(file.fileno())):
                return None
            entry, digest, cubin = file.read().split(b"\n", 2)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a user without a home; ValueError: a file cut short
        return None
    return (entry.decode(), cubin) if digest == _digest(entry, cubin) else None


def store(key: tuple[object, ...], entry: str, cubin: bytes) -> None:
    """Keep a cubin; readers see all of it or nothing."""
    aside = None
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _refused(folder):
            return
        handle, aside = tempfile.mkstemp(prefix=".kernel-", dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(entry.encode() + b"\n" + _digest(entry.encode(), cubin) + b"\n" + cubin)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, folder / _name(key))
    except (OSError, RuntimeError):
        if aside:
            with suppress(OSError):
                os.unlink(aside)


def keeps() -> bool:
    """Would the folder keep what is stored?"""
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return not _refused(folder) and os.access(folder, os.W_OK)
    except (OSError, RuntimeError):
        return False


@contextmanager
def turn(key: tuple[object, ...], *, waits: bool) -> Iterator[bool]:
    """Only one process at a time has the turn to build the kernel of `key`; the system ends it with the process. Gives
    whether this one has it. waits: until it has. Where files cannot be locked, every process has it.
    """
    place, mine, locked = int(_name(key)[:12], 16), True, False
    try:
        fcntl.lockf(_turns(_folder()), fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB), 1, place)
        locked = True
    except BlockingIOError:
        mine = False
    except (OSError, RuntimeError):
        pass
    try:
        yield mine
    finally:
        if locked:
            fcntl.lockf(_turns(_folder()), fcntl.LOCK_UN, 1, place)


@cache
def _turns(folder: Path) -> int:
    """The file with a byte for each kernel, which is locked. Never closed: that would end all turns of this process."""
    return os.open(folder / "building", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _digest(entry: bytes, cubin: bytes) -> bytes:
    return hashlib.sha256(entry + b"\n" + cubin).hexdigest().encode()


def _refused(folder: Path) -> bool:
    """May others have put something into the folder? Says so once. Raises FileNotFoundError if it is not there."""
    if not _is_others(folder.stat()):
        return False
    _say_refused(folder)
    return True


@cache
def _say_refused(folder: Path) -> None:
    _log.warning(
        "kernels are compiled anew by every process: %s is not this user's alone (owned by it, and written to by "
        "nobody else). "
        "chmod 700 it, or name another folder in PIPEMOE_CACHE",
        folder,
    )


def _is_others(status: os.stat_result) -> bool:
    return status.st_uid != os.geteuid() or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _name(key: tuple[object, ...]) -> str:
    return hashlib.sha256(f"{_environment()} {key!r}".encode()).hexdigest()[:32] + ".cubin"


def _folder() -> Path:
    named = os.environ.get("PIPEMOE_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipemoe"


@cache
def _environment() -> str:
    """The sources and compilers of this process."""
    digest = hashlib.sha256()
    for source in sorted(_PACKAGE.rglob("*.py")):
        digest.update(source.read_bytes())
    versions = []
    for name in COMPILERS:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{digest.hexdigest()} {' '.join(versions)}"
