"""Do a model's weights fit into memory? Asked before any is taken: the system kills a process that takes too much,
silently.

The rule. On a GPU all ranks that share it must find room in what is free. On a host all its ranks together must stay
below the limit of their control group if there is one (a container's, a batch job's), else below the machine's memory
and swap. There, free memory decides nothing: caches give way, and the memory of some virtual machines grows as it is
used. If less is free than needed, a warning says so.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipemoe.errors import ConfigError

if TYPE_CHECKING:
    from pipemoe.world.world import World

_log = logging.getLogger("pipemoe")
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # control groups of version 1 say "no limit" with a number near 2**63


def shortage(world: World, num_bytes: int) -> ConfigError | None:
    """An error if the weights of the ranks here do not fit, else None; every rank calls. num_bytes: of this rank."""
    place = _place(world.device)
    told = [
        json.loads(payload)
        for payload in world.all_gather(json.dumps([place, num_bytes]).encode(), "bytes of the model's weights")
    ]
    needed, sharing = sum(count for where, count in told if where == place), sum(where == place for where, _ in told)
    what = f"rank {world.rank}: the weights need {_gib(num_bytes)}"
    if sharing > 1:
        shared = "GPU" if world.device.type == "cuda" else "host"
        what += f", and with those of the {sharing - 1} other ranks on this {shared} {_gib(needed)}"
    if world.device.type == "cuda":
        free, total = _gpu_bytes(world.device)
        if needed > free:
            return ConfigError(
                f"{what}, but {_gib(free)} of the GPU's {_gib(total)} are free; use more ranks, a narrower dtype, "
                "or end what else runs there"
            )
        return None
    limit, whose = host_limit()
    if limit is not None and needed > limit:
        return ConfigError(f"{what}, but {whose} {_gib(limit)}; use more hosts, a narrower dtype, or raise that limit")
    available = _meminfo().get("MemAvailable")
    if (
        available is not None
        and needed > available
        and world.rank == next(rank for rank, (where, _) in enumerate(told) if where == place)
    ):
        _log.warning(
            "%s, but only %s are free at present; the system may end a process that takes more than there is",
            what,
            _gib(available),
        )
    return None


def host_limit() -> tuple[int | None, str]:
    """Bytes that the processes of this host can have together, and what says so; None if nothing limits them."""
    groups = [limit for limit in map(_limit_in, _control_group_files()) if limit is not None]
    if groups:
        return min(groups), "the control group of this process (a container, or a job) may have"
    memory = _meminfo()
    if "MemTotal" not in memory:
        return None, ""
    return memory["MemTotal"] + memory.get("SwapTotal", 0), "this host's memory and swap are"


def _place(device: torch.device) -> str:
    host = socket.gethostname()
    return f"{host} {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else host


def _gpu_bytes(device: torch.device) -> tuple[int, int]:
    """Free bytes, with those that torch keeps for later; and all bytes."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def _meminfo() -> dict[str, int]:
    """Bytes by the names in /proc/meminfo; empty where there is no such file."""
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        return {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    except (OSError, ValueError, IndexError):
        return {}


def _control_group_files() -> Iterable[Path]:
    """Files that may limit this process's control groups and all above them: version 2, then 1."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(root):
                yield folder / name


def _limit_in(file: Path) -> int | None:
    try:
        limit = int(file.read_text())  # or "max"
    except (OSError, ValueError):
        return None
    return limit if limit < _NO_LIMIT else None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
