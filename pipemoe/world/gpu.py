"""A rank's GPU: the settings that CUDA reads from the environment when it starts, and the lanes' streams."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from pipemoe.errors import ConfigError
from pipemoe.runtime.lanes import Lanes
from pipemoe.runtime.stream_lanes import stream_lanes

if TYPE_CHECKING:
    import torch

    from pipemoe.world.arguments import InitArguments

_lanes: dict[
    tuple[torch.device, int, bool], Lanes
] = {}  # streams last as long as the process; the next world reuses them


def runs_on_gpu(arguments: InitArguments) -> bool:
    """Will this rank run on a GPU? Raises ConfigError where it cannot."""
    import torch

    if arguments.device == "cpu":
        return False
    _prepare_cuda(arguments.num_slots)
    found = torch.cuda.is_available()
    if arguments.device == "cuda" and not found:
        raise ConfigError("device is 'cuda', but torch finds no GPU here; `pipemoe doctor` says why")
    if found:
        _check_queues(arguments.num_slots)
    return found


def lanes_of(device: torch.device, num_slots: int, *, alone: bool) -> Lanes:
    """The lanes of a world on this GPU. alone: of one rank."""
    key = device, num_slots, alone
    if key not in _lanes:
        _lanes[key] = stream_lanes(device, num_slots, alone=alone)
    return _lanes[key]


def _prepare_cuda(num_slots: int) -> None:
    """Settings that CUDA reads when it starts.

    A kernel that is loaded at its first launch may wait for all that runs on the GPU, even for a collective that waits
    for this kernel. So everything is loaded at the start. Streams that share a hardware queue may wait for one another.
    """
    import torch

    if torch.cuda.is_initialized() and os.environ.get("CUDA_MODULE_LOADING") != "EAGER":
        warnings.warn(
            "CUDA was started before pipemoe.init(); set CUDA_MODULE_LOADING=EAGER before, or cohorts may block one "
            "another",
            stacklevel=3,
        )
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    # NCCL then sets the stack size of its kernels at once. Otherwise CUDA rearranges memory at their first launch.
    os.environ.setdefault("NCCL_SET_STACK_SIZE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "16" if _queues(num_slots) <= 16 else "32")


def _queues(num_slots: int) -> int:
    """Hardware queues needed so that no two streams share one: per slot three lanes, and a stream of NCCL's own for
    each of its two communicators.
    """
    return 5 * num_slots + 2


def _check_queues(num_slots: int) -> None:
    needed, text = _queues(num_slots), os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            f"CUDA_DEVICE_MAX_CONNECTIONS is {text!r}; it must be a whole number from {needed} to 32, or not set"
        )
    found = int(text)
    if found < needed:
        raise ConfigError(
            f"{num_slots} slots need {needed} hardware queues, but CUDA_DEVICE_MAX_CONNECTIONS is {found}; raise it "
            "(at most 32) or lower num_slots"
        )
