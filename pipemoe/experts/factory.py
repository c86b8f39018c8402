"""Choice of the experts implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipemoe.errors import ConfigError
from pipemoe.experts.protocol import Experts
from pipemoe.experts.weights import ExpertWeights

if TYPE_CHECKING:
    import torch

# implementation name -> device type it runs on
IMPLEMENTATIONS = {"host": "cpu", "torch": "cuda", "hopper": "cuda", "hopper_fp8": "cuda", "ampere": "cuda"}
TAKE_NUM_SMS = ("hopper", "hopper_fp8", "ampere")


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
    num_experts: int | None = None,
    dispatch_dtype: torch.dtype | None = None,
) -> Experts:
    """Build the experts call over `weights`, one entry per MoE layer, which stay referenced and are not copied.

    implementation: "host" (CPU), "hopper" (CUDA of compute capability 9.0, bfloat16: tensor-core kernels), "hopper_fp8"
    (the same in e4m3: rows travel as e4m3, unquantised weights are quantised into a copy), "ampere" (the same from 8.0
    on), "torch" (CUDA: grouped_mm between Numba kernels) or "auto" (on a GPU "hopper" where it can run, else "ampere"
    where it can and torch has no grouped_mm for the device; "hopper_fp8" for quantised weights, which nothing else
    takes). deterministic: a row's result has the same bits whatever its neighbours and however experts are spread over
    ranks; `out` is then float64. num_sms: multiprocessors that the GEMMs of "hopper", "hopper_fp8" and "ampere" may
    fill; None: all. num_experts: of all ranks together; "hopper" chooses its tiles by it; None: always the same tiles.
    dispatch_dtype: format of the rows' hidden values; None: what the implementation computes in (its `wire_dtype`);
    torch.float8_e4m3fn: with scales, for any implementation. Weights are not checked for NaN: see `check_finite`.
    Raises ConfigError and InputError.
    """
    import torch

    device = torch.device(device)
    if implementation == "auto":
        if device.type not in IMPLEMENTATIONS.values():
            raise ConfigError(f"device is {device}; experts run on one of {sorted(set(IMPLEMENTATIONS.values()))}")
        implementation = "host" if device.type == "cpu" else _for_cuda(weights, hidden, device, dtype)
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"experts implementation is {implementation!r}; it must be one of {['auto', *IMPLEMENTATIONS]}"
        )
    if IMPLEMENTATIONS[implementation] != device.type:
        raise ConfigError(
            f"experts implementation {implementation!r} runs on {IMPLEMENTATIONS[implementation]}, but device is "
            f"{device}"
        )
    if any(w.is_quantised for w in weights) and implementation != "hopper_fp8":
        raise ConfigError(
            f"the weights are quantised, which experts implementation {implementation!r} does not take; "
            'use "hopper_fp8" on a Hopper GPU, or pass them through pipemoe.experts.dequantise_experts'
        )
    e4m3_rows = dispatch_dtype == torch.float8_e4m3fn
    if dispatch_dtype is not None and not e4m3_rows:
        raise ConfigError(f"dispatch_dtype is {dispatch_dtype}; it must be torch.float8_e4m3fn or None")
    if e4m3_rows and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"dispatch_dtype is {dispatch_dtype}, but {device} is of compute capability under 8.9, which cannot make it"
        )
    settings: dict[str, Any] = {"top_k": top_k, "hidden": hidden, "device": device, "dtype": dtype}
    settings["deterministic"] = deterministic
    if implementation in TAKE_NUM_SMS:
        settings["num_sms"] = num_sms
    if implementation == "hopper":
        settings["num_experts"] = num_experts
    experts = _class_of(implementation)(weights, **settings)
    if e4m3_rows and experts.wire_dtype != dispatch_dtype:
        from pipemoe.experts.dequantising import DequantisingExperts

        experts = DequantisingExperts(experts, hidden=hidden, top_k=top_k, device=device, dtype=dtype)
    return experts


def _class_of(implementation: str) -> Any:
    """The implementation's class. Each takes only its own scratches, which the protocol `Experts` cannot say."""
    if implementation == "host":
        from pipemoe.experts.host import HostExperts

        return HostExperts
    if implementation == "hopper":
        from pipemoe.experts.hopper import HopperExperts

        return HopperExperts
    if implementation == "hopper_fp8":
        from pipemoe.experts.hopper_fp8 import HopperFp8Experts

        return HopperFp8Experts
    if implementation == "ampere":
        from pipemoe.experts.ampere import AmpereExperts

        return AmpereExperts
    from pipemoe.experts.torch_cuda import TorchExperts

    return TorchExperts


def _for_cuda(weights: Sequence[ExpertWeights], hidden: int, device: torch.device, dtype: torch.dtype) -> str:
    import torch

    if any(w.is_quantised for w in weights):
        return "hopper_fp8"
    from pipemoe.experts.hopper import CAPABILITY, unsupported
    from pipemoe.experts.torch_cuda import GROUPED_MM_MAJORS

    capability = torch.cuda.get_device_capability(device)
    for layer, layer_weights in enumerate(weights):
        layer_weights.validate(layer)
    wanted = "hopper" if capability == CAPABILITY else "ampere"
    if wanted == "ampere" and capability[0] in GROUPED_MM_MAJORS:
        return "torch"
    return "torch" if unsupported(weights, hidden, device, dtype, wanted) else wanted
