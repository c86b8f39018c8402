"""Kept machine code: used where it is whole and current, compiled again where it is not, whatever its files are
like.
"""

import fcntl
import hashlib
import importlib.util
import os
import resource
import types

import pytest
from numba.core import config, event

from pipemoe import kept_code, notices

CALLER = """
from pipemoe.compiled import Compiled
from {package}_called import FACTOR, called
def scaled(n):
    return called(n) * FACTOR
scaled = Compiled(scaled)
"""
CALLED = """
from pipemoe.compiled import Compiled
FACTOR = {factor}
called = Compiled(lambda n: n + {more}, inside=True)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in notices._PLACE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(notices, "_told", set())
    return tmp_path / "cache"


def write(folder, *, factor=2, more=3):
    """Two modules, one of which calls the other; both always as long, and as old."""
    folder.mkdir(exist_ok=True)
    for name, text in (
        ("kept_caller", CALLER.format(package="kept")),
        ("kept_called", CALLED.format(factor=factor, more=more)),
    ):
        (folder / f"{name}.py").write_text(text)
        os.utime(folder / f"{name}.py", (1_000_000_000, 1_000_000_000))


def run(folder, monkeypatch):
    """scaled(10), as a new process would get it, and the functions that were compiled for it."""
    kept_code.sources_stamp.cache_clear()
    modules = {}
    for name in ("kept_called", "kept_caller"):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        modules[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(__import__("sys").modules, name, modules[name])
        exec(compile((folder / f"{name}.py").read_text(), folder / f"{name}.py", "exec"), vars(modules[name]))
    with event.install_recorder("numba:compile") as recorder:
        result = modules["kept_caller"].scaled(10)
    return result, len(recorder.buffer)


def only_file(cache):
    (file,) = cache.rglob("*.nbc")
    return file


def test_the_next_process_compiles_nothing(cache, tmp_path, monkeypatch):
    write(tmp_path / "code")
    result, compiled = run(tmp_path / "code", monkeypatch)
    assert result == 26 and compiled
    assert run(tmp_path / "code", monkeypatch) == (26, 0)
    assert [file.suffix for file in cache.rglob("*") if file.is_file()] == [".nbc"]  # nothing written aside is left


@pytest.mark.parametrize("change", [{"more": 4}, {"factor": 3}])
def test_a_change_in_another_file_compiles_again(change, cache, tmp_path, monkeypatch):
    """Also one that leaves the file as long and as old as it was; and what was kept of the old sources goes."""
    write(tmp_path / "code")
    run(tmp_path / "code", monkeypatch)
    only_file(cache).with_suffix(".lock").touch()  # of a process that was killed
    write(tmp_path / "code", **change)
    result, compiled = run(tmp_path / "code", monkeypatch)
    assert result == (10 + change.get("more", 3)) * change.get("factor", 2) and compiled
    assert [file.suffix for file in cache.rglob("*") if file.is_file()] == [".nbc"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: content[:-9] + bytes(9),
        lambda content: hashlib.sha256(b"no pickle").digest() + b"no pickle",
    ],
    ids=["truncated", "empty", "zeros", "changed", "no pickle"],
)
def test_a_bad_file_is_compiled_again_and_replaced(damage, cache, tmp_path, monkeypatch):
    write(tmp_path / "code")
    run(tmp_path / "code", monkeypatch)
    file = only_file(cache)
    file.write_bytes(damage(file.read_bytes()))
    result, compiled = run(tmp_path / "code", monkeypatch)
    assert result == 26 and compiled
    assert run(tmp_path / "code", monkeypatch) == (26, 0)


def test_a_full_disk_is_told_once_and_nothing_is_left_on_it(cache, tmp_path, monkeypatch, caplog):
    write(tmp_path / "code")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        results = [run(tmp_path / "code", monkeypatch) for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(result, compiled > 0) for result, compiled in results] == [(26, True)] * 2
    assert not [file for file in cache.rglob("*") if file.is_file()]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "NUMBA_CACHE_DIR" in message and "File too large" in message


def test_who_finds_another_process_compiling_waits_and_compiles_nothing(cache, tmp_path, monkeypatch):
    write(tmp_path / "code")
    run(tmp_path / "code", monkeypatch)
    file, kept = only_file(cache), only_file(cache).read_bytes()
    file.unlink()
    holder = os.open(file.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)

    def compiled_meanwhile(seconds):
        file.write_bytes(kept)
        os.close(holder)

    monkeypatch.setattr(kept_code, "time", types.SimpleNamespace(monotonic=lambda: 0.0, sleep=compiled_meanwhile))
    assert run(tmp_path / "code", monkeypatch) == (26, 0)
    assert [f.suffix for f in cache.rglob("*") if f.is_file()] == [".nbc"]


def test_nobody_waits_for_ever_for_another_process(cache, tmp_path, monkeypatch):
    write(tmp_path / "code")
    run(tmp_path / "code", monkeypatch)
    file = only_file(cache)
    file.unlink()
    holder = os.open(file.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(
        kept_code, "time", types.SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    )
    result, compiled = run(tmp_path / "code", monkeypatch)
    assert result == 26 and compiled
    assert next(clock) > kept_code._MOST_WAIT
    os.close(holder)
    only_file(cache)


def test_code_in_a_sub_folder_sees_the_whole_part_of_the_package(tmp_path):
    part, deeper = tmp_path / "package" / "part", tmp_path / "package" / "part" / "deeper"
    deeper.mkdir(parents=True)
    for folder in (tmp_path / "package", part, deeper):
        (folder / "__init__.py").touch()
    for file in (deeper / "caller.py", part / "caller.py"):
        assert kept_code.sources_folder(file) == part
    before = kept_code.sources_stamp(part)
    (deeper / "called.py").write_text("FACTOR = 2\n")
    kept_code.sources_stamp.cache_clear()
    assert kept_code.sources_stamp(part) != before
