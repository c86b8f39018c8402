"""Kernels of gemm/few.py and few_experts.py thread by thread in Python, tensor cores by their documented layout."""

from __future__ import annotations

import ctypes
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import torch

from pipemoe_kernels.ptx import few as ptx_few

WARP = 32


class _Block:
    """The threads of one block, which meet."""

    def __init__(self, threads: int, shared_bytes: int) -> None:
        self.threads = threads
        self.shared, self.arrays = bytearray(shared_bytes + 64), {}
        self.all = threading.Barrier(threads)
        self.warps = [threading.Barrier(WARP) for _ in range(threads // WARP)]
        self.lanes = [[None] * WARP for _ in self.warps]
        self.lock = threading.Lock()


_local = threading.local()


def _of_warp(value):
    """All lanes' values."""
    block, warp, lane = _local.block, _local.thread // WARP, _local.thread % WARP
    block.lanes[warp][lane] = value
    block.warps[warp].wait()
    found = list(block.lanes[warp])
    block.warps[warp].wait()
    return found


def _halves(words, dtype):
    bits = np.frombuffer(words, np.uint16)
    if dtype == torch.float16:
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _bytes_at(address, count):
    return bytes((ctypes.c_ubyte * count).from_address(int(address)))


def _copy_16(shared, address):
    at = int(shared) - BASE
    _local.block.shared[at : at + 16] = _bytes_at(address, 16)


def _mma(sums, a, b, dtype):
    """a: four words of 4 bytes, b: two, of every lane. One lane's part of the sums."""
    everyone, lane = _of_warp((b"".join(a), b"".join(b))), _local.thread % WARP
    product = None
    if lane == 0:  # [g, t, word, half]
        of_a = _halves(b"".join(found[0] for found in everyone), dtype).reshape(8, 4, 4, 2)
        of_b = _halves(b"".join(found[1] for found in everyone), dtype).reshape(8, 4, 2, 2)
        matrix, columns = np.zeros((16, 16)), np.zeros((16, 8))
        for word, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            matrix[row : row + 8, column : column + 8] = of_a[:, :, word].reshape(8, 8)
        for word in range(2):
            columns[8 * word : 8 * word + 8] = of_b[:, :, word].reshape(8, 8).T
        product = matrix @ columns
    product = _of_warp(product)[0]
    g, t = lane // 4, lane % 4
    mine = [product[g, 2 * t], product[g, 2 * t + 1], product[g + 8, 2 * t], product[g + 8, 2 * t + 1]]
    return [s + m for s, m in zip(sums, mine)]


def _few_products(threads, num_x, half=False):
    dtype = torch.float16 if half else torch.bfloat16

    def products(shared, x, exists, x_after):
        sums = [[0.0] * 4 for _ in range(num_x)]
        for s in range(ptx_few.STEPS):
            places = [int(shared) - BASE + 16 * threads * (2 * s + i) for i in range(2)]
            low, high = ([bytes(_local.block.shared[p + 4 * j : p + 4 * j + 4]) for j in range(4)] for p in places)
            for n in range(num_x):
                row = [bytes(4)] * 4
                if exists >> n & 1:
                    found = _bytes_at(x + n * x_after + 64 * s, 16)
                    row = [found[4 * j : 4 * j + 4] for j in range(4)]
                for i in (0, 2):
                    sums[n] = _mma(sums[n], (low[i], high[i], low[i + 1], high[i + 1]), row[i : i + 2], dtype)
        return [value for of_eight in sums for value in of_eight]

    return products


class _Thread:
    x = property(lambda self: _local.thread)


class _Index:
    x = property(lambda self: _local.grid[0])
    y = property(lambda self: _local.grid[1])


class _Shared:
    def array(self, size, kind):
        if size == 0:
            return None
        with _local.block.lock:
            return _local.block.arrays.setdefault("partial", np.full(size, np.nan))


BASE = 4  # of shared memory, not aligned
_ptx = SimpleNamespace(
    shared_address=lambda array: BASE,
    launch_dependents=lambda: None,
    wait_for_earlier=lambda: None,
    load_u32=lambda address: int.from_bytes(_bytes_at(address, 4), "little"),
    lanes_with=lambda flag: sum(bool(f) << i for i, f in enumerate(_of_warp(flag))),
)
_cuda = SimpleNamespace(
    threadIdx=_Thread(), blockIdx=_Index(), shared=_Shared(), syncthreads=lambda: _local.block.all.wait()
)
STAND_INS = {
    "cuda": _cuda,
    "ptx": _ptx,
    "UINT32": lambda value: int(value) & 0xFFFFFFFF,
    "ADDRESS": int,
    "copy_16": _copy_16,
    "wait_for_copies": lambda: None,
    "few_products": _few_products,
    "gated": lambda gating: lambda gate, up: gate / (1 + np.exp(-gate)) * up,
    "from_bits": lambda bits: float(np.uint32(bits).view(np.float32)),
    "types": SimpleNamespace(float32=float, int64=int, uint8=None),
}


def install(monkeypatch, *modules) -> None:
    """Kernels that these modules make from now on can be launched by `launch`."""
    for module in modules:
        for name, stand_in in STAND_INS.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)


def launch(kernel, columns, rows, arguments) -> None:
    """These blocks, one after another. Tensors go in as addresses; those that are stored to by index, as tensors."""
    for at in itertools.product(columns, rows):
        block, errors = _Block(kernel.threads, kernel.shared_bytes), []

        def run(thread, block=block, at=at, errors=errors):
            _local.block, _local.thread, _local.grid = block, thread, at
            try:
                kernel.function(*arguments)
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
                block.all.abort()
                for warp in block.warps:
                    warp.abort()

        threads = [threading.Thread(target=run, args=(thread,)) for thread in range(kernel.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
