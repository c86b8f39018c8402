#!/usr/bin/env bash
# numba-cuda's simulator computes in NumPy's types, the compiled kernel in Numba's: the same line gives other numbers.
#
#   findings/numba_cuda_simulator_types.sh      (needs Python 3.11 and pip, no GPU; some minutes, most of pip)
#
# Expected: NUMBA_ENABLE_CUDASIM=1 runs a kernel slowly but in the types that the device has, so that a kernel whose
# tests pass there is right up to rounding and races.
# Seen: in the simulator an element of an array is a NumPy scalar, and NumPy keeps its width beside Python's numbers.
# The compiler widens: int32 + int32 and uint32 - 1 are int64, float32 * 0.1 and even float16 * 2 are float64. So sums
# of offsets wrap, and differences of unsigned numbers turn huge, in the simulator only; and no test there shows that
# a half-precision kernel does its arithmetic in float64 on the device. With casts, int64(a) + b or x * float32(0.1),
# the two agree.
#
# Seen on 2026-12-01 with numba-cuda 0.30.4, numba 0.68.1, numpy 2.4.6, compiled for sm_90 (values in that type):
#   line      element          simulator             compiled
#   x + x     int32 2**30      -2147483648           int64, 2147483648
#   x - 1     uint32 0         4294967295            int64, -1
#   x * 0.1   float32 3        0.30000001192092896   float64 (mul.f64), 0.30000000000000004
#   x * 2     float16 60000    inf                   float64 (add.f64), 120000.0
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install -qq --disable-pip-version-check "numba-cuda[cu12]==0.30.4" numba==0.68.1 numpy==2.4.6
"$python" -m pip list --disable-pip-version-check | grep -E "^(numba-cuda|numba|numpy) "

cat >"$work/types.txt" <<'TABLE'
x + x | int32 | 2**30 | -2147483648 | int64, 2147483648
x - 1 | uint32 | 0 | 4294967295 | int64, -1
x * 0.1 | float32 | 3 | 0.30000001192092896 | float64 (mul.f64), 0.30000000000000004
x * 2 | float16 | 60000 | inf | float64 (add.f64), 120000.0
TABLE
cat >"$work/one_line.py" <<'PYTHON'
import re
import sys

import numpy as np
from numba import config, cuda, types

for row in open(sys.argv[1]):
    line, dtype, value, *expected = (cell.strip() for cell in row.split("|"))
    function = eval(f"lambda x: {line}")
    x = np.array([eval(value)], dtype)
    if config.ENABLE_CUDASIM:
        out = np.zeros(1, object)

        @cuda.jit
        def kernel(x, out):
            out[0] = function(x[0])

        kernel[1, 1](x, out)
        name, seen, wanted = "simulator", str(out[0].item()), expected[0]
    else:
        ptx, kind = cuda.compile(function, (getattr(types, dtype),), device=True, abi="c", cc=(9, 0))
        operation = re.search(r"(add|mul)\.f64", ptx)
        in_that_type = function(np.dtype(str(kind)).type(x[0]))
        how = f"{kind} ({operation[0]})" if operation else kind
        name, seen, wanted = "compiled", f"{how}, {in_that_type}", expected[1]
    print(f"{name}: {line:8} {dtype} {value}: {seen}")
    if seen != wanted:
        raise SystemExit(f"{name}: {wanted} was seen before: this finding is out of date")
PYTHON
NUMBA_ENABLE_CUDASIM=1 "$python" -W ignore "$work/one_line.py" "$work/types.txt"
NUMBA_ENABLE_CUDASIM=0 "$python" "$work/one_line.py" "$work/types.txt"
