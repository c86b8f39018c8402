"""The launchers, and `pipemoe run`, which is theirs for a pipemoe that is installed.

    pipemoe run -n 4 [--hostfile FILE] (script.py | -m module) [arguments]      # a rank per GPU, or CPU ranks
    pipemoe run --one-gpu -n 4 (script.py | -m module) [arguments]              # all ranks on one GPU, under MPS

In a checkout launch/mpirun.sh and launch/one_gpu.sh are the same scripts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import resources

_USAGE = """usage: pipemoe run [--one-gpu] -n N [--hostfile FILE] (script.py | -m module) [arguments]

Runs a Python script or module on N ranks, with the MPI of this Python's mpi4py. Every rank calls pipemoe.init().

  -n N             number of ranks
  --hostfile FILE  hosts to run on, one per line (not with --one-gpu)
  --one-gpu        all ranks on one GPU, over NCCL, under a private MPS: a whole node in one GPU, for development
"""


def run(arguments: Sequence[str]) -> int:
    """Become the launcher, with this Python for the ranks. Returns the exit status only where nothing is launched."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    launcher, rest = "mpirun.sh", list(arguments)
    os.environ["PIPEMOE_LAUNCHER"] = "pipemoe run"
    if rest[0] == "--one-gpu":
        if rest[1:2] != ["-n"]:
            print("pipemoe run: --one-gpu is followed by -n N", file=sys.stderr)
            return 2
        launcher, rest = "one_gpu.sh", rest[2:]
        os.environ["PIPEMOE_LAUNCHER"] = "pipemoe run --one-gpu -n"
    os.environ.setdefault("PIPEMOE_PYTHON", sys.executable)
    with resources.as_file(resources.files(__package__).joinpath(launcher)) as script:
        # By bash, since an archive may have lost the files' modes.
        os.execvp("bash", ["bash", str(script), *rest])
