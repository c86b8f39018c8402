"""Compiled kernels on disk: found again by an equal key alone, and no trouble where nothing can be written."""

import importlib.util

import pytest

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

import torch

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
