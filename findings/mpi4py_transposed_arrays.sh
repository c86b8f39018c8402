#!/usr/bin/env bash
# mpi4py sends a transposed array in the order of its memory, so that it arrives as another matrix; nothing is raised.
#
#   findings/mpi4py_transposed_arrays.sh      (needs Python 3.11 and pip; about 30 s)
#
# Expected: like any other view with strides, `w.T` is either refused or sent element by element. A slice `w[:, :2]`
# is refused ("buffer is not contiguous").
# Seen: a Fortran-ordered array counts as contiguous. Bcast, Allgather and Allreduce take it and move its memory. The
# receiver's C-ordered array of the same shape gets the values in other places. Weights stored as [I, H] and handed
# over as [H, I] by a transpose are such arrays. `bcast` in lower case, which pickles, is right. A CPU tensor of torch
# behaves alike.
#
# Seen on 2026-12-01 with mpi4py 4.1.2, mpich 5.0.2, numpy 2.4.6:
#   rank 0 sends w.T = [[0, 3], [1, 4], [2, 5]]
#   Bcast:      rank 1 gets [[0, 1], [2, 3], [4, 5]]
#   Allreduce:  w.T of both ranks sums to [[0, 2], [4, 6], [8, 10]]
#   w[:, :2]:   BufferError
#   bcast:      rank 1 gets [[0, 3], [1, 4], [2, 5]]
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install -qq --disable-pip-version-check mpi4py==4.1.2 mpich==5.0.2 numpy==2.4.6
"$python" -m pip list --disable-pip-version-check | grep -E "^(mpi4py|mpich|numpy) "

cat >"$work/send.py" <<'PYTHON'
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
w = np.arange(6).reshape(2, 3)
received = w.T if comm.rank == 0 else np.zeros((3, 2), w.dtype)
comm.Bcast(received)
total = np.zeros((3, 2), w.dtype)
comm.Allreduce(w.T, total)
try:
    comm.Allreduce(w[:, :2], np.zeros((2, 2), w.dtype))
    refused = "taken"
except Exception as error:
    refused = type(error).__name__
pickled = comm.bcast(w.T if comm.rank == 0 else None)
if comm.rank == 1:
    seen = received.tolist(), total.tolist(), refused, pickled.tolist()
    for name, value in zip(("Bcast:", "Allreduce:", "w[:, :2]:", "bcast:"), seen):
        print(f"{name:11} {value}")
    memory = w.reshape(3, 2)
    if seen != (memory.tolist(), (2 * memory).tolist(), "BufferError", w.T.tolist()):
        raise SystemExit("mpi4py treats transposed arrays in another way now: this finding is out of date")
PYTHON
"$work/venv/bin/mpiexec" -n 2 "$python" -m mpi4py "$work/send.py"
