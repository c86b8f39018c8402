#!/usr/bin/env bash
# cupy knows NCCL's results 1 to 6; NCCL has 8, and the last two come out of cupy as a bare KeyError.
#
#   findings/cupy_nccl_status.sh      (needs Python 3.11 and pip, no GPU; installs 350 MB, about a minute)
#
# Expected: whatever NCCL returns that is not success becomes cupy.cuda.nccl.NcclError, with the status in it, so that
# `except NcclError` around a communicator's calls is enough.
# Seen: cupy knows no message for ncclInProgress (7, no failure: NCCL's answer while a non-blocking communicator is at
# work) and ncclTimeout (8). What is raised for these is KeyError: 7 or 8. It passes `except NcclError`, for instance
# around check_async_error, and its text names neither NCCL nor a cause.
#
# Seen on 2026-12-01 with cupy-cuda12x 14.2.0, nvidia-nccl-cu12 2.32.3:
#   6 remote process exited or there was a network error: NcclError
#   7 NCCL operation in progress: KeyError(7)
#   8 timeout: KeyError(8)
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install -qq --disable-pip-version-check cupy-cuda12x==14.2.0 nvidia-nccl-cu12==2.32.3 numpy==2.4.6
"$python" -m pip list --disable-pip-version-check | grep -E "^(cupy|nvidia-nccl)"

"$python" - <<'PYTHON'
import ctypes

from cupy.cuda import nccl

with open("/proc/self/maps") as maps:
    library = ctypes.CDLL(next(line.split()[-1] for line in maps if "libnccl.so" in line))
library.ncclGetErrorString.restype = ctypes.c_char_p
raised = []
for status in (6, 7, 8):
    try:
        nccl.check_status(status)
    except Exception as error:
        raised.append(type(error).__name__)
        text = "NcclError" if isinstance(error, nccl.NcclError) else repr(error)
        print(f"{status} {library.ncclGetErrorString(status).decode().partition(' (')[0]}: {text}")
if raised != ["NcclError", "KeyError", "KeyError"]:
    raise SystemExit("cupy treats NCCL's results 7 and 8 in another way now: this finding is out of date")
PYTHON
