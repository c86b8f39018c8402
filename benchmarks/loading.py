"""How fast checkpoints load, beside reading their bytes alone.

    python benchmarks/loading.py --gigabytes 2.5

For each family a checkpoint of its own form is written by transformers: experts one by one (mixtral, qwen3_moe,
glm4_moe), or stacked, transposed and interleaved (gpt_oss). Then, in turns, all its files are read into memory, and the
model is loaded by one rank: headers, weights into their places, and the look for NaN. Once with the files dropped from
the page cache before, where the system does that, and once with all of them in it. `ratio` is the median time of
reading over that of loading.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results_schema
from benchmarks.bench_main import Progress, positive
from benchmarks.ttft.table import aligned
from pipemoe.output_path import check_output_file

_FILL = 1 << 20  # values that are written again and again
_COMMON = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": False,
}
# Of an expert, by each family's name for it.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 3584},
    "qwen3_moe": {"intermediate_size": 1024, "moe_intermediate_size": 768},
    "glm4_moe": {"intermediate_size": 1024, "moe_intermediate_size": 768, "first_k_dense_replace": 1},
    "gpt_oss": {"intermediate_size": 2880, "hidden_size": 1440, "head_dim": 64},
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Speed of loading, beside reading the bytes.")
    parser.add_argument("--families", default=",".join(FAMILIES), help="default: %(default)s")
    parser.add_argument(
        "--gigabytes", type=positive(float), default=2.5, help="of each checkpoint (default %(default)s)"
    )
    parser.add_argument("--rounds", type=positive(int), default=5, help="default %(default)s")
    parser.add_argument("--folder", type=Path, help="for the checkpoints (default: the system's for temporary files)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where weights go (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, default=Path("out/loading.json"), metavar="FILE", help="%(default)s")
    options = parser.parse_args(arguments)
    options.families = options.families.split(",")
    if unknown := [name for name in options.families if name not in FAMILIES]:
        parser.error(f"--families {','.join(unknown)}: choose from {', '.join(FAMILIES)}")
    return options


def write_checkpoint(family: str, num_bytes: float, folder: Path) -> None:
    """A checkpoint of about `num_bytes`, with as many experts as that takes, in bfloat16, written by transformers."""
    import torch
    from transformers import CONFIG_MAPPING

    from pipemoe.models.whole_loading import whole_skeleton

    own = {**_COMMON, **FAMILIES[family]}
    width = own.get("moe_intermediate_size", own["intermediate_size"])
    of_expert = 2 * 3 * own["hidden_size"] * width * own["num_hidden_layers"]
    count = max(own["num_experts_per_tok"], round(num_bytes / of_expert))
    config = CONFIG_MAPPING[family](**own, num_local_experts=count, num_experts=count, n_routed_experts=count)
    config.dtype = torch.bfloat16
    model = whole_skeleton(config).to(torch.bfloat16).to_empty(device="cpu")
    fill = torch.randn(_FILL).mul_(0.02).bfloat16()
    for tensor in model.state_dict().values():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), _FILL):
            flat[start : start + _FILL].copy_(fill[: flat.numel() - start])
    model.save_pretrained(folder, max_shard_size="1GB")
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def read_all(folder: Path) -> int:
    """Read every file of weights into memory of its own. Returns how many bytes they have."""
    return sum(np.fromfile(file, np.uint8).nbytes for file in sorted(folder.glob("*.safetensors")))


def drop_from_cache(folder: Path) -> None:
    """Ask the system to keep nothing of the files in memory."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_all(folder: Path, device: str) -> None:
    """Load the model as the only rank, and let it go."""
    import torch

    from pipemoe.models.loading import load_decoder

    load_decoder(folder, rank=0, num_ranks=1, device=device, dtype=torch.bfloat16)
    if device == "cuda":
        torch.cuda.synchronize()


def measure(folder: Path, device: str, rounds: int, *, cold: bool) -> dict[str, list[float]]:
    """Seconds of each way, in turns; the first turn is a warm-up."""
    seconds: dict[str, list[float]] = {"read": [], "load": []}
    for turn in range(-1, rounds):
        for name, run in (("read", lambda: read_all(folder)), ("load", lambda: load_all(folder, device))):
            if cold:
                drop_from_cache(folder)
            begin = time.perf_counter()
            run()
            taken = time.perf_counter() - begin
            gc.collect()
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    options, progress, rows = parse(arguments), Progress(0), []
    check_output_file("--json", options.json, may_make_folder=True)
    for family in options.families:
        with TemporaryDirectory(prefix="pipemoe_loading_", dir=options.folder) as name:
            folder = Path(name)
            write_checkpoint(family, options.gigabytes * 1e9, folder)
            size = read_all(folder) / 1e9
            progress.say(f"{family}: {size:.2f} GB in {len(list(folder.glob('*.safetensors')))} files")
            for cold in (True, False):
                seconds = measure(folder, options.device, options.rounds, cold=cold)
                read, load = median(seconds["read"]), median(seconds["load"])
                rows.append(
                    {
                        "family": family,
                        "device": options.device,
                        "gigabytes": size,
                        "page_cache": "dropped" if cold else "full",
                        "read_gbps": size / read,
                        "load_gbps": size / load,
                        "ratio": read / load,
                        "read_s": seconds["read"],
                        "load_s": seconds["load"],
                    }
                )
        document = results_schema.results_document("loading", rows)
        results_schema.write_results(document, options.json)  # keep what was measured, should a later family fail
    heading = ("family", "GB", "page cache", "reading GB/s", "loading GB/s", "ratio")
    lines = [
        [row["family"], f"{row['gigabytes']:.2f}", row["page_cache"]]
        + [f"{row[name]:.2f}" for name in ("read_gbps", "load_gbps", "ratio")]
        for row in rows
    ]
    print(aligned([list(heading), *lines], 3))
    results_schema.print_results(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
