"""Compiled kernels on disk: found again by an equal key alone, and no trouble where nothing can be written."""

import importlib.util
import shutil
from importlib import metadata
from pathlib import Path

import pytest

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

import torch

import pipemoe_kernels
from pipemoe_kernels import cubin_cache, driver
from pipemoe_kernels.index_hopper import index_kernels

CUBIN = b"\x7fELF\n\x00rest"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPEMOE_CACHE", str(tmp_path / "cache"))
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


def test_a_damaged_file_is_no_kernel(folder):
    cubin_cache.store(("a",), "entry", CUBIN)
    (file,) = folder.iterdir()
    file.write_bytes(b"entry\nrubbish")
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
