"""Choice of the experts implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipemoe.errors import ConfigError
from pipemoe.experts.protocol import Experts
from pipemoe.experts.weights import ExpertWeights

if TYPE_CHECKING:
    import torch

# implementation name -> device type it runs on
IMPLEMENTATIONS = {"host": "cpu", "torch": "cuda"}


def make_experts(
    weights: Sequence[ExpertWeights],
    *,
    top_k: int,
    hidden: int,
    device: torch.device | str,
    dtype: torch.dtype,
    implementation: str = "auto",
    deterministic: bool = False,
) -> Experts:
    """Build the experts call over `weights`, one entry per MoE layer, which stay referenced and are not copied.

    implementation: "host" (CPU), "torch" (CUDA: grouped_mm between Numba kernels) or "auto" (by device). deterministic: a
    row's result is the same bits whatever its neighbours and however experts are spread over ranks; `out` is float64 then.
    Weights are not checked for NaN: see `check_finite`. Raises ConfigError and InputError.
    """
    import torch

    device = torch.device(device)
    by_device = {device_type: name for name, device_type in IMPLEMENTATIONS.items()}
    if implementation == "auto":
        if device.type not in by_device:
            raise ConfigError(f"device is {device}; experts run on one of {sorted(by_device)}")
        implementation = by_device[device.type]
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"experts implementation is {implementation!r}; it must be one of {['auto', *IMPLEMENTATIONS]}")
    if IMPLEMENTATIONS[implementation] != device.type:
        raise ConfigError(
            f"experts implementation {implementation!r} runs on {IMPLEMENTATIONS[implementation]}, but device is {device}"
        )
    if implementation == "host":
        from pipemoe.experts.host import HostExperts as implementation_class
    else:
        from pipemoe.experts.torch_cuda import TorchExperts as implementation_class
    return implementation_class(
        weights, top_k=top_k, hidden=hidden, device=device, dtype=dtype, deterministic=deterministic
    )
