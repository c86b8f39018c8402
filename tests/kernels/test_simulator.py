"""The kernels in Numba's CUDA simulator, which must be chosen before Numba is imported: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_kernels_in_the_simulator():
    paths = [str(HERE), str(HERE.parents[1] / "kernels"), str(HERE.parents[1]), *filter(None, sys.path)]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=12"]
    command += ["-p", "tests.simulated_threads"]
    command += [
        str(HERE / "simulated_kernels.py"),
        str(HERE / "simulated_experts.py"),
        str(HERE / "simulated_routing.py"),
        str(HERE / "simulated_attention.py"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
