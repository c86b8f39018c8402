"""The program of test_killed_jobs.py: ranks that share much memory, run a step, say so, and wait to be killed.

Arguments: what FaultJob gives; only the folder counts, for each rank's process number.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

import pipemoe
from tests.moe_cases import make_layers
from tests.runtime.sources import RowsSource, make_runtime


def main(folder: str) -> None:
    torch.set_num_threads(1)
    world = pipemoe.init("cpu")
    layers = make_layers(1, world.device, torch.float32)
    runtime = make_runtime(world, layers, max_tokens_per_rank=1 << 13, moe_max_num_tokens=1 << 14)
    runtime.submit_step([5], RowsSource(5, runtime)).result()
    (Path(folder) / "new").mkdir(exist_ok=True)
    new = Path(folder) / "new" / f"pid{world.rank}"
    new.write_text(str(os.getpid()))
    new.rename(Path(folder) / new.name)
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[2])
