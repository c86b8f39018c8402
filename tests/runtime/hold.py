"""A hold: work of a lane that does not go on until released, on the host and on a GPU."""

from __future__ import annotations

import ctypes
import threading

import torch

WAIT_VALUE_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ
HOLD_SECONDS = 120  # a test that never releases fails by its watchdog long before


class Hold:
    """`wait` holds up the current stream (GPU) or thread (host) until `release`."""

    def __init__(self, device: torch.device) -> None:
        self.released = False
        self._flag = threading.Event()
        self._memory = torch.zeros(1, dtype=torch.int32, pin_memory=True) if device.type == "cuda" else None

    def wait(self) -> None:
        if self._memory is None:
            self._flag.wait(HOLD_SECONDS)
            return
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        address = ctypes.c_uint64(self._memory.data_ptr())  # pinned memory has the same address on the device
        status = ctypes.CDLL("libcuda.so.1").cuStreamWaitValue32_v2(stream, address, ctypes.c_uint32(1), ctypes.c_uint32(WAIT_VALUE_GEQ))
        assert status == 0, f"cuStreamWaitValue32 returned {status}"

    def release(self) -> None:
        self.released = True
        self._flag.set()
        if self._memory is not None:
            self._memory[0] = 1
