"""A hold: work of a lane that does not go on until released, on the host and on a GPU."""

from __future__ import annotations

import threading

import torch

HOLD_SECONDS = 120  # a test that never releases fails by its watchdog long before

# One thread that looks at host memory again and again: to the GPU an attention that takes very long.
_SPIN = """
extern "C" __global__ void spin(volatile const int *flag) {
    while (*flag == 0) __nanosleep(1000);
}
"""


class Hold:
    """`wait` holds up the current stream (GPU) or thread (host) until `release`."""

    def __init__(self, device: torch.device) -> None:
        self.released = False
        self._flag = threading.Event()
        self._memory = None
        if device.type == "cuda":
            import cupy

            self._memory = torch.zeros(1, dtype=torch.int32, pin_memory=True)  # the same address on the device
            self._spin = cupy.RawKernel(_SPIN, "spin")
            self._spin.compile()
            self._memory[0] = 1
            self.wait()  # loaded now: a module load inside a step could wait for the device
            torch.cuda.synchronize()
            self._memory[0] = 0
            self._one = torch.ones(1, dtype=torch.int32, device=device)

    def wait(self) -> None:
        if self._memory is None:
            self._flag.wait(HOLD_SECONDS)
            return
        import cupy

        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            self._spin((1,), (1,), (cupy.uint64(self._memory.data_ptr()),))

    def release(self) -> None:
        self.released = True
        self._flag.set()
        if self._memory is not None:
            self._memory[0] = 1

    def release_behind(self) -> None:
        """Release once the current stream has come this far; on the host at once."""
        self._flag.set()
        if self._memory is not None:
            self._memory.copy_(self._one, non_blocking=True)
