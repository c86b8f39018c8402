"""Machine code on disk: numba's cache made safe. A bad file or a full disk cannot stop a start, and old code is never
used.

numba takes kept code to be current as long as the function's own file has not changed. But the code also holds what the
function calls in other files, and their constants. So a file here is named after all sources of the function's
part of the package (the stamp), the function and the types of its arguments; it begins with a digest of the rest.
Whatever cannot be read is compiled again.

Ranks of one host need the same code at the same time: the first one compiles, the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pickle
import time
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

from pipemoe.notices import tell

_DIGEST_BYTES = 32
_MOST_WAIT, _LOOK = 60.0, 0.02  # seconds: for a process that compiles the same, and between looks


class KeptCode(FunctionCache):
    """Where a dispatcher keeps its code. Raises RuntimeError where numba finds no folder that may be written."""

    is_kept = True  # until something could not be

    def __init__(self, function: Callable, options: dict[str, Any]) -> None:
        super().__init__(function)
        sources = sources_stamp(sources_folder(Path(function.__code__.co_filename)))
        stamp = hashlib.sha256(repr((numba.__version__, sources, sorted(options.items()))).encode())
        self._cache_file = _Files(Path(self.cache_path), self._impl.filename_base, stamp.hexdigest()[:16])
        self._turn = _Turn()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """None: to be compiled, and then saved, by this process."""
        found = self._load(sig, target_context)
        if found is None and (lock := self._lock_path(sig, target_context)) is not None:
            self._turn.wait_for(lock)
            found = self._load(sig, target_context)
            if found is not None:
                self._turn.end()
        return found

    def _load(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        # pickle and LLVM may raise anything for a bad file; the function is compiled again and the file replaced
        except Exception:
            return None

    def _lock_path(self, sig: Any, target_context: Any) -> Path | None:
        """Of a file that is there while a process compiles; None if what it compiles cannot be kept."""
        try:
            key = self._index_key(sig, target_context.codegen())
        except Exception:  # pickle's, of what the function refers to
            return None
        return self._cache_file.path(key).with_suffix(".lock")

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            self.is_kept = False
            tell_nothing_is_kept(f"{type(error).__name__}: {error}")
        finally:
            self._turn.end()


class _Turn:
    """To compile a function, one process of this machine after another. Should the lock be lost, or nobody let go of
    it, two processes compile the same.
    """

    def __init__(self) -> None:
        self._path, self._file = Path(), -1

    def wait_for(self, path: Path) -> None:
        self.end()
        try:
            file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # nothing can be kept there either
            return
        self._path, self._file = path, file
        deadline = time.monotonic() + _MOST_WAIT
        while not _is_locked(file) and time.monotonic() < deadline:
            time.sleep(_LOOK)

    def end(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._file)
            self._file = -1


def _is_locked(file: int) -> bool:
    """By this process, from now on; also where files know no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def folder_for(function: Callable) -> Path | None:
    """Where machine code of functions beside `function` is kept; None: no folder can be written."""
    try:
        return Path(FunctionCache(function).cache_path)
    except (RuntimeError, OSError):
        return None


def tell_nothing_is_kept(why: str) -> None:
    advice = "set NUMBA_CACHE_DIR to a folder that can be written, and has room"
    tell(
        f"compiled code cannot be kept on disk, so every start compiles again ({why}); {advice}", once="nothing is kept"
    )


def sources_folder(file: Path) -> Path:
    """Where the code that a function in `file` may call stands: pipemoe/plan for a file in pipemoe/plan/clock."""
    folder = file.parent
    while (folder.parent / "__init__.py").is_file() and (folder.parents[1] / "__init__.py").is_file():
        folder = folder.parent
    return folder


@cache
def sources_stamp(folder: Path) -> str:
    """A digest of the sources in `folder` and below, by their content: times of files say little where packages are
    copied."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


class _Files:
    """A file for each combination of types; takes the place of numba's index and numbered files."""

    def __init__(self, folder: Path, name: str, stamp: str) -> None:
        self._folder, self._name, self._stamp = folder, name, stamp

    def load(self, key: Any) -> Any:
        """None if there is no such file, or it is not whole."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return pickle.loads(data) if digest == hashlib.sha256(data).digest() else None

    def save(self, key: Any, data: Any) -> None:
        """Whole or not at all; those of other sources go. Raises OSError."""
        content, path = dumps(data), self.path(key)
        aside = path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            with open(aside, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        for old in self._folder.glob(f"{self._name}.*.*"):  # also locks of processes that were killed
            if old.suffix in (".nbc", ".lock") and not old.name.startswith(f"{self._name}.{self._stamp}."):
                old.unlink(missing_ok=True)

    def flush(self) -> None:
        for file in self._folder.glob(f"{self._name}.*.nbc"):
            file.unlink(missing_ok=True)

    def path(self, key: Any) -> Path:
        return self._folder / f"{self._name}.{self._stamp}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"
