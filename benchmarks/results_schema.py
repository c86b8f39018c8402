"""The one form that every benchmark's results have, on disk and as the last line of stdout.

    {"schema": "pipemoe.bench/1", "benchmark": ..., "command": ..., "commit": ..., "machine": {...}, "rows": [...]}

`command` can be run again from the checkout. `commit` is null outside a git checkout, and ends in "+" if files
differed. `machine` has facts, but no host names and no paths. Unknown numbers are null, never NaN or infinity.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipemoe.doctor import installed_gpus, installed_version
from pipemoe.errors import InputError
from pipemoe.output_path import write_whole

SCHEMA = "pipemoe.bench/1"

# The fields that a row must have, and their types. A number may also be null.
_NUMBER = (int, float, type(None))
ROW_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "ttft": {
        "mode": (str,),
        "model": (str,),
        "layers": (int,),
        "num_ranks": (int,),
        "rank_tokens": (list, str),  # tokens per rank, or the trace's name
        "ttft_ms_p50": _NUMBER,
        "ttft_ms_p99": _NUMBER,
        "ttft_ms_slowest_rank": _NUMBER,
        "ttft_ms_median_rank": _NUMBER,
        "exposed_comm_ms": _NUMBER,
        "overlap_pct": _NUMBER,
        "peak_workspace_bytes": _NUMBER,
        "parity": (bool,),
    },
    "forward": {
        "impl": (str,),  # "pipemoe", "pipemoe_before" or "vllm"
        "model": (str,),
        "layers": (int,),
        "num_ranks": (int,),
        "tokens": (int,),  # of each rank's prompt; where they differ (`rank_tokens`), of the longest
        "ttft_ms": _NUMBER,
        "ttft_ms_least": _NUMBER,
        "ttft_ms_most": _NUMBER,
        "rounds": (int,),
        "order": (str,),
        "issue_us_per_layer": _NUMBER,
        "active_experts": _NUMBER,  # mean over layers
        "expert_load_max_over_mean": _NUMBER,
        "sm_clock_mhz": _NUMBER,
    },
    "kernels": {
        "layer": (str,),
        "H": (int,),
        "I": (int,),
        "experts": (int,),
        "local_experts": (int,),
        "top_k": (int,),
        "tokens": (int,),
        "pairs": (int,),
        "dtype": (str,),  # "bf16" or "fp8"
        "impl": (str,),
        "ms": _NUMBER,
        "tflops": _NUMBER,
        "weight_gbps": _NUMBER,
        "floor_ms": _NUMBER,
        "ratio_to_floor": _NUMBER,
        "rel_err": _NUMBER,
        # Only in pipemoe's rows, null in others: parts of a call alone, and the host's time for an eager call.
        "routing_us": _NUMBER,
        "index_us": _NUMBER,
        "host_us": _NUMBER,
        # This run's ceilings.
        "dense_tflops": _NUMBER,
        "copy_tbps": _NUMBER,
    },
    "attention": {
        "shape": (str,),
        "heads": (int,),
        "key_heads": (int,),
        "head_dim": (int,),
        "value_dim": (int,),
        "case": (str,),
        "pieces": (int,),
        "tokens": _NUMBER,
        "keys": _NUMBER,
        "window": _NUMBER,
        "impl": (str,),
        "ms": _NUMBER,
        "tflops": _NUMBER,
        "ratio_to_flash": _NUMBER,  # torch's flash kernel's time over this one
        "host_us": _NUMBER,
        "rel_err": _NUMBER,
        "excess_ms": _NUMBER,  # of a call with a new length over those of similar length; only in the stall test's rows
    },
}
ROW_FIELDS["host"] = {
    "build": (str,),  # "before" or "now"
    "mode": (str,),
    "model": (str,),
    "num_ranks": (int,),
    "rank_tokens": (list, str),
    "mean_ttft_ms": _NUMBER,  # median over rounds
    "ttft_ms": (list,),  # per prompt, by step and rank
    "workspace_bytes": _NUMBER,
    "init_bytes": _NUMBER,  # of resident memory, that pipemoe.init took
}
ROW_FIELDS["host_experts"] = {
    "size": (str,),  # of an expert, by a model's name
    "dtype": (str,),
    "rows_per_expert": (int,),
    "us": _NUMBER,  # of CPU time of a call: one layer's local experts
    "read_floor_us": _NUMBER,  # to read their weights at the rate of a long vector
    "compute_floor_us": _NUMBER,
}
ROW_FIELDS["loading"] = {
    "family": (str,),
    "device": (str,),
    "gigabytes": _NUMBER,
    "page_cache": (str,),  # "dropped" before each time, or "full"
    "read_gbps": _NUMBER,  # all bytes into memory
    "load_gbps": _NUMBER,
    "ratio": _NUMBER,  # load_gbps / read_gbps
    "read_s": (list,),
    "load_s": (list,),
}
ROW_FIELDS["serve"] = {
    "policy": (str,),
    "trace": (str,),
    "what": (str,),  # "alone" (one request at a time), "saturation" (all at once) or "load"
    "seed": (int,),
    "rate_rps": _NUMBER,
    "load": _NUMBER,  # the rate, as a share of the best lockstep policy's throughput at saturation
    "ttft_ms_p50": _NUMBER,
    "ttft_ms_p95": _NUMBER,
    "ttft_ms_p99": _NUMBER,
    "ttft_ms_p50_short": _NUMBER,  # of the shorter half of the prompts
    "ttft_ms_p95_short": _NUMBER,
    "completed": (int,),
    "capacity_rps": _NUMBER,  # of this policy with this seed
    "step_tokens": _NUMBER,  # null for policies without
}
_DOCUMENT_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (str,),
    "benchmark": (str,),
    "command": (str,),
    "commit": (str, type(None)),
    "machine": (dict,),
    "rows": (list,),
}
_CHECKOUT = Path(__file__).resolve().parent.parent


def results_document(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of `benchmark` on this machine, from this checkout, by this process's command; validated."""
    document = plain(
        {
            "schema": SCHEMA,
            "benchmark": benchmark,
            "command": command(),
            "commit": commit(),
            "machine": machine(),
            "rows": list(rows),
        }
    )
    validate(document)
    return document


def validate(document: Any) -> None:
    """Raise InputError that lists all that is wrong with `document`."""
    if not isinstance(document, dict):
        raise InputError(f"results: a {type(document).__name__} instead of an object")
    faults = _faults("results", document, _DOCUMENT_FIELDS)
    if document.get("schema") != SCHEMA:
        faults.append(f"results: schema is {document.get('schema')!r}, not {SCHEMA!r}")
    rows = document.get("rows") if isinstance(document.get("rows"), list) else []
    fields = ROW_FIELDS.get(str(document.get("benchmark")), {})
    for index, row in enumerate(rows):
        if isinstance(row, dict):
            faults += _faults(f"row {index}", row, fields)
        else:
            faults.append(f"row {index}: a {type(row).__name__} instead of an object")
    try:
        json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        faults.append(f"results: not JSON: {error}")
    if faults:
        raise InputError("\n".join(faults))


def write_results(document: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Validate and write; readers see the old file or the whole new one. Raises InputError."""
    validate(document)
    write_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and validate a results file."""
    try:
        document = json.loads(Path(path).read_text())
        validate(document)
    except (OSError, ValueError) as error:  # InputError is a ValueError
        raise InputError(f"{path}: {error}") from error
    return document


def print_results(document: Mapping[str, Any]) -> None:
    """Print the document as one line, to be the last of a benchmark's stdout."""
    validate(document)
    print(json.dumps(document, allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """`value` for JSON: numpy and torch scalars and arrays become Python's, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def command() -> str:
    """The command as run from the checkout: the launcher's, else this process's; no absolute paths in it."""
    words = shlex.split(os.environ.get("PIPEMOE_COMMAND", "")) or ["python", *sys.argv]
    return shlex.join("=".join(_without_folder(part) for part in word.split("=")) for word in words)


def commit() -> str | None:
    """PIPEMOE_COMMIT where it is set, for a copy whose git does not know; else the checkout's."""
    if os.environ.get("PIPEMOE_COMMIT"):
        return os.environ["PIPEMOE_COMMIT"]
    try:
        run = ("git", "-C", str(_CHECKOUT))
        head = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.strip() else "")


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures: processor, GPUs, versions, and the settings that change them."""
    gpus = installed_gpus()
    packages = ("torch", "numpy", "numba", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "mpi4py", "transformers")
    settings = (
        "OMP_NUM_THREADS",
        "NCCL_",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
        "PIPEMOE_NUM_SLOTS",
    )
    return plain(
        {
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "cpu": _cpu_name(),
            "num_cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": [{"name": gpu.name, "memory_mib": gpu.memory_mib, "num_sms": gpu.num_sms} for gpu in gpus],
            "driver": gpus[0].driver if gpus else None,
            "cuda": _loaded("torch", lambda torch: torch.version.cuda),
            "nccl": _loaded("cupy.cuda.nccl", lambda nccl: nccl.get_version()),
            "mpi": _loaded(
                "mpi4py.MPI", lambda mpi: " ".join(re.split(r"\n|, package", mpi.Get_library_version())[0].split())
            ),
            "packages": {name: version for name in packages if (version := installed_version(name))},
            "settings": {
                name: _without_folder(value) for name, value in sorted(os.environ.items()) if name.startswith(settings)
            },
        }
    )


def _loaded(module: str, fact: Any) -> Any:
    """A fact about a module, if the benchmark has loaded it: others have no part in its figures."""
    return fact(sys.modules[module]) if module in sys.modules else None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _without_folder(text: str) -> str:
    if not text.startswith("/"):
        return text
    path = Path(text)
    return str(path.relative_to(_CHECKOUT)) if path.is_relative_to(_CHECKOUT) else path.name


def _faults(where: str, found: Mapping[str, Any], wanted: Mapping[str, tuple[type, ...]]) -> list[str]:
    faults = []
    for name, types in wanted.items():
        if name not in found:
            faults.append(f"{where}: no {name!r}")
        # bool is an int to Python, but true is not a number here
        elif not isinstance(found[name], types) or (isinstance(found[name], bool) and bool not in types):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            faults.append(f"{where}: {name!r} is {found[name]!r}, not {names}")
    return faults
