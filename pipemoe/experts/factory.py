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
IMPLEMENTATIONS = {"host": "cpu", "torch": "cuda", "hopper": "cuda", "ampere": "cuda"}


def make_experts(
    weights: Sequence[ExpertWeights],
    *,
    top_k: int,
    hidden: int,
    device: torch.device | str,
    dtype: torch.dtype,
    implementation: str = "auto",
    deterministic: bool = False,
    num_sms: int | None = None,
) -> Experts:
    """Build the experts call over `weights`, one entry per MoE layer, which stay referenced and are not copied.

    implementation: "host" (CPU), "hopper" (CUDA of compute capability 9.0, bfloat16: tensor-core kernels), "ampere" (the same
    from 8.0 on, by the instructions that all these have), "torch" (CUDA: grouped_mm between Numba kernels) or "auto" (by device:
    "hopper" where it can run, else "ampere" where it can and torch has no grouped_mm for the device). deterministic: a row's result is the
    same bits whatever its neighbours and however experts are spread over ranks; `out` is float64 then. num_sms: multiprocessors
    that the GEMMs of "hopper" and "ampere" may fill, None: all; the others take no notice.
    Weights are not checked for NaN: see `check_finite`. Raises ConfigError and InputError.
    """
    import torch

    device = torch.device(device)
    if implementation == "auto":
        if device.type not in IMPLEMENTATIONS.values():
            raise ConfigError(f"device is {device}; experts run on one of {sorted(set(IMPLEMENTATIONS.values()))}")
        implementation = "host" if device.type == "cpu" else _for_cuda(weights, hidden, device, dtype)
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"experts implementation is {implementation!r}; it must be one of {['auto', *IMPLEMENTATIONS]}")
    if IMPLEMENTATIONS[implementation] != device.type:
        raise ConfigError(
            f"experts implementation {implementation!r} runs on {IMPLEMENTATIONS[implementation]}, but device is {device}"
        )
    settings = {"top_k": top_k, "hidden": hidden, "device": device, "dtype": dtype, "deterministic": deterministic}
    if implementation == "host":
        from pipemoe.experts.host import HostExperts as implementation_class
    elif implementation == "hopper":
        from pipemoe.experts.hopper import HopperExperts as implementation_class

        settings["num_sms"] = num_sms
    elif implementation == "ampere":
        from pipemoe.experts.ampere import AmpereExperts as implementation_class

        settings["num_sms"] = num_sms
    else:
        from pipemoe.experts.torch_cuda import TorchExperts as implementation_class
    return implementation_class(weights, **settings)


def _for_cuda(weights: Sequence[ExpertWeights], hidden: int, device: torch.device, dtype: torch.dtype) -> str:
    import torch

    from pipemoe.experts.hopper import CAPABILITY, unsupported
    from pipemoe.experts.torch_cuda import GROUPED_MM_MAJORS

    capability = torch.cuda.get_device_capability(device)
    for layer, layer_weights in enumerate(weights):
        layer_weights.validate(layer)
    wanted = "hopper" if capability == CAPABILITY else "ampere"
    if wanted == "ampere" and capability[0] in GROUPED_MM_MAJORS:
        return "torch"
    return "torch" if unsupported(weights, hidden, device, dtype, wanted) else wanted
