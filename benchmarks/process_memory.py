"""How much memory this process or this device holds, and the most that it has held since a mark.

Host: VmRSS and VmHWM of /proc/self/status; writing 5 to /proc/self/clear_refs restarts the high-water mark (Linux).
GPU: the device's memory in use as the driver reports it. That is the memory of all processes, so ranks that share a GPU
must go through the marks in step. torch keeps what it has freed; the mark makes it give that back first, so the
driver's figure afterwards is the peak.
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipemoe.errors import ConfigError

if TYPE_CHECKING:
    import torch

_M_MMAP_THRESHOLD = -3  # of mallopt, malloc.h
_MMAP_BYTES = 64 << 10


def use_exact_malloc() -> None:
    """Give every larger block a mapping of its own, so that freed memory leaves the process. Only glibc needs it."""
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    except AttributeError:
        return


class MemoryMark:
    """Memory in use now; `peak_bytes` is how far the process has exceeded it since."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        else:
            _trim()
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError as error:
                raise ConfigError(
                    f"cannot start the process's memory high-water mark anew: {error}; Linux with /proc is needed"
                ) from error
        self._begin = self._in_use("VmRSS")

    def peak_bytes(self) -> int:
        """On a GPU: of all processes that use it."""
        return self._in_use("VmHWM") - self._begin

    def _in_use(self, field: str) -> int:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return
