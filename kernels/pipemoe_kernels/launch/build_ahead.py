"""Build kernels in several processes at once, before they are needed one by one.

A model needs about ten large kernels, and each takes seconds to compile. All ranks of a host need the same ones. Each
process builds those that no other is at (cubin_cache.turn) and finds the rest on disk. Where a process has several
cores, helpers share its work: processes that only compile, and use neither the GPU nor MPI. They end with the process
that has started them, however it ends: its end closes their input.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch

from pipemoe_kernels.launch import cubin_cache
from pipemoe_kernels.launch.kernel import Kernel, Recipe, kernels_in
from pipemoe_kernels.numba_cuda import SIMULATOR

MOST_HELPERS = 3  # each imports torch and numba, which takes as long as one kernel


def load_all(kernels: Sequence[Kernel], device_index: int) -> None:
    """Load kernels for a device; those that are not on disk are built first, each by one process."""
    if SIMULATOR:
        return
    build_all(kernels, torch.cuda.get_device_capability(device_index))
    for kernel in kernels:
        kernel.load(device_index)


def build_all(kernels: Sequence[Kernel], cc: tuple[int, int]) -> None:
    """Build the kernels that are not on disk, unless nothing can be kept there. When this returns, some may still be
    under way in other processes. Needs no GPU.
    """
    missing = [k for k in dict.fromkeys(kernels) if k.key is not None and not cubin_cache.load(k.kept_key(cc))]
    if len(missing) < 2 or not cubin_cache.keeps():
        return
    helpers = _start_helpers([k.recipe for k in missing if k.recipe], cc, min(_spare_cores(), len(missing) - 1))
    try:
        for kernel in missing:
            kernel.build_ahead(cc)
        for helper in helpers:
            helper.wait()
    finally:  # after an error they have not ended
        for helper in helpers:
            with suppress(OSError):  # what a helper that is gone has not read
                helper.stdin.close()


def _spare_cores() -> int:
    """Cores of this process's share, besides its own. The launchers set the share."""
    share = os.environ.get("OMP_NUM_THREADS", "")
    return min(MOST_HELPERS, (int(share) if share.isdigit() else os.cpu_count() or 1) - 1)


def _start_helpers(recipes: list[Recipe], cc: tuple[int, int], count: int) -> list[subprocess.Popen]:
    """Processes that build from the end of the list, or from places between."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    helpers = []
    for number in range(count):
        first = (number + 1) * len(recipes) // (count + 1)
        helper = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert helper.stdin is not None
        try:
            pickle.dump((cc, recipes[first:] + recipes[:first]), helper.stdin)
            helper.stdin.flush()
        except OSError:  # it has ended: then this process builds everything
            pass
        helpers.append(helper)
    return helpers


def _help() -> None:
    """What a helper does."""
    cc, recipes = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_input, daemon=True).start()
    for recipe in recipes:
        made = getattr(import_module(recipe.module), recipe.name)(*recipe.arguments, **dict(recipe.options))
        for kernel in kernels_in(made):
            if kernel.key is not None:
                kernel.build_ahead(cc)


def _end_with_input() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing more is sent
    os._exit(1)


if __name__ == "__main__":
    _help()
