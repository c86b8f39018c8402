"""The devices known by name, with the peak rates that default costs are derived from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """Peak rates of one device. flops: dense bfloat16 (float32 on a CPU), per second. link_bandwidth: one direction.
    cores: 0 for a GPU that a rank has for itself, else how many cores all ranks share.
    """

    name: str
    flops: int
    memory_bandwidth: int  # bytes per second
    link_bandwidth: int
    num_sms: int
    cores: int = 0


# Sources: NVIDIA's data sheets. H200 and H100 SXM (sparse 1,979 TFLOP/s bf16, so 989 dense; HBM3e 4.8, HBM3 3.35 TB/s;
# NVLink 900 GB/s both ways), A100 SXM 80 GB (312 TFLOP/s, 2,039 GB/s, 600 GB/s), HGX B200 per GPU (4.5 PFLOP/s sparse
# bf16, so 2.25 dense; 8 TB/s; NVLink 1.8 TB/s both ways; 148 SMs). SM counts: the architecture white papers.
GPUS: dict[str, Device] = {
    "h200": Device("h200", 989 * 10**12, 4800 * 10**9, 450 * 10**9, 132),
    "h100": Device("h100", 989 * 10**12, 3350 * 10**9, 450 * 10**9, 132),
    "a100": Device("a100", 312 * 10**12, 2039 * 10**9, 300 * 10**9, 108),
    "b200": Device("b200", 2250 * 10**12, 8000 * 10**9, 900 * 10**9, 148),
}
UNKNOWN_GPU = GPUS["a100"]


def cpu(cores: int) -> Device:
    """A host of `cores` cores, with a current server core's rates: float32 peak, memory, copies between processes."""
    return Device("cpu", 150 * 10**9, 20 * 10**9, 16 * 10**9, 0, cores)


def gpu_named(name: str) -> Device:
    """The preset whose name is part of `name` (as the driver gives it); without one, a GPU with modest rates."""
    return next((device for key, device in GPUS.items() if key in name.lower()), UNKNOWN_GPU)
