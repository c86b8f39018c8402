"""Several processes that need the same kernels: each is built once, and helpers build what they are told."""

import gc
import importlib.util
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("nvidia") is None:
    pytest.skip("no CUDA compiler: install pipemoe[compiler]", allow_module_level=True)

import torch

from pipemoe_kernels.attention.norm import norm_kernel
from pipemoe_kernels.gemm.wgmma import grouped_kernel
from pipemoe_kernels.index.hopper import index_kernels
from pipemoe_kernels.launch import build_ahead, cubin_cache
from pipemoe_kernels.launch import kernel as kernel_module
from pipemoe_kernels.launch.kernel import Kernel, kernels_in
from pipemoe_kernels.pack import pack_kernel

CC = (8, 0)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPEMOE_CACHE", str(tmp_path / "cache"))
    cubin_cache._turns.cache_clear()
    return tmp_path / "cache"


def small_kernels() -> list[Kernel]:
    """Two that take a moment to compile; what makes them makes one each."""
    return [norm_kernel(torch.bfloat16, None, 64, 1e-6, False, True), pack_kernel()]


@pytest.fixture
def built(monkeypatch):
    """Names of the kernels that this process builds."""
    names: list[str] = []
    build = Kernel.build
    monkeypatch.setattr(
        Kernel, "build", lambda self, cc, arch: (names.append(self.name), build(self, cc, arch))[1], raising=True
    )
    return names


def kept(kernels: list[Kernel]) -> list[bool]:
    return [cubin_cache.load(kernel.kept_key(CC)) is not None for kernel in kernels]


def test_all_are_on_disk_afterwards_and_none_is_built_again(monkeypatch, built):
    monkeypatch.setattr(build_ahead, "_spare_cores", lambda: 0)
    kernels = small_kernels()
    build_ahead.build_all(kernels, CC)
    assert all(kept(kernels)) and len(built) == len(kernels)
    build_ahead.build_all(kernels, CC)
    assert len(built) == len(kernels)


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_as_before_when_compiling_is_over(monkeypatch, collects):
    """Also where it fails; meanwhile nothing is collected."""
    before, seen = gc.isenabled(), []

    def compile_nothing(*arguments, **settings):
        seen.append(gc.isenabled())
        raise ValueError("planted")

    monkeypatch.setattr(kernel_module.cuda, "compile", compile_nothing)
    (gc.enable if collects else gc.disable)()
    try:
        with pytest.raises(ValueError, match="planted"):
            pack_kernel().compile_ptx(CC)
        assert (seen, gc.isenabled()) == ([False], collects)
    finally:
        (gc.enable if before else gc.disable)()


def test_helpers_build_what_their_recipes_say(monkeypatch, built):
    """Here this process builds nothing itself."""
    monkeypatch.setattr(build_ahead, "_spare_cores", lambda: 1)
    monkeypatch.setattr(Kernel, "build_ahead", lambda self, cc: None)
    kernels = [*small_kernels(), *kernels_in(index_kernels(2, False))]  # the latter are made together
    build_ahead.build_all(kernels, CC)
    assert all(kept(kernels)) and not built


def test_a_helper_that_cannot_start_changes_nothing(monkeypatch, built):
    monkeypatch.setattr(build_ahead, "_spare_cores", lambda: 2)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    kernels = small_kernels()
    build_ahead.build_all(kernels, CC)
    assert all(kept(kernels)) and len(built) == len(kernels)


@pytest.mark.parametrize("end", ["killed", "error"])
def test_a_helper_ends_with_the_process_that_started_it(end):
    """In the middle of its work: here one that never ends."""
    code = f"""
import signal
from pipemoe_kernels.launch import build_ahead
from pipemoe_kernels.launch.kernel import Recipe
start = build_ahead._start_helpers
def started(recipes, cc, count):
    helpers = start([Recipe("signal", "pause", (), ())], cc, 1)
    print(helpers[0].pid, flush=True)
    return helpers
class Missing:
    key, recipe = (), None
    def kept_key(self, cc):
        return ()
    def build_ahead(self, cc):
        signal.pause() if {end!r} == "killed" else 1 / 0
build_ahead._start_helpers = started
build_ahead.build_all([Missing(), Missing()], {CC})
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(build_ahead.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    helper = os.pidfd_open(int(process.stdout.readline()))
    if end == "killed":
        process.kill()
    process.wait(60)
    assert select.select([helper], [], [], 60)[0], "the helper stays"
    os.close(helper)


def test_nothing_is_built_ahead_where_nothing_is_kept(monkeypatch, built, folder):
    folder.mkdir()
    folder.chmod(0o770)  # others may write to it
    build_ahead.build_all(small_kernels(), CC)
    assert not built


def test_one_process_has_the_turn_and_its_end_gives_it_back(folder):
    key = ("a", 1)
    assert cubin_cache.keeps()
    code = f"""
import sys
from pipemoe_kernels.launch import cubin_cache
with cubin_cache.turn({key!r}, waits=False) as mine:
    print(mine, flush=True)
    sys.stdin.readline()
    import os
    os._exit(1)
"""
    kernels = str(Path(build_ahead.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": kernels}
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert other.stdin and other.stdout and other.stdout.readline() == "True\n"
    with cubin_cache.turn(key, waits=False) as mine:
        assert not mine
    with cubin_cache.turn(("another",), waits=False) as mine:
        assert mine
    other.stdin.close()
    with cubin_cache.turn(key, waits=True) as mine:
        assert mine
    other.wait()


def test_where_files_cannot_be_locked_everyone_has_the_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPEMOE_CACHE", str(tmp_path / "no such folder"))
    with cubin_cache.turn(("a",), waits=True) as mine:
        assert mine


def test_a_recipe_makes_an_equal_kernel():
    made = grouped_kernel(gated=True, activation="gelu")
    recipe = made.kernel.recipe
    assert recipe is not None and (recipe.module, recipe.name) == (grouped_kernel.__module__, "grouped_kernel")
    grouped_kernel.cache_clear()
    again = grouped_kernel(*recipe.arguments, **dict(recipe.options)).kernel
    assert again is not made.kernel and again.kept_key((9, 0)) == made.kernel.kept_key((9, 0))
