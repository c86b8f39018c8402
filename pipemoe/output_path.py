"""Results in files: where they are to be written is looked at before the work that makes them, and they are written
whole or not at all.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipemoe.errors import InputError


def check_output_file(option: str, path: Path, *, may_make_folder: bool = False) -> None:
    """Raises InputError, naming `option`, if no file can be written at `path`. Its folder must exist, so that a slip in
    it makes none elsewhere, unless it may_make_folder."""
    folder = path.parent
    with _in_words(option, path):
        if path.is_dir():
            raise InputError(f"{option} {path} is a directory; give the path of a file")
        # files are moved to their final place, which would take the place of a device
        if path.exists() and not path.is_file():
            raise InputError(f"{option} {path} is no file; give the path of one")
        if not may_make_folder and not folder.exists():
            raise InputError(f"{option} {path}: {folder} does not exist; make it first")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{option} {path} may not be written to by this user")
    check_output_folder(option, folder)


def check_output_folder(option: str, path: Path) -> None:
    """Raises InputError, naming `option`, if the folder `path`, which need not exist yet, cannot be made or written
    to.
    """
    there = path
    with _in_words(option, path):
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise InputError(f"{option} {path}: {there} is no directory")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"{option} {path}: {there} may not be written to by this user")


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Readers see the old file or the whole new one, also after a loss of power; its folder is made if need be.

    Raises InputError if it cannot be written: then the old file is as it was, and nothing is left beside it.
    """
    try:
        target = Path(os.path.realpath(path))  # a link stays one
    except ValueError as error:  # such as a NUL in it
        raise InputError(f"{path!r} is no path: {error}") from None
    aside = target.with_name(f".pipemoe-{secrets.token_hex(8)}")
    data = content.encode() if isinstance(content, str) else content
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}; it was not written, and what was there before is as it was"
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink()


@contextmanager
def _in_words(option: str, path: Path) -> Iterator[None]:
    """What looking at a path raises (too long a name, a folder that may not be searched) as InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}") from None
