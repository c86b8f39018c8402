"""CUDA experts on CPU tensors: kernels are not compiled, and a launch leaves only what the driver would have read."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch

from pipemoe.experts import hopper, hopper_fp8
from pipemoe_kernels.launch import driver
from pipemoe_kernels.launch.kernel import Kernel

NUM_SMS = 132


@dataclass(frozen=True)
class Launched:
    """One launch: of which kernel, in how many blocks, on which stream, with which arguments; may its blocks start
    before the kernel in front of it has ended?"""

    kernel: Kernel
    grid: tuple[int, int]
    stream: int
    arguments: tuple[int, ...]
    starts_early: bool

    @staticmethod
    def read(config, kernel, addresses) -> Launched:
        values = (ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))[0] for address in addresses)
        assert (config.grid_z, *config.block, config.shared_bytes) == (1, kernel.threads, 1, 1, kernel.shared_bytes)
        others = kernel.cluster > 1  # the other attribute that a launch may have
        return Launched(
            kernel, (config.grid_x, config.grid_y), config.stream or 0, tuple(values), config.num_attributes > others
        )


def install(monkeypatch: pytest.MonkeyPatch, stream: int = 7) -> list[Launched]:
    """Put the stand-in in place; the list grows by every launch."""
    launched: list[Launched] = []

    def launch(config, kernel, addresses, extra):
        launched.append(Launched.read(config._obj, kernel, addresses))
        return 0

    def load(kernel, device_index):
        kernel._handles[device_index] = kernel

    def device_maps(maps, device):
        return torch.zeros((max(1, len(maps)), 128), dtype=torch.uint8)

    monkeypatch.setattr(driver, "launch_call", lambda: launch)
    monkeypatch.setattr(driver, "enter_context", lambda device_index: None)
    monkeypatch.setattr(driver, "encode_tensor_map", lambda *arguments, **options: bytes(128))
    monkeypatch.setattr(Kernel, "load", load)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device_index: stream, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    properties = type("Properties", (), {"multi_processor_count": NUM_SMS})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for module in (hopper, hopper_fp8):
        monkeypatch.setattr(module, "device_maps", device_maps)
    return launched
