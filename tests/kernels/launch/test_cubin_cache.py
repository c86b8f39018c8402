"""Compiled kernels on disk: found again by an equal key alone, and no trouble where nothing can be written."""

import errno
import importlib.util
import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

import torch

import pipemoe_kernels
from pipemoe_kernels.index.hopper import index_kernels
from pipemoe_kernels.launch import cubin_cache, driver

CUBIN = b"\x7fELF\n\x00rest"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPEMOE_CACHE", str(tmp_path / "cache"))
    cubin_cache._say_refused.cache_clear()
    return tmp_path / "cache"


def test_an_equal_key_finds_it():
    assert cubin_cache.load(("a", 1)) is None
    cubin_cache.store(("a", 1), "entry", CUBIN)
    assert cubin_cache.load(("a", 1)) == ("entry", CUBIN)
    assert cubin_cache.load(("a", 2)) is None


@pytest.fixture
def package(tmp_path):
    """A copy of the kernels' sources; `cache_of` is its cache as another process would have it."""
    copy = tmp_path / "pipemoe_kernels"
    shutil.copytree(Path(pipemoe_kernels.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def cache_of(package):
    place = Path(cubin_cache.__file__).relative_to(Path(pipemoe_kernels.__file__).parent)
    spec = importlib.util.spec_from_file_location("cubin_cache_of_a_copy", package / place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("change", ["changed", "added", "in a sub-folder"])
def test_other_sources_do_not_find_it(package, change):
    (package / "deeper").mkdir()
    (package / "deeper" / "gemm.py").write_text("ROWS = 1\n")
    cache_of(package).store(("a", 1), "entry", CUBIN)
    assert cache_of(package).load(("a", 1)) == ("entry", CUBIN)
    if change == "changed":
        source = next(iter(sorted(package.rglob("*combine.py"))))
        source.write_text(source.read_text() + "# changed\n")
    elif change == "added":
        (package / "one_more.py").write_text("ROWS = 2\n")
    else:
        (package / "deeper" / "gemm.py").write_text("ROWS = 2\n")
    assert cache_of(package).load(("a", 1)) is None


@pytest.mark.parametrize("compiler", ["numba-cuda", "llvmlite", "nvidia-nvjitlink"])
def test_other_compilers_do_not_find_it(package, monkeypatch, compiler):
    cache_of(package).store(("a", 1), "entry", CUBIN)
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.0" if name == compiler else version(name))
    assert cache_of(package).load(("a", 1)) is None


@pytest.mark.parametrize("cut", [0, 3, 6, 40, 71, 72, 75, -1])
def test_a_truncated_file_is_no_kernel_and_is_made_anew(folder, cut):
    cubin_cache.store(("a",), "entry", CUBIN)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:cut])
    assert cubin_cache.load(("a",)) is None
    cubin_cache.store(("a",), "entry", CUBIN)
    assert cubin_cache.load(("a",)) == ("entry", CUBIN)


@pytest.mark.parametrize("place", [0, 10, 70, -1])
def test_a_changed_byte_is_found(folder, place):
    cubin_cache.store(("a",), "entry", CUBIN)
    (file,) = folder.iterdir()
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)
    assert cubin_cache.load(("a",)) is None


def test_names_aside_are_no_other_processes(folder, monkeypatch):
    """Hosts that share a home may have processes of one number: each writes under a name of its own, and the disk has
    it first.
    """
    aside, steps = set(), []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(cubin_cache.os, "fsync", lambda handle: (steps.append("fsync"), fsync(handle)))
    monkeypatch.setattr(
        cubin_cache.os,
        "replace",
        lambda old, new: (aside.add(os.path.basename(old)), steps.append("replace"), replace(old, new)),
    )
    for _ in range(3):
        cubin_cache.store(("a",), "entry", CUBIN)
    assert len(aside) == 3 and steps == ["fsync", "replace"] * 3 and len(list(folder.iterdir())) == 1


def test_a_full_disk_leaves_nothing(folder, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cubin_cache.os, "fsync", full)
    cubin_cache.store(("a",), "entry", CUBIN)
    assert list(folder.iterdir()) == [] and cubin_cache.load(("a",)) is None


def test_the_folder_is_its_users_alone(folder):
    cubin_cache.store(("a",), "entry", CUBIN)
    (file,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_a_folder_that_others_may_write_to_is_not_used(folder, caplog, mode):
    cubin_cache.store(("a",), "entry", CUBIN)
    folder.chmod(mode)
    for _ in range(3):
        assert cubin_cache.load(("a",)) is None
        cubin_cache.store(("b",), "entry", CUBIN)
    assert len(list(folder.iterdir())) == 1
    (record,) = caplog.records
    assert (
        record.levelname == "WARNING"
        and f"{folder} is not this user's alone" in record.getMessage()
        and "chmod 700" in record.getMessage()
    )
    folder.chmod(0o700)
    assert cubin_cache.load(("a",)) == ("entry", CUBIN)


def test_what_others_own_is_not_used(folder, monkeypatch):
    cubin_cache.store(("a",), "entry", CUBIN)
    own = os.geteuid()
    monkeypatch.setattr(cubin_cache.os, "geteuid", lambda: own + 1)
    assert cubin_cache.load(("a",)) is None
    monkeypatch.setattr(cubin_cache.os, "geteuid", lambda: own)
    (file,) = folder.iterdir()
    file.chmod(0o666)
    assert cubin_cache.load(("a",)) is None


def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIPEMOE_CACHE", str(tmp_path / "file" / "cache"))
    cubin_cache.store(("a",), "entry", CUBIN)
    assert cubin_cache.load(("a",)) is None


def test_a_kernel_is_compiled_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(driver, "load_function", lambda cubin, entry, *rest: loaded.append((cubin, entry)))
    index_kernels.__wrapped__(3).count.load(0)
    second = index_kernels.__wrapped__(3).count
    monkeypatch.setattr(second, "build", None)
    second.load(0)
    assert loaded[0] == loaded[1] and loaded[0][0].startswith(b"\x7fELF") and "count_pairs" in loaded[0][1]


def test_what_the_driver_does_not_take_is_compiled_anew(monkeypatch, caplog):
    loaded = []

    def load_function(cubin, entry, *rest):
        loaded.append(cubin)
        if cubin == CUBIN:
            raise RuntimeError("cuModuleLoadData: invalid image")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(driver, "load_function", load_function)
    kernel = index_kernels.__wrapped__(3).count
    key = (
        kernel.name,
        *kernel.key,
        kernel.parameters,
        kernel.threads,
        kernel.blocks_per_sm,
        "sm_90a" if kernel.hopper_only else "sm_90",
    )
    cubin_cache.store(key, "entry", CUBIN)
    kernel.load(0)
    assert loaded[0] == CUBIN and loaded[1].startswith(b"\x7fELF") and loaded[1] != CUBIN
    assert "cannot be loaded (cuModuleLoadData: invalid image); it is compiled anew" in caplog.text
    assert cubin_cache.load(key)[1] == loaded[1]


def test_a_kernel_that_cannot_be_loaded_at_all_says_so(monkeypatch):
    def load_function(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(driver, "load_function", load_function)
    kernel = index_kernels.__wrapped__(3).count
    monkeypatch.setattr(kernel, "build", lambda *_: ("entry", CUBIN))
    with pytest.raises(RuntimeError, match="no memory"):
        kernel.load(0)
    assert kernel._handles == {}
